"""Runs that several tests look at."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from tests.e2e.launch import Ended, launch
from tests.tiny_run import make_files, write_config


class Run(NamedTuple):
    """A finished run: how it ended, its arguments and its directory."""

    ended: Ended
    arguments: list[str]
    directory: Path


@pytest.fixture(scope="session")
def run_of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One torchrun agent with two ranks, data-parallel, with a warm-up and an evaluation."""
    folder = tmp_path_factory.mktemp("two-ranks")
    settings = make_files(folder)
    settings["warmup"] = {"steps": 1, "name": "kl", "beta": 0.5}
    settings["training"]["steps"] = 2
    settings["evaluation"] = {"prompts": 4, "max_response_length": 4}
    write_config(folder, settings)
    arguments = ["--config", str(folder / "run.yaml")]
    return Run(launch(folder, *arguments, ranks=2), arguments, folder / "run")
