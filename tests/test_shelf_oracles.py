"""The shelf against outside numbers: miss ratios of the same streams as another simulator counts them."""

from __future__ import annotations

import csv
import os
from functools import cache
from typing import Any

import pytest
from test_replay import beside

import pagedlab as pl
from pagedlab.lab.accesses import Accesses, accesses
from pagedlab.registry import make

EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "Clock": ("clock", {}),
    "LFU": ("lfu", {}),
    "SLRU": ("slru", {"segments": 4, "protected": 0.75, "variant": "libcachesim"}),
    "TwoQ": ("2q", {}),
    "ARC": ("arc", {}),
    "LIRS": ("lirs", {"variant": "libcachesim"}),
    "S3FIFO": ("s3-fifo", {"variant": "libcachesim"}),
    "Sieve": ("sieve", {}),
    "MQ": ("mq", {}),
    "LRUK(default)": ("lru-k", {"history": 0}),
}
"""Four decimals, with the parameters behind the numbers."""
CLOSE: dict[str, tuple[str, dict[str, Any], float]] = {
    "GDSF": ("gdsf", {}, 0.001),
    "Hyperbolic": ("hyperbolic", {}, 0.005),
    "LFUDA": ("lfu-da", {"variant": "libcachesim"}, 0.005),
    "Random": ("random", {}, 0.01),
    "WTinyLFU": ("w-tinylfu", {"variant": "libcachesim"}, 0.01),
}
"""Within so much: they draw at random, or depend on details that are not published."""
ORDERS = ("prefix_first", "tail_first")


@cache
def conversation() -> Accesses:
    beside("PAGEDLAB_DATA", "data")
    return accesses("mooncake-conversation")


def oracle(file: str) -> list[dict[str, str]]:
    with (beside("PAGEDLAB_ORACLES", "oracles") / file).open() as text:
        return list(csv.DictReader(text))


def check(trace: Accesses, row: dict[str, str], order: str) -> None:
    name, params, within = {**{k: (*v, 0.00005) for k, v in EXACT.items()}, **CLOSE}[row["policy"]]
    point = pl.replay(
        trace,
        make("eviction", name, **params),  # type: ignore[arg-type]
        int(row["cache_blocks"]),
        semantics="plain",
        touch_order=order,  # type: ignore[arg-type]
        progress=False,
    )
    assert point.miss_ratio == pytest.approx(float(row["request_miss_ratio"]), abs=within), row


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("policy", [*EXACT, *CLOSE])
def test_conversations(policy: str, order: str) -> None:
    rows = [r for r in oracle("replay_miss_ratio.csv") if (r["policy"], r["touch_order"]) == (policy, order)]
    if os.environ.get("HYPOTHESIS_PROFILE") != "nightly":
        quick = "50000" if order == "prefix_first" else "5000"
        rows = [r for r in rows if r["cache_blocks"] == quick]
    assert rows
    for row in rows:
        check(conversation(), row, order)


@pytest.mark.parametrize("stream", ["zipf", "scan_loop"])
def test_synthetic_streams(stream: str) -> None:
    trace = accesses(beside("PAGEDLAB_ORACLES", "oracles") / f"{stream}.txt.gz")
    known = {"SLRU": "SLRU", "LRUK": "LRUK(default)"}
    rows = [r for r in oracle("replay_miss_ratio_synthetic.csv") if r["stream"] == stream]
    sizes = sorted({int(r["cache_blocks"]) for r in rows})
    checked = 0
    for row in rows:
        row["policy"] = known.get(row["policy"], row["policy"])
        if row["policy"] in {*EXACT, *CLOSE} and int(row["cache_blocks"]) == sizes[len(sizes) // 2]:
            check(trace, row, "prefix_first")
            checked += 1
    assert checked >= 10
