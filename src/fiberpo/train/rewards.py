"""Loading a user's reward function."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import logging
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from fiberpo.errors import ConfigError

logger = logging.getLogger(__name__)


def load_attribute(spec: str, what: str) -> Callable[..., Any]:
    """Load a function from ``path/to/file.py:function`` or ``package.module:function``.

    Args:
        spec: where it is.
        what: what to call it in errors, ``"reward function"``.

    Errors:
        ConfigError where the file, module or function is missing, or the import fails.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise ConfigError(f"{what} {spec!r}: write path/to/file.py:function or "
                          f"package.module:function")  # fmt: skip
    module = _import_place(place, f"{what} {spec!r}")
    function = getattr(module, name, None)
    if function is None:
        close = difflib.get_close_matches(name, [n for n in vars(module) if n[0] != "_"], n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"{what} {spec!r}: {place} has no {name!r}{hint}")
    if not callable(function):
        raise ConfigError(f"{what} {spec!r}: {name} is a {type(function).__name__}, which "
                          f"cannot be called")  # fmt: skip
    found: Callable[..., Any] = function
    return found


def load_function(spec: str) -> Callable[..., Any]:
    """Load a reward function from ``path/to/file.py:function`` or ``package.module:function``.

    It must have TRL's signature ``fn(prompts, completions, **columns) -> list[float | None]``.

    Errors:
        ConfigError where the file, module or function is missing, the import fails, or the
        function does not take any keyword (columns that it names itself are handed to it).
    """
    function = load_attribute(spec, "reward function")
    name = spec.rpartition(":")[2]
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return function  # no signature to be had: a function of compiled code
    kinds = {p.kind for p in parameters}
    named = {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds
    if not takes_any or any(
        p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters
    ):
        raise ConfigError(
            f"reward function {spec!r} has the parameters ({', '.join(sorted(named))}); it is "
            "called with prompts, completions and every column of the data by keyword, so define "
            f"it as def {name}(prompts, completions, **columns)"
        )
    return function


def _import_place(place: str, named: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place).expanduser().resolve()
        if not path.is_file():
            raise ConfigError(f"{named}: no file {place}; check the path")
        name = f"fiberpo_user_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
        found = importlib.util.spec_from_file_location(name, path)
        if found is None or found.loader is None:
            raise ConfigError(f"{named}: {place} cannot be imported")
        module = importlib.util.module_from_spec(found)
        sys.modules[name] = module  # dataclasses and pickle look the module up there
        found.loader.exec_module(module)
        return module
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{named}: importing {place} failed: "
                          f"{type(error).__name__}: {error}") from error  # fmt: skip
