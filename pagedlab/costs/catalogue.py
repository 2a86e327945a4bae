"""Published figures of models and accelerators, under names that forgive case and punctuation.

>>> from pagedlab.costs.catalogue import find_hardware, find_model, pool_blocks
>>> find_model("meta-llama/Llama-3.1-8B-Instruct").name
'llama-3.1-8b'
>>> pool_blocks(find_model("llama-3.1-8b"), find_hardware("h100"), block_size=16)
28182

Every entry names its source. Compute is dense bfloat16 with float32 accumulation: figures "with sparsity" are
twice that and reached by no model here. Rates are bytes per second in one direction.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from math import floor, isfinite
from pathlib import Path
from typing import Any

from pagedlab.costs.shape import ModelShape
from pagedlab.errors import ConfigError, nearest

__all__ = [
    "HARDWARE",
    "MODELS",
    "Hardware",
    "ModelShape",
    "add_hardware",
    "add_model",
    "find_hardware",
    "find_model",
    "pool_blocks",
]

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One accelerator and the host it sits in.

    No datasheet of a card names what comes after the host link. Latencies and overheads are orders of magnitude, fitted
    to no run; they belong to host and engine rather than to the card, so every entry has them until somebody measures
    it. The disk is one of those that servers for such cards are sold with.
    """

    name: str
    memory_bytes: int
    """Memory as sold, in GiB; drivers and error correction keep 1 to 6% of it."""
    bandwidth: float
    """Bytes per second from and to memory."""
    flops: float
    """Dense bfloat16 FLOP/s with float32 accumulation."""
    interconnect: float
    """Bytes per second to other accelerators, one direction, as published."""
    interconnect_share: float
    """Share of ``interconnect`` that an all-reduce gets: 0.8 over NVLink or Infinity Fabric; 0.25 over PCIe,
    where cards without peer access send every byte up into host memory and down again, and both directions at
    once.
    """
    host_link: float
    """Bytes per second between host memory and the accelerator, one direction, as published."""
    host_latency_s: float = 10e-6
    """Seconds before the first byte of a copy to or from the host."""
    disk_read: float = 6.5e9
    """Bytes per second from one disk to host memory: a PCIe 4.0 NVMe drive, Samsung PM9A3 in U.2, as announced
    (6,500 MB/s).
    """
    disk_write: float = 3.5e9
    """Bytes per second to it (3,500 MB/s)."""
    disk_latency_s: float = 100e-6
    """Seconds before the first byte of a copy to or from the disk: a page of NAND flash read. An order of magnitude."""
    allreduce_latency_s: float = 20e-6
    """Seconds that an all-reduce takes beside its bytes."""
    step_overhead_s: float = 2e-3
    """Seconds of a step outside the model: scheduling, sampling, handing over."""
    layer_overhead_s: float = 30e-6
    """Seconds a layer takes beyond its bytes and FLOPs, replayed from a captured graph: some ten kernels,
    each a few microseconds from full speed. An order of magnitude, to be fitted.
    """
    prefill_layer_overhead_s: float = 150e-6
    """Seconds more a layer takes in a step with prefill: some fifteen kernels launched one by one, at ten
    microseconds each. An order of magnitude, to be fitted.
    """
    source: str = ""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("name", "source"):
                continue
            low_ok = value >= 0 if f.name.endswith("_s") else value > 0
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not isfinite(value)
                or not low_ok
            ):
                raise ConfigError(
                    f"hardware {self.name!r}: {f.name} must be a positive number, not {value!r}"
                )


# ---- models --------------------------------------------------------------------------------------------------------


def _hub(repository: str) -> str:
    return f"config.json of {repository} on the Hugging Face Hub"


def _gated(
    name: str,
    repository: str,
    layers: int,
    hidden: int,
    heads: tuple[int, int, int],
    intermediate: int,
    vocab: int,
    **more: Any,
) -> ModelShape:
    """Make a model of the Llama kind; ``heads`` is (query heads, KV heads, head size)."""
    return ModelShape(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads[0],
        kv_heads=heads[1],
        head_size=heads[2],
        intermediate=intermediate,
        vocab=vocab,
        **{"source": _hub(repository), **more},
    )


def _opt(size: str, layers: int, hidden: int, heads: int) -> ModelShape:
    return ModelShape(
        name=f"opt-{size}",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_size=hidden // heads,
        intermediate=4 * hidden,
        vocab=50272,
        tied_embeddings=True,
        gated=False,
        learned_positions=2050,
        source="Zhang et al., OPT (2022), table 1",
    )


def _moe(experts: int, per_token: int, width: int) -> dict[str, int]:
    return {"experts": experts, "experts_per_token": per_token, "expert_intermediate": width}


_LLAMA = (
    "Touvron et al., LLaMA (2023), table 2; vocabulary and MLP width from the config.json of its conversions"
)
_TIED = {"tied_embeddings": True}

MODELS: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _opt("125m", 12, 768, 12),
        _opt("1.3b", 24, 2048, 32),
        _opt("6.7b", 32, 4096, 32),
        _opt("13b", 40, 5120, 40),
        _opt("30b", 48, 7168, 56),
        _opt("66b", 64, 9216, 72),
        _opt("175b", 96, 12288, 96),
        _gated("llama-7b", "", 32, 4096, (32, 32, 128), 11008, 32000, source=_LLAMA),
        _gated("llama-13b", "", 40, 5120, (40, 40, 128), 13824, 32000, source=_LLAMA),
        _gated("llama-2-7b", "meta-llama/Llama-2-7b-hf", 32, 4096, (32, 32, 128), 11008, 32000),
        _gated("llama-2-13b", "meta-llama/Llama-2-13b-hf", 40, 5120, (40, 40, 128), 13824, 32000),
        _gated("llama-2-70b", "meta-llama/Llama-2-70b-hf", 80, 8192, (64, 8, 128), 28672, 32000),
        _gated("llama-3-8b", "meta-llama/Meta-Llama-3-8B", 32, 4096, (32, 8, 128), 14336, 128256),
        _gated("llama-3.1-8b", "meta-llama/Llama-3.1-8B", 32, 4096, (32, 8, 128), 14336, 128256),
        _gated("llama-3.1-70b", "meta-llama/Llama-3.1-70B", 80, 8192, (64, 8, 128), 28672, 128256),
        _gated("llama-3.1-405b", "meta-llama/Llama-3.1-405B", 126, 16384, (128, 8, 128), 53248, 128256),
        _gated("llama-3.2-1b", "meta-llama/Llama-3.2-1B", 16, 2048, (32, 8, 64), 8192, 128256, **_TIED),
        _gated("llama-3.2-3b", "meta-llama/Llama-3.2-3B", 28, 3072, (24, 8, 128), 8192, 128256, **_TIED),
        _gated("llama-3.3-70b", "meta-llama/Llama-3.3-70B-Instruct", 80, 8192, (64, 8, 128), 28672, 128256),
        _gated("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", 24, 896, (14, 2, 64), 4864, 151936, **_TIED),
        _gated("qwen2.5-7b", "Qwen/Qwen2.5-7B", 28, 3584, (28, 4, 128), 18944, 152064),
        _gated("qwen2.5-32b", "Qwen/Qwen2.5-32B", 64, 5120, (40, 8, 128), 27648, 152064),
        _gated("qwen2.5-72b", "Qwen/Qwen2.5-72B", 80, 8192, (64, 8, 128), 29568, 152064),
        _gated("qwen3-0.6b", "Qwen/Qwen3-0.6B", 28, 1024, (16, 8, 128), 3072, 151936, **_TIED),
        _gated("qwen3-4b", "Qwen/Qwen3-4B", 36, 2560, (32, 8, 128), 9728, 151936, **_TIED),
        _gated("qwen3-8b", "Qwen/Qwen3-8B", 36, 4096, (32, 8, 128), 12288, 151936),
        _gated("qwen3-14b", "Qwen/Qwen3-14B", 40, 5120, (40, 8, 128), 17408, 151936),
        _gated("qwen3-32b", "Qwen/Qwen3-32B", 64, 5120, (64, 8, 128), 25600, 151936),
        _gated(
            "qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", 48, 2048, (32, 4, 128), 6144, 151936, **_moe(128, 8, 768)
        ),
        _gated(
            "qwen3-235b-a22b",
            "Qwen/Qwen3-235B-A22B",
            94,
            4096,
            (64, 4, 128),
            12288,
            151936,
            **_moe(128, 8, 1536),
        ),
        _gated("mistral-7b", "mistralai/Mistral-7B-v0.1", 32, 4096, (32, 8, 128), 14336, 32000),
        _gated(
            "mixtral-8x7b",
            "mistralai/Mixtral-8x7B-v0.1",
            32,
            4096,
            (32, 8, 128),
            14336,
            32000,
            **_moe(8, 2, 14336),
        ),
        _gated("smollm2-135m", "HuggingFaceTB/SmolLM2-135M", 30, 576, (9, 3, 64), 1536, 49152, **_TIED),
        _gated("smollm2-360m", "HuggingFaceTB/SmolLM2-360M", 32, 960, (15, 5, 64), 2560, 49152, **_TIED),
        _gated("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B", 24, 2048, (32, 32, 64), 8192, 49152, **_TIED),
        _gated(
            "tiny",
            "",
            4,
            192,
            (6, 2, 32),
            512,
            2048,
            **_TIED,
            bytes_per_param=4.0,
            kv_bytes=4.0,
            source="the model that pagedlab ships: pagedlab/models/tiny/config.json",
        ),
    )
}
"""Shapes by name; `find_model` also takes other spellings, hub names and folders."""

# ---- hardware ------------------------------------------------------------------------------------------------------

_NVLINK3, _NVLINK4, _NVLINK5 = (
    300e9,
    450e9,
    900e9,
)  # half of 600, 900, 1,800 GB/s, which count both directions
_PCIE4, _PCIE5 = 32e9, 64e9  # x16, half of 64 and 128 GB/s


def _fabric(
    name: str, gib: int, bandwidth: float, flops: float, link: float, host: float, source: str
) -> Hardware:
    return Hardware(
        name=name,
        memory_bytes=gib * GIB,
        bandwidth=bandwidth,
        flops=flops,
        interconnect=link,
        interconnect_share=0.8,
        host_link=host,
        source=source,
    )


def _card(name: str, gib: int, bandwidth: float, flops: float, pcie: float, source: str) -> Hardware:
    """Make a card without a link of its own: it talks to others through PCIe."""
    return Hardware(
        name=name,
        memory_bytes=gib * GIB,
        bandwidth=bandwidth,
        flops=flops,
        interconnect=pcie,
        interconnect_share=0.25,
        host_link=pcie,
        source=source,
    )


HARDWARE: dict[str, Hardware] = {
    entry.name: entry
    for entry in (
        _fabric("a100-40gb", 40, 1.555e12, 312e12, _NVLINK3, _PCIE4, "NVIDIA A100 datasheet, SXM 40 GB"),
        _fabric("a100-80gb", 80, 2.039e12, 312e12, _NVLINK3, _PCIE4, "NVIDIA A100 datasheet, SXM 80 GB"),
        _fabric(
            "h100-sxm",
            80,
            3.35e12,
            989.4e12,
            _NVLINK4,
            _PCIE5,
            "NVIDIA H100 datasheet, SXM (1,979 TFLOP/s with sparsity)",
        ),
        _fabric(
            "h200",
            141,
            4.8e12,
            989.4e12,
            _NVLINK4,
            _PCIE5,
            "NVIDIA H200 datasheet, SXM (1,979 with sparsity)",
        ),
        _fabric(
            "b200",
            180,
            8.0e12,
            2250e12,
            _NVLINK5,
            _PCIE5,
            "NVIDIA DGX B200 datasheet: an eighth of 1,440 GB, 64 TB/s and 36 PFLOP/s with sparsity",
        ),
        _fabric(
            "mi300x",
            192,
            5.3e12,
            1307.4e12,
            448e9,
            _PCIE5,
            "AMD Instinct MI300X data sheet; seven links of 64 GB/s each way",
        ),
        _card("l4", 24, 300e9, 121e12, _PCIE4, "NVIDIA L4 datasheet (242 TFLOP/s with sparsity)"),
        _card("l40s", 48, 864e9, 362.05e12, _PCIE4, "NVIDIA L40S datasheet (733 TFLOP/s with sparsity)"),
        _card(
            "rtx-4090",
            24,
            1.008e12,
            165.2e12,
            _PCIE4,
            "NVIDIA Ada GPU architecture whitepaper, GeForce RTX 4090",
        ),
        _card(
            "rtx-pro-6000",
            96,
            1.792e12,
            503.8e12,
            _PCIE5,
            "NVIDIA RTX Blackwell PRO whitepaper, RTX PRO 6000 Blackwell Workstation Edition "
            "(188 SMs at 2.617 GHz, 1,024 FLOP a clock)",
        ),
    )
}
"""Accelerators by name; `find_hardware` also takes other spellings and the names that drivers report."""

# ---- names ---------------------------------------------------------------------------------------------------------

_MODEL_ENDINGS = ("instruct", "chat", "base", "hf", "it", "v0.1", "v0.2", "v0.3", "2507")
_HARDWARE_ALIASES = {
    "a100": "a100-80gb",
    "a100sxm": "a100-80gb",
    "a100sxm440gb": "a100-40gb",
    "a100sxm480gb": "a100-80gb",
    "a10040": "a100-40gb",
    "a10080": "a100-80gb",
    "h100": "h100-sxm",
    "h10080gb": "h100-sxm",
    "h10080gbhbm3": "h100-sxm",
    "h100sxm5": "h100-sxm",
    "h200sxm": "h200",
    "h200141gb": "h200",
    "b200sxm": "b200",
    "4090": "rtx-4090",
    "rtxpro6000blackwell": "rtx-pro-6000",
    "rtxpro6000blackwellworkstationedition": "rtx-pro-6000",
    "rtxpro6000blackwellserveredition": "rtx-pro-6000",
}


def _key(name: str) -> str:
    """Return letters and digits, and points between digits: OPT-1.3B is not OPT-13B."""
    return re.sub(r"(?!(?<=[0-9])\.(?=[0-9]))[^a-z0-9]", "", name.lower())


def _model_keys(name: str) -> list[str]:
    """Return what to look for: the name without its owner, then without the endings of fine-tuned
    variants.
    """
    key = _key(name.rsplit("/", 1)[-1])
    keys = [key.removeprefix("meta") if key.startswith("metallama") else key]
    while ending := next((e for e in _MODEL_ENDINGS if keys[-1].endswith(e) and keys[-1] != e), None):
        keys.append(keys[-1].removesuffix(ending))
    return keys


def find_model(name: str) -> ModelShape:
    """Return the shape of a model: a name of the catalogue, a hub name, a folder with ``config.json``, or
    that file.

    Case, punctuation, the owner and endings such as ``-Instruct`` do not matter. A path (with a separator)
    that is there is read; a bare name is looked up first. Raises `ConfigError` that names the nearest models
    if there is none.
    """
    path = Path(name)
    if path.name != "config.json":
        path = path / "config.json"
    if len(Path(name).parts) > 1 and path.is_file():
        return _read_model(path)
    known = {_key(known_name): shape for known_name, shape in MODELS.items()}
    for key in _model_keys(name):
        if key in known:
            return known[key]
    if path.is_file():
        return _read_model(path)
    raise ConfigError(
        f"no model {name!r} in the catalogue; known: {', '.join(MODELS)}{nearest(name.lower(), MODELS)}"
    )


def _read_model(path: Path) -> ModelShape:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a model's configuration: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: not a model's configuration: no JSON object")
    return ModelShape.from_hf_config(config, name=path.resolve().parent.name)


def find_hardware(name: str) -> Hardware:
    """Return an accelerator by its name, as sold or as its driver reports it (``"NVIDIA H100 80GB HBM3"``).

    ``"a100"`` is the 80 GB one. Raises `ConfigError` that names the nearest if there is none.
    """
    key = _key(name)
    for maker in ("nvidia", "amd", "geforce", "tesla", "instinct"):
        key = key.removeprefix(maker)
    known = {_key(known_name): entry for known_name, entry in HARDWARE.items()}
    if key in known:
        return known[key]
    if key in _HARDWARE_ALIASES:
        return HARDWARE[_HARDWARE_ALIASES[key]]
    raise ConfigError(
        f"no hardware {name!r} in the catalogue; known: {', '.join(HARDWARE)}{nearest(name.lower(), HARDWARE)}"
    )


def add_model(shape: ModelShape) -> ModelShape:
    """Make a shape findable by its name in this process, in place of one of that name; return it."""
    MODELS[shape.name] = shape
    return shape


def add_hardware(hardware: Hardware) -> Hardware:
    """Make hardware findable by its name in this process, in place of one of that name; return it."""
    HARDWARE[hardware.name] = hardware
    return hardware


# ---- what fits -----------------------------------------------------------------------------------------------------


def kv_heads_per_rank(shape: ModelShape, tensor_parallel: int) -> int:
    """Return the KV heads that each of ``tensor_parallel`` accelerators keeps; when they are too few, copies.

    Raises `ConfigError` if the query heads do not divide.
    """
    if tensor_parallel < 1 or shape.heads % tensor_parallel:
        raise ConfigError(
            f"the {shape.heads} heads of {shape.name} cannot be split over {tensor_parallel} accelerators"
        )
    return -(-shape.kv_heads // tensor_parallel)


def pool_blocks(
    shape: ModelShape,
    hardware: Hardware,
    tp: int = 1,
    block_size: int = 16,
    gpu_memory_utilization: float = 0.9,
    reserved_bytes: int = 2 * GIB,
) -> int:
    """Return how many KV blocks of ``block_size`` tokens fit beside the weights, 0 if not even those do.

    As vLLM does it: a share of each card's memory, less its part of the weights, less ``reserved_bytes`` for
    activations, captured graphs and the driver (which vLLM measures and this does not).
    """
    if block_size < 1:
        raise ConfigError(f"block_size must be at least 1, not {block_size}")
    if not 0 < gpu_memory_utilization <= 1:
        raise ConfigError(
            f"gpu_memory_utilization must be above 0 and at most 1, not {gpu_memory_utilization}"
        )
    per_rank = kv_heads_per_rank(shape, tp)
    room = gpu_memory_utilization * hardware.memory_bytes - shape.weight_bytes / tp - reserved_bytes
    block = shape.kv_bytes_per_token / shape.kv_heads * per_rank * block_size
    return max(0, floor(room / block))
