"""The policy that is checked, and how it is found."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib import import_module, util
from pathlib import Path
from typing import Any

from pagedlab.errors import ConfigError, LawBroken, nearest
from pagedlab.policies.base import Policy
from pagedlab.registry import SLOTS, lookup_class, policy_names
from pagedlab.testing.driver import SAME, Broke, Driver, unequal
from pagedlab.testing.drivers import driver_class
from pagedlab.testing.law import Skipped
from pagedlab.testing.search import search, survey


class Subject:
    """One policy as the laws see it: its class and its parameters."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.slot = policy.slot
        self.title = policy.name or type(policy).__name__
        self.unseeded = False
        self._found: dict[tuple[Any, ...], dict[str, str]] = {}

    def fresh(self) -> Any:
        """Return a new policy with the same parameters, made by its class and not by `clone`."""
        return type(self.policy)(**self.policy.get_params())

    def driver(self, size: int, codes: list[int], policy: Any = None, **options: Any) -> Driver:
        """Return a driver around ``policy`` (a fresh one), which is going to be given ``codes``.

        Random numbers that nobody seeded are the same every time; one law makes them differ.
        """
        if not self.unseeded:
            random.seed(0)
        return driver_class(self.slot)(self.fresh() if policy is None else policy, size, codes, **options)

    def hold(self, law: str, **options: Any) -> None:
        """Raise `LawBroken` if a driver says of any stream that it broke ``law``.

        All laws that are held with the same options look at the same streams, which are tried once for all of them.
        """
        key, kind = tuple(sorted(options.items())), driver_class(self.slot)

        def attempt(size: int, codes: list[int]) -> None:
            self.driver(size, codes, **options).run(codes)

        if key not in self._found:
            self._found[key] = survey(attempt, longest=kind.longest, share=kind.share)
        found = self._found[key]
        if law in found:
            self.search(law, attempt)
            raise LawBroken(found[law])  # it does not happen every time
        if found and "" not in found:
            raise Skipped(f"no stream got to its end: see {' and '.join(found)}")

    def equal(self, law: str, one: Driver, other: Driver, said: str) -> None:
        """Raise `Broke` if the stories of two runs differ; ``said`` introduces what ``one``, an ordinary run, had told.

        A policy that decides otherwise in the same run has broken another law than this one.
        """
        try:
            unequal(law, one, other, said)
        except Broke as broke:
            if law != SAME and not self.repeats:
                raise Broke(SAME, broke.story) from None
            raise

    @cached_property
    def repeats(self) -> bool:
        """Whether it decides the same when it is asked the same."""
        kind = driver_class(self.slot)

        def twice(size: int, codes: list[int]) -> None:
            one, again = (self.driver(size, codes).run(codes) for _ in range(2))
            unequal(SAME, one, again, "the first time:")

        return SAME not in survey(twice, longest=kind.longest, share=kind.share)

    def same(
        self,
        law: str,
        said: str,
        *,
        one: Mapping[str, Any] | None = None,
        other: Mapping[str, Any] | None = None,
        breaches: bool = False,
        share: float = 1.0,
    ) -> None:
        """Search for a stream on which drivers with the options ``one`` and ``other`` tell different stories.

        ``said`` introduces what ``one`` had told. With ``breaches`` any law that ``other`` alone breaks counts, too.
        """

        def attempt(size: int, codes: list[int]) -> None:
            usual = self.driver(size, codes, **(one or {})).run(codes)
            try:
                changed = self.driver(size, codes, **(other or {})).run(codes)
            except Broke as broke:
                raise Broke(law if breaches else broke.law, broke.story) from None
            self.equal(law, usual, changed, said)

        self.search(law, attempt, share=share)

    def search(self, law: str, attempt: Callable[[int, list[int]], object], *, share: float = 1.0) -> None:
        """`search` with streams as long as the slot's driver takes them."""
        kind = driver_class(self.slot)
        search(law, attempt, longest=kind.longest, operations=len(kind.operations), share=share * kind.share)


def find_policy(policy: Any) -> Policy:
    """Return the policy that an object, a class or a text stands for.

    A text is ``slot:name`` of a registered policy, its bare name where only one slot has it, ``module:Class`` or
    ``path/to/file.py:Class``. Raises `ConfigError` that says what is wrong with anything else.
    """
    if isinstance(policy, str):
        policy = _named(policy)
    if isinstance(policy, type) and issubclass(policy, Policy):
        title = policy.__name__
        try:
            policy = policy()
        except TypeError as error:
            raise ConfigError(f"{title} cannot be made without arguments: {error}") from None
    if not isinstance(policy, Policy):
        raise ConfigError(
            f"{policy!r} is no policy: give an object, a class, 'slot:name', 'module:Class' or 'file.py:Class'"
        )
    if getattr(policy, "slot", None) not in SLOTS:
        raise ConfigError(
            f"{type(policy).__name__} is a policy for slot {getattr(policy, 'slot', None)!r}, which has no laws; "
            f"the slots are {', '.join(SLOTS)}"
        )
    return policy


def _named(text: str) -> Any:
    where, colon, name = text.rpartition(":")
    if not colon:
        slots = [slot for slot in SLOTS if text in policy_names(slot)]
        if len(slots) == 1:
            return lookup_class(slots[0], text)
        if slots:
            raise ConfigError(
                f"{text!r} is a policy of {' and '.join(slots)}: say {' or '.join(f'{s}:{text}' for s in slots)}"
            )
        known = sorted({name for slot in SLOTS for name in policy_names(slot)})
        raise ConfigError(
            f"no policy {text!r}; give slot:name, module:Class or file.py:Class{nearest(text, known)}"
        )
    if where in SLOTS:
        return lookup_class(where, name)
    module = _from_file(Path(where)) if where.endswith(".py") else _imported(where)
    found = getattr(module, name, None)
    if isinstance(found, Policy) or (isinstance(found, type) and issubclass(found, Policy)):
        return found
    policies = [
        key
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Policy) and value.__module__ == module.__name__
    ]
    what = "is no policy" if hasattr(module, name) else "is not there"
    raise ConfigError(f"{where}: {name} {what}; policies there: {', '.join(policies) or 'none'}")


def _imported(name: str) -> Any:
    if not name or not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(
            f"{name!r} is no slot, module or file; the slots are {', '.join(SLOTS)}{nearest(name, SLOTS)}"
        )
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return import_module(name)
    except Exception as error:
        raise ConfigError(f"module {name!r} cannot be imported: {type(error).__name__}: {error}") from None


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"no file {str(path)!r}")
    name = path.stem
    spec = util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module  # where pickle and get_type_hints look for it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        raise ConfigError(f"{path}: cannot be imported: {type(error).__name__}: {error}") from None
    return module
