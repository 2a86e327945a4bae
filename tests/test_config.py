"""A configuration is data: it round-trips, it is checked at once, and a file can neither import nor unpickle."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import configs, examples, registry_restored

from pagedlab.config import PRESETS, Config
from pagedlab.errors import ConfigError
from pagedlab.policies import LRU, Eviction
from pagedlab.registry import SLOTS, register


@settings(max_examples=examples(1.0))
@given(configs())
def test_json_round_trip(config: Config) -> None:
    text = config.to_json()
    again = Config.from_json(text)
    assert again == config
    assert again.to_json() == text
    assert Config.from_dict(json.loads(text)) == config


@given(config=configs())
@settings(max_examples=examples(0.3))
def test_file_round_trip(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    path = tmp_path_factory.mktemp("config") / "a config ü.json"
    config.to_json(path)
    assert Config.from_json(path) == config
    assert Config.from_json(str(path)) == config
    assert Config.load(str(path)) == config


@settings(max_examples=examples(0.5))
@given(configs(), configs())
def test_replace_changes_what_it_names_and_nothing_else(one: Config, other: Config) -> None:
    for slot in SLOTS:
        before = one.to_dict()
        changed = one.replace(**{slot: getattr(other, slot), "host_blocks": 8})
        assert one.to_dict() == before
        assert getattr(changed, slot) == getattr(other, slot)
        for key, value in changed.to_dict().items():
            if key not in (slot, "host_blocks"):
                assert value == before[key]


def test_replace_names_what_does_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"no field 'evicton'.*did you mean 'eviction'") as caught:
        Config().replace(evicton="lru")
    assert "\n" not in str(caught.value)


def test_a_slot_takes_a_name_an_object_or_a_class() -> None:
    assert Config(eviction="lru") == Config(eviction=LRU()) == Config(eviction=LRU)
    for bad in (3, None, {"name": "lru"}, "no-such", LRU.__name__):
        with pytest.raises(ConfigError, match="eviction"):
            Config(eviction=bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="slot 'eviction'"):
        Config(scheduler=LRU())


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets(name: str) -> None:
    config = Config.preset(name, num_blocks=77)
    assert config.num_blocks == 77
    assert Config.from_json(config.to_json()) == config
    assert Config.load(name) == Config.preset(name)
    assert Config.preset(name, eviction="lfu").eviction != Config.preset(name, eviction="lru").eviction


def test_presets_differ_and_typos_are_answered() -> None:
    rows = [Config.preset(name).to_json() for name in PRESETS]
    assert len(set(rows)) == len(rows)
    with pytest.raises(ConfigError, match="did you mean 'vllm'"):
        Config.preset("vlm")


@pytest.mark.parametrize(
    "bad",
    [
        {"num_blocks": 0},
        {"num_blocks": 2.0},
        {"num_blocks": True},
        {"num_blocks": "8"},
        {"num_blocks": None},
        {"block_size": -1},
        {"max_num_seqs": 0},
        {"max_num_batched_tokens": 0},
        {"max_model_len": 0},
        {"host_blocks": -1},
        {"num_threads": 0},
        {"device": "gpu"},
        {"device": "cuda:x"},
        {"device": None},
        {"prefetch_budget": 0},
        {"seed": -1},
        {"watermark": 1.0},
        {"watermark": -0.1},
        {"watermark": float("nan")},
        {"watermark": "much"},
        {"null_block": 1},
        {"null_block": True, "num_blocks": 1},
        {"dtype": "float31"},
        {"model": ""},
        {"model": 7},
        {"swap": "host", "host_blocks": 0},
    ],
    ids=str,
)
def test_sizes_are_checked_at_once_and_by_name(bad: dict[str, Any]) -> None:
    for build in (lambda: Config(**bad), lambda: Config().replace(**bad)):
        with pytest.raises(ConfigError) as caught:
            build()
        assert next(iter(bad)) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_unregistered_policy_runs_but_cannot_be_saved() -> None:
    class Mine(Eviction):
        def priority(self, block: Any) -> float:
            return 0.0

    config = Config(eviction=Mine())
    with pytest.raises(ConfigError, match=r"Mine\(\) is not registered.*@pagedlab.register\('eviction'"):
        config.to_json()
    assert config.describe()["eviction"] == {"name": "Mine", "params": {}, "registered": False}
    with registry_restored():
        register("eviction", "mine")(Mine)
        text = config.to_json()
        assert Config.from_json(text) == config
    with pytest.raises(ConfigError, match="no eviction policy 'mine'"):
        Config.from_json(text)


# ---- files are data ------------------------------------------------------------------------------------------------


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        Config.from_json(path)
    text = str(caught.value)
    assert "\n" not in text
    assert path.name in text, f"does not name the file: {text}"
    return text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{\n "num_blocks": 8,\n "seed": }\n', [":3:", "JSON"]),
        ('{"a": 1', [":1:", "JSON"]),
        ("", [":1:", "JSON"]),
        ("[1, 2]", ["object", "list"]),
        ("3", ["object", "int"]),
        ('{"num_blcks": 8}', ["num_blcks", "did you mean 'num_blocks'"]),
        ('{"num_blocks": 0}', ["num_blocks", "0"]),
        ('{"eviction": "lur"}', ["'lur'", "did you mean 'lru'"]),
        ('{"eviction": {"name": "lur"}}', ["'lur'", "did you mean 'lru'"]),
        ('{"eviction": {"name": "lru", "params": {"depth": 1}}}', ["'depth'"]),
        ('{"eviction": {"name": "lru", "params": {"name": "x"}}}', ["'name'"]),
        ('{"eviction": {"name": "lru", "params": {"slot": "x"}}}', ["'slot'"]),
        ('{"eviction": {"name": "lru", "params": [1]}}', ["eviction"]),
        ('{"eviction": {"name": "lru", "class": "os:system"}}', ["eviction"]),
        ('{"eviction": {"params": {}}}', ["eviction"]),
        ('{"eviction": ["lru"]}', ["eviction"]),
        ('{"eviction": null}', ["eviction"]),
        ('{"swap": {"name": "host", "params": {"eviction": "lur"}}}', ["'lur'"]),
        ('{"swap": {"name": "host", "params": {"min_hits": -1}}}', ["min_hits", "-1"]),
        ('{"watermark": NaN}', ["watermark"]),
        ('{"seed": 1e999}', ["seed"]),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, content: str, words: list[str]) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content, encoding="utf-8")
    text = refused(path)
    for word in words:
        assert word in text


def test_no_file_a_folder_and_noise(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none.json")
    refused(tmp_path)
    noise = tmp_path / "noise.json"
    noise.write_bytes(bytes(range(256)))
    assert "not a text file" in refused(noise)
    deep = tmp_path / "deep.json"
    deep.write_text('{"seed": ' + "[" * 100_000, encoding="utf-8")
    refused(deep)


class Trap:
    """Sets a flag when it is unpickled."""

    def __reduce__(self) -> Any:
        return (exec, ("import sys; sys._pagedlab_trap = True",))


def test_a_file_cannot_import_or_unpickle(tmp_path: Path) -> None:
    pickled = tmp_path / "trap.json"
    pickled.write_bytes(pickle.dumps(Trap()))
    refused(pickled)
    module = tmp_path / "trap_module.py"
    module.write_text("import sys\nsys._pagedlab_trap = True\n", encoding="utf-8")
    for name in ("trap_module:Policy", "trap_module", "trap_module.Policy", str(module), "../trap_module"):
        for value in (name, {"name": name}, {"name": "lru", "params": {"__class__": name}}):
            path = tmp_path / "config.json"
            path.write_text(json.dumps({"eviction": value}), encoding="utf-8")
            refused(path)
    assert not hasattr(sys, "_pagedlab_trap")
    assert "trap_module" not in sys.modules


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from([*SLOTS, *(k for k in Config().to_dict() if k not in SLOTS)])
POLICY = st.fixed_dictionaries(
    {"name": st.sampled_from(("lru", "host", "last-in", "queue-lookahead")) | JSON},
    optional={
        "params": st.dictionaries(st.sampled_from(("depth", "min_hits", "eviction", "name")), JSON) | JSON
    },
)


@settings(max_examples=examples(3))
@given(JSON | st.dictionaries(FIELDS, JSON | POLICY, max_size=4))
def test_whatever_a_file_says_is_a_config_or_an_error_in_one_line(data: Any) -> None:
    said = None
    try:
        config = Config.from_dict(data, "file.json")
    except ConfigError as error:
        said = str(error)
    if said is None:
        assert Config.from_json(config.to_json()) == config
    else:
        assert said.startswith("file.json: ")
        assert "\n" not in said


def test_html_shows_names_as_text() -> None:
    html = Config(model="<script>alert(1)</script>")._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
