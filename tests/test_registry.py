"""Names of policies: found, replaced, misspelt, installed by others."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import policies, registry_restored, servable

from pagedlab import registry
from pagedlab.errors import ConfigError
from pagedlab.policies import LRU, Eviction, Policy, Scheduler, param
from pagedlab.registry import SLOTS, is_registered, list_policies, lookup_class, make, policy_names, register


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with registry_restored():
        yield


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("slot", SLOTS)
def test_every_slot_has_policies_that_describe_themselves(slot: str) -> None:
    assert policy_names(slot)
    for name in policy_names(slot):
        cls = lookup_class(slot, name)
        assert (cls.slot, cls.name) == (slot, name)
        policy = make(slot, name)
        assert is_registered(policy)
        assert policy.clone() == policy
        assert policy.clone() is not policy
    for row in list_policies(slot):
        assert set(row) >= {"slot", "name", "summary", "params"}
        assert row["slot"] == slot
        for parameter in row["params"]:
            assert parameter["help"], f"{row['name']}.{parameter['name']} says nothing"


def test_all_slots_are_listed() -> None:
    rows = list_policies()
    assert {row["slot"] for row in rows} == set(SLOTS)
    assert len({(row["slot"], row["name"]) for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("slot", "typo", "meant"),
    [
        ("eviction", "lur", "lru"),
        ("lookup", "chained_hash", "chained-hash"),
        ("scheduler", "chunked-prefil", "chunked-prefill"),
        ("allocator", "freelist", "free-list"),
        ("prefetch", "queue-look-ahead", "queue-lookahead"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(slot: str, typo: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(slot, typo)
    text = one_line(caught)
    assert repr(typo) in text
    assert f"did you mean {meant!r}" in text or f"or {meant!r}" in text
    for name in policy_names(slot):
        assert name in text


def test_a_misspelt_slot_is_answered_with_the_nearest() -> None:
    for call in (
        lambda: make("evicton", "lru"),
        lambda: policy_names("evicton"),
        lambda: list_policies("evicton"),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        assert "did you mean 'eviction'" in one_line(caught)


def test_registering_again_replaces_silently() -> None:
    """A cell that is run twice."""

    def cell(worth: float) -> None:
        @register("eviction", "mine")
        class Mine(Eviction):
            def priority(self, block: Any) -> float:
                return worth

    cell(1.0)
    old = make("eviction", "mine")
    cell(2.0)
    new = make("eviction", "mine")
    assert new.priority(None) == 2.0  # type: ignore[attr-defined]
    assert is_registered(new)
    assert not is_registered(old), "an object of the replaced class is not what its name stands for"
    assert policy_names("eviction").count("mine") == 1


def test_a_policy_belongs_to_one_slot() -> None:
    with pytest.raises(ConfigError) as caught:

        @register("scheduler", "wrong")
        class Wrong(Eviction):
            pass

    assert "'eviction'" in one_line(caught)
    assert "wrong" not in policy_names("scheduler")
    with pytest.raises(ConfigError):
        register("no-slot", "x")


def test_a_subclass_does_not_answer_to_its_parents_name() -> None:
    class MyLRU(LRU):
        pass

    assert not is_registered(MyLRU())
    assert MyLRU.name != "lru"
    assert is_registered(LRU())


class Installed(Eviction):
    """What another package brings."""

    depth: int = param(3, low=1, high=9, help="how deep")

    def priority(self, block: Any) -> float:
        return 0.0


def install(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> list[str]:
    """Pretend that a distribution with these entry points is installed; returns what gets loaded."""
    loaded: list[str] = []

    class Point(metadata.EntryPoint):
        def load(self) -> Any:
            loaded.append(self.name)
            return super().load()

    made = [Point(name=name, value=value, group="pagedlab.policies") for name, value in points]

    def entry_points(**query: str) -> metadata.EntryPoints:
        return metadata.EntryPoints(made).select(**query)

    monkeypatch.setattr(registry, "_entry_points", None)
    monkeypatch.setattr(registry.metadata, "entry_points", entry_points)
    return loaded


def test_entry_points_are_found_and_loaded_lazily(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "their_package", __import__("sys").modules[__name__])
    loaded = install(
        monkeypatch,
        ("eviction.installed", "their_package:Installed"),
        ("eviction.broken", "no_such_package:Thing"),
        ("nonsense", "their_package:Installed"),
        ("no-slot.x", "their_package:Installed"),
    )
    assert {"installed", "broken", "lru"} <= set(policy_names("eviction"))
    assert loaded == [], "listing names must not import what is installed"
    make("eviction", "lru")
    assert loaded == []
    policy = make("eviction", "installed", depth=5)
    assert isinstance(policy, Installed)
    assert policy.get_params() == {"depth": 5}
    assert loaded == ["eviction.installed"]
    make("eviction", "installed")
    assert loaded == ["eviction.installed"], "loaded once"
    assert is_registered(policy)


def test_an_entry_point_for_the_wrong_slot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "their_package", __import__("sys").modules[__name__])
    install(monkeypatch, ("scheduler.installed", "their_package:Installed"))
    with pytest.raises(ConfigError, match="'eviction'"):
        make("scheduler", "installed")


def test_parameters_are_checked_by_name_type_and_range() -> None:
    class Demo(Eviction):
        size: int = param(4, low=1, high=10, help="a size", unit="blocks")
        share: float = param(0.5, low=0.0, high=1.0, help="a share")
        mode: str = param("fast", choices=("fast", "slow"), help="a mode")
        on: bool = param(True, help="a switch")

    register("eviction", "demo")(Demo)
    good = make("eviction", "demo", size=10, share=1, mode="slow", on=False)
    assert good.get_params() == {"size": 10, "share": 1.0, "mode": "slow", "on": False}
    assert isinstance(good.share, float)  # type: ignore[attr-defined]
    for params, words in (
        ({"size": 0}, ["Demo.size", "0", "1 to 10"]),
        ({"size": 11}, ["Demo.size", "11", "1 to 10"]),
        ({"size": 2.5}, ["Demo.size", "int", "2.5"]),
        ({"size": True}, ["Demo.size", "int"]),
        ({"size": "4"}, ["Demo.size", "int"]),
        ({"size": None}, ["Demo.size", "int"]),
        ({"share": 1.5}, ["Demo.share", "0.0 to 1.0"]),
        ({"share": float("nan")}, ["Demo.share"]),
        ({"mode": "fas"}, ["Demo.mode", "did you mean 'fast'"]),
        ({"on": 1}, ["Demo.on", "bool"]),
        ({"sise": 4}, ["'demo'", "'sise'", "did you mean 'size'"]),
    ):
        with pytest.raises(ConfigError) as caught:
            make("eviction", "demo", **params)
        text = one_line(caught)
        assert all(word in text for word in words), text
    with pytest.raises(ConfigError):
        good.clone(size=0)
    assert good.clone(size=1).get_params() == {**good.get_params(), "size": 1}
    (row,) = (r for r in list_policies("eviction") if r["name"] == "demo")
    assert row["params"][0] == {
        "name": "size",
        "type": "int",
        "default": 4,
        "help": "a size",
        "low": 1,
        "high": 10,
        "unit": "blocks",
    }


def test_parameters_may_bear_any_name() -> None:
    """Also those of `make`'s own arguments: a file can carry them, and is to be told, not to crash."""
    for name in ("slot", "name", "self", "cls", "params"):
        with pytest.raises(ConfigError):
            make("eviction", "lru", **{name: 1})


@pytest.mark.parametrize("slot", SLOTS)
@given(data=st.data())
def test_any_policy_is_its_name_and_its_parameters(slot: str, data: st.DataObject) -> None:
    policy = data.draw(policies(slot))
    assert make(slot, policy.name, **policy.get_params()) == policy
    assert eval(f"type(policy)({', '.join(f'{k}={v!r}' for k, v in policy.get_params().items())})") == policy
    assert isinstance(policy, Policy)
    assert policy.name in servable(slot)


def test_a_class_without_a_parameter_has_none() -> None:
    class Bare(Scheduler):
        def plan(self, step: Any) -> None:
            return None

    assert Bare.params() == []
    assert Bare().get_params() == {}
    with pytest.raises(ConfigError, match="it has: none"):
        Bare.from_params({"x": 1})
