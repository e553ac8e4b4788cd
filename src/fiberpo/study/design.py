"""What a study is: a grid of settings, arms and seeds, declared in YAML before anything runs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError

Config = Mapping[str, Any]
"""Settings of a `TrainConfig` by name."""

RESERVED = ("name", "output", "seed")
"""Settings that the study itself gives to each cell."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class Setting:
    """Conditions under which the arms are compared.

    Args:
        about: one line for a person.
        config: settings on top of the study's ``base``.
        seeds: in place of the study's; None takes those.
    """

    about: str = ""
    config: Config = field(default_factory=dict)
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Arm:
    """One of the methods compared.

    Args:
        about: one line for a person.
        config: settings on top of those of the setting.
        family: what it is a trial of, for searches; the arm's own name by default.
        seeds: in place of the study's; None takes those.
    """

    about: str
    config: Config
    family: str
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Block:
    """A part of the grid: these settings with these arms, at ``seeds`` or at their own."""

    settings: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Study:
    """A grid of training runs.

    Args:
        name: of the study.
        about: one line for a person.
        seeds: of every arm in every setting, where neither has its own.
        base: settings of all cells.
        settings: by name.
        arms: by name.
        pairs: comparisons (arm, arm it is compared with).
        plan: the blocks to run, in order of priority.

    A cell's configuration is ``base``, then the setting's, then the arm's; a later value replaces
    an earlier one as a whole.
    """

    name: str
    about: str
    seeds: tuple[int, ...]
    base: Config
    settings: dict[str, Setting]
    arms: dict[str, Arm]
    pairs: list[tuple[str, str]]
    plan: tuple[Block, ...]

    def seeds_of(self, block: Block, setting: str, arm: str) -> tuple[int, ...]:
        """Seeds of an arm in a setting: the block's, or the study's, within their own if any."""
        own = [s for s in (self.settings[setting].seeds, self.arms[arm].seeds) if s is not None]
        seeds = block.seeds or (own[0] if own else self.seeds)
        return tuple(s for s in seeds if all(s in allowed for allowed in own))


def shipped() -> dict[str, Path]:
    """The grids that come with the package, by name."""
    folder = Path(str(files("fiberpo") / "assets" / "studies"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_study(name: str) -> Path:
    """The file of a shipped grid, or of one's own.

    Raises:
        ConfigError: naming what there is.
    """
    known = shipped()
    if name in known:
        return known[name]
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    raise ConfigError(f"no study {name!r}{_hint(name, known)}; or give a YAML file")


def load_study(path: Path) -> Study:
    """Read a grid; nothing of it is left unchecked but the configurations of its cells.

    Raises:
        ConfigError: for unknown keys (with a guess), keys given twice, names that do not exist.
    """
    try:
        given = yaml.load(path.read_text(), Loader=_Loader)
    except FileNotFoundError as error:
        raise ConfigError(f"no study file {path}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    try:
        return parse_study(given, path.stem)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_study(given: Any, name: str) -> Study:
    """A study from what its YAML holds; ``name`` where it has none of its own.

    Raises:
        ConfigError: as `load_study`.
    """
    keys = ("name", "about", "seeds", "base", "settings", "arms", "pairs", "plan")
    top = _section(given, keys, "the study")
    for key in ("seeds", "settings", "arms"):
        if not top.get(key):
            raise ConfigError(f"the study has no {key}; give at least one")
    seeds = _seeds(top["seeds"], "the study") or ()
    settings = {
        key: _setting(value, f"setting {key!r}")
        for key, value in _named(top["settings"], "settings").items()
    }
    arms = {
        key: _arm(value, key, f"arm {key!r}") for key, value in _named(top["arms"], "arms").items()
    }
    study = Study(
        name=_checked_name(top.get("name", name), "the study"),
        about=_text(top, "about", "the study"),
        seeds=seeds,
        base=_config(top.get("base"), "base"),
        settings=settings,
        arms=arms,
        pairs=_pairs(top.get("pairs"), arms),
        plan=_plan(top.get("plan"), settings, arms),
    )
    for number, block in enumerate(study.plan, 1):
        if not any(study.seeds_of(block, s, a) for s in block.settings for a in block.arms):
            raise ConfigError(
                f"block {number} of the plan holds no cell: its seeds, {list(block.seeds or seeds)}"
                ", are not among those of its settings and arms"
            )
    return study


def _setting(given: Any, where: str) -> Setting:
    values = _section(given, ("about", "config", "seeds"), where)
    return Setting(
        _text(values, "about", where),
        _config(values.get("config"), where),
        _seeds(values.get("seeds"), where),
    )


def _arm(given: Any, name: str, where: str) -> Arm:
    values = _section(given, ("about", "config", "family", "seeds"), where)
    return Arm(
        _text(values, "about", where),
        _config(values.get("config"), where),
        _checked_name(values.get("family", name), where),
        _seeds(values.get("seeds"), where),
    )


def _pairs(given: Any, arms: Mapping[str, Arm]) -> list[tuple[str, str]]:
    if given is None:
        first, *others = arms
        return [(arm, first) for arm in others]
    if not isinstance(given, list) or not all(isinstance(p, list) and len(p) == 2 for p in given):
        raise ConfigError(f"pairs is {given!r}; it is a list of two arms each, as [[a, b], [a, c]]")
    for arm in (arm for pair in given for arm in pair):
        check_known(arm, arms, "arm", "pairs")
    return [(a, b) for a, b in given]


def _plan(given: Any, settings: Config, arms: Config) -> tuple[Block, ...]:
    if given is None:
        return (Block(tuple(settings), tuple(arms)),)
    if not isinstance(given, list) or not given:
        raise ConfigError(f"plan is {given!r}; it is a list of blocks, or left out")
    blocks = []
    for number, entry in enumerate(given, 1):
        where = f"block {number} of the plan"
        values = _section(entry, ("settings", "arms", "seeds"), where)
        chosen = []
        for key, known in (("settings", settings), ("arms", arms)):
            names = values.get(key, list(known))
            if not isinstance(names, list) or not names:
                raise ConfigError(f"{where}: {key} is {names!r}; it is a list of names")
            for name in names:
                check_known(name, known, key[:-1], where)
            chosen.append(tuple(dict.fromkeys(names)))
        blocks.append(Block(chosen[0], chosen[1], _seeds(values.get("seeds"), where)))
    return tuple(blocks)


def check_known(name: Any, known: Iterable[Any], kind: str, where: str) -> None:
    """Refuse a name that is not there.

    Raises:
        ConfigError: with a guess at what was meant.
    """
    if name not in (names := list(known)):
        raise ConfigError(f"{where}: unknown {kind} {name!r}{_hint(str(name), names)}")


def _hint(name: str, known: Iterable[Any]) -> str:
    names = [str(other) for other in known]
    guess = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {guess[0]!r}?" if guess else f"; there are {', '.join(names)}"


def _section(given: Any, keys: tuple[str, ...], where: str) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} is {given!r}; it holds {', '.join(keys)} by name")
    for key in given:
        check_known(key, keys, "key", where)
    return given


def _named(given: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{what} is {given!r}; each has a name, as {what}: {{NAME: {{...}}}}")
    for name in given:
        _checked_name(name, what)
    return given


def _checked_name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{where}: {name!r} is no name; it becomes part of a path, so use letters, digits, "
            "'_', '-', '.' and '+' (and quotes, if YAML reads it as something else)"
        )
    return name


def _text(values: Mapping[str, Any], key: str, where: str) -> str:
    text = values.get(key, "")
    if not isinstance(text, str):
        raise ConfigError(f"{where}: {key} is {text!r}; it is a line of text")
    return " ".join(text.split())


def _config(given: Any, where: str) -> Config:
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise ConfigError(f"{where}: the configuration is {given!r}; it holds settings by name")
    for key in RESERVED:
        if key in given:
            raise ConfigError(f"{where}: {key!r} is set by the study; leave it out")
    return dict(given)


def _seeds(given: Any, where: str) -> tuple[int, ...] | None:
    if given is None:
        return None
    fine = isinstance(given, list) and given and all(type(s) is int and s >= 0 for s in given)
    if not fine or len(set(given)) < len(given):
        raise ConfigError(f"{where}: seeds is {given!r}; it is a list of different numbers from 0")
    return tuple(given)


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice, and reads 3e-4 as a number, as YAML 1.2 does."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"),
    list("-+0123456789"),
)
