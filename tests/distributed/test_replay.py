"""Sequences that serve several iterations: who generates when, what is kept, and that no layout changes it."""

from __future__ import annotations

import json
import operator
from typing import Any

import pytest
import torch

from megatron_amd.batch import Prompts, Rollouts
from megatron_amd.config import ParallelConfig, ReuseConfig
from megatron_amd.data.loader import deal
from megatron_amd.distributed.layout import build_layout
from megatron_amd.rollout.replay import Replay, Turn
from tests.distributed.runner import run_distributed

pytestmark = pytest.mark.distributed
PROMPTS, SAMPLES = 4, 2
NEEDED = {False: PROMPTS, True: PROMPTS * SAMPLES}


class Game:
    """Iterations whose responses say who wrote them when: [prompt id, sample, iteration]."""

    def __init__(self, seed: int = 5, **settings: Any) -> None:
        self.layout = build_layout(ParallelConfig(), torch.device("cpu"))
        self.replay = Replay(ReuseConfig(**settings), seed, self.layout, NEEDED)
        self.iteration = 0

    def prompts(self) -> Prompts:
        """This replica's share of the iteration's, of different lengths."""
        ids = [self.iteration * PROMPTS + i for i in range(PROMPTS)]
        lengths = [1 + id % 7 for id in ids]
        mine = deal(lengths, self.layout.dp_size, PROMPTS // self.layout.dp_size)[self.layout.dp_rank]
        return Prompts(tuple(ids[i] for i in mine), (0,) * len(mine), tuple((9,) * lengths[i] for i in mine))

    def play(self, progress: float = 0.0) -> tuple[bool, bool, list[tuple[int, ...]], float]:
        """(generated, learnt from the student, the student's sequences over all replicas, their staleness)."""
        turn = self.replay.turn(self.iteration, progress, [True])

        def respond(prompts: Prompts) -> Rollouts:
            rows = [[id, sample, self.iteration] for id in prompts.ids for sample in range(SAMPLES)]
            return Rollouts.from_lists(prompts.repeat(SAMPLES).tokens, rows)

        found, staleness = [], 0.0
        if turn.student:
            rollouts, staleness = self.replay.serve(turn, True, self.prompts() if turn.fresh else None, respond)
            mine = [tuple(response) for response in rollouts.responses()]
            assert len(mine) == NEEDED[True] // self.layout.dp_size
            for row, response in zip(rollouts.tokens.tolist(), mine, strict=True):
                assert row[: 1 + response[0] % 7] == [9] * (1 + response[0] % 7), "a response goes with its prompt"
            of_replicas: list[Any] = [None] * self.layout.dp_size
            torch.distributed.all_gather_object(of_replicas, mine)
            found = sorted(sequence for of_replica in of_replicas for sequence in of_replica)
        self.iteration += 1
        return turn.fresh, turn.student, found, staleness


def none() -> None:
    game = Game(mode="none")
    for iteration in range(3):
        fresh, _, found, staleness = game.play()
        assert fresh
        assert staleness == 0
        assert {sequence[2] for sequence in found} == {iteration}


def steps() -> None:
    game = Game(mode="steps", steps=3)
    played = [game.play() for _ in range(7)]
    assert [fresh for fresh, *_ in played] == [True, False, False, True, False, False, True]
    assert [staleness for *_, staleness in played] == [0, 1, 2, 0, 1, 2, 0]
    assert played[0][2] == played[1][2] == played[2][2]
    assert {sequence[2] for sequence in played[3][2]} == {3}
    assert len(set(played[0][2])) == NEEDED[True]


def steps_with_both_kinds() -> None:
    """A kind that comes later, as in a new phase, or a batch of another size, as after a resume, is generated anew."""
    layout = build_layout(ParallelConfig(), torch.device("cpu"))
    game = Replay(ReuseConfig(mode="steps", steps=3), 5, layout, NEEDED)
    prompts = Prompts((1, 2, 3, 4), (0,) * 4, ((9,),) * 4)

    def serve(iteration: int, kinds: list[bool]) -> bool:
        turn = game.turn(iteration, 0.0, kinds)
        for kind in kinds:
            new = Rollouts.from_lists([[9]] * NEEDED[kind], [[iteration]] * NEEDED[kind])
            found, _ = game.serve(turn, kind, prompts if turn.fresh else None, lambda _, new=new: new)
            assert len(found) == NEEDED[kind]
        return turn.fresh

    assert [serve(0, [False]), serve(1, [False])] == [True, False]
    assert [serve(i, [False, True]) for i in (2, 3, 4, 5)] == [True, False, False, True], "both, as one comes"
    larger = Replay(ReuseConfig(mode="steps", steps=3), 5, layout, {kind: 2 * count for kind, count in NEEDED.items()})
    larger.load_state_dict(json.loads(json.dumps(game.state_dict())))
    assert larger.turn(6, 0.0, [False, True]).fresh


def replay() -> None:
    game = Game(mode="replay", fresh=0.4, capacity=20)
    played = [game.play() for _ in range(400)]
    assert played[0][0], "there is nothing else"
    assert sum(fresh for fresh, *_ in played) == pytest.approx(160, abs=30)  # 3 standard deviations
    fresh_at = [iteration for iteration, (fresh, *_) in enumerate(played) if fresh]
    for iteration, (_, _, found, staleness) in enumerate(played):
        assert len(set(found)) == NEEDED[True], "drawn without repeats"
        kept = [at for at in fresh_at if at <= iteration][-3:]  # 20 sequences are two generations and a half
        assert {sequence[2] for sequence in found} <= set(kept)
        assert staleness == pytest.approx(sum(iteration - s[2] for s in found) / len(found))
    counts = torch.bincount(torch.tensor([len({s[2] for s in found}) for _, _, found, _ in played[50:]]))
    assert counts[2:].sum() > 300, "most draws mix generations"


def adaptive() -> None:
    game = Game(mode="adaptive", capacity=8)
    assert not any(student for _, student, _, _ in [game.play() for _ in range(20)]), "at first it is never asked for"
    for distance in (1.0, 0.9, 1.0, 0.9, 1.1):  # has risen twice
        game.replay.heed(distance)
    assert game.replay.probability == pytest.approx(0.2)
    for distance in (2.0, 1.9, 2.0, 1.9, 2.0):  # twice more, though never above the worst or below the best
        game.replay.heed(distance)
    assert game.replay.probability == pytest.approx(0.5)
    again = Replay(ReuseConfig(mode="adaptive", capacity=8), 5, game.layout, NEEDED)
    again.load_state_dict(json.loads(json.dumps(game.replay.state_dict())))
    assert len(again._memories[True]) == len(game.replay._memories[True])
    again.heed(2.1)
    other = Replay(ReuseConfig(mode="adaptive", capacity=8, initial_probability=0.4), 5, game.layout, NEEDED)
    other.load_state_dict({**json.loads(json.dumps(game.replay.state_dict())), "mode": "replay"})
    assert other.probability == 0.4, "switched on by a resume, it begins as its settings say"
    assert again.probability == pytest.approx(0.6), "the distance before the interruption counts"
    halfway = [game.play(progress=0.5) for _ in range(400)]
    assert sum(student for _, student, _, _ in halfway) == pytest.approx(200, abs=30)
    assert sum(fresh for fresh, *_ in halfway) == pytest.approx(100, abs=27)
    late = [game.play(progress=1.0) for _ in range(50)]
    assert not any(fresh for fresh, *_ in late)
    assert any(student for _, student, _, _ in late)


def smaller() -> None:
    """A buffer that is made smaller at a resume keeps the newest."""
    game = Game(mode="replay", fresh=1.0, capacity=40)
    for _ in range(5):
        game.play()
    again = Replay(ReuseConfig(mode="replay", capacity=16), 5, game.layout, NEEDED)
    again.load_state_dict(json.loads(json.dumps(game.replay.state_dict())))
    assert [memory.born for memory in again._memories[True]] == [3] * 8 + [4] * 8


def filling() -> None:
    """Until the buffer is full, every iteration that learns from the student generates, however late it is."""
    game = Game(mode="adaptive", capacity=20, initial_probability=1.0)
    assert [game.play(progress=1.0)[0] for _ in range(5)] == [True, True, True, False, False]


def draws() -> None:
    """What is drawn changes with the iteration, and the two kinds are drawn apart."""
    layout = build_layout(ParallelConfig(), torch.device("cpu"))
    game = Replay(ReuseConfig(mode="replay", fresh=0.01, capacity=40), 5, layout, {False: 4, True: 4})
    prompts = Prompts((1, 2, 3, 4), (0,) * 4, ((9,),) * 4)
    for iteration in range(10):
        for kind in (False, True):
            new = Rollouts.from_lists([[9]] * 4, [[iteration, place] for place in range(4)])
            game.serve(Turn(iteration, True, True), kind, prompts, lambda _, new=new: new)
    drawn: dict[bool, list[Any]] = {False: [], True: []}
    for iteration in range(20, 28):
        for kind, found in drawn.items():
            rollouts, _ = game.serve(Turn(iteration, True, False), kind, None, pytest.fail)
            found.append(sorted(map(tuple, rollouts.responses())))
    for found in drawn.values():
        assert len(set(map(str, found))) == 8
    assert all(map(operator.ne, *drawn.values()))


@pytest.mark.parametrize("work", [none, steps, steps_with_both_kinds, replay, adaptive, smaller, filling, draws])
def test_modes(work):
    run_distributed(work, 1)


def play(count: int, state: str | None = None, **settings: Any) -> tuple[list[Any], str]:
    game = Game(**settings)
    if state is not None:
        kept = json.loads(state)
        game.replay.load_state_dict(kept["replay"])
        game.iteration = kept["iteration"]
    played = [game.play(progress=0.3) for _ in range(count)]
    return played, json.dumps({"replay": game.replay.state_dict(), "iteration": game.iteration})


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "steps", "steps": 2},
        {"mode": "replay", "capacity": 19},
        {"mode": "adaptive", "capacity": 16, "initial_probability": 0.6},
    ],
    ids=lambda settings: settings["mode"],
)
def test_layouts_and_restarts_change_nothing(settings: dict[str, Any]) -> None:
    ((expected, state),) = run_distributed(lambda: play(12, **settings), 1)
    assert run_distributed(lambda: play(12, **settings), 2) == [(expected, state)] * 2
    ((first, between),) = run_distributed(lambda: play(5, **settings), 1)
    for rest, end in run_distributed(lambda: play(7, between, **settings), 2):  # goes on with another layout
        assert first + rest == expected
        assert end == state
    ((other, _),) = run_distributed(lambda: play(12, seed=6, **settings), 1)
    assert (other != expected) == (settings["mode"] != "steps")
