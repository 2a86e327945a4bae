"""`import pagedlab` costs next to nothing and loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numba", "pandas", "matplotlib", "triton", "pyarrow", "ipywidgets")


def loaded_by(code: str) -> set[str]:
    """Top-level modules that are loaded after running ``code`` in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint(' '.join(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import pagedlab",
        "import pagedlab.registry, pagedlab.events, pagedlab.errors",
        "import pagedlab.policies",
        "import pagedlab.config; pagedlab.config.Config()",
        "import pagedlab.engine.engine, pagedlab.executors.stub",
    ],
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    assert not loaded_by(code) & set(HEAVY)
