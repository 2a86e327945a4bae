"""From the choice of a kernel to the kernel itself, and the proof that it has what the model's layers ask for."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from importlib import import_module

from pagedlab.errors import ConfigError
from pagedlab.executors.probe import AttentionLayer
from pagedlab.kernels.base import PagedAttention, options_of
from pagedlab.policies.kernel import Kernel
from pagedlab.policies.layout import Layout


def make_attention(kernel: Kernel, layout: Layout) -> PagedAttention:
    """Build what ``kernel.implementation`` ("module:attribute") names."""
    module, _, attribute = kernel.implementation.partition(":")
    made = getattr(import_module(module), attribute)(layout, **kernel.get_params())
    return made  # type: ignore[no-any-return]


def check_options(
    attention: PagedAttention, layers: Iterable[AttentionLayer], *, kernel: str, model: str
) -> frozenset[str]:
    """Return the options that ``attention`` takes, all that ``layers`` need among them.

    Raises `ConfigError` if it lacks one, or if ``attend`` cannot be called as `PagedAttention` says. ``kernel`` and
    ``model`` are their names in the message.
    """
    has = options_of(attention)
    needs = [layer.needs for layer in layers]
    lacking = sorted(frozenset().union(*needs) - has)
    where = f"{type(attention).__name__}.attend"
    if lacking:
        asking = sum(not has.issuperset(need) for need in needs)
        raise ConfigError(
            f"kernel {kernel!r} cannot serve {model}: {asking} of {len(needs)} attention layers need "
            f"{' and '.join(lacking)}, and {where} takes {', '.join(sorted(has)) or 'no option'}; "
            f"add {'it' if len(lacking) == 1 else 'them'} to the keyword arguments, or choose a kernel that has "
            f"{'it' if len(lacking) == 1 else 'them'}, such as 'auto'"
        )
    signature = inspect.signature(attention.attend)
    for need in set(needs):
        given = {"scale", *need, *has.intersection(("sliding_window", "soft_cap"))}
        try:
            signature.bind(*[None] * 4, **dict.fromkeys(given))
        except TypeError as error:
            raise ConfigError(
                f"kernel {kernel!r} cannot be called: {where}{signature}: {error}; "
                "wanted: (query, key_cache, value_cache, batch, *, scale, and options with None as default)"
            ) from None
    return has
