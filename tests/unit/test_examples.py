"""The examples stay true: every YAML file is a valid run, every script is valid shell that names existing files."""

import importlib.util
import json
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
from megatron_amd.errors import InputError
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


def test_task_data_becomes_prompts_and_responses(tmp_path: Path):
    sys.path.insert(0, str(ROOT / "examples/t5"))
    try:
        prepare = importlib.import_module("prepare")
    finally:
        sys.path.pop(0)
        sys.modules.pop("prepare", None)
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
        lines = [json.loads(line) for line in (tmp_path / name / "train.jsonl").open()]
        assert lines == [expected[name]] * (1 if name == "samsum" else 2)
        assert [json.loads(line) for line in (tmp_path / name / "validation.jsonl").open()] == [expected[name]]


@pytest.fixture
def multi30k() -> types.ModuleType:
    """examples/multi30k/run.py as a module."""
    spec = importlib.util.spec_from_file_location("multi30k_run", ROOT / "examples/multi30k/run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_multi30k_trains_once_and_refuses_a_run_of_other_settings(
    multi30k: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    commands = []

    def pretend(command: list[str], check: bool) -> None:
        commands.append(command)
        (tmp_path / "sft" / "student").mkdir(parents=True)
        (tmp_path / "sft" / "student" / "config.json").touch()

    monkeypatch.setattr(multi30k.subprocess, "run", pretend)
    options = types.SimpleNamespace(ranks=2)
    for _ in range(2):
        multi30k.train(options, tmp_path / "sft", "student.yaml", ["training.steps=5"])
    assert len(commands) == 1
    assert commands[0][-2:] == [f"run.directory={tmp_path}/sft", "training.steps=5"]
    message = r"sft: was made with other settings \(training.steps=5; now training.steps=9\); remove it, or give"
    with pytest.raises(InputError, match=message):
        multi30k.train(options, tmp_path / "sft", "student.yaml", ["training.steps=9"])
    with pytest.raises(InputError, match=r"\(--ranks 2; now --ranks 4\)"):
        multi30k.train(types.SimpleNamespace(ranks=4), tmp_path / "sft", "student.yaml", ["training.steps=5"])
    assert len(commands) == 1


def test_multi30k_counts_what_a_run_has_made(
    multi30k: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """From another working directory: the programs that are called are found by their place."""
    pytest.importorskip("sacrebleu")
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

    monkeypatch.setattr(multi30k.subprocess, "run", generate)
    monkeypatch.chdir(tmp_path)
    row = multi30k.row(types.SimpleNamespace(output=tmp_path), "KL", tmp_path / "kl")
    assert row == {"parameters": 17, "iterations": 2, "seconds": 2.0, "bleu": 100.0}
