"""Sequences that serve several iterations.

The memory is one for all replicas: each of them holds all of it, equal and in an order that no layout changes, and
takes its share of what an iteration draws. Sequences are few numbers; what is expensive is to generate them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist

from megatron_amd.batch import Prompts, Rollouts
from megatron_amd.config import ReuseConfig
from megatron_amd.data.loader import deal
from megatron_amd.distributed.layout import Layout

_RISE = 0.1
"""Added to the probability of the student's sequences when the held-out distance has risen (DistiLLM)."""


class Turn(NamedTuple):
    """What an iteration does."""

    iteration: int
    student: bool
    """Learns from the student's sequences too."""
    fresh: bool
    """Generates."""


class Memory(NamedTuple):
    """A sequence that is kept."""

    born: int
    """Iteration that generated it."""
    visit: int
    prompt_id: int
    sample: int
    prompt: tuple[int, ...]
    response: tuple[int, ...]


class Replay:
    """Decides which iterations generate, keeps what they generated, and hands it out.

    Args:
        settings: `rollout.reuse`.
        seed: of the decisions and draws.
        layout: of this rank.
        needed: sequences of an iteration over all replicas, by kind: True for the student's, False for the teacher's.
    """

    def __init__(self, settings: ReuseConfig, seed: int, layout: Layout, needed: Mapping[bool, int]) -> None:
        self._settings, self._seed, self._layout, self._needed = settings, seed, layout, needed
        self._memories: dict[bool, list[Memory]] = {False: [], True: []}
        self.probability = settings.initial_probability
        """Of learning from the student's sequences (`adaptive`)."""
        self._distance: float | None = None

    def turn(self, iteration: int, progress: float, kinds: Sequence[bool]) -> Turn:
        """What the iteration does: a function of the seed, the iteration and what is kept.

        Args:
            iteration: from 0, over all phases.
            progress: share of the run that is done, 0 to 1.
            kinds: of the sequences that would be generated.
        """
        settings = self._settings
        chance = self._random(iteration, "turn", 1)[0]
        if settings.mode == "steps":
            whole = all(len(self._memories[kind]) == self._needed[kind] for kind in kinds)  # or settings have changed
            ages = [iteration - self._memories[kind][0].born for kind in kinds] if whole else []
            return Turn(iteration, True, max(ages, default=settings.steps) >= settings.steps)
        if settings.mode == "replay":
            few = any(len(self._memories[kind]) < self._needed[kind] for kind in kinds)
            return Turn(iteration, True, few or chance < settings.fresh)
        if settings.mode == "adaptive":
            student = chance < self.probability
            few = any(len(self._memories[kind]) < settings.capacity for kind in kinds)
            return Turn(iteration, student, student and (few or chance < self.probability * (1 - progress)))
        return Turn(iteration, True, True)

    def serve(
        self, turn: Turn, on_policy: bool, prompts: Prompts | None, respond: Callable[[Prompts], Rollouts]
    ) -> tuple[Rollouts, float]:
        """This replica's sequences of one kind for an iteration. Collective over the replicas.

        Args:
            on_policy: the kind: the student's sequences, or the teacher's.
            prompts: this replica's; None where the turn does not generate.
            respond: generates, for each prompt equally many responses in neighbouring rows.

        Returns:
            The sequences, and the mean number of iterations since they were generated.
        """
        if prompts is not None and self._settings.mode == "none":
            return respond(prompts), 0.0
        if prompts is not None and turn.fresh:
            self._keep(on_policy, turn.iteration, prompts, respond(prompts))
        memories = self._memories[on_policy]
        if self._settings.mode != "steps":  # there it is the batch itself
            order = np.argsort(self._random(turn.iteration, f"draw {on_policy}", len(memories)), kind="stable")
            memories = [memories[place] for place in sorted(order[: self._needed[on_policy]].tolist())]
        sizes = [len(memory.prompt) + len(memory.response) for memory in memories]
        mine = deal(sizes, self._layout.dp_size, len(memories) // self._layout.dp_size)[self._layout.dp_rank]
        rollouts = Rollouts.from_lists(
            [memories[place].prompt for place in mine],
            [memories[place].response for place in mine],
            self._layout.device,
        )
        return rollouts, sum(turn.iteration - memory.born for memory in memories) / len(memories)

    def heed(self, distance: float) -> None:
        """Told the held-out distance: where it has risen, the student's own sequences are needed more (`adaptive`)."""
        if self._settings.mode != "adaptive":
            return
        if self._distance is not None and distance > self._distance:
            self.probability = min(1.0, self.probability + _RISE)
        self._distance = distance

    def state_dict(self) -> dict[str, Any]:
        """All that is kept; equal on all ranks and for every layout."""
        return {
            "mode": self._settings.mode,
            "probability": self.probability,
            "distance": self._distance,
            "memories": {str(kind): list(memories) for kind, memories in self._memories.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. What another mode has learnt of distances is nothing to this one."""
        if state["mode"] == self._settings.mode:
            self.probability, self._distance = state["probability"], state["distance"]
        for kind, memories in self._memories.items():
            memories[:] = [
                Memory(born, visit, prompt_id, sample, tuple(prompt), tuple(response))
                for born, visit, prompt_id, sample, prompt, response in state["memories"][str(kind)]
            ]
            self._forget(kind)

    def _keep(self, on_policy: bool, iteration: int, prompts: Prompts, rollouts: Rollouts) -> None:
        """Add all replicas' new sequences."""
        samples = self._needed[on_policy] // (len(prompts) * self._layout.dp_size)
        rows = prompts.repeat(samples)
        mine = [
            Memory(iteration, visit, prompt_id, place % samples, prompt, tuple(response))
            for place, (prompt_id, visit, prompt, response) in enumerate(
                zip(rows.ids, rows.visits, rows.tokens, rollouts.responses(), strict=True)
            )
        ]
        of_replicas: list[Any] = [None] * self._layout.dp_size
        dist.all_gather_object(of_replicas, mine, group=self._layout.groups.dp)
        memories = self._memories[on_policy]
        memories += sorted(memory for of_replica in of_replicas for memory in of_replica)
        self._forget(on_policy)

    def _forget(self, on_policy: bool) -> None:
        """The oldest go, where there are more than are kept."""
        memories = self._memories[on_policy]
        if self._settings.mode in ("replay", "adaptive"):
            del memories[: max(0, len(memories) - self._settings.capacity)]
        elif self._settings.mode == "steps":  # the newest batch
            del memories[: max(0, len(memories) - self._needed[on_policy])]

    def _random(self, iteration: int, stream: str, count: int) -> np.ndarray:
        """float64 [count] in [0, 1)."""
        words = np.frombuffer(stream.encode(), dtype=np.uint8).tolist()
        raw = np.random.Philox(np.random.SeedSequence((self._seed, iteration, *words))).random_raw(count)
        return (raw >> np.uint64(11)) * 2.0**-53
