"""`fiberpo lab`, `fiberpo bounds` and `fiberpo figures`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .app import app
from .options import TERMINAL, Json, write_json


@app.command(epilog="Example: fiberpo lab --only 'Thm D.10' --json build/lab.json")
def lab(
    json_: Json = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the page of the docs here.")] = None,
    only: Annotated[
        str | None, typer.Option(help="Claims whose name or source contains this.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the random cases; verdicts do not depend on it.")
    ] = 0,
) -> None:
    """Try every statement of the papers; print claim, place, verdict and worst case.

    Takes about half a minute. Exit code 1 if a verdict differs from the recorded one.
    """
    from ..theory import lab as laboratory
    from ..theory.page import markdown as page
    from ..theory.page import print_table

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
    write_json(json_, json.loads(laboratory.as_json(results, seed)))
    if json_ != TERMINAL:
        print_table(results)
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text(page(results, seed))
    for path in (json_, markdown):
        if path not in (None, TERMINAL):
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
    json_: Json = None,
) -> None:
    """Bound how far the surrogate can be from the true improvement (arXiv 2512.23075).

    Needs --kl-max or --tv-max; prints every bound that the inputs allow, and the tightest.
    """
    from ..bound_inputs import check_length
    from ..theory.bounds import bounds as compute

    found = compute(
        length, kl_max=kl_max, kl_seq=kl_seq, tv_max=tv_max, tv_seq=tv_seq,
        mean_tv=None if mean_tv is None else [mean_tv] * check_length(length),
        reward_range=reward_range, factor=factor, product=product, tight=tight,
    )  # fmt: skip
    write_json(json_, found.as_dict())
    if json_ != TERMINAL:
        from ..report.bounds import print_bounds

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
    from ..theory.comparison import parse_objective
    from ..theory.figures import write_figures

    chosen = [parse_objective(text) for text in objective] if objective else None
    formats = [part.strip() for part in format_.split(",")]
    for path in write_figures(out, chosen, formats):
        print(path)
