"""`simulate`: the whole engine on a virtual clock, for a model and hardware that need not be here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pagedlab.config import Config
from pagedlab.costs import CostModel, Roofline, find_model, pool_blocks
from pagedlab.engine.clock import Clock, StepClock, VirtualClock
from pagedlab.engine.script import Script
from pagedlab.errors import ConfigError, nearest
from pagedlab.executors.simulated import Outputs, SimulatedExecutor
from pagedlab.lab.job import Job, WorkloadLike, as_workload
from pagedlab.lab.results import Run
from pagedlab.lab.session import Progress, drive
from pagedlab.policies.base import Policy
from pagedlab.registry import make

CLOCKS = ("virtual", "step")
_STEPS_A_LOOK = 20_000
_LONGEST = 1 << 40


def simulate(
    config: Config,
    workload: WorkloadLike,
    *,
    model: str | None = None,
    hardware: str | None = None,
    cost: CostModel | str | None = None,
    outputs: Run | Outputs | None = None,
    num_blocks: int | str | None = None,
    clock: str | Clock = "virtual",
    skip_ahead: bool = True,
    events: bool = True,
    progress: Progress = None,
    check: bool = False,
    max_tokens: int | None = None,
    **sampling_overrides: Any,
) -> Run:
    """Serve ``workload`` as `run` would, with a cost model in the model's place, and return what happened.

    ``cost`` says how long steps take: a cost model, or the name of one; left out, the roofline of ``model`` on
    ``hardware`` (names of the catalogue, see ``pagedlab.costs``; "llama-3.1-8b" on "h100-sxm"), which reads the block
    tables of ``config.layout``. ``num_blocks="fit"`` takes as many blocks as that hardware has room for.

    ``outputs`` says what requests answer: an earlier `Run` of the same workload, scripts by (request id, sample), or a
    function of the request and the sample. Left out, the workload's own where it knows them, and else
    ``sampling.max_tokens`` tokens that nobody shares. ``clock="step"`` makes step k happen at k seconds.

    ``skip_ahead`` leaps over steps in which nothing but lengths changes; the event log and every table are the same
    without. ``events`` False keeps no log, which is faster. Other arguments are those of `run`.

    >>> import pagedlab as pl
    >>> sim = pl.simulate(pl.Config(), pl.workloads.mixed_lengths(num_requests=8), model="llama-3.1-8b")
    >>> sim.summary()["finished"]
    8
    """
    given = as_workload(workload)
    price = _cost(config, cost, model, hardware)
    if num_blocks == "fit":
        config = _fitted(config, price)
    elif isinstance(num_blocks, str):
        raise ConfigError(f"num_blocks must be a number or 'fit', not {num_blocks!r}")
    elif num_blocks is not None:
        config = config.replace(num_blocks=num_blocks)
    shape = find_model(price.model) if isinstance(price, Roofline) else None
    like: dict[str, Any] = {}
    if outputs is None:
        outputs = given_outputs(given)
    elif isinstance(outputs, Run):
        facts = outputs.facts
        like = {
            "vocab_size": facts.get("vocab_size"),
            "max_model_len": facts.get("max_model_len") or _LONGEST,
        }
        if facts["has_text"] and any(r.text is not None for r in given):
            like["tokenize"] = _tokenizer(outputs.description["model"])
        outputs = scripts_of(outputs)
    executor = SimulatedExecutor(price, outputs=outputs, shape=shape, **like)
    job = Job(
        config,
        given,
        max_tokens=max_tokens,
        executor=executor,
        clock=_clock(clock),
        events=events,
        overrides=sampling_overrides,
        skip_ahead=skip_ahead,
    )
    return drive(job, progress=progress, check=check, max_steps=None if check else _STEPS_A_LOOK, ended=True)


def _tokenizer(model: str) -> Callable[[str], list[int]]:
    """Return what turns texts into the token ids that ``model`` reads."""
    from pagedlab.executors.loading import read_tokenizer

    tokenizer = read_tokenizer(model)
    return lambda text: [int(i) for i in tokenizer(text, verbose=False)["input_ids"]]


def scripts_of(run: Run) -> dict[tuple[str, int], Script]:
    """Return what every sequence of ``run`` said, to be said again."""
    said, reasons = run.columns("outputs"), run.columns("requests")["finish_reason"]
    return {
        (request, sample): Script(max(1, len(tokens)), tokens, "stop" if reason == "stop" else "length")
        for request, sample, tokens, reason in zip(
            said["request_id"], said["sample"], said["tokens"], reasons, strict=True
        )
    }


def given_outputs(workload: Any) -> dict[tuple[str, int], Script] | None:
    """Return the outputs that a workload's trace knows, or None. They count for every sample of a request alike."""
    known = getattr(workload, "outputs", None)
    if not known:
        return None
    return {
        (r.request_id, i): Script(len(known[r.request_id]), known[r.request_id], "stop")
        if known.get(r.request_id)
        else Script(r.sampling.max_tokens)
        for r in workload
        for i in range(r.sampling.n)
    }


def _cost(config: Config, cost: CostModel | str | None, model: str | None, hardware: str | None) -> CostModel:
    if cost is None or cost == "roofline":
        params: dict[str, Any] = {"model": model, "hardware": hardware, "block_size": config.block_size}
        roofline = Roofline(**{k: v for k, v in params.items() if v is not None})
        return roofline.with_layout(config.policies().layout)
    if model is not None or hardware is not None:
        raise ConfigError("model and hardware belong to the roofline; a cost model of your own knows its own")
    made: Policy = make("cost", cost) if isinstance(cost, str) else cost
    if not isinstance(made, CostModel):
        raise ConfigError(f"cost must be a cost model or its name, not {cost!r}")
    return made.clone()


def _fitted(config: Config, cost: CostModel) -> Config:
    if not isinstance(cost, Roofline):
        raise ConfigError("num_blocks='fit' needs hardware: leave cost out, or give a roofline")
    blocks = pool_blocks(cost.shape, cost.accelerator, cost.tensor_parallel, config.block_size)
    if blocks < 1:
        raise ConfigError(f"{cost.model} does not fit {cost.hardware}")
    return replace(config, num_blocks=blocks)


def _clock(clock: str | Clock) -> Clock:
    if not isinstance(clock, str):
        return clock
    if clock not in CLOCKS:
        raise ConfigError(f"clock must be one of {', '.join(CLOCKS)}, not {clock!r}{nearest(clock, CLOCKS)}")
    return VirtualClock() if clock == "virtual" else StepClock()
