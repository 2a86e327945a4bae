"""The command line: ``pagedlab list | generate | compare | replay | calibrate | reproduce | data | bench | lab``.

What a person got wrong comes back as one line on stderr and exit code 2.
"""

from __future__ import annotations

import json as json_module
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer.core import TyperGroup

import pagedlab
from pagedlab.errors import ConfigError, PagedLabError, nearest

if TYPE_CHECKING:
    from pagedlab.config import Config

BENCHMARKS = ("engine", "cache", "kernel", "replay", "simulate")
_POOL = 512
"""Blocks of `generate`'s pool, unless told otherwise: room for a few sequences of 2,048 tokens."""


class _Commands(TyperGroup):
    """Turns errors that have a name into one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PagedLabError as error:
            typer.echo(f"pagedlab: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("pagedlab: interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    name="pagedlab",
    help="A laboratory for the KV cache of large language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Model = Annotated[str, typer.Option(help='"tiny", a local model folder, or a hub name.')]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a policy (eviction=lfu), one of its parameters "
                 "(swap.min_hits=2) or a size (num_blocks=64). May be repeated."),
]  # fmt: skip
NumBlocks = Annotated[int | None, typer.Option(help="Blocks of the device pool.")]
BlockSize = Annotated[int | None, typer.Option(help="Tokens per block.")]
MaxModelLen = Annotated[
    int | None, typer.Option(help="Longest sequence in tokens [default: what model and pool allow].")
]
MaxNumSeqs = Annotated[int | None, typer.Option(help="Sequences that may run at once.")]


def main() -> None:
    """Run the command line."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pagedlab {pagedlab.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None: ...


@app.command("list")
def list_command(
    slot: Annotated[
        str | None, typer.Argument(help="One of the ten slots, e.g. eviction; all if left out.")
    ] = None,
    json: Json = False,
) -> None:
    """List the policies of every slot with their parameters."""
    from pagedlab.registry import list_policies

    rows = list_policies(slot)
    if json:
        _print_json("list", rows)
        return
    table = [[r["slot"], r["name"], _one_line(r["summary"]), _parameters(r["params"])] for r in rows]
    _print_table(["slot", "name", "what it does", "parameters"], table)


@app.command()
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
    cfg = _config(config, model=model, sizes=sizes, default_blocks=_POOL)
    cfg = _with_set(cfg, set_)
    if cfg.max_num_seqs < n:
        cfg = cfg.replace(max_num_seqs=n)
    cfg = _within_pool(cfg)
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
        typer.echo(_printable(prompt + output if isinstance(output, str) else f"{prompt}{output}"))
    s = result.summary()
    last = [f"— {s['output_tokens']} tokens, {page.number(s['tokens_per_s'])} tokens/s"]
    last += [f"KV waste {page.percent(s['waste'])}", f"prefix hits {page.percent(s['hit_ratio'])}"]
    last += ["interrupted"] if result.interrupted else []
    typer.echo(" · ".join(last))


@app.command()
def replay(
    trace: Annotated[
        str,
        typer.Argument(
            help="A trace file or the name of a workload; FILE.txt[.gz] with one id a line is a plain stream."
        ),
    ],
    eviction: Annotated[
        str, typer.Option(metavar="A,B,...", help="Eviction policies; belady is the bound.")
    ] = "lru,belady",
    num_blocks: Annotated[
        str, typer.Option(metavar="N,M,...", help="Sizes of the cache in blocks.")
    ] = "5000",
    semantics: Annotated[
        str, typer.Option(help="prefix: as a serving engine counts; plain: every access alone.")
    ] = "prefix",
    touch_order: Annotated[
        str, typer.Option(help="Order of a request's accesses for plain: prefix_first or tail_first.")
    ] = "prefix_first",
    block_size: BlockSize = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Only the trace's first N requests.")] = None,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="Write the curve as a picture.")
    ] = None,
    json: Json = False,
) -> None:
    """Replay a trace's block accesses against one cache, without an engine: miss ratios per policy and size."""
    from pagedlab.lab import page
    from pagedlab.lab.accesses import read_trace
    from pagedlab.lab.replay import MissRatioCurve, Semantics, TouchOrder
    from pagedlab.lab.replay import replay as replay_trace
    from pagedlab.workloads import Workload

    given: str | Workload | list[int] = trace
    if requests is not None:
        read = read_trace(trace)
        given = read.head(requests) if isinstance(read, Workload) else read[:requests]
    curve = replay_trace(
        given,
        [name.strip() for name in eviction.split(",")],
        [_whole(n, "--num-blocks") for n in num_blocks.split(",")],
        semantics=cast("Semantics", semantics),
        touch_order=cast("TouchOrder", touch_order),
        block_size=block_size,
    )
    assert isinstance(curve, MissRatioCurve)
    if plot is not None:
        try:
            curve.plot().savefig(plot)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{plot}: cannot be written: {error}") from None
    counted = curve.trace
    if json:
        _print_json(
            "replay",
            curve.rows,
            trace=counted.name,
            semantics=semantics,
            touch_order=touch_order,
            block_size=counted.block_size,
            accesses=counted.total,
            unique=counted.unique,
            interrupted=curve.interrupted,
        )
        return
    typer.echo(f"{counted.name}: miss ratio of {counted.total:,} block accesses ({semantics})")
    _print_table(*curve.table(digits=6))
    ever = page.percent(1 - counted.unique / counted.total)
    typer.echo(f"{counted.unique:,} different blocks: a cache without end would hit {ever} of the accesses.")
    if plot is not None:
        typer.echo(f"figure: {plot}")
    if curve.interrupted:
        typer.echo("Interrupted: these are the caches that were finished.")


def _whole(text: str, option: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{option} takes whole numbers, as in 5000,10000, not {text!r}") from None


@app.command()
def compare(
    workload: Annotated[
        str, typer.Argument(help="A workload (chat, mixed-lengths, ...), a trace or its file.")
    ],
    how: Annotated[
        str, typer.Option(help="run: with a real model; simulate: with a cost model on a virtual clock.")
    ] = "run",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=A,B,...",
            help="Values to go through: every combination is run. May be repeated.",
        ),
    ] = None,
    preset: Annotated[str | None, typer.Option(metavar="A,B,...", help="Presets to go through.")] = None,
    config: Annotated[
        str | None, typer.Option(metavar="PRESET|FILE", help="The configuration to vary.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help='"tiny", a model folder or a hub name [default: tiny]; to simulate, a name of the catalogue.'
        ),
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(help="To simulate: a name of the catalogue (h100, l4, ...).")
    ] = None,
    cost: Annotated[
        str | None, typer.Option(metavar="FILE.json", help="To simulate: a cost model that calibrate wrote.")
    ] = None,
    num_blocks: NumBlocks = None,
    block_size: BlockSize = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Tokens computed in one step at most.")
    ] = None,
    requests: Annotated[int | None, typer.Option(help="Only the workload's first N requests.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="New tokens per request at most [default: the workload's].")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the workload.")] = 0,
    report: Annotated[
        str | None, typer.Option(metavar="FILE.html", help="Write a report that needs no other file.")
    ] = None,
    json: Json = False,
) -> None:
    """Run a workload under several configurations and set the results side by side."""
    from pagedlab import workloads
    from pagedlab.lab.compare import HOW
    from pagedlab.lab.compare import compare as compare_configs

    if how not in HOW:
        raise ConfigError(f"--how must be one of {', '.join(HOW)}, not {how!r}")
    if how == "run" and (hardware or cost):
        raise ConfigError(f"--{'hardware' if hardware else 'cost'} belongs to --how simulate")
    generated = workload in {row["name"] for row in workloads.list_workloads()}
    seeded: dict[str, Any] = {"seed": seed} if generated else {}
    given = workloads.load(workload, **seeded)
    if requests is not None:
        given = given.head(requests)
    sizes = {
        "num_blocks": num_blocks,
        "block_size": block_size,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
    }
    options: dict[str, Any] = {"max_tokens": max_tokens}
    if how == "simulate":
        fit = (
            "fit" if num_blocks is None and not any(v.startswith("num_blocks=") for v in set_ or ()) else None
        )
        if cost is not None:
            fit = None  # a fitted cost model knows no memory
        options |= {
            "model": model,
            "hardware": hardware,
            "cost": None if cost is None else _read_cost(cost),
            "num_blocks": fit,
            "events": False,
        }
    configs = _grid(preset, config, model if how == "run" else None, sizes, set_)
    comparison = compare_configs(configs, given, how=how, **options)
    if report is not None:
        comparison.to_html(report)
    if json:
        _print_json(
            "compare",
            comparison.rows,
            workload=given.name,
            how=how,
            same_output=comparison.same_output,
            interrupted=comparison.interrupted,
        )
        return
    _print_comparison(comparison)
    if report is not None:
        typer.echo(f"report: {report}")


@app.command()
def calibrate(
    workload: Annotated[str, typer.Argument(help="What to serve while steps are timed.")] = "mixed-lengths",
    against: Annotated[
        str, typer.Option(help="Another workload, to see how well the fit holds where it was not made.")
    ] = "shared-prefix",
    model: Annotated[
        str | None, typer.Option(help='"tiny", a model folder or a hub name [default: tiny].')
    ] = None,
    set_: Set = None,
    num_blocks: NumBlocks = None,
    block_size: BlockSize = None,
    max_num_seqs: MaxNumSeqs = None,
    requests: Annotated[int | None, typer.Option(help="Only the workloads' first N requests.")] = None,
    out: Annotated[
        str | None, typer.Option(metavar="FILE.json", help="Write the cost model, for compare --cost.")
    ] = None,
    json: Json = False,
) -> None:
    """Fit a cost model to this machine's own engine, and try it on another workload."""
    from pagedlab import workloads
    from pagedlab.lab import page
    from pagedlab.lab.calibrate import calibrate as fit
    from pagedlab.lab.calibrate import report
    from pagedlab.lab.session import run, warm_up
    from pagedlab.lab.simulate import simulate

    sizes = {"num_blocks": num_blocks, "block_size": block_size, "max_num_seqs": max_num_seqs}
    cfg = _with_set(_config(None, model=model, sizes=sizes, default_blocks=_POOL), set_)
    both = [workloads.load(name) for name in (workload, against)]
    if requests is not None:
        both = [given.head(requests) for given in both]
    warm_up(cfg, both[0])
    fitted_on, other = (run(cfg, given) for given in both)
    cost = fit(fitted_on)
    again = simulate(cfg, both[1], cost=cost, outputs=other, events=False, progress=False)
    measured, said = (sum(r.columns("steps")["duration"]) for r in (other, again))
    steps = [len(r.columns("steps")["step"]) for r in (other, again)]
    error = (said / steps[1]) / (measured / steps[0]) - 1
    if out is not None:
        _write(out, cost.to_json() + "\n")
    result = {
        "cost": cost.get_params(),
        "fitted_on": vars(report(cost, fitted_on)),
        "against": vars(report(cost, other)),
        "mean_step_error": error,
        "steps": steps[0],
        "steps_simulated": steps[1],
    }
    if json:
        _print_json("calibrate", result)
        return
    typer.echo(str(cost))
    typer.echo(f"on {workload}: {report(cost, fitted_on)}")
    typer.echo(f"on {against}: {report(cost, other)}")
    typer.echo(
        f"{against} simulated: mean step {page.seconds(said / steps[1])}, measured {page.seconds(measured / steps[0])} "
        f"({error:+.1%})"
    )
    if out is not None:
        typer.echo(f"cost model: {out}")


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def _read_cost(path: str) -> Any:
    from pagedlab.costs import Calibrated

    try:
        return Calibrated.from_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise ConfigError(f"{path}: {reason}; expected what pagedlab calibrate --out writes") from None


reproduce_app = typer.Typer(help="Published measurements, reproduced.", no_args_is_help=True)
app.add_typer(reproduce_app, name="reproduce")


@reproduce_app.command("vllm-run")
def reproduce_vllm_run(
    folder: Annotated[str, typer.Argument(help="The run: requests.jsonl, timeseries.csv, meta.json.")],
    workload: Annotated[
        str, typer.Option("--workload", help="Its requests with token ids: a file or a name.")
    ],
    model: Annotated[
        str | None, typer.Option(help="The catalogue's name for its model [default: the run's own].")
    ] = None,
    hardware: Annotated[str, typer.Option(help="The catalogue's name for its card.")] = "rtx-pro-6000",
    fit_on: Annotated[int, typer.Option(help="Requests whose measurements the fit may read.")] = 100,
    num_blocks: NumBlocks = None,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="Draw running and waiting over the measured ones.")
    ] = None,
    json: Json = False,
) -> None:
    """Fit a cost model to the first requests of a real vLLM run, and simulate all of it."""
    from pagedlab.lab.vllm_run import reproduce

    done = reproduce(folder, workload, model=model, hardware=hardware, fit_on=fit_on, num_blocks=num_blocks)
    if plot is not None:
        try:
            done.plot().savefig(plot)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{plot}: cannot be written: {error}") from None
    if json:
        result = done.as_dict()
        _print_json("reproduce vllm-run", result, error=result["error"])
        return
    typer.echo(f"{done.run.model}, {len(done.run.requests)} requests: simulated against measured")
    _print_table(*done.table())
    typer.echo(f"prefix hits: {done.hit_tokens:,} of {done.prompt_tokens:,} prompt tokens")
    typer.echo(
        f"fit on the first {done.fitted_on}: {done.fit.simulations} simulations in {done.fit.seconds:.1f} s; "
        f"one simulation of the run: {done.seconds:.2f} s"
    )
    typer.echo(f"{done.fit.cost}")


data_app = typer.Typer(help="Published traces: which are known, and fetching them.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.command("list")
def data_list(json: Json = False) -> None:
    """List the published traces: which are here, where, under which licence, and where they come from."""
    from pagedlab.workloads.data import list_data

    rows = list_data()
    if json:
        _print_json("data list", rows)
        return
    headings = ["trace", "what it is", "size", "where", "licence", "source"]
    _print_table(
        headings,
        [
            [
                r["name"],
                r["summary"],
                "—" if r["size"] is None else f"{r['size'] / 1e6:.1f} MB",
                r["where"] or (f"pagedlab data fetch {r['name']}" if r["fetch"] else "not here"),
                r["licence"],
                r["source"].removeprefix("https://"),
            ]
            for r in rows
        ],
    )


@data_app.command("fetch")
def data_fetch(
    name: Annotated[str, typer.Argument(help="A trace of `pagedlab data list`.")],
    to: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder to put it into [default: the download cache].")
    ] = None,
) -> None:
    """Fetch a trace from its authors' repository and check its SHA-256. What is there already is not fetched again."""
    from pagedlab.workloads.data import fetch

    path, fetched = fetch(name, to, progress=sys.stderr.isatty())
    typer.echo(f"{path}{'' if fetched else ' (was there)'}")


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="engine, cache, kernel, replay or simulate.")],
    json: Json = False,
) -> None:
    """Measure one part against what else there is, in one process, alternating."""
    if name not in BENCHMARKS:
        raise ConfigError(f"no benchmark {name!r}; known: {', '.join(BENCHMARKS)}{nearest(name, BENCHMARKS)}")
    if find_spec(f"pagedlab.bench.{name}") is None:
        raise ConfigError(f"benchmark {name!r} is not part of this installation")
    rows = import_module(f"pagedlab.bench.{name}").main(json=json)
    if json:
        _print_json(f"bench {name}", rows)
    elif rows:
        from pagedlab.lab import page

        headings = list(dict.fromkeys(key for row in rows for key in row))
        _print_table(headings, [[page.number(row.get(key)) for key in headings] for row in rows])


@app.command()
def demo(
    out: Annotated[
        str | None, typer.Option(metavar="FILE.html", help="Where to write the report.")
    ] = "report.html",
) -> None:
    """The quickstart without a browser: three ways to manage one small cache, compared, and a report."""
    from pagedlab import workloads
    from pagedlab.config import Config
    from pagedlab.lab.compare import compare as compare_configs

    small = Config(num_blocks=96, max_model_len=512)
    configs = {
        "contiguous (orca-max)": Config.preset("orca-max", num_blocks=96, max_model_len=512),
        "paged": small.replace(lookup="none"),
        "paged, prefixes shared": small.replace(lookup="radix"),
    }
    typer.echo(
        "64 turns of 16 conversations, served by a 2 M-parameter model from a cache of 96 blocks of 16 tokens.\n"
    )
    comparison = compare_configs(configs, workloads.chat(seed=0))
    _print_comparison(comparison)
    if out is not None:
        comparison.to_html(out)
        typer.echo(f"report: {out}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lab(ctx: typer.Context) -> None:
    """Open JupyterLab on the notebooks; further arguments go to JupyterLab. Loopback only, with its token."""
    folder = notebooks_folder()
    command = lab_command(folder, ctx.args)
    raise typer.Exit(subprocess.call(command))


def notebooks_folder() -> Path:
    """Return the checkout's notebooks, or a copy of the packaged ones in the current folder."""
    package = Path(pagedlab.__file__).parent
    checkout = package.parent / "notebooks"
    if any(checkout.glob("*.ipynb")):
        return checkout
    target = Path.cwd() / "pagedlab-notebooks"
    packaged = sorted((package / "notebooks").glob("*.ipynb"))
    if not packaged and not target.is_dir():
        raise ConfigError(
            "this installation has no notebooks; clone the repository, or start jupyter lab yourself"
        )
    target.mkdir(exist_ok=True)
    for notebook in packaged:
        copy = target / notebook.name
        if not copy.exists():
            copy.write_bytes(notebook.read_bytes())
    return target


def lab_command(folder: Path, extra: list[str]) -> list[str]:
    """Return the command that starts JupyterLab on ``folder``; the address comes last, so nothing overrides it."""
    command = [sys.executable, "-m", "jupyterlab"]
    quickstart = sorted(folder.glob("*quickstart*.ipynb"))
    command += [str(quickstart[0])] if quickstart else []
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    return [*command, *extra, f"--ServerApp.root_dir={folder}", "--ServerApp.ip=127.0.0.1"]


# ---- configurations ------------------------------------------------------------------------------------------------


def _config(
    name: str | None, *, model: str | None, sizes: dict[str, int | None], default_blocks: int | None = None
) -> Config:
    from pagedlab.config import PRESETS, Config

    if name is not None and name not in PRESETS and not Path(name).exists() and Path(name).suffix != ".json":
        raise ConfigError(
            f"no preset or file {name!r}; presets: {', '.join(PRESETS)}{nearest(name, PRESETS)}"
        )
    cfg = Config() if name is None else Config.load(name)
    override: dict[str, Any] = {k: v for k, v in sizes.items() if v is not None}
    if default_blocks is not None and (name is None or name in PRESETS):
        override.setdefault("num_blocks", default_blocks)
    if model is not None:
        override["model"] = model
    return cfg.replace(**override)


def _within_pool(cfg: Config) -> Config:
    """No sequence can be longer than the pool, and saying so keeps reservations of the longest one possible."""
    if cfg.max_model_len is not None:
        return cfg
    return cfg.replace(max_model_len=max((cfg.num_blocks - cfg.null_block) * cfg.block_size, 1))


def _grid(
    preset: str | None,
    config: str | None,
    model: str | None,
    sizes: dict[str, int | None],
    settings: list[str] | None,
) -> dict[str, Config]:
    from pagedlab.lab.grid import expand

    if preset is not None and config is not None:
        raise ConfigError("--preset and --config exclude each other")
    axes: dict[str, list[Any]] = {}
    for name, text in map(_assignment, settings or ()):
        axes[name] = [_value(name, v) for v in text.split(",")]
    names = [None] if preset is None else [p.strip() for p in preset.split(",")]
    grid: dict[str, Config] = {}
    for base in names:
        for title, cfg in expand(_config(base or config, model=model, sizes=sizes), axes).items():
            full = " ".join(filter(None, (base, title if axes else ""))) or config or "default"
            if full in grid:
                raise ConfigError(f"{full!r} comes twice")
            grid[full] = _within_pool(cfg)
    return grid


def _with_set(cfg: Config, settings: list[str] | None) -> Config:
    from pagedlab.lab.grid import with_values

    return with_values(cfg, {name: _value(name, text) for name, text in map(_assignment, settings or ())})


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise ConfigError(f"--set takes FIELD=VALUE, as in eviction=lru, not {text!r}")
    return name.strip(), value.strip()


def _value(name: str, text: str) -> Any:
    """Return a policy's name as it stands, and numbers, true, false and null as what they mean."""
    from pagedlab.registry import SLOTS

    text = text.strip()
    if name in SLOTS:
        return text
    try:
        value = json_module.loads(text)
    except json_module.JSONDecodeError:
        return text
    return value if isinstance(value, bool | int | float | None) else text


# ---- output --------------------------------------------------------------------------------------------------------


def _print_json(command: str, results: Any, **more: Any) -> None:
    from pagedlab.lab.environment import environment

    typer.echo(json_module.dumps({"command": command, **environment(), **more, "results": results}, indent=2))


def _print_comparison(comparison: Any) -> None:
    headings, rows = comparison.table()
    # Configurations are few and numbers are many: one column for each configuration fits any terminal.
    _print_table(
        ["", *(row[0] for row in rows)], [list(line) for line in zip(headings[1:], *(r[1:] for r in rows))]
    )
    typer.echo(comparison.verdict())
    for name, run in comparison.runs.items():
        for request_id, error in list(run.errors.items())[:3]:
            typer.echo(f"{name}: {_printable(request_id)}: {_printable(error)}")
    if comparison.interrupted:
        typer.echo("Interrupted: the numbers are those of the work that was done.")


def _print_table(headings: list[str], rows: list[list[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(Text(heading), overflow="fold")
    for row in rows:
        # Text, not str: brackets in a name are no markup.
        table.add_row(*(Text(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _parameters(params: list[dict[str, Any]]) -> str:
    return "\n".join(f"{p['name']}={p['default']!r}: {p['help']}" for p in params)


def _one_line(text: str) -> str:
    return text.replace("``", "").replace("`", "")


def _printable(text: str) -> str:
    """Keep a model's words from steering the terminal: control characters are shown, not sent."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


if __name__ == "__main__":
    main()
