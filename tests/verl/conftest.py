"""verl on CPU: environment first, then verl, then one process group for this process."""

import os
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "verl"), str(ROOT / "examples" / "verl")]


os.environ.update(
    RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import cpu_step  # sets the rest of the environment, and loads verl
    import ray  # noqa: F401
    import torch

    import fiberpo.integrations.verl_worker  # noqa: F401

HOST = (
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::ResourceWarning",
    "ignore::UserWarning:torch",
    "ignore::UserWarning:verl",
    "ignore::UserWarning:hydra",
    "ignore::UserWarning:ray",
)
"""Warnings of the host are its own affair; those of fiberpo stay errors."""


def pytest_collection_modifyitems(items):
    for item in items:
        for each in HOST:
            item.add_marker(pytest.mark.filterwarnings(each))


@pytest.fixture(scope="session", autouse=True)
def process_group():
    torch.distributed.init_process_group("gloo")
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Folder of the tiny model."""
    folder = tmp_path_factory.mktemp("model")
    cpu_step.make_model(folder)
    return folder


@pytest.fixture(scope="session")
def batch(model):
    """16 answers to 4 prompts of 2 domains, far enough off policy for gates to act."""
    from harness import off_policy

    return off_policy(model)


@pytest.fixture(scope="session")
def worker(model):
    """verl's worker with the exact actor; `harness.step` changes its loss."""
    from harness import CASES, build, make_config

    return build(make_config(model, *CASES["domain"]))
