"""Launches of the Triton kernels: all of them say the same, and which is taken is measured, kept and kept to."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from test_kernels import Case as Inputs
from test_kernels import error

import pagedlab as pl
from pagedlab.errors import ConfigError
from pagedlab.policies.kernel import TritonPaged, interpreted
from pagedlab.policies.layout import CSR, Extents, Padded, TwoLevel

pytest.importorskip("triton")
GPU = torch.cuda.is_available() and not interpreted()
if not (GPU or interpreted()):
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)

from test_triton_kernels import attend  # noqa: E402

from pagedlab.bench import kernel_gpu  # noqa: E402
from pagedlab.bench.kernel_resources import SHAPES  # noqa: E402
from pagedlab.kernels.triton import choices, paged, tuning  # noqa: E402
from pagedlab.kernels.triton.choices import TITLE, Choice, Choices  # noqa: E402
from pagedlab.kernels.triton.shapes import Launch, Shape  # noqa: E402
from pagedlab.kernels.triton.tuning import Case, Tuner, choose, nearest_power  # noqa: E402

DEVICE = torch.device("cuda" if GPU else "cpu")
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "kernel-resources.json"
LAUNCHES = Shape.of(4, 128, 128, 2).decode
CASE = Case("a GPU", "decode", "csr", "bfloat16", "model", 4, 8, 128, 128, 16)
DECODE, MIXED = [(1, 1), (1, 100)], [(33, 40), (1, 20)]

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A file of choices that nobody has written yet, for kernels that are made from now on."""
    monkeypatch.setenv("PAGEDLAB_TUNING", str(tmp_path / "deep" / "launches.json"))
    choices._shared.cache_clear()
    yield tmp_path / "deep" / "launches.json"
    choices._shared.cache_clear()


class Clock:
    """Stands for the stopwatch: seconds by what is measured, and a record of it."""

    def __init__(self, monkeypatch, seconds=lambda launch: 1.0, *, runs: bool = False):
        self.seconds, self.asked, self.outputs = seconds, [], []

        def stopwatch(run, device):
            def measure(launch):
                self.asked.append(launch)
                if runs:
                    self.outputs.append(run(launch))
                return self.seconds(launch)

            return measure

        monkeypatch.setattr(tuning, "can_measure", lambda device: True)
        monkeypatch.setattr(tuning, "stopwatch", stopwatch)


def prefers(i: int):
    """Seconds by which a clock finds the i-th launch of every list the fastest."""

    def seconds(launch):
        lists = [x for x in (*_lists(), LAUNCHES) if launch in x]
        return 1.0 if any(x.index(launch) == i % len(x) for x in lists) else 2.0

    return seconds


def _lists():
    shapes = [Shape.of(2, 16, 16, 4), Shape.of(2, 16, 16, 2), Shape.of(2, 16, 16, 4, True)]
    return [x for shape in shapes for x in (shape.decode, shape.prefill)]


# ---- what may be chosen


@pytest.mark.parametrize(
    ("dtype", "params"),
    [(torch.float32, {}), (torch.bfloat16, {}), (torch.float32, {"kv_dtype": "int8"})],
    ids=["float32", "bfloat16", "int8"],
)
@pytest.mark.parametrize("lengths", [DECODE, MIXED], ids=["decode", "mixed"])
def test_every_launch_says_the_same(lengths, dtype, params, path, monkeypatch):
    """Close to float64 from the same inputs; of a cache of bytes, close to the rule."""
    Clock(monkeypatch)
    window = 70 if lengths is DECODE and not params else None  # where pieces begin depends on the tile
    inputs = Inputs(lengths, dtype=dtype, block_size=16, num_kv_heads=1, sliding_window=window)
    shape = Shape.of(2, 16, 16, dtype.itemsize, bool(params))
    launches = shape.decode if lengths is DECODE else shape.prefill
    taken = []

    def take(known, measure):
        taken.append(known[len(taken)])
        return Choice(taken[-1])

    monkeypatch.setattr(tuning, "choose", take)
    monkeypatch.setattr(Choices, "get", lambda *_: None)
    monkeypatch.setattr(Choices, "add", lambda self, case, known, choice: choice)
    outs = [attend(inputs, autotune=True, **params) for _ in launches]
    assert tuple(taken) == launches
    expected = outs[0].double() if params else inputs.expected()
    assert error(outs[0], inputs.expected()) < 0.05
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert all(error(out, expected) < tolerance for out in outs)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize(
    ("group", "size", "itemsize"), list(itertools.product((1, 4, 7, 71), (16, 64, 80, 128, 256), (2, 4)))
)
def test_the_lists_of_launches(group, size, itemsize, quantised):
    """Short, all different, tiles of powers of two that hold a whole group; the first is the rule."""
    shape = Shape.of(group, size, size, itemsize, quantised)
    for launches in (shape.decode, shape.prefill):
        assert 2 <= len(launches) == len(set(launches)) <= 10
        for launch in launches:
            assert launch.rows >= group
            for n in launch[:3]:
                assert n.bit_count() == 1
            assert min(launch[:2]) >= 16
            assert 1 <= launch.num_warps <= 16
    assert all(launch.programs > 0 for launch in shape.decode)
    for length in (16, 64, 512):
        pieces = shape.in_pieces_of(length)
        assert all(length % launch.tile == 0 for launch in pieces)
        assert len({launch.programs for launch in pieces}) <= 1


def test_what_is_on_record_are_these_launches_and_they_do_not_spill():
    """`bench kernel-resources` was run with the lists of today."""
    rows = json.loads(RESULTS.read_text())["results"]
    for given in SHAPES:
        full = {"dtype": "bfloat16", "kv_dtype": "model", "head_size": 128, "group": 4, "block_size": 16}
        full |= {"layout": "csr", "features": False} | given
        itemsize = 4 if full["dtype"] == "float32" else 2
        size, quantised = full["head_size"], full["kv_dtype"] != "model"
        shape = Shape.of(full["group"], size, size, itemsize, quantised)
        mine = [row for row in rows if all(row[k] == v for k, v in full.items())]
        for target in ("sm_80", "sm_90", "gfx942"):
            for kernel in ("decode", "prefill"):
                found = [row for row in mine if (row["target"], row["kernel"]) == (target, kernel)]
                known = {str(x._replace(programs=0)) for x in getattr(shape, kernel)}
                assert {row["launch"] for row in found} == known
                if (target, full["layout"]) != ("sm_80", "extents"):
                    assert all(row["stack"] == row["spills"] == 0 for row in found), given
                fitting = [row["launch"] for row in found if row["shared"] <= row["shared_limit"]]
                assert str(getattr(shape, kernel)[0]._replace(programs=0)) in fitting
                assert len(fitting) == len(found) if target != "gfx942" else len(fitting) >= 2


def test_launches_compile_for_a_gpu_that_is_not_here():
    """One shape for one GPU, in a process of its own; the record has the others."""
    script = (
        "import json; from pagedlab.kernels.triton.resources import compile_kernels;"
        "print(json.dumps(compile_kernels(['sm_90'], [{'head_size': 64}], every_launch=True)))"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    rows = [row for row in json.loads(done.stdout.splitlines()[-1]) if row["launch"]]
    shape = Shape.of(4, 64, 64, 2)
    assert len(rows) == len({x._replace(programs=0) for x in shape.decode}) + len(shape.prefill)
    for row in rows:
        assert row["stack"] == row["spills"] == 0, row
        assert row["shared"] <= row["shared_limit"], row


# ---- choosing


def test_the_fastest_is_chosen_if_it_beats_the_rule_by_more_than_noise():
    rule, other, third = LAUNCHES[:3]
    seconds = {rule: 1.0, other: 0.99, third: 2.0}
    assert choose(list(seconds), seconds.__getitem__) == Choice(rule)
    seconds[third] = 0.8
    assert choose(list(seconds), seconds.__getitem__) == Choice(third, 1.25)
    seconds[other] = 0.5
    assert choose(list(seconds), seconds.__getitem__) == Choice(other, 2.0)


def test_launches_take_turns_in_both_orders():
    """So one that always comes after another, on a GPU that grows warm, is not the slower for it."""
    asked = []

    def warming(launch):
        asked.append(launch)
        return 1.0 + 0.02 * len(asked)

    assert choose(LAUNCHES[:3], warming).launch == LAUNCHES[0]
    once, again = asked[:3], asked[3:6]
    assert once == list(LAUNCHES[:3]) == again[::-1]
    assert len(asked) == 3 * tuning.ROUNDS


def test_one_moment_does_not_count():
    times = {launch: itertools.cycle([1.0, 1.0, 9.0]) for launch in LAUNCHES}
    times[LAUNCHES[1]] = itertools.cycle([0.1, 1.0, 1.0])
    times[LAUNCHES[2]] = itertools.cycle([0.5, 9.0, 0.5])
    assert choose(LAUNCHES, lambda launch: next(times[launch])).launch == LAUNCHES[2]


def test_a_launch_that_cannot_run_is_left_out():
    def measure(launch):
        if launch in LAUNCHES[1:3]:
            raise RuntimeError("out of resource: shared memory")
        return 0.5 if launch == LAUNCHES[4] else 1.0

    assert choose(LAUNCHES, measure).launch == LAUNCHES[4]
    assert choose(LAUNCHES[:3], measure) == Choice(LAUNCHES[0])
    assert choose(LAUNCHES[1:], measure) is None


def test_ctrl_c_is_no_launch_that_cannot_run():
    with pytest.raises(KeyboardInterrupt):
        choose(LAUNCHES, Mock(side_effect=KeyboardInterrupt))


def test_batches_of_one_size_are_one_case():
    assert [nearest_power(n) for n in (1, 2, 3, 8, 9, 32, 33, 4096)] == [1, 1, 4, 4, 16, 16, 64, 4096]
    assert CASE.among(16, 16, 1000) == CASE.among(20, 20, 1500) != CASE.among(64, 64, 1000)
    assert CASE.among(16, 16, 1000) != CASE.among(16, 16, 9000)
    assert CASE.among(1, 1, 1) == CASE.among(1, 1, 300)
    windowed = CASE._replace(window=512)
    assert windowed.among(4, 4, 1000) == windowed.among(4, 4, 100_000)
    prefill = CASE._replace(kernel="prefill")
    assert prefill.among(64, 65, 1000).query_len > 1
    assert prefill.among(1, 512, 512) != prefill.among(1, 8, 512)
    texts = {str(case) for case in (CASE, windowed, prefill, CASE.among(4, 4, 1), CASE.among(64, 64, 1))}
    assert len(texts) == 5


@pytest.mark.parametrize("layout", [Padded, CSR, TwoLevel, Extents], ids=lambda cls: cls.name)
@pytest.mark.parametrize(("kernel", "num_blocks"), [("decode", 3), ("prefill", 200)])
def test_a_batch_is_made_up_for_a_case(kernel, num_blocks, layout):
    case = CASE._replace(kernel=kernel).among(5, 5 if kernel == "decode" else 100, 300)
    made = layout()
    batch = tuning.sample_batch(case, made, num_blocks)
    counts = batch.query_start[1:] - batch.query_start[:-1]
    assert set(counts) == {case.query_len}
    assert len(counts) == case.num_seqs == 4
    assert set(batch.context_lens) == {case.context_len}
    assert not hasattr(made, "max_rows"), "the layout of the run is left alone"
    anybody = tuning.sample_batch(CASE._replace(kernel=kernel, split_len=512), made, num_blocks)
    assert len(anybody.rows) == tuning.ANY[kernel][0]


# ---- keeping


def test_choices_are_found_again(tmp_path):
    path = tmp_path / "new" / "launches.json"
    first = Choices(path, "triton 1")
    assert not first
    assert first.get("a", LAUNCHES) is None
    assert first.add("a", LAUNCHES, Choice(LAUNCHES[3], 1.25)) == first.get("a", LAUNCHES)
    assert Choices(path, "triton 1").get("a", LAUNCHES) == Choice(LAUNCHES[3], 1.25)
    assert Choices(path, "triton 1").get("b", LAUNCHES) is None
    other = Choices(path, "triton 2")
    assert not other, "another version of Triton, or of the kernels"
    other.add("a", LAUNCHES, Choice(LAUNCHES[1], 1.5))
    assert Choices(path, "triton 1").get("a", LAUNCHES).launch == LAUNCHES[3]
    assert Choices(path, "triton 2").get("a", LAUNCHES).launch == LAUNCHES[1]
    assert {p.name for p in path.parent.iterdir()} == {"launches.json", ".launches.json.lock"}


def test_in_memory_alone():
    known = Choices(None, "triton 1")
    known.add("a", LAUNCHES, Choice(LAUNCHES[1], 1.5))
    assert known.get("a", LAUNCHES) == Choice(LAUNCHES[1], 1.5)


def test_the_first_process_that_measures_decides(tmp_path):
    path = tmp_path / "launches.json"
    one, other = Choices(path, "triton 1"), Choices(path, "triton 1")
    assert len(one) == len(other) == 0
    one.add("a", LAUNCHES, Choice(LAUNCHES[1], 1.5))
    assert other.add("a", LAUNCHES, Choice(LAUNCHES[2], 1.6)).launch == LAUNCHES[1]
    assert other.get("a", LAUNCHES).launch == LAUNCHES[1]
    other.add("b", LAUNCHES, Choice(LAUNCHES[2], 1.6))
    assert len(Choices(path, "triton 1")) == 2


BROKEN = {
    "empty": b"",
    "half": b'{"pagedlab launches": {"triton 1": {"a": {"laun',
    "bytes": bytes(range(128, 256)),
    "deep": b"[" * 100_000,
    "other": b'{"accuracy": 0.9}',
    "list": b"[1, 2]",
    "number": b'{"pagedlab launches": 3}',
    "no case": b'{"pagedlab launches": {"triton 1": 3}}',
    "no launch": b'{"pagedlab launches": {"triton 1": {"a": {"gain": 1}}}}',
    "no gain": b'{"pagedlab launches": {"triton 1": {"a": {"launch": {"rows": 1}, "gain": "x"}}}}',
    "unknown": b'{"pagedlab launches": {"triton 1": {"a": {"launch": {"colour": 1}, "gain": 1}}}}',
}


@pytest.mark.parametrize("contents", BROKEN.values(), ids=list(BROKEN))
def test_a_file_that_is_something_else_is_ignored_and_moved_aside(contents, tmp_path):
    path = tmp_path / "launches.json"
    path.write_bytes(contents)
    known = Choices(path, "triton 1")
    with pytest.warns(UserWarning, match=r"launches\.json is no file of launches; it is ignored"):
        assert known.get("a", LAUNCHES) is None
    assert path.read_bytes() == contents, "looking changes nothing"
    known.add("a", LAUNCHES, Choice(LAUNCHES[1], 1.5))
    assert Choices(path, "triton 1").get("a", LAUNCHES) == Choice(LAUNCHES[1], 1.5)
    assert (tmp_path / "launches.json.old").read_bytes() == contents


def test_a_launch_that_is_none_is_ignored(tmp_path):
    """A file edited by hand cannot make a kernel do what it cannot do."""
    path = tmp_path / "launches.json"
    Choices(path, "triton 1").add("a", LAUNCHES, Choice(LAUNCHES[1], 1.5))
    path.write_text(path.read_text().replace('"tile": 64', '"tile": 65'))
    known = Choices(path, "triton 1")
    with pytest.warns(UserWarning, match=r"16x65, .* is no launch for a; it is ignored"):
        assert known.get("a", LAUNCHES) is None
    assert known.add("a", LAUNCHES, Choice(LAUNCHES[2], 1.5)).launch == LAUNCHES[2]
    assert Choices(path, "triton 1").get("a", LAUNCHES).launch == LAUNCHES[2]
    path.write_text(path.read_text().replace('"tile": 64', '"tile": 64.0'))
    found = Choices(path, "triton 1").get("a", LAUNCHES)
    assert all(type(n) is int for n in found.launch)


def test_a_place_that_cannot_be_written_costs_a_warning(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "file" / "launches.json"):
        known = Choices(path, "triton 1")
        with pytest.warns(UserWarning, match="launches cannot be read"):
            assert not known
        with pytest.warns(UserWarning, match="launches cannot be kept there"):
            known.add("a", LAUNCHES, Choice(LAUNCHES[1], 1.5))
        assert known.get("a", LAUNCHES) == Choice(LAUNCHES[1], 1.5)
    assert (tmp_path / "file").read_text() == "mine"


def test_two_processes_write_one_file(tmp_path):
    """None of what either has kept is lost, and where both have measured they agree."""
    script = """
import sys, time
from pagedlab.kernels.triton.choices import Choice, Choices
from pagedlab.kernels.triton.shapes import Shape
launches, me = Shape.of(4, 128, 128, 2).decode, int(sys.argv[2])
known = Choices(__import__("pathlib").Path(sys.argv[1]), "triton 1")
len(known)
print("ready", flush=True)
sys.stdin.readline()
for i in range(25):
    known.add(f"{me} {i}", launches, Choice(launches[me], 1.5))
    print(known.add(f"both {i}", launches, Choice(launches[me], 1.5)).launch, flush=True)
"""
    path = tmp_path / "launches.json"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(path), str(me)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for me in (1, 2)
    ]
    assert [w.stdout.readline() for w in writers] == ["ready\n"] * 2
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    said = [writer.communicate(timeout=60)[0] for writer in writers]
    assert said[0] == said[1]
    known = Choices(path, "triton 1")
    assert len(known) == 75
    assert {known.get(f"{me} {i}", LAUNCHES).launch for me in (1, 2) for i in range(25)} == {*LAUNCHES[1:3]}


def test_a_crash_while_writing_leaves_the_file(tmp_path, monkeypatch):
    path = tmp_path / "launches.json"
    Choices(path, "triton 1").add("a", LAUNCHES, Choice(LAUNCHES[1], 1.5))
    before = path.read_bytes()
    monkeypatch.setattr(choices.json, "dump", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Choices(path, "triton 1").add("b", LAUNCHES, Choice(LAUNCHES[1], 1.5))
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("*launches.json-*"))


def test_where_the_file_is(tmp_path, monkeypatch):
    monkeypatch.setenv("PAGEDLAB_CACHE", str(tmp_path))
    for named, expected in (("", tmp_path / choices.FILE), (str(tmp_path / "x"), tmp_path / "x")):
        monkeypatch.setenv("PAGEDLAB_TUNING", named)
        choices.choices_of_process("triton 1").add("a", LAUNCHES, Choice(LAUNCHES[1]))
        assert TITLE in json.loads(expected.read_text())
    assert choices.choices_of_process("triton 1") is choices.choices_of_process("triton 1")
    monkeypatch.setenv("PAGEDLAB_TUNING", "off")
    assert choices.choices_of_process("triton 1") is None


def test_choices_hold_for_the_kernels_they_were_made_with(monkeypatch):
    before = tuning.stamp()
    tuning.stamp.cache_clear()
    monkeypatch.setattr(tuning.triton, "__version__", "9.9")
    assert tuning.stamp() != before
    monkeypatch.undo()
    tuning.stamp.cache_clear()
    assert tuning.stamp() == before
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read(self) + b"#" * (self.name == "tiles.py"))
    tuning.stamp.cache_clear()
    assert tuning.stamp() != before
    tuning.stamp.cache_clear()


# ---- keeping to it


def test_a_case_is_measured_once_and_then_known(path, monkeypatch):
    clock = Clock(monkeypatch, prefers(1))
    inputs = Inputs(DECODE, block_size=16, num_kv_heads=1)
    out = attend(inputs, autotune=True, again=2)
    asked = len(clock.asked)
    assert asked == tuning.ROUNDS * len(Shape.of(2, 16, 16, 4).decode)
    assert error(out, inputs.expected()) < 1e-5
    again = attend(inputs, autotune=True)
    choices._shared.cache_clear()  # a new process
    later = attend(inputs, autotune=True)
    without = attend(inputs)
    assert len(clock.asked) == asked
    assert torch.equal(out, again)
    assert torch.equal(out, later)
    assert torch.equal(out, without), "what is known is taken without asking for it"


def taken(monkeypatch):
    """Record the launches that the kernel takes, outside of measurements."""
    found, launch_of = [], paged.TritonPagedAttention._launch

    def launch(self, *args):
        found.append(launch_of(self, *args))
        return found[-1]

    monkeypatch.setattr(paged.TritonPagedAttention, "_launch", launch)
    return found


def test_the_rule_where_nothing_is_known_and_nothing_is_asked(path, monkeypatch):
    clock, found = Clock(monkeypatch, prefers(2)), taken(monkeypatch)
    inputs = Inputs(DECODE, block_size=16, num_kv_heads=1)
    rule, _, other, *_ = Shape.of(2, 16, 16, 4).decode
    attend(inputs)
    assert found == [rule]
    assert not clock.asked
    assert not path.exists()
    attend(inputs, autotune=True)
    attend(inputs)
    monkeypatch.setenv("PAGEDLAB_TUNING", "off")
    asked = len(clock.asked)
    attend(inputs, autotune=True)
    assert found == [rule, other, other, rule]
    assert asked == len(clock.asked) > 0


def test_a_kernel_keeps_to_what_it_has_settled(tmp_path, monkeypatch):
    """Even if another one measures the same case meanwhile."""
    Clock(monkeypatch, prefers(2))
    known = Choices(tmp_path / "launches.json", "triton 1")
    idle, eager = Tuner(known), Tuner(known, autotune=True)
    assert idle.idle
    assert not eager.idle
    assert eager.launch(CASE, LAUNCHES, Mock(), DEVICE) == LAUNCHES[2]
    assert idle.idle, "it began with the rule"
    quiet, other = Tuner(known), CASE.among(64, 64, 1000)
    assert quiet.launch(CASE, LAUNCHES, Mock(), DEVICE) == LAUNCHES[2]
    assert quiet.launch(other, LAUNCHES, Mock(), DEVICE) == LAUNCHES[0]
    assert eager.launch(other, LAUNCHES, Mock(), DEVICE) == LAUNCHES[2]
    assert quiet.launch(other, LAUNCHES, Mock(), DEVICE) == LAUNCHES[0]
    assert Tuner(known).launch(other, LAUNCHES, Mock(), DEVICE) == LAUNCHES[2]


def test_what_cannot_be_measured_is_the_rule(tmp_path, monkeypatch):
    known = Choices(tmp_path / "launches.json", "triton 1")
    Clock(monkeypatch, Mock(side_effect=RuntimeError("the GPU fell off")))
    with pytest.warns(UserWarning, match=r"nothing could be measured for device=a GPU kernel=decode"):
        assert Tuner(known, autotune=True).launch(CASE, LAUNCHES, Mock(), DEVICE) == LAUNCHES[0]
    full = Mock(side_effect=torch.OutOfMemoryError("no room for a batch"))
    with pytest.warns(UserWarning, match="nothing could be measured"):
        assert Tuner(known, autotune=True).launch(CASE, LAUNCHES, full, DEVICE) == LAUNCHES[0]
    monkeypatch.setattr(tuning, "can_measure", lambda device: False)
    asked = Mock()
    assert Tuner(known, autotune=True).launch(CASE, LAUNCHES, asked, DEVICE) == LAUNCHES[0]
    asked.assert_not_called()
    assert not (tmp_path / "launches.json").exists(), "nothing was found out"


def test_nothing_is_measured_in_the_interpreter():
    assert not tuning.can_measure(torch.device("cpu"))


@pytest.mark.parametrize("query_len", [1, 3], ids=["decode", "prefill"])
def test_measuring_works_on_the_caches_that_are_there(query_len, path, monkeypatch):
    """A measurement does the whole work of its case, over the run's blocks; the run's own output is right."""
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    clock = Clock(monkeypatch, prefers(1), runs=True)
    inputs = Inputs([(query_len, 40)], block_size=16, num_kv_heads=1, sliding_window=50, soft_cap=3.0)
    inputs.options["sinks"] = torch.rand(2)
    expected = inputs.expected()
    inputs.keys, inputs.values = (
        [torch.cat([x[0], inputs.random(56, 1, 16)])] for x in (inputs.keys, inputs.values)
    )
    inputs.contexts, inputs.tables = [96], [[5, 0, 3, 1, 4, 2]]
    layout = Extents()
    layout.reset(max_rows=1, max_blocks=6)
    layout.open(0, inputs.tables[0])
    attention = paged.TritonPagedAttention(layout, autotune=True)
    caches = [attention.allocate(6, 16, 1, 16, dtype=inputs.dtype, device=DEVICE) for _ in range(2)]
    for cache, contents in zip(caches, (inputs.keys, inputs.values)):
        attention.write(cache, contents[0].to(DEVICE), inputs.batch(layout, inputs.slots(), [0]))
    before = [cache.clone() for cache in caches]
    inputs.contexts = [40]
    batch = inputs.batch(layout, inputs.slots(), [0])
    options = inputs.options | {"sinks": inputs.options["sinks"].to(DEVICE)}
    out = attention.attend(inputs.query.to(DEVICE), *caches, batch, **options).cpu()
    assert error(out, expected) < 1e-5
    assert all(torch.equal(*pair) for pair in zip(caches, before))
    assert len(clock.outputs) == len(_lists()[0 if query_len == 1 else 1])
    for measured in clock.outputs:
        assert measured.shape == (1 if query_len == 1 else tuning.LEAST_CHUNK, 2, 16)
        assert torch.allclose(measured, clock.outputs[0], atol=1e-5)


@pytest.mark.parametrize("quantised", [False, True])
def test_an_invariant_kernel_chooses_without_the_batch(quantised, path, monkeypatch):
    """Two cases, decode and prefill, whatever the batch; and nobody's output depends on the company."""
    params = {"batch_invariant": True, "split_tokens": 64, "autotune": True}
    if quantised:
        params["kv_dtype"] = "int8"
    clock = Clock(monkeypatch, prefers(1))
    lengths = [(1, 130), (5, 70), (1, 7)]
    together = Inputs(lengths, block_size=16, num_kv_heads=1)
    out = attend(together, **params)
    asked = len(clock.asked)
    shape = Shape.of(2, 16, 16, 4, quantised)
    assert asked == tuning.ROUNDS * (len(shape.in_pieces_of(64)) + len(shape.prefill))
    assert {x.programs for x in clock.asked if x in shape.decode} == {shape.decode[0].programs}
    at = 0
    for s, (q, t) in enumerate(lengths):
        alone = Inputs([(q, t)], block_size=16, num_kv_heads=1)
        alone.query = together.query[at : at + q]
        alone.keys, alone.values = [together.keys[s]], [together.values[s]]
        assert torch.equal(attend(alone, **params), out[at : at + q])
        at += q
    assert len(clock.asked) == asked
    (cases,) = (part.values() for part in [json.loads(path.read_text())[TITLE]])
    assert all("num_seqs" not in case for part in cases for case in part)


def test_a_kernel_that_is_not_invariant_chooses_by_the_batch(path, monkeypatch):
    clock = Clock(monkeypatch)
    asked = []
    for lengths in ([(1, 40)], [(1, 70)], [(1, 40)] * 4, [(5, 40)], [(1, 40), (5, 40)]):
        attend(Inputs(lengths, block_size=16, num_kv_heads=1), autotune=True)
        asked.append(len(clock.asked))
    assert asked[0] == asked[1] < asked[2] < asked[3]
    assert asked[3] == asked[4], "as many query tokens a sequence, nearly"


# ---- through the policy


def test_the_policy_has_the_parameter():
    assert not TritonPaged.from_params({}).autotune
    config = pl.Config(kernel=TritonPaged(autotune=True))
    assert pl.Config.from_json(config.to_json()).kernel.autotune
    with pytest.raises(ConfigError, match="autotune must be bool, not 'yes'"):
        TritonPaged.from_params({"autotune": "yes"})


def test_a_run_measures_what_it_needs(path, tiny, monkeypatch):
    """Through the whole engine: the same words, and the choices are kept for the next run."""
    clock = Clock(monkeypatch, prefers(1))
    config = pl.Config(model="tiny", dtype="float32", num_blocks=16, block_size=16, device=str(DEVICE))
    texts = ["def f(x):\n    return"]
    runs = []
    for kernel in ("dense", TritonPaged(autotune=True), "triton-paged"):
        runs.append(pl.run(config.replace(kernel=kernel), texts, max_tokens=2).outputs)
        if kernel == "dense":
            assert not clock.asked
    asked = len(clock.asked)
    assert asked > 0
    assert runs[0] == runs[1] == runs[2]
    assert len(Choices(path, tuning.stamp())) == 2


# ---- the stopwatch


def test_the_stopwatch_replays_on_a_cold_cache(monkeypatch):
    """On stand-ins for torch's streams: compiled once outside of the graph, flushed before each replay."""
    log, captured = [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 8.0

    class Graph:
        def replay(self):
            log.append("replay")

    @contextmanager
    def capture(graph, pool):
        captured.append(pool)
        if len(captured) > 1:
            raise RuntimeError("capture failed")
        yield

    flush = Mock()
    flush.zero_ = lambda: log.append("flush")
    monkeypatch.setattr(tuning, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: flush)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 7)
    monkeypatch.setattr(tuning, "on", lambda device: nullcontext())
    measure = tuning.stopwatch(lambda launch: log.append(launch), torch.device("cuda"))
    rule, other = LAUNCHES[:2]
    assert measure(rule) == pytest.approx(8e-3)
    one = ["flush", "event", "replay", "event"]
    assert log == [rule, rule, *one * tuning.REPLAYS]
    log.clear()
    measure(rule)
    assert log == one * tuning.REPLAYS
    log.clear()
    measure(other)
    assert log == [other, *["flush", "event", other, "event"] * tuning.REPLAYS], "without a graph"
    assert captured == [7, 7]


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("invariant", [False, True])
def test_on_a_gpu_it_is_measured(invariant, path):
    for lengths in (DECODE, MIXED):
        inputs = Inputs(lengths, block_size=16, head_size=64, dtype=torch.bfloat16)
        params = {"autotune": True, "batch_invariant": invariant}
        out = attend(inputs, again=3, **params)
        assert error(out, inputs.expected()) < 1e-2
        choices._shared.cache_clear()
        assert torch.equal(attend(inputs, **params), out)
    assert len(Choices(path, tuning.stamp())) >= 2


def test_the_benchmark_says_what_was_chosen(path, monkeypatch):
    clock = Clock(monkeypatch, prefers(2))
    for name, size in (("NUM_HEADS", 2), ("NUM_KV_HEADS", 1), ("HEAD_SIZE", 16)):
        monkeypatch.setattr(kernel_gpu, name, size)
    caches = torch.zeros(1, 1, 64, 16, device=DEVICE), torch.zeros(1, 1, 64, 16, device=DEVICE)
    made = kernel_gpu.forms(torch.zeros(1, 2, 16, device=DEVICE), 64, [16], torch.Generator())
    form = made["triton-paged", "csr", 16]
    form(*caches)
    assert clock.asked
    assert kernel_gpu.chosen(form) == {"launch": str(Shape.of(2, 16, 16, 4).decode[2]), "gain": 2.0}
    assert kernel_gpu.chosen(made["copy", "contiguous", None]) == {"launch": None, "gain": None}


def test_launches_say_what_they_are():
    assert str(Launch(16, 64, 4, 2, 8)) == "16x64, 4 warps, 2 stages, 8 programs"
    assert str(Launch(64, 32, 8, 3)) == "64x32, 8 warps, 3 stages"
