"""Objects around a policy: what its answers cost (`Timed`), and what it was asked (`Recorded`).

A wrapped policy is a policy of the same class with the same parameters, and decides the same::

    lru = pl.policies.Timed(pl.policies.LRU())
    pl.replay(trace, lru, 5000)
    print(lru.report())

A run works on a clone, as ever; all clones write into one book, which is read from any of them. Only calls from outside
count, not what a method calls of its own. A wrapped policy is an object and has no name, so a file cannot hold it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import isfunction
from time import perf_counter_ns
from typing import Any, NamedTuple

from pagedlab.errors import ConfigError
from pagedlab.policies.base import Policy
from pagedlab.policies.block import FIELDS, Block
from pagedlab.policies.view import NOTHING_KNOWN, View


class _Wrapping(type):
    """Makes ``Timed(policy)`` an object of a new class, derived from `Timed` and the policy's own."""

    def __call__(cls, *args: Any, **params: Any) -> Any:
        if issubclass(cls, Policy):
            return super().__call__(*args, **params)
        return cls.around(*args, **params)  # type: ignore[attr-defined]


class Wrapper(metaclass=_Wrapping):
    """What wrappers share: a class for each wrapped object, in which the methods of its contract are replaced."""

    book: Any
    """What was written down, by all clones."""

    _inside = False

    @classmethod
    def around(cls, policy: Policy) -> Any:
        """Wrap a policy object. `ConfigError` if it is none."""
        if not isinstance(policy, Policy):
            raise ConfigError(f"{cls.__name__} wraps a policy object, not {policy!r}")
        inner = type(policy)
        wrapped = {name: cls._wrap(name, getattr(inner, name)) for name in _contract_methods(inner)}
        made = _Wrapping(cls.__name__ + inner.__name__, (cls, inner), {**wrapped, "book": cls._new_book()})
        return made.from_params(policy.get_params())  # type: ignore[attr-defined]

    @staticmethod
    def _new_book() -> Any:
        raise NotImplementedError

    def _note(self, method: str, call: Callable[[], Any], args: tuple[Any, ...], more: dict[str, Any]) -> Any:
        """Make the call, write it down and return its answer."""
        raise NotImplementedError

    @staticmethod
    def _wrap(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def noted(self: Wrapper, *args: Any, **more: Any) -> Any:
            if self._inside:
                return method(self, *args, **more)
            self._inside = True
            try:
                return self._note(name, lambda: method(self, *args, **more), args, more)
            finally:
                self._inside = False

        return noted

    def forget(self) -> None:
        """Begin the book anew."""
        self.book.clear()


def _contract_methods(cls: type[Policy]) -> list[str]:
    """Return the names of the methods that a policy's contract declares, but for what only looks at it."""
    contract = next(c for c in reversed(cls.__mro__) if issubclass(c, Policy) and "slot" in vars(c))
    return [
        name
        for name, value in vars(contract).items()
        if isfunction(value) and not name.startswith("_") and name not in ("attach", "stats")
    ]


class Cost(NamedTuple):
    """What the calls of one method have cost."""

    calls: int
    seconds: float


class Timed(Wrapper):
    """Counts the calls of every method and the time that they take: `times`, `report`, and in `stats`.

    The clock is read twice a call, which costs about as much as a short method does: compare times with each other.
    """

    @staticmethod
    def _new_book() -> dict[str, list[int]]:
        return {}

    def _note(self, method: str, call: Callable[[], Any], args: tuple[Any, ...], more: dict[str, Any]) -> Any:
        entry = self.book.setdefault(method, [0, 0])
        start = perf_counter_ns()
        try:
            return call()
        finally:
            entry[0] += 1
            entry[1] += perf_counter_ns() - start

    @property
    def times(self) -> dict[str, Cost]:
        """What each method has cost so far, the dearest first."""
        rows = sorted(self.book.items(), key=lambda row: -row[1][1])
        return {method: Cost(calls, spent / 1e9) for method, (calls, spent) in rows}

    def stats(self) -> dict[str, Any]:
        """Return the policy's own state, if it shows any, and ``calls`` and ``seconds`` by method."""
        own: dict[str, Any] = getattr(super(), "stats", dict)()
        times = self.times
        calls = {method: cost.calls for method, cost in times.items()}
        return {**own, "calls": calls, "seconds": {method: cost.seconds for method, cost in times.items()}}

    def report(self) -> str:
        """Return a table: method, calls, milliseconds in all, microseconds a call."""
        rows = [f"{'method':<16}{'calls':>12}{'ms':>12}{'µs a call':>12}"]
        for method, (calls, seconds) in self.times.items():
            rows.append(f"{method:<16}{calls:>12,}{1e3 * seconds:>12.2f}{1e6 * seconds / calls:>12.2f}")
        return "\n".join(rows)


class Seen(NamedTuple):
    """A block as it was when a policy was told of it."""

    tier: int
    number: int
    state: tuple[Any, ...]
    """The other attributes, in the order of `Block`'s slots."""


class Opaque(NamedTuple):
    """Something that a recording does not keep; its class and, of a sequence, its request."""

    kind: str
    name: str


class Call(NamedTuple):
    """One call of a method and its answer. Blocks are `Seen`, what lives in the engine is `Opaque`."""

    method: str
    args: tuple[Any, ...]
    more: dict[str, Any]
    answer: Any
    now: int
    """The time that the policy could see, in picoseconds."""
    costs: tuple[float, float, float] = (1.0, 0.0, 1.0)
    """FLOPs a token, FLOPs a pair and bytes a token, as it could see them."""


class Difference(NamedTuple):
    """Where another policy parts from a recording."""

    number: int
    """Of the call in the book, from 0."""
    call: Call
    answer: Any
    """What the other one says."""


class Recorded(Wrapper):
    """Writes down every call and its answer in `book`, to compare runs and to ask another policy the same.

    Keeps a copy of each block that was mentioned, so it is meant for short runs.
    """

    @staticmethod
    def _new_book() -> list[Call]:
        return []

    def _note(self, method: str, call: Callable[[], Any], args: tuple[Any, ...], more: dict[str, Any]) -> Any:
        view = getattr(self, "view", NOTHING_KNOWN)
        now, costs = view.now, (view.flops_per_token, view.flops_per_pair, view.bytes_per_token)
        kept, named = _kept(args), _kept(more)
        answer = call()
        self.book.append(Call(method, kept, named, _kept(answer), now, costs))
        return answer

    def first_difference(self, other: Policy) -> Difference | None:
        """Ask a clone of ``other`` all that is in the book; return the first answer that differs, None if none does.

        What was recorded goes on as the recorded answers had it, so a comparison ends at the first difference.
        `ConfigError` for a policy of another slot, or if the book has arguments that live in the engine only.
        """
        if not isinstance(other, Policy) or other.slot != self.slot:  # type: ignore[attr-defined]
            raise ConfigError(f"{other!r} is no policy for slot {self.slot!r}, whose calls were recorded")  # type: ignore[attr-defined]
        asked, blocks, view = other.clone(), _Blocks(), _Clock()
        if hasattr(asked, "attach"):
            asked.attach(view)
        for number, call in enumerate(self.book):
            view.see(call)
            args, more = blocks.revived(call.args), blocks.revived(call.more)
            answer = _kept(getattr(asked, call.method)(*args, **more))
            if _named(answer) != _named(call.answer):
                return Difference(number, call, answer)
        return None


_REST = [slot for slot in FIELDS if slot not in ("tier", "index")]


class _Clock(View):
    """The time that each call was made at, and the costs that were known."""

    def __init__(self) -> None:
        self.time = 0

    def see(self, call: Call) -> None:
        self.time = call.now
        self.flops_per_token, self.flops_per_pair, self.bytes_per_token = call.costs

    @property
    def now(self) -> int:
        return self.time


class _Blocks:
    """The blocks of a recording, brought back to life: one object each, as it was when it is mentioned."""

    def __init__(self) -> None:
        self._alive: dict[tuple[int, int], Block] = {}

    def revived(self, value: Any) -> Any:
        if isinstance(value, Seen):
            block = self._alive.setdefault((value.tier, value.number), Block(value.number, value.tier))
            for slot, was in zip(_REST, value.state):
                setattr(block, slot, was)
            return block
        if isinstance(value, Opaque):
            raise ConfigError(
                f"a recording does not keep a {value.kind}, so nobody else can be asked about it"
            )
        return _each(value, self.revived)


def _kept(value: Any) -> Any:
    """Return what of an argument can be kept."""
    if isinstance(value, Block):
        return Seen(value.tier, value.index, tuple(getattr(value, slot) for slot in _REST))
    if value is None or isinstance(value, bool | int | float | str | bytes | range):
        return value
    if isinstance(value, list | tuple | set | frozenset | dict):
        return _each(value, _kept)
    if hasattr(value, "keys") and hasattr(value, "__iter__"):
        return list(map(_kept, value))
    return Opaque(type(value).__name__, str(getattr(value, "request_id", "")))


def _named(value: Any) -> Any:
    """Return an answer with blocks by tier and number alone: what a policy says, not what it saw."""
    return (value.tier, value.number) if isinstance(value, Seen) else _each(value, _named)


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {change(key): change(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(change, value))
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(map(change, value))
    return value
