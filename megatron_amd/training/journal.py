"""What a run writes down as it goes: its settings, metrics and evaluations."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_amd.config import Config, config_to_yaml
from megatron_amd.distributed.initialize import agreed
from megatron_amd.training.metrics import MetricLog


class Journal:
    """config.yaml, metrics.jsonl, TensorBoard events and evaluation.json of a run directory.

    The last rank writes: it is on the last pipeline stage, where the work of the heads and so the peak of memory is.
    All methods are collective. Usable as a context manager, which closes the files.

    Args:
        config: the run's settings.
        phases: iterations of each phase.
        resume: state of the checkpoint that the run goes on from, or None.

    Raises:
        InputError: on all ranks, when a file cannot be written.
    """

    def __init__(self, config: Config, phases: Mapping[str, int], resume: Mapping[str, Any] | None) -> None:
        self._directory = Path(config.run.directory)
        self._writes = dist.get_rank() == dist.get_world_size() - 1
        self.evaluations: list[dict[str, Any]] = list(resume["evaluations"]) if resume else []
        with agreed():
            if self._writes:
                self._directory.mkdir(parents=True, exist_ok=True)
                _write_atomically(self._directory / "config.yaml", config_to_yaml(config))
            progress = resume["progress"] if resume else None
            self._log = MetricLog(
                self._directory,
                iterations=phases,
                enabled=self._writes,
                resume_at=(progress["phase"], progress["iteration"]) if progress else None,
                log_interval=config.training.log_interval,
            )

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()

    def write(self, phase: str, iteration: int, metrics: Mapping[str, float]) -> None:
        """Log one iteration."""
        with agreed():
            self._log.write(phase, iteration, metrics)

    def say(self, text: str) -> None:
        """Print a line above the live line."""
        self._log.message(text)

    def generating(self, whose: str, total: int) -> Callable[[int, int], None] | None:
        """A function to be told how many of `total` responses are complete, and their tokens; None on other ranks."""
        return self._log.generating(whose, total)

    def has_evaluation(self, point: Mapping[str, Any]) -> bool:
        """Whether an evaluation was already made at this point of the run."""
        return any(point.items() <= entry.items() for entry in self.evaluations)

    def add_evaluation(self, point: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Keep an evaluation: `point` says when, `result` comes from evaluation/distances.py."""
        self.evaluations.append({**point, **result})
        distances = {f"evaluation/{name}": result[name] for name in ("tv_off", "tv_on", "kl_off", "kl_on")}
        with agreed():
            self._log.write(point["phase"], point["iteration"], distances)
            if self._writes:
                text = json.dumps(self.evaluations, indent=1, ensure_ascii=False)
                _write_atomically(self._directory / "evaluation.json", text)


def _write_atomically(path: Path, text: str) -> None:
    """The file holds the old text or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
