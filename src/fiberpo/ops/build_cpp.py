"""Builds the C++ of this package with the compiler of the system, once, into a cache of the user.

Plain C functions are called through ctypes, so that no header of torch or Python is read: a build
takes seconds, and one library serves every version of both.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

SOURCES = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
FLAGS = [
    "-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-pthread",
    "-Wno-psabi",
]  # fmt: skip
NATIVE = ["-march=native"]


class BuildError(Exception):
    """The library is not there and cannot be made; says why."""


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/fiberpo``, or ``~/.cache/fiberpo``."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "fiberpo"


def find_compiler() -> list[str]:
    """The command of ``$CXX``, else the first of ``c++``, ``g++``, ``clang++``.

    Raises:
        BuildError: where there is none.
    """
    wanted = os.environ.get("CXX")
    if wanted:
        command = shlex.split(wanted)
        if shutil.which(command[0]) is None:
            raise BuildError(f"CXX is {wanted!r}, which is no program on PATH; unset or correct it")
        return command
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise BuildError(
        f"no C++ compiler ({', '.join(COMPILERS)}) on PATH; install one, or name one in CXX"
    )


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    first = {line.split(":")[0].strip(): line for line in reversed(lines) if ":" in line}
    return "".join(first.get(key, "") for key in ("model name", "flags", "Features"))


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{shlex.join(command)}: {error}") from error


def build(name: str, extra: tuple[str, ...] = ()) -> Path:
    """Path of the library of ``name``.cpp, built if its cache has none.

    The file name holds a hash of the sources, flags, compiler and processor. It appears at once
    and whole: processes that build at the same time do not see each other's half of a file.

    Args:
        name: of the source, without suffix; headers are all that start with it.
        extra: flags to add.

    Raises:
        BuildError: without a compiler, where it fails (its output is quoted), or where the cache
            cannot be written.
    """
    compiler = find_compiler()
    version = _run([*compiler, "--version"])
    if version.returncode:
        raise BuildError(f"{shlex.join(compiler)} --version failed: {version.stderr.strip()}")
    sources = [SOURCES / f"{name}.cpp", *sorted(SOURCES.glob(f"{name}*.h"))]
    parts = [*FLAGS, *NATIVE, *extra, *compiler, version.stdout, _processor(), platform.machine()]
    digest = hashlib.sha256("\0".join(parts).encode())
    for source in sources:
        digest.update(source.read_bytes())
    folder = cache_folder()
    target = folder / f"{name}-{digest.hexdigest()[:24]}.so"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as made:
            out = Path(made) / target.name
            failed = ""
            for native in (NATIVE, []):  # not every compiler knows the machine it runs on
                done = _run([*compiler, *FLAGS, *native, *extra, str(sources[0]), "-o", str(out)])
                if done.returncode == 0:
                    os.replace(out, target)
                    return target
                failed = failed or done.stderr.strip()
    except OSError as error:
        raise BuildError(
            f"{folder} cannot be written ({error}); set XDG_CACHE_HOME to a folder that can"
        ) from error
    raise BuildError(f"{shlex.join(compiler)} cannot build {sources[0].name}:\n{failed}")


@lru_cache
def load(name: str) -> ctypes.CDLL | str:
    """The library of ``name``.cpp, or why there is none; asked once a process."""
    try:
        return ctypes.CDLL(str(build(name)))
    except (BuildError, OSError) as error:
        return str(error)
