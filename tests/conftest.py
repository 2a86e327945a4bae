"""Profiles and fixtures of the whole suite.

``HYPOTHESIS_PROFILE`` chooses how deep the property tests go: ``dev`` (quick), ``ci`` (thorough, the same examples
every time), ``nightly`` (deep), ``mutants`` (quick, without shrinking).
Without it, ``ci`` where the variable CI is set, else ``dev``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

# Thread pools must be sized before the libraries that keep them are imported. One thread is the fastest for models as
# small as the tests', and two that wait for each other on a busy machine are slower by orders of magnitude.
NUM_THREADS = 1
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, str(NUM_THREADS))
os.environ.setdefault("NUMBA_NUM_THREADS", str(max(1, min(2, os.cpu_count() or 1))))
# Without a GPU Triton kernels run in its interpreter, which must be known before triton is first imported.
if not any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Nor do results depend on what was measured on this machine once.
os.environ.setdefault("PAGEDLAB_TUNING", "off")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

_COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
}
settings.register_profile("dev", max_examples=40, stateful_step_count=30, **_COMMON)
settings.register_profile(
    "ci", max_examples=150, stateful_step_count=50, derandomize=True, print_blob=True, **_COMMON
)
settings.register_profile(  # benchmarks/mutants.py: a failure counts, its smallest example does not
    "mutants",
    max_examples=25,
    stateful_step_count=30,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    **_COMMON,
)
settings.register_profile("nightly", max_examples=4000, stateful_step_count=80, print_blob=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


@pytest.fixture(scope="session")
def torch_threads() -> int:
    """Import torch and numba, size their pools, and return the number of threads."""
    torch = pytest.importorskip("torch")
    numba = pytest.importorskip("numba")
    torch.set_num_threads(NUM_THREADS)
    numba.set_num_threads(NUM_THREADS)
    return NUM_THREADS


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The folder of the embedded model."""
    folder = HERE.parent / "pagedlab" / "models" / "tiny"
    if not (folder / "model.safetensors").is_file():
        pytest.skip("the embedded model is not built: no pagedlab/models/tiny/model.safetensors")
    return folder


@pytest.fixture(scope="session")
def data_path() -> Path:
    """The folder of real traces, which does not ship: named by the variable PAGEDLAB_DATA."""
    named = os.environ.get("PAGEDLAB_DATA")
    if not named:
        pytest.skip("PAGEDLAB_DATA is not set: real traces are not at hand")
    folder = Path(named)
    if not folder.is_dir():
        pytest.skip(f"PAGEDLAB_DATA names {named!r}, which is no folder")
    return folder
