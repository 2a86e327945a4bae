"""``pagedlab generate``."""

from __future__ import annotations

from typing import Annotated

import typer

from pagedlab.cli.options import (
    GENERATE_BLOCKS,
    BlockSize,
    MaxModelLen,
    NumBlocks,
    Set,
    config_of,
    with_set,
    within_pool,
)
from pagedlab.cli.output import printable
from pagedlab.errors import PagedLabError


def generate(
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    model: Annotated[
        str | None, typer.Option(help='"tiny", a model folder or a hub name [default: tiny].')
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Parallel samples of the prompt.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="New tokens per sample at most.")] = 64,
    config: Annotated[
        str | None,
        typer.Option(metavar="PRESET|FILE", help="A preset (vllm, sglang, orca-max, ...) or a JSON config."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens that together have this probability.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Drop tokens below this share of the likeliest one's probability.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes repetition rarer.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text. May be repeated.")] = None,
    set_: Set = None,
    num_blocks: NumBlocks = None,
    block_size: BlockSize = None,
    max_model_len: MaxModelLen = None,
) -> None:
    """Continue a prompt with a real model through the paged cache.

    The last line of output says how fast it was and how the cache did.
    """
    from pagedlab.lab import page
    from pagedlab.lab.session import run, warm_up

    sizes = {"num_blocks": num_blocks, "block_size": block_size, "max_model_len": max_model_len}
    cfg = config_of(config, model=model, sizes=sizes, default_blocks=GENERATE_BLOCKS)
    cfg = with_set(cfg, set_)
    if cfg.max_num_seqs < n:
        cfg = cfg.replace(max_num_seqs=n)
    cfg = within_pool(cfg)
    warm_up(cfg, [prompt])
    result = run(
        cfg,
        [prompt],
        max_tokens=max_tokens,
        progress=False,
        n=n,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
    )
    for error in result.errors.values():
        raise PagedLabError(error)
    outputs = result.outputs[0] if n > 1 else result.outputs
    for i, output in enumerate(outputs):
        if n > 1:
            typer.echo(f"--- sample {i + 1} of {n}")
        typer.echo(printable(prompt + output if isinstance(output, str) else f"{prompt}{output}"))
    s = result.summary()
    last = [f"— {s['output_tokens']} tokens, {page.number(s['tokens_per_s'])} tokens/s"]
    last += [f"KV waste {page.percent(s['waste'])}", f"prefix hits {page.percent(s['hit_ratio'])}"]
    last += ["interrupted"] if result.interrupted else []
    typer.echo(" · ".join(last))
