"""The examples stay true: every YAML file is a valid run, every script is valid shell that names existing files."""

import re
import subprocess
from pathlib import Path

import pytest

from megatron_amd.config import load_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "examples").rglob("*.yaml"))
SCRIPTS = sorted(path for path in (ROOT / "examples").rglob("*") if path.suffix in (".sh", ".sbatch"))
SCRIPTS += [ROOT / "tools/find_python.sh", ROOT / ".ci/run"]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_every_config_loads(path: Path):
    config = load_config(path)
    assert config.run.directory.startswith("runs/"), "git ignores runs/ alone"


def test_there_are_examples():
    assert {"examples/gpt/llama_amm.yaml", "examples/gpt/qwen2_amm.yaml"} <= {name(path) for path in CONFIGS}


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_every_script_is_executable_shell(path: Path):
    assert path.stat().st_mode & 0o111
    assert path.read_text(encoding="utf-8").startswith("#!")
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("path", CONFIGS + SCRIPTS + [ROOT / "Makefile", ROOT / "Dockerfile"], ids=name)
def test_files_that_are_named_exist(path: Path):
    for named in re.findall(r"\b(?:examples|tools|tests)/[\w./-]+\.\w+", path.read_text(encoding="utf-8")):
        assert (ROOT / named).exists(), named


def test_ci_runs_exactly_make_check():
    lines = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert lines == ["#!/usr/bin/env bash", "set -euo pipefail", 'cd "$(dirname "$0")/.."', "make check"]


def test_find_python_names_what_is_missing(tmp_path: Path):
    """With an empty PATH for Pythons it ends with one line and a status."""
    for tool in ("sh", "sed", "env"):
        (tmp_path / tool).symlink_to(Path("/bin") / tool if (Path("/bin") / tool).exists() else Path("/usr/bin") / tool)
    environment = {"PATH": str(tmp_path), "PYENV_ROOT": str(tmp_path)}
    command = [str(tmp_path / "sh"), str(ROOT / "tools/find_python.sh"), "3.11", "3.12"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "no Python 3.11, 3.12 with the venv module was found" in done.stderr
