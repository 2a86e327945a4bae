"""What every policy is: parameters that can be seen, copied and written to JSON, and the state of one run.

A policy is a keyword-only dataclass (made so by subclassing; no decorator is needed). Its fields are its
parameters and nothing else; `reset` of each slot's contract makes the state of a run, so one object can be
configured in a notebook, cloned into many runs, and compared by its parameters.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar, Self, dataclass_transform, get_type_hints
from weakref import WeakKeyDictionary

from pagedlab.errors import ConfigError, nearest


def param(
    default: Any,
    *,
    help: str,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    unit: str | None = None,
) -> Any:
    """Declare a policy's parameter with what a person needs to set it: range, choices, unit, one line of help."""
    return field(
        default=default,
        metadata={"help": help, "low": low, "high": high, "choices": choices, "unit": unit},
    )


@dataclass(frozen=True)
class Parameter:
    """One parameter of a policy class, as forms and listings show it."""

    name: str
    type: type
    default: Any
    help: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] | None = None
    unit: str | None = None

    def describe(self) -> dict[str, Any]:
        """Return the parameter as plain JSON data."""
        row = {"name": self.name, "type": self.type.__name__, "default": self.default, "help": self.help}
        row.update({k: v for k in ("low", "high", "choices", "unit") if (v := getattr(self, k)) is not None})
        return row

    def check(self, owner: str, value: Any) -> Any:
        """Return ``value`` if it is allowed, or raise `ConfigError` naming the parameter and its range."""
        where = f"{owner}.{self.name}"
        if self.type is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, self.type) or (self.type is not bool and isinstance(value, bool)):
            raise ConfigError(f"{where} must be {self.type.__name__}, not {value!r}")
        if self.choices is not None and value not in self.choices:
            raise ConfigError(
                f"{where} must be one of {', '.join(self.choices)}, not {value!r}{nearest(str(value), self.choices)}"
            )
        low = -inf if self.low is None else self.low
        high = inf if self.high is None else self.high
        if isinstance(value, int | float) and not low <= value <= high:
            raise ConfigError(f"{where} = {value!r} is out of range; allowed: {low} to {high}")
        return value


_declared: WeakKeyDictionary[type, list[Parameter]] = WeakKeyDictionary()
"""What each class declares, once somebody has asked: reading type hints takes a while."""


@dataclass_transform(kw_only_default=True, field_specifiers=(param, field))
class Policy:
    """Base of the ten contracts. ``slot`` says which decision it makes; ``name`` is set by registration."""

    slot: ClassVar[str]
    name: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = ""
        dataclass(kw_only=True)(cls)

    @classmethod
    def params(cls) -> list[Parameter]:
        """Return the declared parameters, in order of declaration."""
        found = _declared.get(cls)
        if found is None:
            hints = get_type_hints(cls)
            found = [
                Parameter(
                    f.name,
                    hints[f.name] if isinstance(hints[f.name], type) else object,
                    f.default,
                    **f.metadata,
                )
                for f in dataclasses.fields(cls)  # type: ignore[arg-type]
            ]
            _declared[cls] = found
        return list(found)

    @classmethod
    def from_params(cls, params: dict[str, Any]) -> Self:
        """Build from a mapping; `ConfigError` names an unknown parameter (with the nearest) or a bad value."""
        known = {p.name: p for p in cls.params()}
        title = cls.name or cls.__name__
        for key in params:
            if key not in known:
                allowed = ", ".join(known) or "none"
                raise ConfigError(
                    f"{cls.slot} policy {title!r} has no parameter {key!r}; it has: {allowed}{nearest(key, known)}"
                )
        return cls(**params)

    def __post_init__(self) -> None:
        for parameter in self.params():
            setattr(self, parameter.name, parameter.check(type(self).__name__, getattr(self, parameter.name)))

    def get_params(self) -> dict[str, Any]:
        """Return the parameters as a plain dict, as scikit-learn's estimators do."""
        return {p.name: getattr(self, p.name) for p in self.params()}

    def clone(self, **override: Any) -> Self:
        """Return a new policy with the same parameters (or ``override``) and no state."""
        return type(self).from_params({**self.get_params(), **override})
