"""One step's gradient, of every parameter of the student or the critic, under every layout: equal to a dense one's.

Compared before the optimizer sees it, with tests/dense_game.py. Real models, fixed sequences, fp32. Settings are
combined so that every pair of them occurs, not every combination.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_amd.config import Config
from megatron_amd.distributed.initialize import set_seeds
from megatron_amd.distributed.layout import build_layout
from megatron_amd.training.steps import critic_step, student_step
from tests.dense_game import DenseGame, fixed_sequences
from tests.distributed.runner import run_distributed
from tests.tiny_game import Game
from tests.tiny_run import STUDENT, make_files, save_model, write_config

TOLERANCE = 5e-5
"""Of the largest entry of a parameter's gradient; fp32 gave at most 1e-5."""
LAYOUTS: dict[str, tuple[int, int, int, bool]] = {
    "one": (1, 1, 1, False),
    "tp2-sp": (2, 1, 1, True),
    "pp2": (1, 2, 1, False),
    "dp2": (1, 1, 2, False),
    "tp2-pp2-sp": (2, 2, 1, True),
    "tp2-dp2": (2, 1, 2, False),
}
"""(TP, PP, DP, sequence parallelism)."""
STUDENT_FACTORS: dict[str, tuple[str, ...]] = {
    "layout": tuple(LAYOUTS),
    "objective": ("rao_blackwell", "reinforce", "per_step", "kl", "rkl", "js", "tv", "sft"),
    "objective.beta": ("0", "0.5", "1"),
    "objective.gamma": ("1", "0.9"),
    "objective.normalization": ("per_token", "per_sequence"),
    "training.micro_batch_size": ("1", "2", "3", "4"),
    "critic": ("own", "teacher", "pair", "pair prior", "pair plain"),
    "student": ("untied", "tied"),
    "use_distributed_optimizer": ("true", "false"),
    "sequences": ("mixed", "short rank"),
}
CRITIC_FACTORS: dict[str, tuple[str, ...]] = {
    "layout": tuple(LAYOUTS),
    "objective.estimator": ("full_vocabulary", "sampled"),
    **{
        name: STUDENT_FACTORS[name]
        for name in (
            "objective.beta", "objective.gamma", "objective.normalization", "training.micro_batch_size", "critic",
            "use_distributed_optimizer", "sequences",
        )
    },
}  # fmt: skip
CRITICS = {
    "own": ("critic.features=own", "critic.trunk=model"),
    "teacher": ("critic.features=teacher", "critic.head_init=zero"),
    "pair": ("critic.features=pair", "critic.bound=2"),
    "pair prior": ("critic.features=pair", "critic.prior=log_ratio", "critic.prior_scale=0.5"),
    "pair plain": ("critic.features=pair", "critic.squash=none", "critic.center=false"),
}
Case = dict[str, str]


def all_pairs(factors: dict[str, tuple[str, ...]]) -> list[Case]:
    """Cases in which every two levels of different factors meet; the same ones each time."""
    draw = random.Random(0)
    missing = possible_meetings(factors)
    cases = []
    while missing:
        wanted = dict(min(missing))
        candidates = []
        for _ in range(60):
            case = {name: wanted.get(name) or draw.choice(levels) for name, levels in factors.items()}
            if case.get("objective") == "sft":
                case["objective.beta"] = "1"
            candidates.append(case)
        best = max(candidates, key=lambda case: len(missing & meetings(case)))
        missing -= meetings(best)
        cases.append(best)
    return cases


def possible_meetings(factors: dict[str, tuple[str, ...]]) -> set[Any]:
    """All pairs of (factor, level) but those of sft, which learns from off-policy responses alone, and beta < 1."""
    levels = [[(name, level) for level in levels] for name, levels in factors.items()]
    pairs = {pair for a, b in itertools.combinations(levels, 2) for pair in itertools.product(a, b)}
    return pairs - {(("objective", "sft"), ("objective.beta", beta)) for beta in ("0", "0.5")}


def meetings(case: Case) -> set[Any]:
    return set(itertools.combinations(case.items(), 2))


class Files:
    """Models on disk, their dense games and the settings of a case."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.settings = folder, make_files(folder)
        self.vocab_size = _rows(folder / "teacher") - 2
        save_model(folder / "tied", {**STUDENT, "tie_word_embeddings": True}, self.vocab_size + 5, seed=3)
        save_model(folder / "trunk", {**STUDENT, "hidden_size": 16}, self.vocab_size, seed=4)
        self.settings["critic"]["model"] = {"path": str(folder / "trunk")}
        self.games: dict[tuple[str, str], DenseGame] = {}

    def config(self, case: Case) -> Config:
        tensor, pipeline, _, sequence = LAYOUTS[case["layout"]]
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
            f"student.path={self.folder / ('tied' if case.get('student') == 'tied' else 'student')}",
            f"training.ddp={{use_distributed_optimizer: {case['use_distributed_optimizer']}}}",
            "training.optim={learning_rate: 0, weight_decay: 0, clip_grad: 0}",  # nothing moves: cases share players
            "critic.optim={learning_rate: 0, weight_decay: 0, clip_grad: 0}",
        )

    def dense(self, case: Case) -> DenseGame:
        student, kind = case.get("student", "untied"), case["sequences"]
        if (student, kind) not in self.games:
            folders = (self.folder / ("tied" if student == "tied" else "student"), self.folder / "teacher")
            game = DenseGame(*folders, self.folder / "trunk", self.vocab_size, fixed_sequences(kind, self.vocab_size))
            self.games[student, kind] = game
        return self.games[student, kind]


def _rows(folder: Path) -> int:
    return load_file(folder / "model.safetensors")["model.embed_tokens.weight"].shape[0]


def play(files: Files, player: str, cases: list[Case], configs: list[Config]) -> list[dict[str, np.ndarray]]:
    """One rank's part: each case's gradients into the folder `gradients-N`; returns those of the critic's heads."""
    layout = build_layout(configs[0].parallel, torch.device("cpu"))
    set_seeds(0, layout)
    games: dict[tuple[str, str], Game] = {}
    results = []
    for number, (case, config) in enumerate(zip(cases, configs, strict=True)):
        key = (case.get("student", "untied"), case["use_distributed_optimizer"])
        if key not in games:
            games[key] = Game(config, layout, files.vocab_size)
        game, folder = games[key], files.folder / f"gradients-{number}"
        game.players.critic = None
        if config.objective.name == "amm":
            game.enter_critic(config, random_heads=True)
        batch = game.batch(fixed_sequences(case["sequences"], files.vocab_size), config)
        heads: dict[str, np.ndarray] = {}
        if player == "student":
            step, _ = student_step(game.players, batch, config.objective.name, config.objective.beta)
            game.write_student_gradients(folder)
        else:
            step, _, _ = critic_step(game.players, batch)
            heads = game.write_critic_gradients(folder)
        assert step.applied
        results.append(heads)
    return results


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("gradients"))


def assert_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], case: Case) -> None:
    assert actual.keys() == expected.keys(), case
    for name, gradient in expected.items():
        error, largest = (g.abs().max().item() for g in (actual[name].double() - gradient, gradient))
        assert error <= TOLERANCE * largest + 1e-9, f"{name} is wrong by {error:.1e} of {largest:.1e} in {case}"


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_student_gradient_is_the_dense_one(files: Files, name: str) -> None:
    cases = [case for case in all_pairs(STUDENT_FACTORS) if case["layout"] == name]
    tensor, pipeline, data, _ = LAYOUTS[name]
    configs = [files.config(case) for case in cases]
    run_distributed(play, tensor * pipeline * data, files, "student", cases, configs)
    for number, (case, config) in enumerate(zip(cases, configs, strict=True)):
        actual = load_file(files.folder / f"gradients-{number}" / "model.safetensors")
        assert_gradients(actual, files.dense(case).student_gradients(config), case)


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_critic_gradient_is_the_dense_one(files: Files, name: str) -> None:
    cases = [case for case in all_pairs(CRITIC_FACTORS) if case["layout"] == name]
    tensor, pipeline, data, _ = LAYOUTS[name]
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
    for factors, most in ((STUDENT_FACTORS, 60), (CRITIC_FACTORS, 40)):
        cases = all_pairs(factors)
        assert possible_meetings(factors) <= set().union(*map(meetings, cases))
        assert len(cases) <= most
    assert {case["objective.beta"] for case in all_pairs(STUDENT_FACTORS) if case["objective"] == "sft"} == {"1"}
