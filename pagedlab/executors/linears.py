"""The fast path: the same model with fewer and faster operations, each proven on the model itself before it is taken.

The model's code stays as it is; single modules get another ``forward``:

- **linear layers** use weights that oneDNN has laid out once and for all, instead of on every call;
- **siblings**, layers that read the very same tensor (query, key, value; gate, up), become one product;
- **RMSNorm** is one loop over memory instead of eight, ``silu(gate) * up`` one instead of two;
- **attention** with rotary embeddings in two halves turns queries and keys in one loop and hands them to the paged
  kernel in its own axis order, without the transposes and copies of the general way.

Nothing is recognised by its name alone. One forward pass of the plain model is watched; each candidate then
gets the inputs that the plain module had, and is taken if it gives the same output up to rounding. In the end the
whole model must give the plain logits up to rounding, or everything is put back. `FastPath.notes` says what was taken.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pagedlab.executors import loops
from pagedlab.executors.layers import Buffers, FusedLayer
from pagedlab.executors.probe import NOT_PAGED, AttentionLayer, NotPaged
from pagedlab.executors.products import OneDNN, Panels, product

# Largest relative difference (Frobenius norm) between a plain module and its replacement, and between whole models.
_MODULE_BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
_MODEL_BOUND = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
_MEMORY_SHARE = 0.5


@dataclass
class _Call:
    """What a plain module was given in the watched pass and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor


class FastPath:
    """Installs the replacements, and takes them out again. ``notes`` is one line per kind of replacement."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._swapped: list[tuple[nn.Module, Callable[..., Any]]] = []
        self._groups: list[_Group] = []

    @torch.inference_mode()
    def install(
        self,
        model: PreTrainedModel,
        layers: dict[nn.Module, AttentionLayer],
        forward: Callable[[], torch.Tensor],
    ) -> None:
        """Replace what can be replaced in ``model``.

        ``layers`` says what each attention module asks for; ``forward`` runs the model once through `paged_attention`
        and returns logits [num_tokens, vocab].
        """
        dtype = model.dtype
        if model.device.type != "cpu" or dtype not in _MODULE_BOUND:
            self.notes.append(f"plain: no faster operations for {dtype} on {model.device.type}")
            return
        calls, plain = _watch(model, forward)
        bound = _MODULE_BOUND[dtype]
        norms = self._norms(calls, bound)
        if _can_prepack(model, self.notes):
            packed = self._linears(calls, bound)
            attentions = self._attentions(calls, layers, norms, packed, bound)
            gated = self._gated(calls, packed, bound)
            self._layers(calls, norms, attentions, gated, bound)
        try:
            error = relative_error(forward(), plain)
        except Exception as fault:
            error, reason = float("inf"), f"{type(fault).__name__}: {fault}"
        else:
            reason = f"logits differ by {error:.1e}"
        if not error <= _MODEL_BOUND[dtype]:
            self.remove()
            self.notes = [f"plain: {reason}"]

    def remove(self) -> None:
        """Put every module back as it was."""
        for module, forward in self._swapped:
            if module.__dict__.get("forward") is forward:
                del module.forward
        self._swapped.clear()
        self._groups.clear()

    def end(self) -> None:
        """Drop what siblings left for each other in the forward pass that just ended."""
        for group in self._groups:
            group.clear()

    def _swap(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        # An instance attribute hides the class's method; deleting it brings the method back.
        module.forward = forward
        self._swapped.append((module, forward))

    def _norms(self, calls: dict[nn.Module, _Call], bound: float) -> dict[nn.Module, _Norm]:
        taken: dict[nn.Module, _Norm] = {}
        seen = 0
        for module, call in calls.items():
            weight = getattr(module, "weight", None)
            eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
            if (
                not type(module).__name__.endswith("RMSNorm")
                or not isinstance(weight, nn.Parameter)
                or eps is None
            ):
                continue
            seen += 1
            for scale in (weight.float(), 1 + weight.float()):
                norm = _Norm(scale.contiguous(), float(eps))
                if _agrees(norm, call, bound):
                    taken[module] = norm
                    self._swap(module, norm)
                    break
        if seen:
            self.notes.append(f"{len(taken)} of {seen} RMSNorms in one loop")
        return taken

    def _linears(
        self, calls: dict[nn.Module, _Call], bound: float
    ) -> dict[nn.Module, OneDNN | Panels | _Sibling]:
        families: dict[tuple[int, int], list[nn.Module]] = {}
        parents = {child: parent for parent in calls for child in parent.children()}
        for module, call in calls.items():
            if isinstance(module, nn.Linear | Conv1D) and type(module).forward in (
                nn.Linear.forward,
                Conv1D.forward,
            ):
                # The watched calls hold their inputs alive, so an id stands for one tensor.
                families.setdefault((id(call.args[0]), id(parents.get(module))), []).append(module)
        taken: dict[nn.Module, OneDNN | Panels | _Sibling] = {}
        sizes: Counter[int] = Counter()
        for family in families.values():
            if len(family) > 1:
                group = _Group(family)
                replacements: list[OneDNN | Panels | _Sibling] = [
                    _Sibling(group, i) for i in range(len(family))
                ]
            else:
                replacements = [product(family)]
            if all(_agrees(r, calls[m], bound) for m, r in zip(family, replacements, strict=True)):
                for module, replacement in zip(family, replacements, strict=True):
                    taken[module] = replacement
                    self._swap(module, replacement)
                sizes[len(family)] += 1
                if len(family) > 1:
                    group.clear()
                    self._groups.append(group)
        groups = ", ".join(f"{n} in groups of {k}" for k, n in sorted(sizes.items()) if k > 1)
        self.notes.append(f"{len(taken)} linear layers prepacked" + (f" ({groups})" if groups else ""))
        return taken

    def _attentions(
        self,
        calls: dict[nn.Module, _Call],
        layers: dict[nn.Module, AttentionLayer],
        norms: dict[nn.Module, _Norm],
        packed: dict[nn.Module, OneDNN | Panels | _Sibling],
        bound: float,
    ) -> dict[nn.Module, _RotaryAttention]:
        taken: dict[nn.Module, _RotaryAttention] = {}
        for module, layer in layers.items():
            parts = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
            if layer.sinks or module not in calls or any(part not in packed for part in parts):
                continue
            first = packed[parts[0]]  # type: ignore[index]
            if not isinstance(first, _Sibling) or first.group.members != parts[:3]:
                continue
            extra = {name for name, _ in module.named_children()} - {"q_proj", "k_proj", "v_proj", "o_proj"}
            if extra not in (set(), {"q_norm", "k_norm"}) or any(
                getattr(module, n) not in norms for n in extra
            ):
                continue
            q_norm, k_norm = (norms.get(getattr(module, n, None)) for n in ("q_norm", "k_norm"))  # type: ignore[arg-type]
            attention = _RotaryAttention(module, layer, first.group.packed, packed[parts[3]], q_norm, k_norm)  # type: ignore[index]
            if attention.fits(calls[module]) and _agrees(attention, calls[module], bound):
                self._swap(module, attention)
                taken[module] = attention
        self.notes.append(f"{len(taken)} attention layers without transposes")
        return taken

    def _gated(
        self, calls: dict[nn.Module, _Call], packed: dict[nn.Module, OneDNN | Panels | _Sibling], bound: float
    ) -> dict[nn.Module, _GatedMLP]:
        taken: dict[nn.Module, _GatedMLP] = {}
        for module, call in calls.items():
            gate, up, down = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
            first, last = packed.get(gate), packed.get(down)  # type: ignore[arg-type]
            if not isinstance(first, _Sibling) or first.group.members != [gate, up] or last is None:
                continue
            gated = _GatedMLP(first.group.packed, last)
            if _is_silu(getattr(module, "act_fn", None)) and _agrees(gated, call, bound):
                self._swap(module, gated)
                taken[module] = gated
        if taken:
            self.notes.append(f"{len(taken)} gated MLPs with their activation in one loop")
        return taken

    def _layers(
        self,
        calls: dict[nn.Module, _Call],
        norms: dict[nn.Module, _Norm],
        attentions: dict[nn.Module, _RotaryAttention],
        gated: dict[nn.Module, _GatedMLP],
        bound: float,
    ) -> None:
        taken: list[nn.Module] = []
        buffers = Buffers()
        for module, call in calls.items():
            parts = dict(module.named_children())
            if set(parts) != {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}:
                continue
            before, between = (
                norms.get(parts["input_layernorm"]),
                norms.get(parts["post_attention_layernorm"]),
            )
            attention, mlp = attentions.get(parts["self_attn"]), gated.get(parts["mlp"])
            if before is None or between is None or attention is None or mlp is None:
                continue
            packs = (attention.qkv, attention.out, mlp.both, mlp.down)
            if not all(isinstance(p, Panels) for p in packs) or mlp.both.bias is not None:
                continue
            try:
                layer = FusedLayer(
                    parts["self_attn"],
                    attention.layer,
                    (before.terms, between.terms),
                    (
                        None if attention.q_norm is None else attention.q_norm.terms,
                        None if attention.k_norm is None else attention.k_norm.terms,
                    ),
                    *packs,  # type: ignore[arg-type]
                    buffers,
                )
            except ValueError:
                continue
            if _agrees(layer, call, bound) and _same_wiring(layer, module, call, bound):
                self._swap(module, layer)
                taken.append(module)
        if taken:
            self.notes.append(f"{len(taken)} whole layers fused")


def _is_silu(activation: Any) -> bool:
    """Compared over a range, not by the module's output: near zero many activations are alike."""
    if not callable(activation):
        return False
    x = torch.linspace(-10, 10, 201)
    return torch.allclose(activation(x), nn.functional.silu(x), atol=1e-6)


def strip(model: PreTrainedModel) -> None:
    """Take out every replacement, also those of an executor that was dropped without `release`."""
    for module in model.modules():
        if isinstance(
            module.__dict__.get("forward"),
            OneDNN | Panels | _Sibling | _Norm | _RotaryAttention | _GatedMLP | FusedLayer,
        ):
            del module.forward


def relative_error(one: torch.Tensor, other: torch.Tensor) -> float:
    """Norm of the difference over the norm of ``other``."""
    return float((one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-30))


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _agrees(replacement: Callable[..., Any], call: _Call, bound: float) -> bool:
    try:
        output = _first(replacement(*call.args, **call.kwargs))
    except (RuntimeError, TypeError, ValueError):
        return False
    same = output.shape == call.output.shape and output.dtype == call.output.dtype
    return same and relative_error(output, call.output) <= bound


def _same_wiring(replacement: Callable[..., Any], module: nn.Module, call: _Call, bound: float) -> bool:
    """Whether a layer agrees for a small input too.

    The residual, which both have, is most of a layer's output and in bfloat16 could hide what is added to it. A norm
    undoes the factor, the residual does not.
    """
    if not call.args:
        return False
    small = _Call((call.args[0] / 256, *call.args[1:]), call.kwargs, call.output)
    small.output = _first(module(*small.args, **small.kwargs))
    return _agrees(replacement, small, bound)


def _watch(
    model: PreTrainedModel, forward: Callable[[], torch.Tensor]
) -> tuple[dict[nn.Module, _Call], torch.Tensor]:
    """Run ``forward`` and note the last call of every module that was called just once with a tensor as result."""
    calls: dict[nn.Module, _Call] = {}
    often: set[nn.Module] = set()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module in calls:
            often.add(module)
        if isinstance(_first(output), torch.Tensor):
            calls[module] = _Call(args, kwargs, _first(output))

    hooks = [m.register_forward_hook(note, with_kwargs=True) for m in model.modules()]
    try:
        logits = forward()
    finally:
        for hook in hooks:
            hook.remove()
    return {m: c for m, c in calls.items() if m not in often}, logits


def _can_prepack(model: PreTrainedModel, notes: list[str]) -> bool:
    """Whether oneDNN's own weight layout can be had for this dtype, and the memory for a second copy of the weights."""
    ops = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and hasattr(ops, "_reorder_linear_weight")):
        notes.append("linear layers stay plain: this torch has no oneDNN")
        return False
    try:
        trial = ops._reorder_linear_weight(torch.ones(8, 8, dtype=model.dtype), None)
        ops._linear_pointwise(torch.ones(2, 8, dtype=model.dtype), trial, None, "none", [], "")
    except RuntimeError as error:
        notes.append(f"linear layers stay plain: {str(error).splitlines()[0]}")
        return False
    need = sum(p.numel() * p.element_size() for p in model.parameters())
    free = _available_memory()
    if free is not None and need > _MEMORY_SHARE * free:
        notes.append(f"linear layers stay plain: {need / 2**30:.1f} GiB more is over half of the free memory")
        return False
    return True


def _available_memory() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


@dataclass(eq=False)
class _Group:
    """Siblings: the first one called computes for all; the others find their part if they bring the same tensor."""

    members: list[nn.Module]
    packed: OneDNN | Panels = field(init=False)
    source: torch.Tensor | None = None
    parts: list[torch.Tensor | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.packed = product(self.members)

    def clear(self) -> None:
        self.source, self.parts = None, []

    def take(self, i: int, x: torch.Tensor) -> torch.Tensor:
        if x is self.source and (part := self.parts[i]) is not None:
            self.parts[i] = None
            return part
        parts = self.packed(x).split(self.packed.sizes, dim=-1)
        self.source, self.parts = x, list(parts)
        # Each part is handed out once: whoever asks again may have changed what it got.
        self.parts[i] = None
        return parts[i]  # type: ignore[no-any-return]


@dataclass(eq=False)
class _Sibling:
    """The forward of one member of a group."""

    group: _Group
    i: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.group.take(self.i, x)


class _Norm:
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis, computed in float32, rounded once."""

    def __init__(self, scale: torch.Tensor, eps: float) -> None:
        self.scale, self.eps = scale, eps
        self.terms = scale, eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.scale.shape[0]:
            raise ValueError("another axis is normalised here")
        return loops.rms_norm(x.contiguous(), self.scale, self.eps)


class _GatedMLP:
    """``down(silu(gate(x)) * up(x))`` (Shazeer 2020, SwiGLU), gate and up in one product."""

    def __init__(self, both: OneDNN | Panels, down: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.both, self.down = both, down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(loops.silu_mul(self.both(x)))


class _RotaryAttention:
    """Attention whose queries and keys turn in two halves (Su et al. 2021, as in Llama), straight to the kernel."""

    def __init__(
        self,
        module: nn.Module,
        layer: AttentionLayer,
        qkv: OneDNN | Panels,
        out: Callable[[torch.Tensor], torch.Tensor],
        q_norm: _Norm | None = None,
        k_norm: _Norm | None = None,
    ) -> None:
        self.module, self.layer, self.qkv, self.out = module, layer, qkv, out
        self.q_norm, self.k_norm = q_norm, k_norm
        self.heads, self.kv_heads, self.size = layer.num_heads, layer.num_kv_heads, layer.key_size

    def fits(self, call: _Call) -> bool:
        """Whether the watched call had what this forward needs."""
        turned = call.kwargs.get("position_embeddings")
        if not isinstance(turned, tuple) or len(turned) != 2 or turned[0].shape[-1] != self.size:
            return False
        per_head = all(n is None or n.scale.shape[0] == self.size for n in (self.q_norm, self.k_norm))
        sizes = [self.heads * self.size, self.kv_heads * self.size, self.kv_heads * self.size]
        return per_head and self.size % 2 == 0 and self.qkv.sizes == sizes

    def __call__(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        paged: Any = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        if paged is None:
            raise NotPaged(NOT_PAGED)
        cos, sin = position_embeddings
        query, key, value = loops.rotate(
            self.qkv(hidden_states).view(-1, (self.heads + 2 * self.kv_heads) * self.size),
            cos.contiguous(),
            sin.contiguous(),
            self.heads,
            self.kv_heads,
            None if self.q_norm is None else (self.q_norm.scale, self.q_norm.eps),
            None if self.k_norm is None else (self.k_norm.scale, self.k_norm.eps),
        )
        layer = self.layer
        seen = paged.attend(self.module, query, key, value, layer.scale, layer.sliding_window, layer.soft_cap)
        return self.out(seen.view(*hidden_states.shape[:-1], -1)), None
