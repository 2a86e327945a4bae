"""Every kernel compiled ahead of time for GPUs that need not be here, and what each takes there.

`compile_kernels` answers with registers a thread, stack and spilled registers as the assembler counts them:
``cuobjdump -res-usage`` on NVIDIA's cubin, the metadata of AMD's assembly. A spill costs memory traffic in the inner
loop, so the launches of `shapes` have none. Needs a process without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pagedlab.errors import ConfigError, nearest
from pagedlab.kernels.scaled import TAIL
from pagedlab.kernels.triton import blocks, cache_write, decode, prefill, quantised, tables
from pagedlab.kernels.triton.formats import FORMATS, QUANTISED_CHUNK
from pagedlab.kernels.triton.moves import CHUNK
from pagedlab.kernels.triton.shapes import FUSED, WRITING, Launch, Shape
from pagedlab.policies.kernel import interpreted


class Target(NamedTuple):
    """A GPU to compile for.

    ``fp8`` is its form of fp8, a key of `formats.FORMATS`, ``shared`` the bytes of shared memory a program may have.
    """

    backend: str
    architecture: int | str
    warp_size: int
    fp8: str
    shared: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, "E4M3_BITS", 163 * 1024),
    "sm_90": Target("cuda", 90, 32, "E4M3", 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, "E4M3_FNUZ", 64 * 1024),
}
"""A100, H100 and H200, MI300."""
DTYPES = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}

DEFAULTS: dict[str, Any] = {
    "dtype": "bfloat16",
    "kv_dtype": "model",
    "head_size": 128,
    "group": 4,
    "block_size": 16,
    "layout": "csr",
    "features": False,
}


@dataclass(frozen=True, slots=True)
class Build:
    """One kernel with all that fixes its code."""

    kernel: str
    function: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    launch: Launch | None = None
    """Of `decode` and `prefill`."""


def builds(
    *,
    target: str,
    dtype: str = "bfloat16",
    kv_dtype: str = "model",
    head_size: int = 128,
    group: int = 4,
    block_size: int = 16,
    layout: str = "csr",
    features: bool = False,
    every_launch: bool = False,
) -> Iterator[Build]:
    """Yield every kernel for one shape, with the rule's launches, or with ``every_launch`` that may be chosen.

    ``features`` adds a sliding window, a soft cap, ALiBi slopes and sinks. Of a cache in one byte a channel
    (``kv_dtype`` "fp8" or "int8") only the kernels that differ are yielded.
    """
    element, real = DTYPES[dtype], tl.float32
    shape = Shape.of(group, head_size, head_size, element.primitive_bitwidth // 8, kv_dtype != "model")
    form = "" if kv_dtype == "model" else "INT8" if kv_dtype == "int8" else TARGETS[target].fp8
    computed = f"*{element.name}"
    cached = "*u8" if form else computed
    table = dict.fromkeys(("entries", "index", "query_start", "context_lens", "rows"), "*i32")
    tensors = {"out": computed, "query": computed, "key_cache": cached, "value_cache": cached, **table}
    parts = dict.fromkeys(("parts", "part_sums"), "*fp32")
    sizes = {"NUM_KV_HEADS": 8, "BLOCK_SIZE": block_size, "SIZE": head_size}
    common: dict[str, Any] = {
        "block_of": getattr(tables, layout.replace("-", "_")),
        "SCALE": head_size**-0.5,
        "WINDOW": 4096 if features else 0,
        "SOFT_CAP": 50.0 if features else 0.0,
        "TAIL": TAIL if form else 0,
        "FORMAT": FORMATS[form] if form else 0,
        "OPERAND": element,
        "REAL": real,
        **sizes,
        **shape.constants,
    }
    for names, there in ((("key_scales", "value_scales"), bool(form)), (("slopes", "sinks"), features)):
        if there:
            tensors |= dict.fromkeys(names, "*fp32")
        else:
            common |= dict.fromkeys(names)
    for launch in _compiled(shape.decode, every_launch):
        cut = {"ROWS": launch.rows, "TILE": launch.tile, "SPLIT": True}
        pointers = {**tensors, **parts, "sequences": "*i32"}
        yield Build("decode", decode.decode_splits, pointers, {**common, **cut}, launch.options, launch)
    for launch in _compiled(shape.prefill, every_launch):
        cut = {"ROWS": launch.rows, "TILE": launch.tile}
        pointers = {**tensors, "tiles": "*i32"}
        yield Build("prefill", prefill.prefill_tiles, pointers, {**common, **cut}, launch.options, launch)
    padded = triton.next_power_of_2(head_size)
    if form:
        yield Build(
            "write",
            quantised.store_quantised,
            {
                "cache": cached,
                "scales": "*fp32",
                "new": computed,
                "order": "*i32",
                "runs": "*i32",
                "slots": "*i64",
            },
            {
                **sizes,
                "PADDED": padded,
                "TAIL": TAIL,
                "CHUNK": QUANTISED_CHUNK,
                "FORMAT": FORMATS[form],
                "FIXED": False,
            },
            {},
        )
        return
    yield Build(
        "reduce",
        decode.reduce_splits,
        {"out": computed, **parts, **dict.fromkeys(("sequences", "query_start", "context_lens"), "*i32")},
        {
            "NUM_HEADS": 8 * group,
            "VALUE_SIZE": head_size,
            "VALUE_PADDED": shape.constants["VALUE_PADDED"],
            "TILE": shape.decode[0].tile,
            "WINDOW": common["WINDOW"],
            "REAL": real,
        },
        {"num_warps": 1},
    )
    yield Build(
        "write",
        cache_write.store_tokens,
        {"cache": cached, "new": cached, "slots": "*i64"},
        {**sizes, "PADDED": padded},
        WRITING,
    )
    yield Build(
        "write-rotated",
        cache_write.rotate_and_store,
        {
            **dict.fromkeys(("key_cache", "value_cache", "key", "value", "cos", "sin"), cached),
            "slots": "*i64",
        },
        {
            **sizes,
            "VALUE_SIZE": head_size,
            "PADDED": padded,
            "VALUE_PADDED": padded,
            "ROTARY": head_size,
            "INTERLEAVED": False,
            "REAL": real,
        },
        WRITING,
    )
    yield Build(
        "move-blocks",
        blocks.move_words,
        dict.fromkeys(("sources", "targets", "from_blocks", "to_blocks"), "*i64"),
        {
            "WORDS": 8 * block_size * head_size * element.primitive_bitwidth // 64,
            "CHUNK": CHUNK,
            "WORD": tl.int64,
        },
        {},
    )


def _compiled(launches: Sequence[Launch], every_launch: bool) -> list[Launch]:
    """Return those ``launches`` whose code differs, or the rule alone."""
    return list(dict.fromkeys(x._replace(programs=0) for x in launches)) if every_launch else [launches[0]]


def compile_kernel(build: Build, target: str) -> dict[str, Any]:
    """Compile for ``target``; return ``registers`` a thread, ``stack``, ``spills``, ``shared`` and ``shared_limit``.

    ``spills`` counts spilled registers where the assembler says so (AMD) and bytes of local memory elsewhere.
    """
    _check(target)
    names = build.function.arg_names
    signature = {
        name: "constexpr" if name in build.constants else build.pointers.get(name, "i32") for name in names
    }
    # What a launch finds out: addresses and strides are multiples of 16.
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.startswith("*") or name.endswith("_stride")
    }
    source = ASTSource(build.function, signature=signature, constexprs=build.constants, attrs=aligned)
    compiled = triton.compile(
        source, target=GPUTarget(*TARGETS[target][:3]), options={**build.options, **FUSED}
    )
    usage = _nvidia(compiled.asm["cubin"]) if "cubin" in compiled.asm else _amd(compiled.asm["amdgcn"])
    return {**usage, "shared": int(compiled.metadata.shared), "shared_limit": TARGETS[target].shared}


def compile_kernels(
    targets: Iterable[str] = tuple(TARGETS),
    shapes: Iterable[dict[str, Any]] = ({},),
    *,
    every_launch: bool = False,
) -> list[dict[str, Any]]:
    """Return a row per target, shape, kernel and launch; ``shapes`` are arguments of `builds`."""
    given = list(shapes)
    rows = []
    for target in targets:
        _check(target)
        for shape in given:
            full = {**DEFAULTS, **shape}
            for build in builds(target=target, every_launch=every_launch, **full):
                row = {"target": target, "kernel": build.kernel, "launch": _text(build.launch), **full}
                rows.append({**row, **compile_kernel(build, target)})
    return rows


def _text(launch: Launch | None) -> str | None:
    return None if launch is None else str(launch._replace(programs=0))


def _check(target: str) -> None:
    if target not in TARGETS:
        raise ConfigError(f"no target {target!r}; known: {', '.join(TARGETS)}{nearest(target, TARGETS)}")
    if interpreted():
        raise ConfigError(
            "TRITON_INTERPRET is set: kernels are interpreted in this process and cannot be compiled"
        )


def _nvidia(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        said = subprocess.run(
            [str(tool), "-res-usage", str(path)], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return {"registers": found["REG"], "stack": found["STACK"], "spills": found["LOCAL"]}


def _amd(assembly: str) -> dict[str, int]:
    found = dict(
        re.findall(r"^\s*\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", assembly, re.M)
    )
    return {
        "registers": int(found["vgpr_count"]),
        "stack": int(found["private_segment_fixed_size"]),
        "spills": int(found["vgpr_spill_count"]),
    }
