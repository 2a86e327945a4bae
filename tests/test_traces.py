"""Published traces: real ones give the numbers that are known of them; small ones by hand for every format; garbage."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import tarfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import pagedlab.workloads as w
from pagedlab.errors import WorkloadError
from pagedlab.policies.prompt import HashedPrompt
from pagedlab.workloads import data, traces

DATA = Path(os.environ.get("PAGEDLAB_DATA") or Path(__file__).parents[2] / "shared" / "data")
real = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no real traces: PAGEDLAB_DATA is not set and {DATA} is not there"
)

Write = Callable[..., Path]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces are found by name."""
    monkeypatch.setenv("PAGEDLAB_DATA", str(DATA))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write JSON lines, or text as it stands, and return the file."""

    def file(name: str, *rows: Any) -> Path:
        path = tmp_path / name
        path.write_text(
            "".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in rows), encoding="utf-8"
        )
        return path

    return file


def mooncake_row(**changes: Any) -> dict[str, Any]:
    return {"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [0, 1], **changes}


# ---- real files ----------------------------------------------------------------------------------------------------


@real
@pytest.mark.usefixtures("here")
def test_mooncake_conversation() -> None:
    began = time.perf_counter()
    workload = w.load("mooncake-conversation")
    assert time.perf_counter() - began < 3.0  # about 0.2 s on an idle core
    said = workload.describe()
    assert said["requests"] == 12_031
    assert (said["blocks"], said["unique_blocks"]) == (288_500, 182_790)
    assert said["repeated_blocks"] == pytest.approx(0.3664, abs=5e-5)
    assert said["duration_s"] == pytest.approx(3536.999)
    before: dict[int, int] = {}
    for request in workload:
        prompt = request.prompt
        assert isinstance(prompt, HashedPrompt)
        assert prompt.hash_block == 512
        last = -1
        for i in prompt.hash_ids:
            # Chained: an id always stands after the same one.
            assert before.setdefault(i, last) == last
            last = i
    arrivals = [r.arrival for r in workload]
    assert arrivals == sorted(arrivals)
    assert len(set(arrivals)) < 1300
    spread = [r.arrival for r in workload.jitter(3.0)]
    assert spread == sorted(spread)
    assert len(set(spread)) == 12_031


@real
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("name", "count"), [("azure-code", 8819), ("azure-conv", 19366), ("arxiv", 28257)])
def test_lengths_only(name: str, count: int) -> None:
    workload = w.load(name)
    assert len(workload) == count
    said = workload.describe()
    assert said["repeated_blocks"] == 0
    assert all(r.prompt.num_full == 0 for r in workload)  # type: ignore[attr-defined]
    if name != "arxiv":
        assert workload.requests[0].arrival == 0
        assert 3400 < said["duration_s"] < 3600
    else:
        assert said["duration_s"] == 0
        assert w.load(name, rate=10.0).describe()["duration_s"] == pytest.approx(2826, rel=0.05)


@real
@pytest.mark.usefixtures("here")
def test_weka_sessions() -> None:
    workload = w.load("weka")
    assert len(workload) == 1342
    assert workload.describe()["sessions"] == 40
    by_id = {r.request_id: r for r in workload}
    owner: dict[int, str | None] = {}
    for request in workload:
        prompt = request.prompt
        assert isinstance(prompt, HashedPrompt)
        assert prompt.hash_block == 64
        for i in prompt.hash_ids:
            assert owner.setdefault(i, request.session) == request.session
        if request.follows is not None:
            assert by_id[request.follows].session == request.session
    # Where a pause is recorded, it counts from the request that is followed.
    raw = json.loads(gzip.decompress((DATA / "weka" / "trace_0167.json.gz").read_bytes()))
    for n, row in enumerate(raw["requests"]):
        request = by_id[f"trace_0167-{n}"]
        assert len(request.prompt) == row["in"]
        assert request.sampling.max_tokens == row["out"]
        assert request.arrival == row["t"]
        if n:
            assert request.follows == f"trace_0167-{n - 1}"
            assert request.think_time == row["think_time"]
    # Requests that were sent while others still ran all follow the one that had ended.
    assert [by_id[f"trace_0166-{n}"].follows for n in range(1, 6)] == ["trace_0166-0"] * 4 + ["trace_0166-4"]
    assert [by_id[f"trace_0166-{n}"].think_time for n in range(1, 6)] == [159, 204, 215, 223, 128]
    opened = w.load("weka", closed_loop=False, session_gap=10.0)
    assert all(r.follows is None for r in opened)
    assert {r.arrival for r in opened if r.request_id.endswith("-0")} == {10.0 * k for k in range(40)}
    one = w.load(DATA / "weka" / "trace_0167.json.gz")
    assert len(one) == len(raw["requests"])


@real
@pytest.mark.usefixtures("here")
def test_lmcache_agents() -> None:
    workload = w.load("lmcache-agent")
    assert len(workload) == 402
    sessions: dict[str | None, list[str]] = {}
    for request in workload:
        assert request.text is not None
        assert request.hints.agent_step == len(sessions.setdefault(request.session, []))
        sessions[request.session].append(request.text)
    assert len(sessions) == 20
    for texts in sessions.values():
        for before, after in pairwise(texts):
            assert after.startswith(before)
    tokens = w.load("lmcache-agent", tokenize=lambda text: list(text.encode()))
    assert tokens.outputs is not None
    for request in tokens:
        assert request.text is None
        assert len(tokens.outputs[request.request_id]) == request.sampling.max_tokens
    assert tokens.describe()["repeated_blocks"] > 0.8


@real
@pytest.mark.usefixtures("here")
def test_llmservingsim_and_the_runs_of_vllm() -> None:
    workload = w.load("sharegpt-llama-3.1-8b")
    said = workload.describe(16)
    assert (said["requests"], said["input_tokens"]) == (300, 257_239)
    assert (said["blocks"] - said["unique_blocks"]) * 16 == 19_520
    assert workload.outputs is not None
    assert all(len(workload.outputs[r.request_id]) == r.sampling.max_tokens for r in workload)
    run = w.load("vllm:rtxpro6000-llama-3.1-8b")
    assert [list(r.prompt) for r in run] == [list(r.prompt) for r in workload]
    assert run.outputs is not None
    assert [run.outputs[r.request_id] for r in run] == [workload.outputs[r.request_id] for r in workload]
    assert not run.content_ids
    assert run.requests[0].arrival == 0
    for a, b in zip(run, workload, strict=True):
        assert a.arrival == pytest.approx(b.arrival - workload.requests[0].arrival, abs=0.02)
    lengths = w.load("vllm:rtxpro6000-llama-3.1-8b", tokens=False)
    assert lengths.content_ids
    assert lengths.outputs is None
    assert [len(r.prompt) for r in lengths] == [len(r.prompt) for r in run]
    with pytest.raises(WorkloadError, match=r"not what the prompts in its dataset have"):
        w.load(
            "vllm:rtxpro6000-llama-3.1-8b", dataset=DATA / "workloads/sharegpt-qwen3-32b-300-sps10.jsonl.gz"
        )
    with pytest.raises(WorkloadError, match=r"no measurement"):
        w.load("vllm:rtxpro")


@real
@pytest.mark.usefixtures("here")
def test_every_trace_here_is_found_out_by_what_it_holds() -> None:
    for row in w.list_traces():
        if row["here"]:
            assert traces.detect(Path(row["where"])) == row["format"]


# ---- by hand, format by format -------------------------------------------------------------------------------------


def test_mooncake_by_hand(write: Write) -> None:
    file = write(
        "t.jsonl",
        mooncake_row(timestamp=6000, hash_ids=[0, 2]),
        "",
        mooncake_row(),
        mooncake_row(input_length=512, hash_ids=[0]),
    )
    workload = w.load(file)
    assert workload.name == "t"
    assert [(r.request_id, r.arrival) for r in workload] == [
        ("mooncake-3", 3),
        ("mooncake-4", 3),
        ("mooncake-1", 6),
    ]
    first = workload.requests[0]
    assert first.prompt == HashedPrompt([0, 1], 600, 512)
    assert (first.sampling.max_tokens, first.sampling.ignore_eos, first.hints.output_len) == (5, True, 5)
    assert len(w.load(file, limit=2)) == 2
    with pytest.raises(WorkloadError, match=r"t.jsonl:1: 600 tokens need 10 hash_ids, not 2"):
        w.load(file, hash_block=64)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"input_length": 0}, "input_length must be a whole number from 1"),
        ({"input_length": -5}, "input_length must be"),
        ({"input_length": None}, "input_length must be .* not None"),
        ({"input_length": True}, "input_length must be .* not True"),
        ({"input_length": 600.0}, "input_length must be .* not 600.0"),
        ({"input_length": 10**30}, "input_length must be"),
        ({"output_length": 0}, "output_length must be"),
        ({"output_length": "5"}, "output_length must be .* not '5'"),
        ({"timestamp": -1}, "timestamp must be a number from 0"),
        ({"timestamp": 10**400}, "timestamp must be a number"),
        ({"hash_ids": [0]}, "600 tokens need 2 hash_ids, not 1"),
        ({"hash_ids": [0, 1.5]}, "hash_ids must be a list of whole numbers"),
        ({"hash_ids": [0, -1]}, "hash_ids must be a list of whole numbers"),
        ({"hash_ids": "01"}, "hash_ids must be a list of whole numbers"),
        ({"hash_ids": [True, False]}, "hash_ids must be a list of whole numbers"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(write: Write, changes: dict[str, Any], said: str) -> None:
    file = write("t.jsonl", mooncake_row(), "", mooncake_row(**changes), mooncake_row())
    with pytest.raises(WorkloadError, match=rf"t\.jsonl:3: {said}"):
        w.load(file)
    kept = w.load(file, skip_bad=True)
    assert [r.request_id for r in kept] == ["mooncake-1", "mooncake-4"]
    assert kept.num_skipped == 1
    assert kept.skipped[0][0] == 3
    assert "t.jsonl:3:" in kept.skipped[0][1]
    assert "1 bad lines were skipped" in kept.description


@pytest.mark.parametrize("broken", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(write: Write, broken: str) -> None:
    line = json.dumps(mooncake_row()).replace("3000", broken)
    with pytest.raises(WorkloadError, match=r"t.jsonl:2: "):
        w.load(write("t.jsonl", mooncake_row(), line))


@pytest.mark.parametrize(
    "line", ["{", "[1, 2]", "null", "x", '{"a": 1}}', "[" * 100_000, "1" * 5000, '{"a": ' * 5000]
)
def test_lines_that_are_no_objects(write: Write, line: str) -> None:
    file = write("t.jsonl", mooncake_row(), line)
    with pytest.raises(WorkloadError, match=r"t.jsonl:2: ") as caught:
        w.load(file)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)
    assert w.load(file, skip_bad=True).num_skipped == 1


def test_only_the_first_few_skipped_lines_are_kept(write: Write) -> None:
    workload = w.load(write("t.jsonl", mooncake_row(), *["{"] * 500), skip_bad=True)
    assert workload.num_skipped == 500
    assert len(workload.skipped) == 10
    with pytest.raises(WorkloadError, match=r"no requests in it; 3 were skipped, first: .*:1: "):
        w.load(write("bad.jsonl", *["{"] * 3), skip_bad=True, format="mooncake")


def test_encodings_and_compression(tmp_path: Path) -> None:
    text = "".join(json.dumps(mooncake_row()) + "\r\n" for _ in range(3))
    good = tmp_path / "bom.jsonl"
    good.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert len(w.load(good)) == 3
    # The content counts, not the name.
    packed = tmp_path / "packed.jsonl"
    packed.write_bytes(gzip.compress(text.encode()))
    assert len(w.load(packed)) == 3
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(text.encode() + b'{"x": "\xe9"}\n')
    with pytest.raises(WorkloadError, match=r"latin.jsonl:4: not UTF-8 text"):
        w.load(latin)
    assert w.load(latin, skip_bad=True).num_skipped == 1
    noise = "".join(
        json.dumps(mooncake_row(hash_ids=[random.Random(i).getrandbits(60), i])) + "\n" for i in range(99)
    )
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(noise.encode())[:-200])
    for skip_bad in (False, True):
        with pytest.raises(WorkloadError, match=r"cut.jsonl.gz:\d+: damaged or cut off here"):
            w.load(cut, skip_bad=skip_bad)
    corrupt = tmp_path / "corrupt.jsonl.gz"
    corrupt.write_bytes(b"\x1f\x8b" + b"\x00" * 50)
    with pytest.raises(WorkloadError, match=r"damaged"):
        w.load(corrupt)
    zst = tmp_path / "t.jsonl.zst"
    zst.write_bytes(b"\x28\xb5\x2f\xfd rest")
    with pytest.raises(WorkloadError, match=r"zstd -d"):
        w.load(zst)
    utf16 = tmp_path / "utf16.jsonl"
    utf16.write_bytes(text.encode("utf-16"))
    with pytest.raises(WorkloadError):
        w.load(utf16)


AZURE_2023 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens",
    "2023-11-16 18:17:04.0319600,3180,8",
    "2023-11-16 18:17:03.9799600,4808,10",
)
AZURE_2024 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens",
    "2024-05-10 00:00:00.009930+00:00,2162,5",
    "2024-05-10 01:00:00+01:00,2399,6",
    "2024-05-10T00:00:01Z,7,1",
)


def test_azure_by_hand(write: Write) -> None:
    old = w.load(write("old.csv", *AZURE_2023))
    assert [(r.request_id, len(r.prompt)) for r in old] == [("azure-3", 4808), ("azure-2", 3180)]
    assert [r.sampling.max_tokens for r in old] == [10, 8]
    assert [r.arrival for r in old] == pytest.approx([0, 0.052])
    new = w.load(write("new.csv", *AZURE_2024))
    assert [r.arrival for r in new] == pytest.approx([0, 0.00993, 1])
    assert len({r.prompt for r in new}) == 3
    day = "2023-11-16"
    bad_lines = ["x,5,5", ",5,5", f"{day},5", f"{day},5,0", f"{day},5,-1", f"{day},1_0,5", f"{day},nan,5"]
    for bad in [*bad_lines, "2023-13-16 00:00,5,5", f'"{day},5,5']:
        with pytest.raises(WorkloadError, match=r"bad.csv:3: "):
            w.load(write("bad.csv", *AZURE_2023[:2], bad))
    assert (
        len(w.load(write("edge.csv", AZURE_2023[0], "0001-01-01 00:00:00+14:00,5,5", "9999-12-31,5,5"))) == 2
    )


def test_vidur_by_hand(write: Write) -> None:
    file = write(
        "v.csv", "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio", "37,5,42,7.4", "2,1,3,2.0"
    )
    assert [(len(r.prompt), r.sampling.max_tokens, r.arrival) for r in w.load(file)] == [
        (37, 5, 0),
        (2, 1, 0),
    ]
    assert w.load(file, rate=1.0, seed=1) != w.load(file, rate=1.0, seed=2)


BURST_OLD = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
    "5,ChatGPT,472,18,490,Conversation log",
    "45,GPT-4,1087,230,1317,API log",
)
BURST_NEW = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type",
    "100.0,aa,4,GPT-4,10,3,13,Conversation log",
    "103.0,,2,GPT-4,10,3,13,API log",
    "110.0,aa,,ChatGPT,30,3,33,Conversation log",
    "120.0,aa,1,GPT-4,40,3,43,Conversation log",
    "120.5,aa,1,GPT-4,40,3,43,Conversation log",
)


def test_burstgpt_by_hand(write: Write) -> None:
    old = w.load(write("old.csv", *BURST_OLD))
    assert [(r.arrival, r.request_class, r.session) for r in old] == [
        (0, "Conversation log", None),
        (40, "API log", None),
    ]
    assert [len(r.prompt) for r in w.load(write("old.csv", *BURST_OLD), model="gpt-4", limit=1)] == [1087]
    file = write("new.csv", *BURST_NEW)
    assert [r.session for r in w.load(file)] == ["aa", None, "aa", "aa", "aa"]
    closed = w.load(file, closed_loop=True)
    # The answer before the fourth row has no known end, so that row comes at its own time.
    assert [r.follows for r in closed] == [None, None, "burstgpt-2", None, "burstgpt-5"]
    assert [r.think_time for r in closed] == [0, 0, 6, 0, 0]
    with pytest.raises(WorkloadError, match=r"missing: Session ID, Elapsed time"):
        w.load(write("old.csv", *BURST_OLD), closed_loop=True)
    failed = write("failed.csv", *BURST_OLD, "46,GPT-4,9,0,9,API log")
    with pytest.raises(WorkloadError, match=r"failed.csv:4: Response tokens must be"):
        w.load(failed)
    assert len(w.load(failed, skip_bad=True)) == 2


def bailian_row(chat: int, parent: int, ids: list[int], tokens: int, **changes: Any) -> dict[str, Any]:
    row = {"chat_id": chat, "parent_chat_id": parent, "timestamp": chat / 2, "input_length": tokens}
    return {**row, "output_length": 4, "type": "text", "turn": 1, "hash_ids": ids, **changes}


def ids_of(workload: w.Workload) -> list[tuple[int, ...]]:
    return [r.prompt.hash_ids for r in workload]  # type: ignore[attr-defined]


def test_bailian_by_hand(write: Write) -> None:
    rows = [
        bailian_row(1, -1, [5, 6], 32),
        bailian_row(2, 1, [5, 6, 7], 40, type="search"),
        bailian_row(4, 2, [5, 6, 8], 48),
        bailian_row(9, 77, [5], 20),  # the parent is not in the trace, the partial block has no id
    ]
    workload = w.load(write("qwen_coder_blksz_16.jsonl", *rows))
    assert [r.session for r in workload] == ["chat-1", "chat-1", "chat-1", "chat-9"]
    assert [r.request_class for r in workload] == ["text", "search", "text", "text"]
    assert [r.arrival for r in workload] == [0.5, 1, 2, 4.5]
    assert ids_of(workload) == [(5, 6), (5, 6, 7), (5, 6, 8), (5, 9)]
    with pytest.raises(WorkloadError, match=r":5: chat_id '9' comes twice"):
        w.load(write("twice.jsonl", *rows, rows[3]))


def test_bailian_content_hashes_are_chained_anew(write: Write) -> None:
    rows = [
        bailian_row(1, -1, [5, 6], 32),
        bailian_row(2, -1, [7, 6], 32),  # the block 6 after another beginning
        bailian_row(3, -1, [5, 6, 6], 40),
    ]
    anew = [(0, 1), (2, 3), (0, 1, 4)]
    assert ids_of(w.load(write("qwen_traceA_blksz_16.jsonl", *rows))) == anew
    plain = write("other.jsonl", *rows)
    assert ids_of(w.load(plain, hashes="content")) == anew
    with pytest.raises(
        WorkloadError, match=r"other.jsonl:2: hash id 6 stands after different blocks.*hashes='content'"
    ):
        w.load(plain)
    with pytest.raises(WorkloadError, match=r"hashes must be one of"):
        w.load(plain, hashes="both")


def test_chats_in_a_circle_are_one_session(write: Write) -> None:
    rows = [
        bailian_row(1, 2, [1], 16),
        bailian_row(2, 3, [1], 16),
        bailian_row(3, 1, [1], 16),
        bailian_row(4, 3, [1], 9),
    ]
    rows[3]["hash_ids"] = []
    assert len({r.session for r in w.load(write("b.jsonl", *rows))}) == 1


def weka_call(t: float, tokens: int, ids: list[int], **more: Any) -> dict[str, Any]:
    return {"t": t, "type": "n", "in": tokens, "out": 3, "hash_ids": ids, "api_time": 2.0, **more}


def weka_session(name: str, *requests: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": name, "block_size": 64, "hash_id_scope": "local", "requests": list(requests), **more}


def test_weka_sub_agents(tmp_path: Path) -> None:
    session = weka_session(
        "s",
        weka_call(0, 64, [1]),
        weka_call(5, 130, [1, 2], think_time=3.0),
        {
            "t": 8,
            "type": "subagent",
            "requests": [
                weka_call(8, 70, [1]),
                weka_call(11, 100, [1]),
                {"type": "subagent", "requests": []},
            ],
        },
        weka_call(20, 200, [1, 2, 3], out=0, api_time=None),
        weka_call(21, 200, [1, 2, 3], think_time=1.5),
    )
    for file in (tmp_path / "s.json", tmp_path / "s.json.gz"):
        text = json.dumps(session, indent=1).encode()
        file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)
        workload = w.load(file)
        assert [r.request_class for r in workload] == [
            "agent",
            "agent",
            "subagent",
            "subagent",
            "agent",
            "agent",
        ]
        assert [r.follows for r in workload] == [None, "s-0", "s-1", "s-2", "s-3", "s-3"]
        assert [r.think_time for r in workload] == [0, 3, 1, 1, 7, 8]
        assert [r.sampling.max_tokens for r in workload] == [3, 3, 3, 3, 1, 3]
        assert workload.requests[0].prompt.hash_ids[0] == workload.requests[2].prompt.hash_ids[0]  # type: ignore[attr-defined]
        partial = [r.prompt.hash_ids[-1] for r in workload if len(r.prompt) % 64]  # type: ignore[attr-defined]
        assert len(set(partial)) == len(partial)


def test_weka_ids_are_local_unless_they_are_global(tmp_path: Path) -> None:
    for scope, shared in (("local", 0), ("global", 2)):
        folder = tmp_path / scope
        folder.mkdir()
        for name in "ab":
            session = weka_session(name, weka_call(0, 128, [0, 7]), hash_id_scope=scope)
            (folder / f"{name}.json").write_text(json.dumps(session))
        a, b = (set(ids) for ids in ids_of(w.load(folder)))
        assert len(a & b) == shared


def test_weka_names_the_place(tmp_path: Path) -> None:
    good, bad = weka_call(0, 64, [1]), weka_call(1, 64, [1, 2, 3])
    inner = {"type": "subagent", "requests": [good, bad]}
    file = tmp_path / "s.json"
    file.write_text(json.dumps(weka_session("s", good, inner)))
    with pytest.raises(
        WorkloadError, match=r"s.json: requests\[1\].requests\[1\]: 64 tokens in blocks of 64"
    ):
        w.load(file)
    assert len(w.load(file, skip_bad=True)) == 2
    for name in ("s.json", "t.json"):
        (tmp_path / name).write_text(json.dumps(weka_session("s", good)))
    with pytest.raises(WorkloadError, match=r"t.json: session 's' comes twice"):
        w.load(tmp_path)
    deep: dict[str, Any] = weka_session("s")
    for _ in range(40):
        deep = {"requests": [deep]}
    file.write_text(json.dumps(deep))
    with pytest.raises(WorkloadError, match=r"levels deep"):
        w.load(file)


def lmcache_row(micros: int, prompt: str, session: str = "s") -> dict[str, Any]:
    return {"timestamp": micros, "input": prompt, "output": "answer é", "session_id": session}


def test_lmcache_by_hand(write: Write, tmp_path: Path) -> None:
    rows = [lmcache_row(3_000_000, "ab"), lmcache_row(1_000_000, "a"), lmcache_row(2_500_000, "x", "other")]
    file = write("s.jsonl", *rows)
    workload = w.load(file)
    assert [r.request_id for r in workload] == ["s-0", "other-0", "s-1"]
    assert [(r.text, r.arrival) for r in workload] == [("a", 0), ("x", 1.5), ("ab", 2)]
    assert [r.sampling.max_tokens for r in workload] == [2] * 3
    tar = tmp_path / "all.tar"
    with tarfile.open(tar, "w") as packed:
        packed.add(file, "x/s.jsonl")
        packed.add(tmp_path, "x/folder", recursive=False)
    assert w.load(tar).requests == workload.requests
    cut = tmp_path / "cut.tar.gz"
    whole = gzip.compress(tar.read_bytes())
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WorkloadError, match=r"cut"):
        w.load(cut, format="lmcache-agent")
    with pytest.raises(WorkloadError, match=r"s.jsonl:4: input holds half a character"):
        w.load(write("s.jsonl", *rows, lmcache_row(1, "\ud800")))


def servingsim_row(**changes: Any) -> dict[str, Any]:
    row = {"input_toks": 2, "output_toks": 1, "arrival_time_ns": 5 * 10**8}
    return {**row, "input_tok_ids": [1, 2], "output_tok_ids": [3], **changes}


def test_llmservingsim_by_hand(write: Write) -> None:
    workload = w.load(write("s.jsonl", servingsim_row(), servingsim_row(input_tok_ids=[4, 5])))
    assert [(list(r.prompt), r.arrival) for r in workload] == [([1, 2], 0.5), ([4, 5], 0.5)]
    assert workload.outputs == {"request-1": [3], "request-2": [3]}
    lengths = {k: v for k, v in servingsim_row().items() if not k.endswith("ids")}
    assert w.load(write("s.jsonl", lengths)).outputs is None
    for bad in (servingsim_row(input_tok_ids=[1]), servingsim_row(output_tok_ids=[]), lengths):
        with pytest.raises(WorkloadError, match=r"s.jsonl:2: "):
            w.load(write("s.jsonl", servingsim_row(), bad))


def test_prompts_of_your_own(write: Write) -> None:
    rows = [
        {"prompt": [1, 2, 3], "max_tokens": 2, "id": "a", "output": [7, 8], "session": "s"},
        {"prompt": "def f():", "arrival": 0.5},
        {"prompt": [1], "follows": "a", "think_time": 2, "max_tokens": 1},
    ]
    workload = w.load(write("own.jsonl", *rows))
    assert [r.request_id for r in workload] == ["a", "line-3", "line-2"]
    assert workload.outputs == {"a": [7, 8]}
    assert workload.requests[1].follows == "a"
    assert workload.requests[2].text == "def f():"
    bad: list[dict[str, Any]] = [
        {"prompt": []},
        {"prompt": ""},
        {"prompt": 5},
        {"prompt": [1], "id": "a"},
        {"prompt": [1], "follows": "later"},
        {"prompt": [1], "max_tokens": 0},
        {"prompt": [1], "arrival": "now"},
        {"prompt": [1], "output": [1, 2]},
    ]
    for row in bad:
        with pytest.raises(WorkloadError, match=r"own.jsonl:4: "):
            w.load(write("own.jsonl", *rows, row), format="tokens")


def test_vllm_by_hand(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    row = {"request_id": "bench-0", "input_toks": 9, "output_toks": 2, "arrival_time": 1777142838.3}
    (run / "requests.jsonl").write_text(json.dumps(row) + "\n")
    for meta in (
        None,
        "{}",
        '{"dataset_path": "../../etc/passwd", "dataset_hash": "0"}',
        '{"dataset_path": 5}',
    ):
        if meta is not None:
            (run / "meta.json").write_text(meta)
        workload = w.load(run)
        assert (workload.name, len(workload.requests[0].prompt), workload.requests[0].arrival) == (
            "run",
            9,
            0,
        )
    (run / "meta.json").write_text("[]")
    with pytest.raises(WorkloadError, match=r"meta.json: must be a JSON object"):
        w.load(run)
    (run / "requests.jsonl").write_text((json.dumps(row) + "\n") * 2)
    with pytest.raises(WorkloadError, match=r"requests.jsonl:2: request_id 'bench-0' comes twice"):
        w.load(run, tokens=False)


# ---- finding -------------------------------------------------------------------------------------------------------


def test_formats_are_found_out(write: Write) -> None:
    samples: dict[str, tuple[Any, ...]] = {
        "azure": AZURE_2024,
        "vidur": ("num_prefill_tokens,num_decode_tokens", "1,1"),
        "burstgpt": BURST_NEW,
        "mooncake": (mooncake_row(),),
        "bailian": (bailian_row(1, -1, [5], 16),),
        "llmservingsim": (servingsim_row(),),
        "lmcache-agent": (lmcache_row(1, "x"),),
        "weka": (weka_session("s", weka_call(0, 64, [1])),),
        "tokens": ({"prompt": "x"},),
        "vllm": ({"request_id": "a", "input_toks": 1, "output_toks": 1, "arrival_time": 1.0},),
    }
    assert set(samples) == set(traces.FORMATS)
    for format, rows in samples.items():
        file = write("any.name", *rows)
        assert traces.detect(file) == format
        assert w.load(file) == w.load(file, format=format)


def test_what_cannot_be_found(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEDLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PAGEDLAB_DATA", "nowhere")
    with pytest.raises(WorkloadError, match=r"fetch it with: pagedlab data fetch mooncake-synthetic"):
        w.load("mooncake-synthetic")
    with pytest.raises(WorkloadError, match=r"PAGEDLAB_DATA"):
        w.load("sharegpt-qwen3-32b")
    with pytest.raises(WorkloadError, match=r"did you mean 'mooncake-conversation'"):
        w.load("mooncake-conversatio")
    with pytest.raises(WorkloadError, match=r"no file 'no/such.jsonl'"):
        w.load("no/such.jsonl")
    for odd in ("a\0b", "x" * 5000, ""):
        with pytest.raises(WorkloadError):
            w.load(odd, format="mooncake")
    with pytest.raises(WorkloadError, match=r"did you mean 'mooncake'"):
        w.load(write("t.jsonl", mooncake_row()), format="moncake")
    with pytest.raises(WorkloadError, match=r"did you mean 'skip_bad'"):
        w.load(write("t.jsonl", mooncake_row()), skipbad=True)
    for rows in ((), ("",), ("a,b,c",), ({"a": 1},)):
        with pytest.raises(WorkloadError):
            w.load(write("unknown", *rows))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(WorkloadError, match=r"neither"):
        w.load(empty)
    with pytest.raises(WorkloadError, match=r"hash_block must be a whole number of at least 1"):
        w.load(write("t.jsonl", mooncake_row()), hash_block=0)
    with pytest.raises(WorkloadError, match=r"limit"):
        w.load(write("t.jsonl", mooncake_row()), limit=0)


def test_what_was_fetched_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEDLAB_CACHE", str(tmp_path))
    monkeypatch.setenv("PAGEDLAB_DATA", "nowhere")
    folder = tmp_path / "mooncake-synthetic"
    folder.mkdir()
    (folder / "synthetic_trace.jsonl").write_text(json.dumps(mooncake_row()) + "\n")
    assert w.load("mooncake-synthetic").name == "mooncake-synthetic"
    row = next(r for r in data.list_data() if r["name"] == "mooncake-synthetic")
    assert row["here"]
    assert row["size"] > 0


# ---- garbage -------------------------------------------------------------------------------------------------------

ROWS: dict[str, list[Any]] = {
    "azure": list(AZURE_2024),
    "vidur": ["num_prefill_tokens,num_decode_tokens", "12,3", "5,1"],
    "burstgpt": list(BURST_NEW),
    "mooncake": [mooncake_row(), mooncake_row(timestamp=1, hash_ids=[0, 3])],
    "bailian": [bailian_row(1, -1, [5, 6], 32), bailian_row(2, 1, [5, 6, 7], 40)],
    "llmservingsim": [servingsim_row(), servingsim_row(arrival_time_ns=3)],
    "lmcache-agent": [lmcache_row(5, "ab"), lmcache_row(2, "a")],
    "weka": [
        weka_session("s", weka_call(0, 64, [1]), {"type": "subagent", "requests": [weka_call(3, 70, [1])]})
    ],
    "tokens": [{"prompt": "x", "id": "a"}, {"prompt": [1, 2], "follows": "a", "think_time": 1}],
    "vllm": [{"request_id": "a", "input_toks": 1, "output_toks": 1, "arrival_time": 1.0}],
}

fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
odd_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def only_workload_errors(file: Path, **params: Any) -> None:
    """Reading may succeed or be refused in one line, with the file's name in it."""
    for skip_bad in (False, True):
        try:
            workload = traces.read(file, skip_bad=skip_bad, **params)
        except WorkloadError as error:
            message = str(error)
        else:
            message = ""
            assert len({r.request_id for r in workload}) == len(workload) > 0
            assert [r.arrival for r in workload] == sorted(r.arrival for r in workload)
            ids = {r.request_id for r in workload}
            assert all(r.follows is None or r.follows in ids for r in workload)
            assert all(r.text or len(r.prompt) for r in workload)
        assert "\n" not in message
        assert len(message) < 1000


@fuzz
@given(raw=st.binary(max_size=300), format=st.sampled_from([None, *traces.FORMATS]))
@example(raw=b"\x1f\x8b", format=None)
@example(raw=b"\xef\xbb\xbf", format=None)
def test_random_bytes(tmp_path: Path, raw: bytes, format: str | None) -> None:
    file = tmp_path / "noise"
    file.write_bytes(raw)
    only_workload_errors(file, format=format)


@fuzz
@given(raw=st.data(), format=st.sampled_from(list(traces.FORMATS)), packed=st.booleans())
def test_mutated_bytes(tmp_path: Path, raw: st.DataObject, format: str, packed: bool) -> None:
    text = "".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in ROWS[format])
    content = bytearray(gzip.compress(text.encode(), mtime=0) if packed else text.encode())
    for _ in range(raw.draw(st.integers(1, 6))):
        at = raw.draw(st.integers(0, len(content) - 1))
        match raw.draw(st.integers(0, 2)):
            case 0:
                content[at] = raw.draw(st.integers(0, 255))
            case 1:
                content[at:at] = raw.draw(st.binary(max_size=8))
            case _:
                del content[at : at + raw.draw(st.integers(1, 20))]
        content = content or bytearray(b" ")
    file = tmp_path / "mutated"
    file.write_bytes(content)
    only_workload_errors(file)
    only_workload_errors(file, format=format)


@fuzz
@given(raw=st.data(), format=st.sampled_from([f for f, rows in ROWS.items() if isinstance(rows[0], dict)]))
def test_odd_values_in_good_lines(tmp_path: Path, raw: st.DataObject, format: str) -> None:
    rows = json.loads(json.dumps(ROWS[format]))
    places = [(holder, key) for row in rows for holder, key in _places(row)]
    for holder, key in raw.draw(st.lists(st.sampled_from(places), min_size=1, max_size=3)):
        if isinstance(holder, dict) and raw.draw(st.booleans()):
            holder.pop(key, None)
        elif isinstance(holder, dict) or key < len(holder):
            holder[key] = raw.draw(odd_values)
    file = tmp_path / "odd"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    only_workload_errors(file, format=format)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) within a JSON value."""
    keys = (
        list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    )
    return [(value, k) for k in keys] + [place for k in keys for place in _places(value[k])]


@fuzz
@given(raw=st.binary(max_size=100), at=st.integers(0, 10_000))
def test_mutated_tars(tmp_path: Path, raw: bytes, at: int) -> None:
    buffer = io.BytesIO()
    line = json.dumps(lmcache_row(1, "a")).encode()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("s.jsonl")
        info.size = len(line)
        tar.addfile(info, io.BytesIO(line))
    content = bytearray(buffer.getvalue())
    content[at : at + len(raw)] = raw
    file = tmp_path / "mutated.tar"
    file.write_bytes(content[: max(600, 10_000 - at)])
    only_workload_errors(file, format="lmcache-agent")


@fuzz
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 10**7), st.integers(1, 5000), st.integers(1, 2000), st.integers(0, 10**9)),
        min_size=1,
        max_size=20,
    )
)
def test_what_is_written_is_read(tmp_path: Path, rows: list[tuple[int, int, int, int]]) -> None:
    lines = [
        mooncake_row(timestamp=at, input_length=n, output_length=m, hash_ids=list(range(h, h + -(-n // 512))))
        for at, n, m, h in rows
    ]
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in lines))
    workload = w.load(file)
    expected = sorted(zip(lines, range(1, len(lines) + 1), strict=True), key=lambda x: x[0]["timestamp"])
    for request, (row, number) in zip(workload, expected, strict=True):
        assert request.request_id == f"mooncake-{number}"
        assert request.arrival == row["timestamp"] / 1000
        assert request.prompt == HashedPrompt(row["hash_ids"], row["input_length"], 512)
        assert request.sampling.max_tokens == row["output_length"]
