"""What holds for the policies of every slot: parameters, copies, and decisions that depend on nothing else."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cloudpickle

from pagedlab.config import Config
from pagedlab.errors import ConfigError, LawBroken
from pagedlab.policies.base import Parameter
from pagedlab.registry import is_registered
from pagedlab.testing.driver import NO_ERROR, Broke, Driver
from pagedlab.testing.drivers import has_driver
from pagedlab.testing.law import EVERY_SLOT, Skipped, law
from pagedlab.testing.subject import Subject

_CLOCKS = (
    "time",
    "time_ns",
    "monotonic",
    "monotonic_ns",
    "perf_counter",
    "perf_counter_ns",
    "process_time",
    "process_time_ns",
)


def _show(subject: Subject, params: dict[str, Any]) -> str:
    return f"{type(subject.policy).__name__}({', '.join(f'{k}={v!r}' for k, v in params.items())})"


@law(EVERY_SLOT)
def check_policy_parameters_are_legal(subject: Subject) -> None:
    """Every parameter has a default that its own declaration allows, and values that it does not allow are refused."""
    cls = type(subject.policy)
    for parameter in cls.params():
        if parameter.default is dataclasses.MISSING:
            raise LawBroken(f"parameter {parameter.name!r} has no default")
        try:
            parameter.check(cls.__name__, parameter.default)
        except ConfigError as error:
            raise LawBroken(f"the default is not allowed: {error}") from None
        for value in _illegal(parameter):
            made = f"{cls.__name__}({parameter.name}={value!r})"
            try:
                cls(**{parameter.name: value})
            except ConfigError:
                continue
            except Exception as error:
                raise LawBroken(f"{made} raised {type(error).__name__}, not ConfigError: {error}") from None
            raise LawBroken(f"{made} was accepted; it is not allowed by the parameter's declaration")


def _illegal(parameter: Parameter) -> Iterator[Any]:
    if parameter.choices is not None:
        yield "no such choice"
    if parameter.type in (int, float):
        yield "a word"
        for limit, step in ((parameter.low, -1), (parameter.high, 1)):
            if limit is not None:
                yield parameter.type(limit + step)
    elif parameter.type in (str, bool):
        yield None


@law(EVERY_SLOT)
def check_policy_parameters_round_trip(subject: Subject) -> None:
    """`from_params` of `get_params` is the same policy, also through JSON, and through a `Config` if it has a name."""
    policy, cls = subject.policy, type(subject.policy)
    params = policy.get_params()
    try:
        text = json.dumps(params)
    except (TypeError, ValueError) as error:
        raise LawBroken(f"the parameters are not JSON: {error}: {params!r}") from None
    for how, given in (("from_params(get_params())", params), ("JSON", json.loads(text))):
        try:
            again = cls.from_params(given).get_params()
        except ConfigError as error:
            raise LawBroken(f"through {how}, {_show(subject, params)} is refused: {error}") from None
        if again != params:
            raise LawBroken(f"through {how}, {_show(subject, params)} became {_show(subject, again)}")
    try:
        cls.from_params({"no_such_parameter": 1})
    except ConfigError:
        pass
    else:
        raise LawBroken("from_params({'no_such_parameter': 1}) was accepted")
    if is_registered(policy) and not getattr(policy, "needs_future", False):
        config = Config().replace(**{subject.slot: policy})
        read = Config.from_json(config.to_json()).policy(subject.slot)
        if type(read) is not cls or read.get_params() != params:
            raise LawBroken(f"through a Config's JSON, {_show(subject, params)} became {read!r}")


@law(EVERY_SLOT)
def check_policy_init_does_no_work(subject: Subject) -> None:
    """A new policy holds its parameters and nothing else; what a run needs is made by `reset`."""
    extra = sorted(set(vars(subject.fresh())) - {p.name for p in type(subject.policy).params()})
    if extra:
        raise LawBroken(f"a new {subject.title} has {', '.join(extra)} before any reset")


@law(EVERY_SLOT)
def check_policy_answers_without_error(subject: Subject) -> None:
    """No legal stream of operations makes the policy raise an exception."""
    _drivable(subject)
    subject.hold(NO_ERROR)


@law(EVERY_SLOT)
def check_policy_pickles_when_new(subject: Subject) -> None:
    """A pickled new policy comes back with the same parameters."""
    params = subject.policy.get_params()
    again = _pickled(subject.fresh(), f"a new {subject.title}")
    if again.get_params() != params:
        raise LawBroken(f"{_show(subject, params)} came back as {_show(subject, again.get_params())}")


@law(EVERY_SLOT)
def check_policy_pickles_in_the_middle(subject: Subject) -> None:
    """A policy that is pickled in the middle of a run goes on where it was."""
    _drivable(subject)

    def attempt(size: int, codes: list[int]) -> None:
        straight = subject.driver(size, codes).run(codes)
        pickled, half = subject.driver(size, codes), len(codes) // 2
        for code in codes[:half]:
            pickled.step(code)
        try:
            pickled = _pickled(pickled, f"{subject.title} after {half} operations")
        except LawBroken as broken:
            raise Broke("pickles_in_the_middle", str(broken)) from None
        pickled.tell("pickled and read back", aside=True)
        try:
            pickled.run(codes[half:])
        except Broke as broke:
            raise Broke("pickles_in_the_middle", broke.story) from None
        subject.equal("pickles_in_the_middle", straight, pickled, "without pickling:")

    subject.search("pickles_in_the_middle", attempt)


def _pickled(what: Any, title: str) -> Any:
    try:
        return cloudpickle.loads(cloudpickle.dumps(what))
    except Exception as error:
        raise LawBroken(f"{title} cannot be pickled: {type(error).__name__}: {error}") from None


@law(EVERY_SLOT)
def check_policy_clone_starts_empty(subject: Subject) -> None:
    """A clone of a used policy has its parameters and nothing of its state: it decides as a new one does."""
    used = subject.fresh()
    params = used.get_params()
    clone = used.clone()
    if type(clone) is not type(used) or clone is used or clone.get_params() != params:
        raise LawBroken(f"the clone of {_show(subject, params)} is {clone!r}")
    if not has_driver(subject.slot):
        return

    def attempt(size: int, codes: list[int]) -> None:
        cloned = subject.driver(size, codes).run(codes).asked.clone()
        extra = sorted(set(vars(cloned)) - set(vars(subject.fresh())))
        if extra:
            raise Broke("clone_starts_empty", f"the clone of a used {subject.title} has {', '.join(extra)}")
        new = subject.driver(size, codes).run(codes)
        again = subject.driver(size, codes, cloned).run(codes)
        subject.equal("clone_starts_empty", new, again, "of a new policy, not a clone of a used one:")

    subject.search("clone_starts_empty", attempt)


@law(EVERY_SLOT)
def check_policy_reset_forgets(subject: Subject) -> None:
    """After `reset` a used policy decides as a new one does."""
    _drivable(subject)
    if not hasattr(subject.policy, "reset"):
        raise Skipped(f"a policy of slot {subject.slot!r} has no reset")

    def attempt(size: int, codes: list[int]) -> None:
        policy = subject.fresh()
        subject.driver(size + 1, codes[::-1], policy, reuse=True).run(codes[::-1])
        again = subject.driver(size, codes, policy, reuse=True).run(codes)
        new = subject.driver(size, codes).run(codes)
        subject.equal("reset_forgets", new, again, "of a new policy, not one that was used and reset:")

    subject.search("reset_forgets", attempt)


@law(EVERY_SLOT)
def check_policy_instances_share_nothing(subject: Subject) -> None:
    """Two policies in use at the same time decide as each would alone."""
    _drivable(subject)

    def attempt(size: int, codes: list[int]) -> None:
        alone = subject.driver(size, codes).run(codes)
        one, other = (subject.driver(size, codes) for _ in range(2))
        for code in codes:
            other.step(code)
            one.step(code)
        other.finish()
        one.finish()
        subject.equal("instances_share_nothing", alone, one, "with no second policy beside it:")

    subject.search("instances_share_nothing", attempt)


@law(EVERY_SLOT)
def check_policy_same_input_same_decisions(subject: Subject) -> None:
    """Decisions follow from what the policy was told: no clock, no random numbers but its own seeded ones."""
    _drivable(subject)

    def attempt(size: int, codes: list[int]) -> None:
        runs: list[Driver] = []
        for round_ in range(2):
            with _another_world(round_, subject):
                runs.append(subject.driver(size, codes).run(codes))
        subject.equal("same_input_same_decisions", runs[0], runs[1], "the first time:")

    subject.search("same_input_same_decisions", attempt)


@contextmanager
def _another_world(number: int, subject: Subject) -> Iterator[None]:
    """Other random numbers, another time on every clock, other addresses in memory."""
    ballast = [object() for _ in range(997 * number)]
    random.seed(number)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(number)
    moment = 1e9 * (1 + number)

    def clock(name: str) -> Callable[[], float]:
        def read() -> float:
            nonlocal moment
            moment += 1 + 977 * number
            return int(moment) if name.endswith("_ns") else moment

        return read

    real = {getattr(time, name): clock(name) for name in _CLOCKS}
    scopes: list[dict[str, Any]] = [vars(time)]
    for cls in type(subject.policy).__mro__:
        module = sys.modules.get(cls.__module__)
        scopes += [vars(module)] if module is not None else []
        scopes += [f.__globals__ for f in vars(cls).values() if hasattr(f, "__globals__")]
    replaced = []
    subject.unseeded = True
    for scope in scopes:
        for name, value in list(scope.items()):
            if callable(value) and _known(value, real):
                replaced.append((scope, name, value))
                scope[name] = real[value]
    try:
        yield
    finally:
        subject.unseeded = False
        for scope, name, value in reversed(replaced):
            scope[name] = value
        del ballast


def _known(value: Any, real: dict[Any, Any]) -> bool:
    try:
        return value in real
    except TypeError:
        return False


def _drivable(subject: Subject) -> None:
    if not has_driver(subject.slot):
        raise Skipped(f"a policy of slot {subject.slot!r} has no state")
