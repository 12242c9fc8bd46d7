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
from tests.dense_game import DenseGame, Sequences
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
    "own": ("critic.features=own", "critic.trunk=teacher"),
    "teacher": ("critic.features=teacher", "critic.head_init=zero"),
    "pair": ("critic.features=pair", "critic.bound=2"),
    "pair prior": ("critic.features=pair", "critic.prior=log_ratio", "critic.prior_scale=0.5"),
    "pair plain": ("critic.features=pair", "critic.squash=none", "critic.center=false"),
}
Case = dict[str, str]


def all_pairs(factors: dict[str, tuple[str, ...]]) -> list[Case]:
    """Cases in which every two levels of different factors meet; the same ones each time."""
    draw = random.Random(0)
    pairs = set()
    for (a, levels), (b, others) in itertools.combinations(factors.items(), 2):
        pairs |= {((a, level), (b, other)) for level in levels for other in others}
    pairs = {pair for pair in pairs if pair[0] != ("objective", "sft") or pair[1] not in UNUSED_BY_SFT}
    cases = []
    while pairs:
        must = min(pairs)
        candidates = [
            {name: dict(must).get(name) or draw.choice(levels) for name, levels in factors.items()} for _ in range(60)
        ]
        candidates = [c for c in candidates if c.get("objective") != "sft" or c["objective.beta"] == "1"] or [
            {**candidates[0], "objective.beta": "1"}
        ]
        best = max(candidates, key=lambda case: len(pairs & meetings(case)))
        pairs -= meetings(best)
        cases.append(best)
    return cases


UNUSED_BY_SFT = {("objective.beta", "0"), ("objective.beta", "0.5")}


def meetings(case: Case) -> set[Any]:
    return set(itertools.combinations(case.items(), 2))


def sequences(kind: str, vocab_size: int) -> dict[bool, Sequences]:
    """Four responses of each policy. `short rank`: the second data-parallel rank of two has one-token ones alone."""
    lengths = {"mixed": ((3, 1, 5, 2), (2, 6, 1, 3)), "short rank": ((4, 2, 1, 1), (3, 5, 1, 1))}[kind]
    draw = random.Random(kind)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(count)]

    return {
        on_policy: Sequences([tokens(n) for n in (3, 1, 4, 2)], [tokens(n) for n in lengths[on_policy]])
        for on_policy in (False, True)
    }


class Files:
    """Models on disk, their dense games and the settings of a case."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.settings = folder, make_files(folder)
        self.vocab_size = _rows(folder / "teacher") - 2
        save_model(folder / "tied", {**STUDENT, "tie_word_embeddings": True}, self.vocab_size + 5, seed=3)
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
            folder = self.folder / ("tied" if student == "tied" else "student")
            game = DenseGame(folder, self.folder / "teacher", self.vocab_size, sequences(kind, self.vocab_size))
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
        batch = game.batch(sequences(case["sequences"], files.vocab_size), config)
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
        error = (actual[name].double() - gradient).abs().max().item()
        assert error <= TOLERANCE * gradient.abs().max().item() + 1e-9, f"{name} by {error:.1e} in {case}"


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
    cases = all_pairs(STUDENT_FACTORS)
    met = set().union(*map(meetings, cases))
    for (a, levels), (b, others) in itertools.combinations(STUDENT_FACTORS.items(), 2):
        for pair in itertools.product(((a, x) for x in levels), ((b, y) for y in others)):
            assert pair in met or (pair[0] == ("objective", "sft") and pair[1] in UNUSED_BY_SFT), pair
    assert len(cases) < 70
