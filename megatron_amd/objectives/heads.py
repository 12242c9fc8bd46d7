"""The LM heads of student, teacher and critic, and their application to a chunk of tokens at a time.

Shapes: N tokens (states), n of them in a chunk or block, V_local rows in this rank's shard of a head, R of them real
ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_amd.objectives.blocks import Block, F, compiled
from megatron_amd.objectives.vocab_parallel import (
    LocalTargets,
    Partition,
    Vocabulary,
    partitions,
    subtract_top,
    whole_partition,
)

CPU_CHUNK_TOKENS = 512
"""Most tokens of a chunk on a CPU where none are given. Each chunk reads and writes the heads' whole gradient; with
this many, that is a small part of the time, and more would only take memory."""
TILE_TOKENS = 128
"""A chunk of more tokens is a multiple of this many, which matrix products work in."""
BLOCK_NUMBERS = 2**18
"""Logits in a block on a CPU: a MiB in fp32, so that the few tensors of its size that are alive fit in a cache."""
GPU_BLOCK_NUMBERS = 2**24
"""The same on a GPU whose kernels are not compiled, which make a few tensors of a block's size; compiled ones work on
a whole chunk."""


@dataclass(frozen=True)
class Head:
    """Hidden states and the LM head that reads them."""

    hidden: Tensor
    """[N, H]."""
    weight: Tensor
    """[V_local, H]: this rank's shard."""
    logit_scale: float = 1.0
    """Factor on the logits: the architecture's own, over the temperature."""


@dataclass(frozen=True)
class CriticHead:
    """f = bound * tanh(raw), raw = sum_j sign_j h_j W_j^T [+ prior_scale (ln p - ln q)] [- its mean under (p+q)/2].

    p and q are constants to the critic.
    """

    terms: tuple[tuple[Tensor, Tensor, float], ...]
    """(hidden [N, H_j], weight [V_local, H_j], sign): one term for `own` and `teacher`, +teacher and -student for
    `pair`."""
    bound: float = 1.0
    """c: largest |f|."""
    squash: str = "tanh"
    """`tanh`, or `none`: f = raw."""
    center: bool = True
    """Subtract from the raw values their mean under (p+q)/2; the critic's gradient goes through it."""
    prior: str = "none"
    """`log_ratio` adds prior_scale (ln p - ln q); or `none`."""
    prior_scale: float = 1.0
    """kappa."""

    def __post_init__(self) -> None:
        if not self.terms or self.squash not in ("tanh", "none") or self.prior not in ("log_ratio", "none"):
            raise ValueError(
                f"a critic's head with {len(self.terms)} terms, squash {self.squash!r} and prior {self.prior!r}: needs "
                "a term, tanh or none, log_ratio or none"
            )


@dataclass(frozen=True)
class HeadOptions:
    """How the vocabulary-wide work is done. Changes memory and speed, never the result."""

    chunk_tokens: int | None = None
    """Tokens of a chunk; None: as many as `memory_mib` allows, on a CPU at most `CPU_CHUNK_TOKENS`."""
    memory_mib: int = 512
    """Working set of a chunk where its tokens are not given, in MiB."""
    compiled: bool = True
    """On a GPU, make kernels of the element-wise part with torch.compile."""

    def tokens(self, local_rows: int, buffers: int, dtype: torch.dtype, device: torch.device) -> int:
        """Tokens of a chunk with so many [chunk, local_rows] buffers."""
        if self.chunk_tokens is not None:
            return self.chunk_tokens
        bytes_per_token = buffers * dtype.itemsize * max(local_rows, 1)
        allowed = max(1, self.memory_mib * 2**20 // bytes_per_token)
        if device.type == "cpu":
            allowed = min(allowed, CPU_CHUNK_TOKENS)
        return max(allowed // TILE_TOKENS * TILE_TOKENS, min(allowed, TILE_TOKENS))


def arithmetic(hidden: Tensor) -> torch.dtype:
    """What is computed in, beside the matrix products: fp64 for fp64 hidden states, else fp32."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


class AppliedHeads:
    """The heads' real rows on N tokens, without gradients, applied to chunks of them in buffers that all chunks share.

    Raises ValueError where a head's rows or tokens do not go with the student's.
    """

    def __init__(
        self,
        student: Head,
        teacher: Head | None,
        critic: CriticHead | None,
        targets: Tensor,
        vocabulary: Vocabulary,
        options: HeadOptions,
    ):
        self.num_tokens, self.device = targets.shape[0], student.hidden.device
        self.dtype, self.vocabulary, self.critic = arithmetic(student.hidden), vocabulary, critic
        self.real_rows = vocabulary.real_rows(student.weight.shape[0])
        self.student = self._real(student)
        self.teacher = None if teacher is None else self._real(teacher)
        self.terms: list[tuple[Head, float]] = []
        if critic is not None:
            self.terms = [(self._real(Head(hidden, weight)), sign) for hidden, weight, sign in critic.terms]
        if (
            targets.device.type == "cpu"
            and self.num_tokens
            and not 0 <= targets.min() <= targets.max() < vocabulary.size
        ):
            raise ValueError(
                f"targets: ids from {targets.min()} to {targets.max()} in a vocabulary of {vocabulary.size}"
            )
        self._targets = LocalTargets.of(targets, vocabulary.shard_start, self.real_rows)
        count = 1 + (teacher is not None) + (critic is not None)
        widened = student.weight.dtype != self.dtype  # products in a narrow type have memory of their own for a while
        self._chunk_tokens = options.tokens(student.weight.shape[0], count + widened, self.dtype, self.device)
        self._compiled = options.compiled and self.device.type == "cuda"
        shape = (min(self._chunk_tokens, self.num_tokens), self.real_rows)
        self._buffers = [torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(count)]

    def one_each(self, name: str, values: Tensor) -> Tensor:
        """One number for each token, in the arithmetic's type.

        Raises ValueError where there are more or fewer.
        """
        if values.shape != (self.num_tokens,):
            raise ValueError(f"{name}: {list(values.shape)} numbers for {self.num_tokens} targets")
        return values.to(self.dtype)

    def chunks(self) -> Iterator[slice]:
        """Slices of the tokens that cover all N."""
        for first in range(0, self.num_tokens, self._chunk_tokens):
            yield slice(first, min(first + self._chunk_tokens, self.num_tokens))

    def apply(self, rows: slice) -> Iterator[tuple[slice, Block]]:
        """The chunk's blocks, each with the tokens it is about, after one exchange with the other shards.

        Without other shards each block is normalised just before it is given out, while it is in a cache.
        """
        student, teacher, raw = self._of_chunk(rows)
        self._project(self.student, rows, student, self.student.logit_scale)
        if self.teacher is not None and teacher is not None:
            self._project(self.teacher, rows, teacher, self.teacher.logit_scale)
        if raw is not None:
            for number, (head, sign) in enumerate(self.terms):
                self._project(head, rows, raw, sign, add=number > 0)
        parts = self._parts(rows)
        normalised: Iterator[list[Partition]]
        sums = (self._sums(student, teacher, raw, part) for part in parts)
        if self.vocabulary.num_shards == 1:
            normalised = ([whole_partition(own) for own in of_part] for of_part in sums)
        else:
            assert self.vocabulary.group is not None
            whole = partitions(torch.cat([torch.stack(of_part) for of_part in sums], dim=2), self.vocabulary.group)
            normalised = ([partition[part] for partition in whole] for part in parts)
        for part, (of_student, *others) in zip(parts, normalised, strict=True):
            tokens = slice(rows.start + part.start, rows.start + part.stop)
            of_teacher = others[0] if others else None
            yield (
                tokens,
                Block(
                    student=student[part],
                    of_student=of_student,
                    teacher=None if teacher is None else teacher[part],
                    of_teacher=of_teacher,
                    raw=None if raw is None else raw[part],
                    shift=self._shift(of_student, of_teacher),
                    bound=self.critic.bound if self.critic is not None and self.critic.squash == "tanh" else None,
                    targets=self._targets[tokens],
                    first_id=self.vocabulary.shard_start,
                    vocab_size=self.vocabulary.size,
                ),
            )

    def _shift(self, of_student: Partition, of_teacher: Partition | None) -> Tensor | None:
        """What the raw values are too large by, [n]."""
        if self.critic is None or of_teacher is None:
            return None
        if self.critic.center:
            # The mean under (p+q)/2 of values that lack the same number: it takes that out as well.
            return 0.5 * (of_teacher.expectation + of_student.expectation)  # type: ignore[operator]
        if self.critic.prior == "log_ratio":
            # ln p - ln q = (z_p - z_q) - (lse_p - lse_q)
            gap = (of_teacher.top - of_student.top) + (of_teacher.log_total - of_student.log_total)
            return self.critic.prior_scale * gap
        return None

    def kernel(self, function: F) -> F:
        """A function of blocks, compiled where that is to be."""
        return compiled(function) if self._compiled else function

    def student_gradient(self, rows: slice) -> Tensor:
        """[n, R] what the blocks left in the student's memory."""
        return self._buffers[0][: rows.stop - rows.start]

    def critic_gradient(self, rows: slice) -> Tensor:
        """[n, R] what the blocks left in the critic's memory."""
        return self._buffers[-1][: rows.stop - rows.start]

    def _real(self, head: Head) -> Head:
        rows, tokens = head.weight.shape[0], head.hidden.shape[0]
        if self.vocabulary.real_rows(rows) != self.real_rows or tokens != self.num_tokens:
            raise ValueError(
                f"a head of {rows} rows on {tokens} tokens does not go with a student of {self.real_rows} real rows "
                f"and {self.num_tokens} targets"
            )
        return Head(head.hidden.detach(), head.weight.detach()[: self.real_rows], head.logit_scale)

    def _of_chunk(self, rows: slice) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Memory for the chunk's logits of student and teacher and the raw values."""
        buffers = [buffer[: rows.stop - rows.start] for buffer in self._buffers]
        raw = buffers.pop() if self.critic is not None else None
        return buffers[0], buffers[1] if self.teacher is not None else None, raw

    def _parts(self, rows: slice) -> list[slice]:
        """Blocks as slices of the chunk."""
        count = rows.stop - rows.start
        numbers = GPU_BLOCK_NUMBERS if self.device.type == "cuda" else BLOCK_NUMBERS
        size = count if self._compiled else max(1, numbers // max(self.real_rows, 1))
        return [slice(first, min(first + size, count)) for first in range(0, count, size)]

    def _project(self, head: Head, rows: slice, out: Tensor, scale: float, add: bool = False) -> None:
        """out [n, R] = or += scale * hidden W^T. The product is taken in the head's own type."""
        hidden, weight = head.hidden[rows], head.weight.T
        if hidden.dtype == out.dtype:
            torch.addmm(out, hidden, weight, beta=float(add), alpha=scale, out=out)
        elif add:
            out.add_(hidden @ weight, alpha=scale)
        else:
            out.copy_(hidden @ weight)
            if scale != 1:
                out.mul_(scale)

    def _sums(self, student: Tensor, teacher: Tensor | None, raw: Tensor | None, part: slice) -> list[Tensor]:
        """What `subtract_top` gives of student and teacher in a block; finishes the raw values' prior."""
        values = None
        if self.critic is not None and raw is not None and teacher is not None:
            if self.critic.prior == "log_ratio":
                # Logits instead of log-probabilities, which are not known before the exchange.
                raw[part].add_(teacher[part] - student[part], alpha=self.critic.prior_scale)
            values = raw[part] if self.critic.center else None
        subtract = self.kernel(subtract_top)
        return [subtract(z[part], values) for z in (student, teacher) if z is not None]
