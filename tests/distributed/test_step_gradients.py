"""One step's gradient, of every parameter of the student or the critic, under every layout: equal to a dense one's.

Compared before the optimizer sees it, with tests/dense_game.py. Real models, fixed sequences, fp32. Settings are
combined so that every pair of them occurs, not every combination.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_amd.config import Config
from megatron_amd.distributed.initialize import set_seeds
from megatron_amd.distributed.layout import build_layout
from megatron_amd.objectives.divergences import DIVERGENCES
from megatron_amd.training.steps import critic_step, student_step
from tests.dense_game import DenseGame, fixed_sequences
from tests.distributed.runner import run_distributed
from tests.pairs import Case, all_pairs, meetings, possible_meetings
from tests.tiny_game import Game
from tests.tiny_run import STUDENT, T5_STUDENT, T5_TEACHER, TEACHER, make_files, save_model, write_config

TOLERANCE = 5e-5
"""Of the largest entry of a parameter's gradient; fp32 gave at most 1e-5."""
LAYOUTS: dict[str, tuple[int, int, int, bool]] = {
    "one": (1, 1, 1, False),
    "tp2-sp": (2, 1, 1, True),
    "tp4": (4, 1, 1, False),
    "pp2": (1, 2, 1, False),
    "pp4": (1, 4, 1, False),
    "dp2": (1, 1, 2, False),
    "dp4": (1, 1, 4, False),
    "tp2-pp2-sp": (2, 2, 1, True),
    "tp2-dp2": (2, 1, 2, False),
    "tp2-pp2-dp2-sp": (2, 2, 2, True),
    "tp4-pp2": (4, 2, 1, False),
}
"""(TP, PP, DP, sequence parallelism)."""
T5_LAYOUTS: dict[str, tuple[int, int, int, bool]] = {
    "one": (1, 1, 1, False),
    "tp2": (2, 1, 1, False),
    "tp2-sp": (2, 1, 1, True),
    "pp2": (1, 2, 1, False),
    "dp2": (1, 1, 2, False),
    "tp2-dp2": (2, 1, 2, False),
    "pp3-dp2": (1, 3, 2, False),
    "tp2-pp2-sp": (2, 2, 1, True),
    "tp2-pp3-sp": (2, 3, 1, True),
}
STUDENT_FACTORS: dict[str, tuple[str, ...]] = {
    "layout": tuple(LAYOUTS),
    "objective": ("rao_blackwell", "reinforce", "per_step", "sft", *DIVERGENCES),
    "temperatures": ("one", "two"),
    "objective.beta": ("0", "0.5", "1"),
    "objective.gamma": ("1", "0.9"),
    "objective.normalization": ("per_token", "per_sequence"),
    "training.micro_batch_size": ("1", "2", "3", "4"),
    "critic": ("own", "teacher", "pair", "pair prior", "pair plain"),
    "student": ("untied", "tied", "qwen3"),
    "use_distributed_optimizer": ("true", "false"),
    "overlap_grad_reduce": ("false", "true"),
    "sequences": ("mixed", "short rank"),
}
CRITIC_FACTORS: dict[str, tuple[str, ...]] = {
    "layout": tuple(LAYOUTS),
    "objective.estimator": ("full_vocabulary", "sampled"),
    **{
        name: STUDENT_FACTORS[name]
        for name in (
            "temperatures", "objective.beta", "objective.gamma", "objective.normalization",
            "training.micro_batch_size", "critic", "use_distributed_optimizer", "sequences",
        )
    },
}  # fmt: skip
_T5_COMMON: dict[str, tuple[str, ...]] = {
    "layout": tuple(T5_LAYOUTS),
    "objective.beta": ("0", "0.5", "1"),
    "training.micro_batch_size": ("1", "3", "4"),
    "temperatures": ("one",),
    "critic": ("own", "teacher", "pair"),
    "use_distributed_optimizer": ("true", "false"),
    "sequences": ("mixed", "short rank"),
}
T5_STUDENT_FACTORS = {
    **_T5_COMMON,
    "objective": ("rao_blackwell", "per_step", "sft", "kl"),
    "student": ("untied", "tied"),
    "overlap_grad_reduce": ("false", "true"),
}
T5_CRITIC_FACTORS = {**_T5_COMMON, "objective.estimator": ("full_vocabulary", "sampled")}
CRITICS = {
    "own": ("critic.features=own", "critic.trunk=model"),
    "teacher": ("critic.features=teacher", "critic.head_init=zero"),
    "pair": ("critic.features=pair", "critic.bound=2"),
    "pair prior": ("critic.features=pair", "critic.prior=log_ratio", "critic.prior_scale=0.5"),
    "pair plain": ("critic.features=pair", "critic.squash=none", "critic.center=false"),
}


def possible(case: Case) -> bool:
    """sft learns from off-policy responses alone; unbiased estimators need rollouts at the student's temperature."""
    if case.get("objective") == "sft" and case.get("objective.beta", "1") != "1":
        return False
    return case.get("temperatures", "one") == "one" or not (
        case.get("objective") in ("rao_blackwell", "reinforce") or case.get("objective.estimator") == "sampled"
    )


class Family(NamedTuple):
    """Models that play, and the layouts they play under."""

    teacher: dict[str, Any]
    student: dict[str, Any]
    trunk: dict[str, Any]
    others: dict[str, dict[str, Any]]
    """Further students, by name."""
    embedding: str
    layouts: dict[str, tuple[int, int, int, bool]]


DIVISIBLE = {"num_hidden_layers": 4, "num_key_value_heads": 4}
"""By the largest TP and PP."""
LLAMA = Family(
    {**TEACHER, **DIVISIBLE}, {**STUDENT, **DIVISIBLE}, {**STUDENT, **DIVISIBLE, "hidden_size": 16},
    {
        "tied": {**STUDENT, **DIVISIBLE, "tie_word_embeddings": True},
        "qwen3": {**STUDENT, **DIVISIBLE, "model_type": "qwen3", "head_dim": 8},  # norms of queries and keys
    },
    "model.embed_tokens.weight", LAYOUTS,
)  # fmt: skip
T5 = Family(
    T5_TEACHER, T5_STUDENT, {**T5_STUDENT, "d_model": 16}, {"tied": {**T5_STUDENT, "tie_word_embeddings": True}},
    "shared.weight", T5_LAYOUTS,
)  # fmt: skip


class Files:
    """Models on disk, their dense games and the settings of a case."""

    def __init__(self, folder: Path, family: Family) -> None:
        self.folder, self.layouts = folder, family.layouts
        self.settings = make_files(folder, teacher=family.teacher, student=family.student)
        self.vocab_size = load_file(folder / "teacher" / "model.safetensors")[family.embedding].shape[0] - 2
        for number, (name, student) in enumerate(family.others.items()):
            save_model(folder / name, student, self.vocab_size + 5 - 2 * number, seed=3 + 2 * number)
        save_model(folder / "trunk", family.trunk, self.vocab_size, seed=4)
        self.settings["critic"]["model"] = {"path": str(folder / "trunk")}
        self.games: dict[tuple[str, str], DenseGame] = {}

    def config(self, case: Case) -> Config:
        tensor, pipeline, _, sequence = self.layouts[case["layout"]]
        objective = case.get("objective", "per_step")
        amm = objective in ("rao_blackwell", "reinforce", "per_step")
        return write_config(
            self.folder,
            self.settings,
            *(f"{name}={value}" for name, value in case.items() if name.startswith(("objective.", "training."))),
            *(
                ("objective.name=amm", f"objective.policy_gradient={objective}")
                if amm
                else (f"objective.name={objective}",)
            ),
            *CRITICS[case["critic"]],
            f"parallel.tensor_model_parallel_size={tensor}",
            f"parallel.pipeline_model_parallel_size={pipeline}",
            f"parallel.sequence_parallel={str(sequence).lower()}",
            f"student.path={self.student_folder(case)}",
            f"training.ddp.use_distributed_optimizer={case['use_distributed_optimizer']}",
            f"training.ddp.overlap_grad_reduce={case.get('overlap_grad_reduce', 'false')}",
            *(
                ("objective.student_temperature=0.7", "objective.teacher_temperature=1.5")
                if case["temperatures"] == "two"
                else ()
            ),
            "objective.gjs_weight=0.3",
            "objective.skew=0.2",
            "training.optim={learning_rate: 0, weight_decay: 0, clip_grad: 0}",  # nothing moves: cases share players
            "critic.optim={learning_rate: 0, weight_decay: 0, clip_grad: 0}",
        )

    def student_folder(self, case: Case) -> Path:
        student = case.get("student", "untied")
        return self.folder / ("student" if student == "untied" else student)

    def dense(self, case: Case) -> DenseGame:
        student, kind = case.get("student", "untied"), case["sequences"]
        if (student, kind) not in self.games:
            folders = (self.student_folder(case), self.folder / "teacher")
            game = DenseGame(*folders, self.folder / "trunk", self.vocab_size, fixed_sequences(kind, self.vocab_size))
            self.games[student, kind] = game
        return self.games[student, kind]


def play(files: Files, player: str, cases: list[Case], configs: list[Config]) -> list[dict[str, np.ndarray]]:
    """One rank's part: each case's gradients into the folder `gradients-N`; returns those of the critic's heads."""
    layout = build_layout(configs[0].parallel, torch.device("cpu"))
    set_seeds(0, layout)
    games: dict[tuple[str, ...], Game] = {}
    results = []
    for number, (case, config) in enumerate(zip(cases, configs, strict=True)):
        names = ("student", "use_distributed_optimizer", "overlap_grad_reduce")
        key = tuple(case.get(name, "") for name in names)
        if key not in games:
            games[key] = Game(config, layout, files.vocab_size)
        game, folder = games[key], files.folder / f"gradients-{number}"
        game.players.critic = None
        if config.objective.name == "amm":
            game.enter_critic(config, random_heads=True)
        batch = game.batch(fixed_sequences(case["sequences"], files.vocab_size), config)
        heads: dict[str, np.ndarray] = {}
        if player == "student":
            step, _ = student_step(game.players, batch, config.objective.name)
            game.write_student_gradients(folder)
        else:
            step, _, _ = critic_step(game.players, batch)
            heads = game.write_critic_gradients(folder)
        assert step.applied
        results.append(heads)
    return results


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("gradients"), LLAMA)


@pytest.fixture(scope="module")
def t5_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("t5-gradients"), T5)


def assert_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], case: Case) -> None:
    assert actual.keys() == expected.keys(), case
    for name, gradient in expected.items():
        error, largest = (g.abs().max().item() for g in (actual[name].double() - gradient, gradient))
        assert error <= TOLERANCE * largest + 1e-9, f"{name} is wrong by {error:.1e} of {largest:.1e} in {case}"


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_student_gradient_is_the_dense_one(files: Files, name: str) -> None:
    check_student(files, [case for case in all_pairs(STUDENT_FACTORS, possible) if case["layout"] == name])


@pytest.mark.distributed
@pytest.mark.parametrize("name", T5_LAYOUTS)
def test_every_gradient_of_a_t5_student_is_the_dense_one(t5_files: Files, name: str) -> None:
    check_student(t5_files, [case for case in all_pairs(T5_STUDENT_FACTORS, possible) if case["layout"] == name])


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_critic_gradient_is_the_dense_one(files: Files, name: str) -> None:
    check_critic(files, [case for case in all_pairs(CRITIC_FACTORS, possible) if case["layout"] == name])


@pytest.mark.distributed
@pytest.mark.parametrize("name", T5_LAYOUTS)
def test_every_gradient_of_a_t5_critic_is_the_dense_one(t5_files: Files, name: str) -> None:
    check_critic(t5_files, [case for case in all_pairs(T5_CRITIC_FACTORS, possible) if case["layout"] == name])


def check_student(files: Files, cases: list[Case]) -> None:
    tensor, pipeline, data, _ = files.layouts[cases[0]["layout"]]
    configs = [files.config(case) for case in cases]
    run_distributed(play, tensor * pipeline * data, files, "student", cases, configs)
    for number, (case, config) in enumerate(zip(cases, configs, strict=True)):
        actual = load_file(files.folder / f"gradients-{number}" / "model.safetensors")
        assert_gradients(actual, files.dense(case).student_gradients(config), case)


def check_critic(files: Files, cases: list[Case]) -> None:
    tensor, pipeline, data, _ = files.layouts[cases[0]["layout"]]
    configs = [files.config(case) for case in cases]
    results = run_distributed(play, tensor * pipeline * data, files, "critic", cases, configs)
    for number, (case, config) in enumerate(zip(cases, configs, strict=True)):
        expected = files.dense(case).critic_gradients(config)
        expected = {key: value for key, value in expected.items() if key != "lm_head.weight"}
        actual = {}
        if case["critic"] == "own":
            actual = load_file(files.folder / f"gradients-{number}" / "model.safetensors")
            del actual["lm_head.weight"]  # f_1's head, compared as a head
        for key, head in results[-1][number].items():
            actual[key] = torch.zeros(expected[key].shape)  # the dense head has the rows of the most padded layout
            actual[key][: len(head)] = torch.from_numpy(head)
        assert_gradients(actual, expected, case)


def test_cases_cover_all_pairs() -> None:
    """Guards the guard: each setting meets each other one, and the cases stay few."""
    for factors, most in (
        (STUDENT_FACTORS, 130), (CRITIC_FACTORS, 80), (T5_STUDENT_FACTORS, 40), (T5_CRITIC_FACTORS, 30)
    ):  # fmt: skip
        cases = all_pairs(factors, possible)
        assert possible_meetings(factors, possible) <= set().union(*map(meetings, cases))
        assert len(cases) <= most
    assert {case["objective.beta"] for case in all_pairs(STUDENT_FACTORS, possible) if case["objective"] == "sft"} == {
        "1"
    }
