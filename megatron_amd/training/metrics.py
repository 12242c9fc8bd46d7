"""What a run tells about itself: metrics.jsonl, TensorBoard and the live line, on one rank.

`METRICS` names every number that a run may log; docs/metrics.md gives each its equation. In a name, `off` stands
for the teacher's states (tau ~ p) and `on` for the student's (tau ~ q).
"""

from __future__ import annotations

import io
import json
import math
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TextIO

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_amd.errors import InputError
from megatron_amd.training.progress import ProgressLine


def _both(name: str, description: str) -> dict[str, str]:
    """The metric on teacher states and on student states; {states} and {policy} stand for whose they are."""
    return {
        f"{name}_off": description.format(states="teacher states", policy="off-policy"),
        f"{name}_on": description.format(states="student states", policy="on-policy"),
    }


METRICS: dict[str, str] = {
    **_both("amm/d_mm", "moment-matching distance d_MM on {states}, before the critic trains on the batch"),
    **_both("amm/tv_bound", "the largest d_MM a critic can reach, 2 c d_TV, on {states}"),
    **_both("amm/tightness", "d_MM / (2 c d_TV) on {states}: 1 is the best critic there is"),
    **_both("amm/d_mm_trained", "d_MM on {states} of the batch that the critic has just trained on"),
    **_both("distance/tv", "total variation between teacher and student, mean per token, on {states}"),
    **_both("distance/kl", "KL(teacher || student), mean per token, on {states}"),
    **_both("distance/rkl", "KL(student || teacher), mean per token, on {states}"),
    **_both("distance/js", "Jensen-Shannon divergence, mean per token, on {states}"),
    **_both("distance/top1_agreement", "share of {states} where both models' likeliest token is the same"),
    **_both(
        "distance/teacher_mass", "teacher's probability of the token that was written, mean per token, on {states}"
    ),
    **_both("distance/entropy_student", "entropy of the student's next token, mean per token, on {states}"),
    **_both("distance/entropy_teacher", "entropy of the teacher's next token, mean per token, on {states}"),
    "critic/loss": "what the critic descends: minus the weighted moments, last of the K steps",
    "critic/grad_norm": "global gradient norm of the critic before clipping, last of the K steps",
    "critic/learning_rate": "the critic's learning rate",
    "critic/f_min": "smallest critic value over the batch's states and the vocabulary",
    "critic/f_max": "largest critic value over the batch's states and the vocabulary",
    "student/loss": "value of the student's objective",
    "student/grad_norm": "global gradient norm of the student before clipping",
    "student/learning_rate": "the student's learning rate",
    **_both("rollout/response_length", "mean length of the {policy} responses, EOS included"),
    **_both("rollout/eos_fraction", "share of the {policy} responses that end with EOS"),
    **_both("rollout/capped_fraction", "share of the {policy} responses cut at rollout.max_response_length"),
    "rollout/staleness": "iterations since the batch's student sequences were generated, mean",
    "rollout/student_probability": "probability of learning from the student's sequences (adaptive reuse)",
    "time/rollout": "seconds in generation",
    "time/hidden": "seconds in the forward passes that collect hidden states",
    "time/critic": "seconds in critic steps",
    "time/student": "seconds in the student step",
    "time/iteration": "seconds in the whole iteration",
    "throughput/tokens_per_second": "response tokens of the global batch per second of iteration",
    "memory/peak_gib": "peak memory so far of the rank that used most",
    "memory/total_gib": "peak memory so far, summed over ranks",
    "train/skipped_student_steps": "student steps skipped so far because of a non-finite gradient",
    "train/skipped_critic_steps": "critic steps skipped so far because of a non-finite gradient",
    "train/waiting": "1 where the student waited because the critic was not tight enough, else 0",
    **_both("evaluation/tv", "total variation on {states} of held-out prompts, mean per token"),
    **_both("evaluation/kl", "KL(teacher || student) on {states} of held-out prompts, mean per token"),
}
"""Every name that may be logged, with its meaning in one line."""


class MetricLog:
    """Appends to `directory`/metrics.jsonl and `directory`/tensorboard, and keeps the live line.

    metrics.jsonl has one JSON object a line: "phase", "iteration", then the metrics in alphabetical order. A number
    that is not finite is written as null (JSON has no NaN); TensorBoard gets it as it is. Lines reach the operating
    system as they are written, so a killed process loses none. Evaluations at an iteration may have a line of
    their own.

    In TensorBoard the phases share one growing axis: step = iterations of the phases before + iteration.

    Only one rank of a job writes: pass `enabled=False` on the others, where every method does nothing.

    Args:
        directory: the run's folder; made if missing.
        iterations: number of iterations of each phase, in order, such as {"warmup": 20, "main": 100}. Iterations
            count from 1; 0 stands for the moment before the first.
        enabled: False on all ranks but one.
        resume_at: phase and iteration of the checkpoint that the run goes on from. Whatever was logged after it is
            cut off, so that the files end up as those of an uninterrupted run. None starts a new log.
        log_interval: iterations between TensorBoard points and between progress lines. metrics.jsonl gets every
            iteration, and TensorBoard every evaluation and the last iteration of each phase.
        stream: where the live line goes; standard error if None.

    Raises:
        InputError: a file cannot be written (no permission, a full disk), or metrics.jsonl holds a line that is
            not JSON. `write` raises it too; the ranks that do not log must be told (distributed.initialize.agreed).
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        iterations: Mapping[str, int],
        enabled: bool = True,
        resume_at: tuple[str, int] | None = None,
        log_interval: int = 1,
        stream: TextIO | None = None,
    ) -> None:
        self._enabled = enabled
        self._iterations = dict(iterations)
        self._log_interval = log_interval
        self._resume_at = resume_at
        if not enabled:
            return
        self._path = Path(directory) / "metrics.jsonl"
        with _writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file, self._repeatable = _open_log(self._path, resume_at, self._order)
        purge_step = self._step(*resume_at) + 1 if resume_at else 0
        self._events = _EventFile(Path(directory) / "tensorboard", purge_step)
        self._line = ProgressLine(stream or sys.stderr)

    def write(self, phase: str, iteration: int, values: Mapping[str, float]) -> None:
        """Log the metrics of one iteration.

        Args:
            phase: a key of `iterations`.
            iteration: from 1 on; 0 for an evaluation before the phase.
            values: metric name -> number.

        Raises:
            ValueError: a name that METRICS does not hold, or an unknown phase.
            InputError: the disk is full or a file cannot be written.
        """
        if unknown := sorted(set(values) - set(METRICS)):
            raise ValueError(f"metrics without a description in METRICS: {', '.join(unknown)}")
        if phase not in self._iterations:
            raise ValueError(f"phase {phase!r} is not one of {', '.join(self._iterations)}")
        if not self._enabled:
            return
        numbers = {name: float(values[name]) for name in sorted(values)}
        record = {"phase": phase, "iteration": iteration}
        record.update((name, x if math.isfinite(x) else None) for name, x in numbers.items())  # type: ignore[misc]
        is_evaluation = _is_evaluation(record)
        with _writing(self._path):
            if self._repeatable is not None and is_evaluation and (phase, iteration) == self._resume_at:
                self._file.seek(self._repeatable)
                self._file.truncate()
            self._repeatable = None
            _append(self._file, (json.dumps(record, allow_nan=False) + "\n").encode())
        total = self._iterations[phase]
        is_due = iteration % self._log_interval == 0 or iteration >= total
        if is_due or is_evaluation:
            self._events.write(self._step(phase, iteration), numbers)
        if not is_evaluation:
            self._line.tick(phase, iteration)
            if is_due:
                self._line.show(phase, iteration, total, numbers)

    def message(self, text: str) -> None:
        """Print a line of text above the live line."""
        if self._enabled:
            self._line.message(text)

    def generating(self, whose: str, total: int) -> Callable[[int, int], None] | None:
        """See `ProgressLine.generating`; None on a rank that does not write."""
        return self._line.generating(whose, total) if self._enabled else None

    def close(self) -> None:
        """Close the files and leave the live line behind. Further writes fail."""
        if self._enabled:
            self._line.close()
            self._events.close()
            self._file.close()

    def _order(self, phase: str, iteration: int) -> tuple[int, int]:
        """Sorts records as the run makes them."""
        return list(self._iterations).index(phase), iteration

    def _step(self, phase: str, iteration: int) -> int:
        """Position on the axis that all phases share."""
        place, _ = self._order(phase, iteration)
        return sum(list(self._iterations.values())[:place]) + iteration


class Timers:
    """Wall-clock seconds by name: `with timers("rollout"): ...`, then `timers.collect()`.

    A name entered several times adds up, so K critic steps become one number. On a GPU both ends wait for the
    queued kernels, so that a phase is charged what it caused.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = self._now()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - began

    def collect(self) -> dict[str, float]:
        """{"time/<name>": seconds since the last collect}; the timers start from zero again."""
        collected = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return collected

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def peak_memory_gib() -> float:
    """Most memory this process has used so far, in GiB: allocated on its GPU, or resident where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class _EventFile:
    """A TensorBoard event file, written at once: no background thread, so a full disk is an error here and now."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / name
        self._described: set[str] = set()
        with _writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab")
        self._put(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # TensorBoard drops the points that earlier files have from this step on.
        self._put(Event(wall_time=time.time(), step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to the curve of every name."""
        summary = Summary()
        for name, number in values.items():
            value = summary.value.add(tag=name, simple_value=number)
            if name not in self._described:
                scalars = SummaryMetadata.PluginData(plugin_name="scalars")
                value.metadata.CopyFrom(SummaryMetadata(summary_description=METRICS[name], plugin_data=scalars))
                self._described.add(name)
        self._put(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._file.close()

    def _put(self, event: Event) -> None:
        framed = io.BytesIO()  # one write a record: RecordWriter itself makes several
        RecordWriter(framed).write(event.SerializeToString())
        with _writing(self._path):
            _append(self._file, framed.getvalue())


def _open_log(
    path: Path, resume_at: tuple[str, int] | None, order: Callable[[str, int], tuple[int, int]]
) -> tuple[BinaryIO, int | None]:
    """metrics.jsonl ready to append to: emptied, or cut after the records of `resume_at`.

    Also returns where its last line begins if that is an evaluation at `resume_at`. The checkpoint may be older than
    the evaluation; if so it is made, and written, once more.
    """
    if resume_at is None or not path.exists():
        return path.open("wb"), None
    kept, repeatable = 0, None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break  # the process was killed in the middle of this line
            try:
                record = json.loads(line)
                place = order(record["phase"], record["iteration"])
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{path}, line {number}: is not a record of this run; delete the line") from None
            if place > order(*resume_at):
                break
            repeatable = kept if place == order(*resume_at) and _is_evaluation(record) else None
            kept += len(line)
    log = path.open("r+b")
    log.truncate(kept)
    log.seek(kept)
    return log, repeatable


def _is_evaluation(record: Mapping[str, object]) -> bool:
    return all(name.startswith("evaluation/") for name in record if name not in ("phase", "iteration"))


def _append(file: BinaryIO, data: bytes) -> None:
    """Write and flush. After an error the file is closed: what its buffer holds must not be tried again at exit."""
    try:
        file.write(data)
        file.flush()
    except OSError:
        with suppress(OSError):
            file.close()
        raise


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn a failure to write into one line for the user."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{path}: cannot be written ({reason}); make room or choose another run.directory") from None
