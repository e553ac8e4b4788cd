"""The command line. Commands are few; everything heavy is imported inside them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from .errors import ConfigError, FiberPOError

# threads that wait actively slow each other down several times over on few cores; to have an effect
# this must stand before the first import of torch
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _parse_budget(text: str) -> tuple[str, Any]:
    """``domain=0.02,0.015`` or ``domain:math=0.02,0.015`` -> (stratum, budget)."""
    place, _, pair = text.partition("=")
    try:
        positive, negative = (float(part) for part in pair.split(","))
    except ValueError as error:
        raise ConfigError(
            f"--budget {text!r} is not of the form domain=0.02,0.015 (or domain:math=0.02,0.015 "
            "for one context)"
        ) from error
    stratum, _, context = place.partition(":")
    return stratum, {context: (positive, negative)} if context else (positive, negative)


def budgets_from(texts: list[str]) -> dict[str, Any]:
    """Budgets by stratum from the command line; several contexts of one stratum are joined.

    >>> budgets_from(["domain:math=0.2,0.1", "domain:*=0.1,0.05", "group=0.1,0.1"])
    {'domain': {'math': (0.2, 0.1), '*': (0.1, 0.05)}, 'group': (0.1, 0.1)}
    """
    out: dict[str, Any] = {}
    for text in texts:
        stratum, budget = _parse_budget(text)
        if isinstance(budget, dict) and isinstance(out.get(stratum), dict):
            out[stratum].update(budget)
        elif stratum in out:
            raise ConfigError(f"--budget names the stratum {stratum!r} twice")
        else:
            out[stratum] = budget
    return out


def objective_kwargs(
    objective: str | None,
    budget: list[str],
    epsilon: float | None,
    pessimistic: bool | None,
    values: dict[str, Any],
) -> dict[str, Any]:
    """Parameters of a recipe from command-line flags, on top of ``values``."""
    out = dict(values)
    if budget:
        budgets = budgets_from(budget)
        if objective == "fiberpo":
            if set(budgets) != {"trajectory"}:
                raise ConfigError(
                    f"fiberpo has one budget, that of the trajectory, not {sorted(budgets)}; use "
                    "--objective fiberpo_domain for other strata"
                )
            out["budget"] = budgets["trajectory"]
        else:
            out["budgets"] = budgets
    if epsilon is not None:
        out["epsilon"] = epsilon
    if pessimistic is not None:
        out["pessimistic"] = pessimistic
    return out


app = typer.Typer(
    help="Trust regions for reinforcement learning of large language models.",
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip


def _show_version(value: bool) -> None:
    if value:
        from . import __version__

        print(f"fiberpo {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: fiberpo train --objective gspo --epsilon 0.02 --rollouts 50 --seed 1")
def train(
    name: Annotated[str | None, typer.Option(help="Directory of the run.")] = None,
    output: Annotated[str | None, typer.Option(help="Where runs are kept.")] = None,
    model: Annotated[
        str | None, typer.Option(help="embedded, smollm2, a directory, or a hub id.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="A domain: sum, sort, reverse, boolean or reasoning_gym:NAME."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Own prompts: JSONL, parquet, ...")] = None,
    reward: Annotated[str | None, typer.Option(help="file.py:function.")] = None,
    objective: Annotated[str | None, typer.Option(help="A recipe, as grpo or gspo.")] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="domain=0.02,0.015 (positive, negative; nats per token)."),
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="Half-width of the token clip.")] = None,
    pessimistic: Annotated[
        bool | None,
        typer.Option("--pessimistic/--printed", help="min(G A, r A), or as the paper."),
    ] = None,
    mask_max: Annotated[
        float | None, typer.Option(help="Leave out answers with a token of a larger k2, in nats.")
    ] = None,
    mask_mean: Annotated[
        float | None, typer.Option(help="Leave out answers of a larger mean k3, in nats.")
    ] = None,
    rollouts: Annotated[int | None, typer.Option(help="How often answers are sampled.")] = None,
    updates_per_rollout: Annotated[
        int | None, typer.Option(help="Optimizer steps on each rollout.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes a run repeatable.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting, as prompts=32 (value in YAML)."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue this run directory.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a run of the same name.")] = False,
    tensorboard: Annotated[bool | None, typer.Option("--tensorboard")] = None,
    trackio: Annotated[bool | None, typer.Option("--trackio")] = None,
) -> None:
    """Train a language model by RL with any objective, and write a report.

    Without options: FiberPO-Domain on the embedded model and four small domains, about four
    minutes on two cores. The run's directory holds the report, metrics, config and checkpoint.
    """
    from .report.terminal import print_summary
    from .train.config import CONFIG_FILE, make_config
    from .train.program import train as run

    given = {
        "name": name, "output": output, "model": model, "tasks": task, "data": data,
        "reward": reward, "objective": objective, "rollouts": rollouts,
        "updates_per_rollout": updates_per_rollout, "learning_rate": learning_rate,
        "seed": seed, "tensorboard": tensorboard, "trackio": trackio,
        "mask_max": mask_max, "mask_mean": mask_mean,
    }  # fmt: skip
    values = {k: v for k, v in given.items() if v is not None}
    for text in set_ or []:
        key, _, value = text.partition("=")
        values[key] = yaml.safe_load(value)
    if resume is not None:
        if config is not None:
            raise ConfigError("--resume takes its settings from the run; leave out --config")
        config = resume / CONFIG_FILE
        values = {**values, "output": str(resume.parent), "name": resume.name}
    base = make_config(config, values)
    parameters = objective_kwargs(
        base.objective, budget or [], epsilon, pessimistic, base.objective_kwargs
    )
    settings = base.replace(objective_kwargs=parameters)
    summary = run(settings, resume=resume is not None, overwrite=overwrite)
    print_summary(summary)
    print(f"\nreport: {settings.run_dir / 'report.html'}")
    if summary["interrupted"]:
        print(f"continue with: fiberpo train --resume {settings.run_dir}")
        raise typer.Exit(130)


@app.command(epilog="Example: fiberpo warmstart build/embedded --seed 0")
def warmstart(
    output: Annotated[Path, typer.Argument(help="Directory for the checkpoint.")],
    seed: Annotated[int, typer.Option(help="Of weights and problems.")] = 0,
) -> None:
    """Rebuild the embedded model's checkpoint by supervised fine-tuning (about two minutes)."""
    from .train.warmstart import warmstart as run

    report = run(output, seed=seed)
    for kind in ("greedy", "sampled"):
        accuracy = ", ".join(f"{k} {v:.3f}" for k, v in report[f"{kind}_accuracy"].items())
        print(f"{kind:8} {accuracy}")


@app.command(epilog="Example: fiberpo lab --only 'Thm D.10' --json build/lab.json")
def lab(
    json_: Annotated[
        Path | None, typer.Option("--json", help="Write everything found here.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the page of the docs here.")] = None,
    only: Annotated[
        str | None, typer.Option(help="Claims whose name or source contains this.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of the random cases; verdicts do not depend on it.")
    ] = 0,
) -> None:
    """Try every statement of the papers; print claim, place, verdict and worst case.

    Takes about half a minute. Exit code 1 if a verdict differs from the recorded one.
    """
    from .theory import lab as laboratory
    from .theory.page import markdown as page
    from .theory.page import print_table

    if markdown is not None and only is not None:
        raise ConfigError(f"--markdown {markdown} is the page of all claims; leave out --only")
    claims = laboratory.select(only)
    done: list[laboratory.Result] = []

    def progress(result: laboratory.Result) -> None:
        done.append(result)
        verdict, took = result.finding.verdict.value, f"{result.seconds:.1f} s"
        line = f"{len(done)}/{len(claims)} {result.claim.name}: {verdict} ({took})"
        print(line, file=sys.stderr, flush=True)

    results = laboratory.run(claims, seed=seed, progress=progress)
    print_table(results)
    for path, text in (
        (json_, laboratory.as_json(results, seed)), (markdown, page(results, seed)),
    ):  # fmt: skip
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(f"written: {path}")
    changed = [result for result in results if result.changed]
    for result in changed:
        print(f"fiberpo lab: verdict changed: {result.change}", file=sys.stderr)
    if changed:
        raise typer.Exit(1)


@app.command(
    epilog="Example: fiberpo bounds --length 4096 --kl-max 1e-4 --kl-seq 0.01 --tv-max 5e-3 "
    "--tv-seq 0.05"
)
def bounds(
    length: Annotated[int, typer.Option(help="Tokens of the longest sequence.")],
    kl_max: Annotated[float | None, typer.Option(help="Largest KL of a token, nats.")] = None,
    kl_seq: Annotated[float | None, typer.Option(help="KL of whole sequences, nats.")] = None,
    tv_max: Annotated[float | None, typer.Option(help="Largest TV of a token, 0 to 1.")] = None,
    tv_seq: Annotated[float | None, typer.Option(help="TV of whole sequences, 0 to 1.")] = None,
    mean_tv: Annotated[
        float | None, typer.Option(help="Mean TV of a token, taken as that of every position.")
    ] = None,
    reward_range: Annotated[
        tuple[float, float], typer.Option(help="Lowest and highest reward.")
    ] = (0.0, 1.0),
    factor: Annotated[int, typer.Option(help="4 as in the paper, or 2, also proved.")] = 4,
    product: Annotated[
        bool, typer.Option("--product", help="1 - (1-eps)^s in place of min(1, s eps).")
    ] = False,
    tight: Annotated[
        bool, typer.Option("--tight", help="--factor 2 and --product together.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object only.")] = False,
) -> None:
    """Bound how far the surrogate can be from the true improvement (arXiv 2512.23075).

    Needs --kl-max or --tv-max; prints every bound that the inputs allow, and the tightest.
    """
    from .bound_inputs import check_length
    from .theory.bounds import bounds as compute

    found = compute(
        length, kl_max=kl_max, kl_seq=kl_seq, tv_max=tv_max, tv_seq=tv_seq,
        mean_tv=None if mean_tv is None else [mean_tv] * check_length(length),
        reward_range=reward_range, factor=factor, product=product, tight=tight,
    )  # fmt: skip
    if json_:
        print(json.dumps(found.as_dict(), indent=2))
        return
    from .report.bounds import print_bounds

    print_bounds(found)


@app.command(epilog="Example: fiberpo figures --objective grpo --objective 'gspo(epsilon=0.02)'")
def figures(
    out: Annotated[Path, typer.Option(help="Directory for the files.")] = Path("figures"),
    objective: Annotated[
        list[str] | None,
        typer.Option(help="To compare: a recipe, or one with parameters. Repeatable."),
    ] = None,
    format_: Annotated[str, typer.Option("--format", help="Of png, svg, pdf.")] = "png,svg",
) -> None:
    """Draw Figures 1 to 4 of the FiberPO paper, and objectives side by side (ten seconds)."""
    from .theory.comparison import parse_objective
    from .theory.figures import write_figures

    chosen = [parse_objective(text) for text in objective] if objective else None
    formats = [part.strip() for part in format_.split(",")]
    for path in write_figures(out, chosen, formats):
        print(path)


def main() -> None:
    """Entry point of ``fiberpo``; user mistakes end without a traceback, with exit code 2."""
    try:
        app()
    except FiberPOError as error:
        print(f"fiberpo: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        print(
            f"fiberpo: {error.name} is not installed. The command line needs the extras: "
            "pip install 'fiberpo[trl,report,lab]'",
            file=sys.stderr,
        )
        sys.exit(2)
