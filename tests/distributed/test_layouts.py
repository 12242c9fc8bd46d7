"""One run under every layout: the same rollout tokens, losses, moments and evaluations as on one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_amd.config import Config, config_to_dict
from megatron_amd.distributed.initialize import set_seeds
from megatron_amd.distributed.layout import build_layout
from megatron_amd.training.setup import set_up
from tests.distributed.runner import run_distributed
from tests.tiny_run import PROMPTS, STUDENT, T5_STUDENT, T5_TEACHER, make_files, read_metrics, save_model, write_config

# (TP, PP, DP) and further settings
LAYOUTS: dict[str, tuple[int, int, int, tuple[str, ...]]] = {
    "tp2": (2, 1, 1, ()),
    "pp2": (1, 2, 1, ()),
    "dp2": (1, 1, 2, ()),
    "pp3": (1, 3, 1, ()),
    "tp2-pp2": (2, 2, 1, ()),
    "tp2-dp2": (2, 1, 2, ()),
    "tp2-sp": (2, 1, 1, ("parallel.sequence_parallel=true",)),
    "tp2-pp2-sp": (2, 2, 1, ("parallel.sequence_parallel=true",)),
    "pp2-dp2": (1, 2, 2, ()),
    "micro1": (1, 1, 1, ("training.micro_batch_size=1",)),
    "micro4-pp2": (1, 2, 1, ("training.micro_batch_size=4",)),
    "micro3-pp2": (1, 2, 1, ("training.micro_batch_size=3",)),
}
VARIANTS: dict[str, tuple[str, ...]] = {
    "pair": (),
    "own": ("critic.features=own", "objective.critic_steps=2"),
    "data": (
        "warmup.steps=1", "warmup.name=js", "warmup.beta=0", "student.path={}/tied", "critic.features=own",
        "critic.trunk=model", "critic.model.path={}/trunk", "objective.critic_steps=2", "objective.resample=true",
        "objective.gamma=0.8", "objective.policy_gradient=reinforce", "data.train={}/unequal.jsonl",
        "rollout.off_policy=data", "rollout.samples_per_prompt=3", "evaluation.prompts=5", "evaluation.interval=1",
    ),
    "short": (
        "warmup.steps=1", "warmup.name=sft", "student.path={}/tied", "critic.features=teacher",
        "critic.head_init=random", "critic.center=false", "critic.prior=log_ratio", "objective.critic_steps=0",
        "objective.normalization=per_token", "rollout.max_response_length=1", "evaluation.prompts=5",
    ),
    "sampled": (
        "warmup.steps=1", "warmup.name=tv", "warmup.beta=0.3", "critic.warmup_steps=2",
        "critic.tightness_threshold=0.645", "objective.beta=0", "objective.estimator=sampled",
        "rollout.samples_per_prompt=3", "training.micro_batch_size=3", "training.head_chunk_tokens=5",
        "evaluation.prompts=5",
    ),
    "replay": (
        "warmup.steps=1", "warmup.name=kl", "warmup.beta=0.5", "objective.policy_gradient=per_step",
        "training.steps=4", "rollout.reuse.mode=replay", "rollout.reuse.fresh=0.4", "rollout.reuse.capacity=12",
        "rollout.samples_per_prompt=2", "rollout.teacher_share=0.4", 'rollout.stop_strings=["e", "qu"]',
    ),
    "adaptive": (
        "objective.policy_gradient=per_step", "objective.beta=0.25", "training.steps=4", "rollout.off_policy=data",
        "rollout.reuse.mode=adaptive", "rollout.reuse.initial_probability=0.7", "rollout.reuse.capacity=4",
        "evaluation.prompts=5", "evaluation.interval=1",
    ),
    "t5": (
        "warmup.steps=1", "warmup.name=sft", "rollout.off_policy=teacher", "critic.features=own",
        "critic.trunk=student", "data.tokenizer={}/teacher", "teacher.path={}/t5-teacher",
        "student.path={}/t5-student", "evaluation.prompts=5", "rollout.samples_per_prompt=2",
    ),
    "t5 pair": (
        "data.tokenizer={}/teacher", "teacher.path={}/t5-teacher", "student.path={}/t5-tied",
        "rollout.teacher_share=0.3", "objective.policy_gradient=per_step", "rollout.reuse.mode=steps",
        "training.micro_batch_size=3",
    ),
}  # fmt: skip
"""Settings with which a run takes other ways through the trainer; `{}` is the folder of its files."""
FEW = ("tp2-sp", "pp2", "dp2")
PLAYED = [
    *(("pair", name) for name in LAYOUTS if name != "pp3"),
    *(("own", name) for name in ("tp2-sp", "pp2-dp2", "micro3-pp2")),
    *(("t5", name) for name in ("tp2-sp", "pp2", "pp3", "dp2", "tp2-pp2-sp", "pp2-dp2")),
    *(("t5 pair", name) for name in ("tp2-sp", "pp3")),
    *((variant, name) for variant in ("data", "short", "sampled", "replay", "adaptive") for name in FEW),
]
FLOOR = 1e-6 * 2.0  # times 2 * bound


def train(config: Config) -> tuple[list[Any], list[dict[str, Any]]]:
    """One rank's part of a run: the sequences of each iteration (of this replica) and the metrics of the run."""
    layout = build_layout(config.parallel, torch.device("cpu"))
    set_seeds(config.run.seed, layout)
    trainer, _ = set_up(config, layout)
    sequences = []
    sample = trainer.sample

    def recording_sample() -> Any:
        is_new = trainer.batch is None
        batch = sample()
        if is_new:
            for m in batch.microbatches:
                for row in range(m.tokens.shape[0]):
                    targets = m.targets[m.state_rows == row].tolist()
                    if targets:  # not an empty row that fills a micro-batch up
                        place = trainer.progress.phase, trainer.progress.iteration
                        sequences.append((*place, m.on_policy, targets))
        return batch

    trainer.sample = recording_sample  # type: ignore[method-assign]
    assert trainer.train() is None
    return sequences if layout.tp_rank == 0 and layout.is_last_stage else [], read_metrics(Path(config.run.directory))


def write_files(folder: Path) -> dict[str, Any]:
    """Settings of a run of three iterations, and what the variants name."""
    settings = make_files(folder)
    settings["training"]["steps"] = 3
    settings["checkpoint"] = {"export": False}
    settings["evaluation"] = {"max_response_length": 4}
    rows = json.loads((folder / "student" / "config.json").read_text())["vocab_size"]
    save_model(folder / "tied", {**STUDENT, "tie_word_embeddings": True}, rows, seed=5)
    save_model(folder / "trunk", {**STUDENT, "hidden_size": 16, "tie_word_embeddings": True}, rows - 3, seed=6)
    save_model(folder / "t5-teacher", T5_TEACHER, rows - 3, seed=7)
    save_model(folder / "t5-student", T5_STUDENT, rows - 3, seed=8)
    save_model(folder / "t5-tied", {**T5_STUDENT, "tie_word_embeddings": True}, rows, seed=9)
    answers = [{"prompt": prompt, "response": prompt if i % 3 else "x"} for i, prompt in enumerate(PROMPTS)]
    (folder / "unequal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    return settings


def assert_close(found: Any, expected: Any, where: str) -> None:
    """Equal texts and shapes, and every number within 1e-4 relative."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name, value in found.items():
            assert_close(value, expected[name], f"{where} {name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for index, value in enumerate(found):
            assert_close(value, expected[index], f"{where} {index}")
    elif isinstance(expected, (str, int)):
        assert found == expected, where
    else:
        assert found == pytest.approx(expected, rel=1e-4, abs=FLOOR), where


def evaluations(run: Path) -> list[dict[str, Any]]:
    file = run / "evaluation.json"
    return json.loads(file.read_text()) if file.exists() else []


Reference = tuple[Path, dict[str, Any], tuple[list[Any], list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """A variant's run on one process, made once."""

    @cache
    def play(variant: str) -> Reference:
        folder = tmp_path_factory.mktemp(variant)
        settings = write_files(folder)
        settings["run"]["directory"] = str(folder / "one")
        overrides = [override.replace("{}", str(folder)) for override in VARIANTS[variant]]
        settings = config_to_dict(write_config(folder, settings, *overrides))
        (result,) = run_distributed(train, 1, write_config(folder, settings))
        check_covered(variant, result[1], evaluations(folder / "one"))
        return folder, settings, result

    return play


def check_covered(variant: str, metrics: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> None:
    """The reference really took the ways that its variant is for."""
    trained = [row for row in metrics if not any(name.startswith("evaluation/") for name in row)]
    if variant in ("replay", "adaptive"):
        staleness = [row.get("rollout/staleness") for row in trained]
        assert 0 in staleness, "some iterations generate"
        assert any(age for age in staleness), "some do not"
        assert (None in staleness) == (variant == "adaptive"), "some learn from the data alone"
        for row in trained:
            if "rollout/staleness" not in row:  # with weight 1, whatever beta is
                assert row["student/loss"] == pytest.approx(row["amm/d_mm_trained_off"], rel=1e-5)
        return
    phases = {"pair": [], "own": [], "t5 pair": [], "sampled": ["warmup", "critic", "critic"]}.get(variant, ["warmup"])
    assert [row["phase"] for row in trained] == [*phases, "main", "main", "main"]
    if variant in ("pair", "own", "t5 pair"):
        return
    assert [entry["prompts"] for entry in evaluations] == [5] * (4 if variant == "data" else 2)
    assert all(len(entry["samples"]) == 3 for entry in evaluations)
    if variant == "data":
        assert all(0 < row["rollout/eos_fraction_off"] < 1 for row in trained[1:]), "some are short, some are cut"
    elif variant == "short":
        assert all(row["rollout/response_length_on"] == 1 for row in trained[1:])
    elif variant == "sampled":
        waiting = {row["train/waiting"] for row in trained[-3:]}
        assert waiting == {0, 1}, [row["amm/tightness_on"] for row in trained[-3:]]


@pytest.mark.distributed
@pytest.mark.parametrize(("variant", "name"), PLAYED)
def test_layout_changes_nothing(one_process: Callable[[str], Reference], variant: str, name: str) -> None:
    folder, settings, (sequences, reference) = one_process(variant)
    tensor, pipeline, data, overrides = LAYOUTS[name]
    config = write_config(
        folder,
        settings,
        f"parallel.tensor_model_parallel_size={tensor}",
        f"parallel.pipeline_model_parallel_size={pipeline}",
        f"run.directory={folder / name}",
        *overrides,
    )
    results = run_distributed(train, tensor * pipeline * data, config)
    assert sorted(s for own, _ in results for s in own) == sorted(sequences)
    assert_close(results[0][1], reference, "metrics")
    assert_close(evaluations(folder / name), evaluations(folder / "one"), "evaluation")
