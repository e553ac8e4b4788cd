"""The shape of the house: imports point one way, files stay short, the top level stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fiberpo

ROOT = Path(fiberpo.__file__).parent

LAYERS = [
    {"errors", "collective", "palette"},
    {"ops"},
    {"labels", "inputs", "columns", "budgets", "charts", "strata", "gates", "peer_gates"},
    {"divergence", "cutting", "batch", "layout", "bound_inputs", "length_neutral"},
    {
        "gating",
        "weights",
        "masks",
        "token_masks",
        "statistics",
        "stops",
        "measurement",
        "acceptance",
    },
    {"lowering", "surrogate", "objective", "memory", "exact", "citations", "corrections"},
    {"building", "peers", "stopping", "recipes", "testing"},
    {"theory", "recording"},
    {"diagnosis"},
    {"integrations", "report"},
    {"train"},
    {"study"},
    {"cli", "__main__"},
]
"""A module imports from its own layer or from one above it in this list, never from below."""


def modules():
    return sorted(ROOT.rglob("*.py"))


def layer_of(name):
    for i, layer in enumerate(LAYERS):
        if name in layer:
            return i
    raise AssertionError(f"{name} is in no layer; put it into LAYERS")


def imported(path):
    """Top-level names below the package that a file imports at run time."""
    package = path.relative_to(ROOT).parts[:-1]
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            full = [*base, *(node.module.split(".") if node.module else [])]
            yield from [full[0]] if full else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fiberpo."):
            yield node.module.split(".")[1]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_to_lower_layers(path):
    """Nothing below reads anything above."""
    parts = path.relative_to(ROOT).parts
    own = parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for name in imported(path):
        if name.startswith("__"):
            continue
        assert layer_of(name) <= layer_of(own), f"{own} imports {name}, which is above it"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_under_400_lines(path):
    """A longer file is two things."""
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize(
    ("package", "home"), [("torch.distributed", "collective.py"), ("triton", "ops/triton/")]
)
def test_one_home(package, home):
    """``torch.distributed`` is named in one file, ``triton`` in one folder."""
    users = [
        str(p.relative_to(ROOT))
        for p in modules()
        if any(
            line.strip().startswith(("import ", "from "))
            and package in line
            or f"{package}." in line
            and not line.strip().startswith(("#", '"', "``"))
            for line in p.read_text().splitlines()
        )
    ]
    assert [user for user in users if not user.startswith(home)] == []


def test_import_is_light():
    """``import fiberpo`` loads neither a trainer nor a plotting library, nor torch itself."""
    code = (
        "import sys, fiberpo; "
        "print([m for m in ('torch', 'transformers', 'trl', 'matplotlib', 'typer') "
        "if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names_resolve():
    """Every exported name exists, and nothing else is promised."""
    for name in fiberpo.__all__:
        assert getattr(fiberpo, name) is not None
    with pytest.raises(AttributeError, match="fibre"):
        _ = fiberpo.fibre


def test_every_error_is_a_value_error():
    """One root, which is also a ``ValueError``."""
    errors = [v for v in vars(fiberpo.errors).values() if isinstance(v, type)]
    for error in errors:
        if issubclass(error, Exception) and not issubclass(error, Warning):
            assert issubclass(error, fiberpo.FiberPOError)
            assert issubclass(error, ValueError)
