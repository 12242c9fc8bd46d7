"""d_TV and KL(teacher || student) on held-out prompts, on the teacher's states and on the student's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_amd.batch import Prompts, Rollouts
from megatron_amd.rollout.generate import generate
from megatron_amd.training.collect import OFF, ON, make_batch, noise_seed
from megatron_amd.training.players import Players
from megatron_amd.training.steps import measure


class HeldOut:
    """The evaluation of one run: the same prompts and the same noise each time, so that differences are the student's.

    Args:
        prompts: this replica's share of the held-out prompts.
        eos_ids: tokens that end a response.
        decode: token ids -> text.
    """

    def __init__(self, prompts: Prompts, eos_ids: tuple[int, ...], decode: Callable[[Sequence[int]], str]) -> None:
        self._prompts = prompts
        self._eos_ids = eos_ids
        self._decode = decode
        self._teacher_responses: Rollouts | None = None  # the teacher never changes

    def evaluate(self, players: Players) -> dict[str, Any]:
        """Measure. Collective.

        Returns:
            {"tv_off", "kl_off", "tv_on", "kl_on"}: means over response tokens, nats for KL; "prompts": how many;
            "samples": [{"prompt", "teacher", "student"}] of the first few prompts. Equal on all ranks.
        """
        config, layout = players.config, players.layout
        if self._teacher_responses is None:
            self._teacher_responses = self._respond(players, players.teacher, "held-out teacher")
        student_responses = self._respond(players, players.student, "held-out student")
        batch = make_batch(players, {OFF: self._teacher_responses, ON: student_responses})
        distances = measure(players, batch)
        count = torch.tensor([len(self._prompts)], dtype=torch.int64, device=layout.device)
        dist.all_reduce(count, group=layout.groups.dp)
        return {
            **{name: distances[f"distance/{name}"] for name in ("tv_off", "kl_off", "tv_on", "kl_on")},
            "prompts": int(count.item()),
            "samples": self._samples(players, student_responses, config.evaluation.samples),
        }

    def _respond(self, players: Players, model: torch.nn.Module, stream: str) -> Rollouts:
        config = players.config
        return generate(
            model,
            self._prompts,
            layout=players.layout,
            vocab_size=players.vocabulary.size,
            eos_ids=self._eos_ids,
            seed=noise_seed(config.run.seed, stream),
            max_response_length=config.evaluation.max_response_length,
            batch_size=config.rollout.batch_size,
        )

    def _samples(self, players: Players, student: Rollouts, count: int) -> list[dict[str, str]]:
        """Texts of the first prompts, from the first replica, the same on every rank."""
        assert self._teacher_responses is not None and self._prompts.texts is not None
        rows = zip(self._prompts.texts, self._teacher_responses.responses(), student.responses(), strict=True)
        mine = [
            {"prompt": prompt, "teacher": self._text(teacher), "student": self._text(answer)}
            for prompt, teacher, answer in list(rows)[:count]
        ]
        shared = [mine]
        source = dist.get_process_group_ranks(players.layout.groups.dp)[0]
        dist.broadcast_object_list(shared, src=source, group=players.layout.groups.dp)
        return shared[0]

    def _text(self, tokens: list[int]) -> str:
        return self._decode(tokens).strip()
