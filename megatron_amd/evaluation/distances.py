"""d_TV and KL(teacher || student) on held-out prompts, on the teacher's states and on the student's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_amd.batch import Prompts, Rollouts
from megatron_amd.training.collect import OFF, ON, make_batch, respond
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
        self._teacher_answers: Rollouts | None = None

    def evaluate(self, players: Players) -> dict[str, Any]:
        """Measure. Collective.

        Returns:
            {"tv_off", "kl_off", "tv_on", "kl_on"}: means over response tokens, nats for KL; "prompts": how many;
            "samples": [{"prompt", "teacher", "student"}], the likeliest answers to the first few prompts. Equal on all
            ranks.
        """
        if self._teacher_responses is None:
            self._teacher_responses = self._respond(players, players.teacher, "held-out teacher")
        student_responses = self._respond(players, players.student, "held-out student")
        batch = make_batch(players, {OFF: self._teacher_responses, ON: student_responses})
        distances = measure(players, batch, tempered=False)
        count = torch.tensor([len(self._prompts)], dtype=torch.int64, device=players.layout.device)
        dist.all_reduce(count, group=players.layout.groups.dp)
        return {
            **{name: distances[f"distance/{name}"] for name in ("tv_off", "kl_off", "tv_on", "kl_on")},
            "prompts": int(count.item()),
            "samples": self._samples(players),
        }

    def _samples(self, players: Players) -> list[dict[str, str]]:
        """Greedy answers of both models to the first prompts of all replicas together."""
        count, layout = players.config.evaluation.samples, players.layout
        first = self._prompts.head(count)
        texts = first.texts or ()
        if self._teacher_answers is None:
            self._teacher_answers = self._respond(players, players.teacher, "samples", first, temperature=0)
        answers = self._respond(players, players.student, "samples", first, temperature=0)
        rows = zip(texts, self._teacher_answers.responses(), answers.responses(), strict=True)
        mine = [
            {"prompt": prompt, "teacher": self._decode(teacher).strip(), "student": self._decode(student).strip()}
            for prompt, teacher, student in rows
        ]
        of_replicas: list[Any] = [None] * layout.dp_size
        dist.all_gather_object(of_replicas, mine, group=layout.groups.dp)
        return [sample for samples in of_replicas for sample in samples][:count]

    def _respond(
        self,
        players: Players,
        model: torch.nn.Module,
        stream: str,
        prompts: Prompts | None = None,
        temperature: float = 1.0,
    ) -> Rollouts:
        return respond(
            players,
            model,
            self._prompts if prompts is None else prompts,
            self._eos_ids,
            stream,
            max_response_length=players.config.evaluation.max_response_length,
            temperature=temperature,
        )
