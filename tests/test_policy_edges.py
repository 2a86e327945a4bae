"""Policies of every slot at their edges: full, empty, asked twice, given what they cannot use."""

from __future__ import annotations

import pytest

from pagedlab.errors import ConfigError
from pagedlab.policies import kernel
from pagedlab.registry import make


def test_auto_takes_the_fastest_kernel_that_serves_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = make("kernel", "auto")
    assert auto.resolve("cpu", "float32") == make("kernel", "cpu-paged")
    monkeypatch.setattr(kernel, "find_spec", lambda name: object() if name == "triton" else None)
    assert auto.resolve("cuda:0", "bfloat16") == make("kernel", "triton-paged")
    assert auto.resolve("cuda", "float64") == make("kernel", "gather-sdpa")
    monkeypatch.setattr(kernel, "find_spec", lambda name: None)
    assert auto.resolve("cuda", "bfloat16") == make("kernel", "gather-sdpa")
    with pytest.raises(ConfigError, match="needs triton"):
        make("kernel", "triton-paged").resolve("cuda", "bfloat16")
