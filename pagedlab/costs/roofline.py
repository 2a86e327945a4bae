"""`Roofline`: what a step costs by the catalogue's figures, for hardware that nobody has measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagedlab.costs.catalogue import Hardware, ModelShape, find_hardware, find_model, kv_heads_per_rank
from pagedlab.costs.linear import PS, LinearCost, Terms, coverage_table
from pagedlab.costs.shape import BYTES
from pagedlab.policies.base import param
from pagedlab.registry import register

if TYPE_CHECKING:
    from pagedlab.policies import Layout

_DTYPES = ("auto", "float32", "bfloat16", "float16", "fp8", "int8", "int4")


@register("cost", "roofline")
class Roofline(LinearCost):
    """Bytes over bandwidth or FLOPs over compute, whichever is slower, from published figures (Williams et
    al. 2009).

    A step reads the weights once (of a mixture of experts the share that its tokens reach) or computes its
    tokens, reads the keys and values of the decoding sequences and the block tables that lead to them,
    computes the attention of its prompt chunks, the logits of what it samples and, over several accelerators,
    two all-reduces per layer. The form is in `pagedlab.costs.linear`.

    The efficiencies say what share of the published figures real engines get. Their defaults are round
    numbers that well-tuned kernels reach, fitted to no run. Expect tens of per cent of error, and fit a
    `Calibrated` where a log is at hand. Compute is at the bfloat16 rate whatever ``dtype`` says; that changes
    bytes only.
    """

    model: str = param("llama-3.1-8b", help="name in the catalogue, hub name, or folder with config.json")
    hardware: str = param("h100-sxm", help="name in the catalogue")
    tensor_parallel: int = param(1, low=1, high=1024, help="accelerators that share each layer")
    dtype: str = param("auto", choices=_DTYPES, help="type of the weights; auto: the model's own")
    kv_dtype: str = param("auto", choices=_DTYPES, help="type of the KV cache; auto: the model's own")
    block_size: int = param(16, low=1, high=1 << 20, help="tokens a block", unit="tokens")
    table_bytes_per_block: float = param(
        4.0,
        low=0.0,
        high=1e6,
        help="bytes of block table that a layer's attention reads per block",
        unit="bytes",
    )
    table_bytes_per_seq: float = param(
        0.0, low=0.0, high=1e9, help="bytes of block table that it reads per sequence beside", unit="bytes"
    )
    bandwidth_efficiency: float = param(
        0.8, low=0.001, high=1.0, help="share of the memory bandwidth reached"
    )
    flops_efficiency: float = param(0.6, low=0.001, high=1.0, help="share of the FLOP/s in matrix products")
    attention_efficiency: float = param(
        0.5, low=0.001, high=1.0, help="share of the FLOP/s in prefill attention"
    )
    kernel_efficiency: float = param(
        1.0, low=0.001, high=1.0, help="attention kernel against the best one: keys and values, and pairs"
    )
    host_efficiency: float = param(0.8, low=0.001, high=1.0, help="share of the host link reached")
    disk_efficiency: float = param(0.8, low=0.001, high=1.0, help="share of the disk's rates reached")
    overhead_factor: float = param(1.0, low=0.0, high=1e3, help="times the catalogue's overheads of the host")
    step_overhead_us: float = param(0.0, low=0.0, high=1e9, help="overhead of a step beside those", unit="µs")

    @property
    def shape(self) -> ModelShape:
        """The model with the types that this cost model assumes."""
        shape = find_model(self.model)
        if self.dtype != "auto":
            shape = shape.replace(bytes_per_param=BYTES[self.dtype])
        if self.kv_dtype != "auto":
            shape = shape.replace(kv_bytes=BYTES[self.kv_dtype])
        return shape

    @property
    def accelerator(self) -> Hardware:
        """The hardware's figures as published."""
        return find_hardware(self.hardware)

    def with_layout(self, layout: Layout) -> Roofline:
        """Return a copy that reads ``layout``'s block tables."""
        few, many = layout.bytes_read(1), layout.bytes_read(1025)
        per_block = (many - few) / 1024
        return self.clone(table_bytes_per_block=per_block, table_bytes_per_seq=max(0.0, few - per_block))

    def terms(self) -> Terms:
        """Return what the catalogue's figures and the efficiencies make of the form."""
        shape, card, ranks = self.shape, self.accelerator, self.tensor_parallel
        kv_heads = kv_heads_per_rank(shape, ranks)
        byte = PS / (card.bandwidth * self.bandwidth_efficiency)
        flop = PS / (card.flops * self.flops_efficiency)
        kernel_byte = byte / self.kernel_efficiency
        kv_bytes = shape.kv_bytes_per_token / shape.kv_heads * kv_heads
        table_bytes = shape.layers * self.table_bytes_per_block / self.block_size
        overhead = card.step_overhead_s + shape.layers * card.layer_overhead_s
        link = 0.0
        if ranks > 1:
            # Two all-reduces a layer, of a token's two-byte activations; in a ring each rank sends (and receives)
            # 2 (n - 1) / n of them.
            sent = 2 * shape.layers * shape.hidden * 2 * (2 * (ranks - 1) / ranks)
            link = PS * sent / (card.interconnect * card.interconnect_share)
            overhead += 2 * shape.layers * card.allreduce_latency_s
        return Terms(
            overhead=PS * overhead * self.overhead_factor + 1e6 * self.step_overhead_us,
            weights=shape.common_bytes / ranks * byte,
            experts=shape.expert_bytes / ranks * byte,
            coverage=coverage_table(shape.experts, shape.experts_per_token) if shape.experts else (),
            token=shape.flops_per_token / ranks * flop,
            head=shape.head_bytes / ranks * byte,
            logits=shape.head_flops / ranks * flop,
            link=link,
            sequence=shape.layers * self.table_bytes_per_seq * kernel_byte,
            pair=PS
            * shape.pair_flops
            / ranks
            / (card.flops * self.attention_efficiency * self.kernel_efficiency),
            prefill=PS * shape.layers * card.prefill_layer_overhead_s * self.overhead_factor,
            soft=False,
            context=round((kv_bytes + table_bytes) * kernel_byte),
        )

    def links(self) -> dict[str, tuple[float, int]]:
        """Return the host link's rate, over all accelerators, the disk's, which they share, and latencies."""
        card = self.accelerator
        rate = card.host_link * self.host_efficiency * self.tensor_parallel / PS
        read, write = (r * self.disk_efficiency / PS for r in (card.disk_read, card.disk_write))
        disk_latency = round(PS * card.disk_latency_s)
        return {
            "host": (rate, round(PS * card.host_latency_s)),
            "disk-read": (read, disk_latency),
            "disk-write": (write, disk_latency),
        }
