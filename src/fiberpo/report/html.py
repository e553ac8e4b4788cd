"""Pages of one file: templates, scripts and plotly inline, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import gzip
from functools import cache
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import FiberPOError
from .tables import format_difference, format_drift, format_percent, format_reward

PACKAGE = "fiberpo.report"


def environment(*needed: str, package: str = PACKAGE) -> Any:
    """The templates of a package, and the report's, as a jinja2 environment.

    Args:
        needed: further packages without which the page cannot be made.
        package: where templates are looked for first, in its folder ``assets``.

    Raises:
        FiberPOError: If one of them, jinja2 or plotly is not installed.
    """
    try:
        from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

        for name in (*needed, "plotly.offline"):
            import_module(name)
    except ImportError as exc:
        raise FiberPOError(
            f"reports need {exc.name} ({exc}); install it with: pip install 'fiberpo[report]'"
        ) from exc
    places = dict.fromkeys((package, PACKAGE))
    templates = Environment(
        loader=ChoiceLoader([PackageLoader(place, "assets") for place in places]),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    templates.filters.update(
        reward=format_reward,
        difference=format_difference,
        drift=format_drift,
        percent=format_percent,
    )
    return templates


def asset(name: str, package: str = PACKAGE) -> str:
    """Text of a file in a package's folder ``assets``."""
    return (files(package) / "assets" / name).read_text(encoding="utf-8")


@cache
def packed_plotly() -> str:
    """Plotly's script compressed, as base64; the page unpacks it."""
    from plotly.offline import get_plotlyjs

    packed = gzip.compress(get_plotlyjs().encode(), compresslevel=9, mtime=0)
    return base64.b64encode(packed).decode("ascii")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file as a whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)
