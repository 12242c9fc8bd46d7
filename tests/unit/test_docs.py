"""The documents stay true: links lead somewhere, settings exist, configs load, code runs, commands parse."""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_amd.config import Config, describe_fields, load_config
from megatron_amd.objectives.divergences import DIVERGENCES
from megatron_amd.objectives.fused_head import student_loss
from megatron_amd.objectives.heads import Head
from megatron_amd.objectives.vocab_parallel import Vocabulary
from megatron_amd.train import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
SECTIONS = [field.name for field in dataclasses.fields(Config)]
FILE_SUFFIXES = ("csv", "html", "json", "jsonl", "md", "parquet", "pt", "py", "sh", "yaml")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def text_of(page: Path) -> str:
    """A page without its comments."""
    return re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.S)


def prose(page: Path) -> str:
    """Without fenced and indented code."""
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.S | re.M)
    return re.sub(r"^    .*$", "", text, flags=re.M)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), flags=re.S | re.M)


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command in an indented block, comments and line continuations taken out."""
    for line in re.sub(r" *\\\n +", " ", text_of(page)).splitlines():
        code = line.removeprefix("    ")
        if code != line and re.match(r"(\w+=\S+ )*(python3?|torchrun|make|pip|examples/\S+|docker) ", code):
            yield shlex.split(code, comments=True)


def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ +(.+?) *$", re.sub(r"^```.*?^```$", "", text_of(page), flags=re.S | re.M), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_pages_are_found():
    assert {"README.md", "CONTRIBUTING.md", "docs/algorithm.md", "docs/log.md"} <= {name(page) for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_and_anchors_resolve(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{target} does not exist"
        assert path.is_relative_to(ROOT), f"{target} leaves the repository"
        if anchor:
            assert anchor in anchors(path), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_exist(page: Path):
    for named in re.findall(r"(?<![\w/.-])(?:examples|tools|tests|megatron_amd)/[\w./-]+\.\w+", text_of(page)):
        assert (ROOT / named).exists(), named


def settings_named_in(text: str) -> Iterator[str]:
    """`section.field` wherever it stands, files such as run.yaml aside."""
    for setting in re.findall(rf"(?<![\w./-])(?:{'|'.join(SECTIONS)})(?:\.[a-z_0-9]+)+(?!\w|\()", text):
        if setting.rsplit(".", 1)[1] not in FILE_SUFFIXES:
            yield setting


def is_setting(setting: str) -> bool:
    """A field, a section of fields, or a key within a field that passes a mapping through."""
    fields = {field: kind for field, kind, _, _ in describe_fields()}
    parents = [setting.rsplit(".", count)[0] for count in range(setting.count("."))]
    return any(field == setting or field.startswith(f"{setting}.") for field in fields) or any(
        fields.get(parent, "").startswith("mapping") for parent in parents
    )


def test_wrong_settings_are_noticed():
    text = "`objective.betta`, `run.seed`, training.fp8.fp8_recipe, run.yaml, critic.optim, megatron_amd.training.steps"
    found = list(settings_named_in(text))
    assert found == ["objective.betta", "run.seed", "training.fp8.fp8_recipe", "critic.optim"]
    assert [is_setting(setting) for setting in found] == [False, True, True, True]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_settings_exist(page: Path):
    assert not [setting for setting in settings_named_in(text_of(page)) if not is_setting(setting)]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_yaml_is_a_valid_config(page: Path, tmp_path: Path):
    for block in blocks(page, "yaml"):
        path = tmp_path / "run.yaml"
        path.write_text(block, encoding="utf-8")
        load_config(path)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_compiles(page: Path):
    for block in blocks(page, "python"):
        compile(block, name(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_parse(page: Path, capsys: pytest.CaptureFixture[str]):
    """Targets of make, options of torchrun's program and its overrides."""
    main(["--help"])
    known_options = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    for words in commands(page):
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, words
        if "megatron_amd.train" in words:
            arguments = words[words.index("megatron_amd.train") + 1 :]
            assert {word for word in arguments if word.startswith("--")} <= known_options, words
            load_config(None, [word for word in arguments if "=" in word])


@pytest.mark.parametrize("page", ["algorithm.md", "architecture.md", "parallelism.md"])
def test_names_of_the_code_are_in_the_code(page: str):
    """Every `name` or `Class.name` in a document for developers occurs in a source file."""
    files = [path for folder in ("megatron_amd", "tests", "tools") for path in (ROOT / folder).rglob("*.py")]
    words = set(
        re.findall(r"\w+", " ".join(path.read_text(encoding="utf-8") for path in files if path.stem != "test_docs"))
    )
    words |= {"CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "torchrun"}
    words |= {"PORT", "RANKS_PER_NODE"}
    names = re.findall(r"`([A-Za-z_]\w*(?:\.\w+)*)(?:\(\w*\))?`", prose(ROOT / "docs" / page))
    assert len(names) > 20
    assert not [named for named in names if not set(named.split(".")) <= words | set(FILE_SUFFIXES)]


def run_block(page: Path, index: int) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(blocks(page, "python")[index], name(page), "exec"), names)
    return names


def test_the_example_of_adding_an_objective_works(monkeypatch: pytest.MonkeyPatch):
    """Its value and gradient equal those of its definition, and are exactly 0 between equal models."""
    page = ROOT / "docs" / "algorithm.md"
    monkeypatch.setitem(DIVERGENCES, "hellinger", DIVERGENCES["kl"])  # put away again after the test
    run_block(page, 0)
    names = run_block(page, 1)["ObjectiveName"].__args__
    assert "hellinger" in names
    assert set(names) - {"hellinger"} <= set(config_names())
    distance = run_block(page, 2)["distance"]
    generator = torch.Generator().manual_seed(0)
    hidden, z_teacher = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    teacher, student = Head(z_teacher, weight), Head(hidden.requires_grad_(), weight.clone().requires_grad_())
    weights, targets = torch.rand(5, generator=generator, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
    common: dict[str, Any] = {
        "objective": "hellinger",
        "targets": targets,
        "weights": weights,
        "vocabulary": Vocabulary(7),
    }
    loss, _ = student_loss(student, teacher, None, **common)
    leaves = (student.hidden, student.weight)
    got = torch.autograd.grad(loss, leaves)
    expected = (weights * distance("hellinger", z_teacher @ weight.T, student.hidden @ student.weight.T)).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for gradient, want in zip(got, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-9, atol=1e-12)
    loss, _ = student_loss(student, Head(hidden.detach(), weight), None, **common)
    assert loss == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, leaves))


def config_names() -> tuple[str, ...]:
    """Objectives that the configuration knows."""
    (kind,) = [kind for field, kind, _, _ in describe_fields() if field == "objective.name"]
    return tuple(kind.split(" | "))


def test_the_readme_says_what_amd_is_first():
    title, first, *_ = [line for line in text_of(ROOT / "README.md").splitlines() if line]
    assert title == "# megatron_amd"
    assert "not the chip vendor" in first


def test_the_readme_explains_every_setting_of_its_config():
    (block,) = blocks(ROOT / "README.md", "yaml")
    settings = [line for line in block.splitlines() if not re.fullmatch(r" *\w+:", line)]
    assert len(settings) > 10
    assert not [line for line in settings if "  # " not in line]
