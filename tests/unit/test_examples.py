"""The examples stay true: every YAML file is a valid run, every script is valid shell that names existing files."""

import importlib
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from megatron_amd.config import load_config
from megatron_amd.training.plan import describe_plan
from tests.hub_configs import SMOLLM2, write_hub_cache

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


PLANNED = {
    "examples/demo/demo.yaml": 2,
    "examples/gpt/gpt2_dolly.yaml": 8,
    "examples/gpt/llama70b_amm.yaml": 32,
    "examples/gpt/llama_amm.yaml": 8,
    "examples/gpt/openllama_dolly.yaml": 8,
    "examples/gpt/qwen2_amm.yaml": 16,
    "examples/multi30k/student.yaml": 2,
    "examples/multi30k/teacher.yaml": 2,
    "examples/t5/iwslt17.yaml": 8,
    "examples/t5/samsum.yaml": 8,
    "examples/t5/strategyqa.yaml": 8,
}
"""Ranks of each example, as its first lines say."""


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("hub")
    write_hub_cache(cache)
    return cache


@pytest.mark.filterwarnings("ignore::FutureWarning:torch.distributed")  # Megatron-Core calls by former names
@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_every_config_is_planned_and_fits(path: Path, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`--dry-run` with the models' real sizes: in the memory of an 80 GB GPU, or of a laptop for what runs there."""
    ranks = PLANNED[name(path)]
    overrides = []
    if "demo" in path.parts:  # its model is not on the hub in this form
        for role in ("teacher", "student"):
            overrides.append(f"{role}.path={tmp_path}")
        (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    if path.name == "student.yaml":
        teacher = load_config(path.with_name("teacher.yaml")).teacher.architecture
        (tmp_path / "config.json").write_text(json.dumps(teacher))
        overrides.append(f"teacher.path={tmp_path}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub_cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    plan = describe_plan(load_config(path, overrides), ranks)
    peaks = [float(value) for value in re.findall(r"GiB at the peak((?: +[\d.]+)+)", plan)[-1].split()]
    assert max(peaks) < (8 if ranks == 2 else 74)


def import_example(folder: str, name: str) -> types.ModuleType:
    """A program of an example as a module, which finds those beside it."""
    sys.path.insert(0, str(ROOT / folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)
        for other in (ROOT / folder).glob("*.py"):
            sys.modules.pop(other.stem, None)


def test_task_data_becomes_prompts_and_responses(tmp_path: Path):
    prepare = import_example("examples/t5", "prepare")
    rows = {
        "samsum": {"dialogue": "A: hi", "summary": "A greets."},
        "iwslt17": {"translation": {"en": "Thanks.", "de": "Danke."}},
        "strategyqa": {"question": "Is it?", "answer": True, "facts": "It is."},
    }
    expected = {
        "samsum": {"prompt": "summarize: A: hi", "response": "A greets."},
        "iwslt17": {"prompt": "translate English to German: Thanks.", "response": "Danke."},
        "strategyqa": {"prompt": "question: Is it?", "response": "It is. So the answer is yes."},
    }
    for name, row in rows.items():
        task = prepare.TASKS[name]._replace(held_out=1)
        empty = {**row, **({"summary": " "} if name == "samsum" else {})}
        prepare.write({"train": [row, empty, row]}, task, tmp_path / name)
        lines = [json.loads(line) for line in (tmp_path / name / "train.jsonl").read_text().splitlines()]
        assert lines == [expected[name]] * (1 if name == "samsum" else 2)
        assert json.loads((tmp_path / name / "validation.jsonl").read_text()) == expected[name]


def multi30k(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit status and what is said on stderr of a start that comes to nothing, from another working directory."""
    command = [sys.executable, str(ROOT / "examples/multi30k/run.py"), "--output", str(folder), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert not (folder / "teacher").exists()
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training.stepz=1"], "training.stepz: unknown key; did you mean training.steps?"),
        (["--data", "nowhere"], "nowhere: has none of multi30k_train.en"),
        (["--secondz", "3"], "command line: unrecognized arguments: --secondz;"),
    ],
)
def test_multi30k_says_in_a_line_what_is_wrong(tmp_path: Path, arguments: list[str], message: str):
    status, said = multi30k(tmp_path, *arguments)
    assert status == 2
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1


def test_multi30k_keeps_to_the_options_it_was_begun_with(tmp_path: Path):
    multi30k(tmp_path, "--data", "nowhere", "--seconds", "5")
    status, said = multi30k(tmp_path, "--data", "nowhere", "--seconds", "2")
    assert status == 2
    assert said == (
        f"error: {tmp_path}: was begun with other options (seconds 5.0 -> 2.0); give those, or another --output\n"
    )


def test_multi30k_leaves_a_folder_alone_that_is_not_its_own(tmp_path: Path):
    (tmp_path / "notes.txt").touch()
    status, said = multi30k(tmp_path, "--data", "nowhere")
    assert (status, said) == (
        2, f"error: {tmp_path}: holds other things and no options.json; give another --output\n"
    )  # fmt: skip
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_multi30k_counts_what_a_run_has_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From another working directory: the programs that are called are found by their place."""
    run = import_example("examples/multi30k", "run")
    sentences = ["Ein Hund rennt über die Wiese .", "Zwei Männer sitzen auf einer Bank ."]
    (tmp_path / "inputs").mkdir()
    rows = [json.dumps({"prompt": "A", "response": sentence}) for sentence in sentences]
    (tmp_path / "inputs" / "test.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "kl" / "student").mkdir(parents=True)
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, tmp_path / "kl" / "student" / "model.safetensors")
    logged = [{"time/iteration": 0.5}, {"evaluation/kl": 1.0}, {"time/iteration": 1.5}]
    (tmp_path / "kl" / "metrics.jsonl").write_text("\n".join(map(json.dumps, logged)) + "\n")

    def generate(command: list[str], check: bool) -> None:
        assert Path(command[1]).is_file()
        folder = Path(command[command.index("--output") + 1])
        folder.mkdir(parents=True)
        (folder / "responses-00000.jsonl").write_text("\n".join(rows) + "\n")

    monkeypatch.setattr(run.subprocess, "run", generate)
    monkeypatch.chdir(tmp_path)
    row = run.row(types.SimpleNamespace(output=tmp_path), "KL", tmp_path / "kl")
    assert row == {"parameters": 17, "iterations": 2, "seconds": 2.0, "bleu": 100.0}
