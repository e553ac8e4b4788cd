"""The program that the commands hang on."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    help="Trust regions for reinforcement learning of large language models.",
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip


def _show_version(value: bool) -> None:
    if value:
        from .. import __version__

        print(f"fiberpo {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass
