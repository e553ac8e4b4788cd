"""The program that the commands hang on."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

ORDER = (
    "train", "report", "doctor", "replay", "suggest", "study", "bounds", "figures", "lab",
    "warmstart",
)  # fmt: skip
"""Commands as a user meets them; others follow in the order in which they were added."""


class InOrder(TyperGroup):
    """A group that lists its commands in `ORDER`."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names for the help page and for completion."""
        names = super().list_commands(ctx)
        return [*(n for n in ORDER if n in names), *(n for n in names if n not in ORDER)]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The list of commands, each with its whole first sentence."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, c.get_short_help_str(300)) for name, c in commands if c is not None]
            )


app = typer.Typer(
    cls=InOrder,
    help="Trust regions for reinforcement learning of large language models.",
    epilog="Exit codes: 0 fine, 1 a check found something, 2 wrong input, 130 interrupted. "
    "Each command has --help with an example.",
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
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
