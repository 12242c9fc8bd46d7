"""LM heads and objective in one: values and gradients over the whole vocabulary without a [tokens, vocabulary] tensor.

The heads of student, teacher and critic are applied together to a chunk of tokens at a time, on this rank's shard of
the vocabulary, and the gradient of every objective is formed in the same pass from one formula:

    dL/dz_k = weight * q_k (a_k - sum_j q_j a_j) + score * (1[k = y] - q_k),   a_k = dD/dq_k,   amm: a = -f.

It is then carried back through the head: hidden states' gradients are summed over the tensor-parallel group here,
once (so a gather from sequence-parallel regions before the head must not sum them again); a head's weight gradient
belongs to its shard and needs no communication. Matrix products are in the heads' own type; all else is fp32, or fp64
for fp64 hidden states, the sums of gradients over chunks too. Extra memory is a few [chunk, V_local] buffers.

Communication per chunk: one exchange of the softmaxes' maxima and sums, and one sum of q*a (none for kl, whose sum is
known; for the critic only where it is centred). Statistics are reduced once, after the last chunk.

Shapes: N tokens (states), n of them in a chunk, V_local rows in this rank's shard of a head, R of them real ids.
All functions belong on the last pipeline stage, and every rank of the tensor-parallel group calls them with equal N.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor

from megatron_amd.objectives.divergences import DIVERGENCES
from megatron_amd.objectives.vocab_parallel import (
    LocalTargets,
    Partition,
    Vocabulary,
    local_max,
    max_over_group,
    partitions,
    sum_over_group,
)

CHUNK_BYTES = 256 * 2**20
"""Working set of a chunk where no chunk size is given."""
CHUNK_BUFFERS = 10
"""[chunk, V_local] buffers alive at once, at most: ln p, ln q, p, q, f, gradient, temporaries."""


@dataclass(frozen=True)
class Head:
    """Hidden states and the LM head that reads them."""

    hidden: Tensor
    """[N, H]."""
    weight: Tensor
    """[V_local, H]: this rank's shard."""


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


@dataclass(frozen=True)
class TokenStatistics:
    """Per-token quantities, each [N] in fp32 (fp64 for fp64 hidden states), equal on all tensor-parallel ranks."""

    kl: Tensor
    """KL(p||q), nats."""
    rkl: Tensor
    """KL(q||p), nats."""
    tv: Tensor
    """Total variation, in [0, 1]."""
    js: Tensor
    """Jensen-Shannon divergence, nats."""
    entropy_student: Tensor
    """-sum q ln q."""
    entropy_teacher: Tensor
    """-sum p ln p."""
    student_logprob: Tensor
    """ln q(y)."""
    teacher_logprob: Tensor
    """ln p(y)."""
    top1_agreement: Tensor
    """1 where both models' likeliest token is the same (of equally likely ones the first), else 0."""
    delta: Tensor | None = None
    """E_p f - E_q f. This and the following are None without a critic."""
    f_target: Tensor | None = None
    """f(y)."""
    expected_f_teacher: Tensor | None = None
    """E_p f."""
    expected_f_student: Tensor | None = None
    """E_q f."""
    f_min: Tensor | None = None
    """Smallest f over the real vocabulary."""
    f_max: Tensor | None = None
    """Largest f over the real vocabulary."""


@dataclass(frozen=True)
class StudentTokens:
    """What `student_loss` knows of each token, each [N]."""

    value: Tensor
    """D(p, q): delta for amm, the distance in nats (tv: in [0, 1]), -ln q(y) for sft."""
    student_logprob: Tensor
    """ln q(y)."""
    statistics: TokenStatistics | None = None
    """Everything else, where it was asked for."""


def default_chunk_tokens(local_rows: int, dtype: torch.dtype = torch.float32) -> int:
    """Tokens a chunk, so that its working set on `local_rows` rows of the vocabulary is about 256 MiB."""
    return max(1, CHUNK_BYTES // (CHUNK_BUFFERS * dtype.itemsize * max(local_rows, 1)))


@torch.no_grad()
def head_statistics(
    student: Head,
    teacher: Head,
    critic: CriticHead | None,
    targets: Tensor,
    vocabulary: Vocabulary,
    chunk_tokens: int | None = None,
) -> TokenStatistics:
    """Every per-token statistic, without gradients. targets: int64 [N]."""
    heads = _Heads(student, teacher, critic, targets, vocabulary)
    parts = [_statistics(heads.evaluate(rows), vocabulary) for rows in heads.chunks(chunk_tokens)]
    return _finish_statistics(heads, parts)


def student_loss(
    student: Head,
    teacher: Head | None,
    critic: CriticHead | None,
    *,
    objective: str,
    targets: Tensor,
    weights: Tensor,
    scores: Tensor | None = None,
    vocabulary: Vocabulary,
    chunk_tokens: int | None = None,
    with_statistics: bool = False,
) -> tuple[Tensor, StudentTokens]:
    """sum_i weights_i D_i + sum_i scores_i ln q_i(y_i), differentiable in the student's hidden states and head.

    objective: `amm` (D = delta, f held fixed), a name of `DIVERGENCES`, or `sft` (D = -ln q(y), which needs no
    teacher). targets: int64 [N]; weights, scores: [N], constants. Only `amm` reads the critic. The loss is equal on
    all tensor-parallel ranks. with_statistics: collect the statistics in the same pass (not for `sft`, which sees no
    teacher). Raises ValueError for an unknown objective or a missing head.
    """
    if objective not in ("amm", "sft", *DIVERGENCES):
        raise ValueError(f"objective: {objective!r} is not known")
    if (teacher is None and objective != "sft") or (critic is None and objective == "amm"):
        raise ValueError(f"objective {objective} needs the teacher's head" + (" and a critic" * (objective == "amm")))
    gradient = _HeadGradient(student, _arithmetic(student.hidden))
    with torch.no_grad():
        heads = _Heads(
            student,
            None if objective == "sft" else teacher,
            critic if objective == "amm" else None,
            targets,
            vocabulary,
        )
        weights = weights.to(heads.dtype)
        scores = torch.zeros_like(weights) if scores is None else scores.to(heads.dtype)
        logprob_weights = scores - weights if objective == "sft" else scores
        # Partial sums over this shard: D and ln q(y).
        tokens = torch.zeros(2, heads.num_tokens, dtype=heads.dtype, device=student.hidden.device)
        parts = []
        for rows in heads.chunks(chunk_tokens):
            chunk = heads.evaluate(rows)
            if with_statistics:
                parts.append(_statistics(chunk, vocabulary))
            tokens[1, rows] = chunk.targets.take(chunk.log_q)
            logits_gradient = -chunk.q * logprob_weights[rows, None]
            chunk.targets.add_(logits_gradient, logprob_weights[rows])
            if objective != "sft":
                tokens[0, rows], slope = _value_and_slope(objective, chunk, vocabulary)
                logits_gradient.addcmul_(slope, weights[rows, None])
                del slope
            gradient.add(rows, logits_gradient, heads.student)
            del chunk, logits_gradient
        value, logprob = sum_over_group(tokens, vocabulary.group)
        if objective == "sft":
            value = -logprob
        loss = (weights * value).sum() + (scores * logprob).sum()
        gradient.reduce(vocabulary)
        statistics = _finish_statistics(heads, parts) if with_statistics else None
    return _with_gradients(loss, [gradient]), StudentTokens(value, logprob, statistics)


def critic_loss(
    student: Head,
    teacher: Head,
    critic: CriticHead,
    *,
    targets: Tensor,
    weights: Tensor,
    on_policy: bool,
    estimator: str,
    vocabulary: Vocabulary,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, TokenStatistics]:
    """-sum_i weights_i U_i, differentiable in the critic's terms alone, and the statistics of the same pass.

    estimator `full_vocabulary`: U = delta. `sampled`: U = f(y) - E_q f off-policy (y from the teacher), E_p f - f(y)
    on-policy (y from the student). targets: int64 [N]; weights: [N], constants. Raises ValueError for another
    estimator.
    """
    if estimator not in ("full_vocabulary", "sampled"):
        raise ValueError(f"estimator: {estimator!r} is not known")
    dtype = _arithmetic(student.hidden)
    gradients = [_HeadGradient(Head(hidden, weight), dtype) for hidden, weight, _ in critic.terms]
    with torch.no_grad():
        heads = _Heads(student, teacher, critic, targets, vocabulary)
        weights = weights.to(heads.dtype)
        parts = []
        for rows in heads.chunks(chunk_tokens):
            chunk = heads.evaluate(rows)
            parts.append(_statistics(chunk, vocabulary))
            raw_gradient = _raw_critic_gradient(chunk, critic, weights[rows], on_policy, estimator, vocabulary)
            for gradient, (head, sign) in zip(gradients, heads.terms, strict=True):
                gradient.add(rows, raw_gradient, head, sign)
            del chunk, raw_gradient
        for gradient in gradients:
            gradient.reduce(vocabulary)
        statistics = _finish_statistics(heads, parts)
        loss = -(weights * _moments(statistics, on_policy, estimator)).sum()
    return _with_gradients(loss, gradients), statistics


def _arithmetic(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


@dataclass
class _Chunk:
    """All heads on n tokens of this shard. log_p, p are None without a teacher, f without a critic."""

    log_q: Any
    q: Any
    q_holds_top: Any
    """bool [n]: the largest of all q lies on this shard."""
    log_p: Any
    p: Any
    p_holds_top: Any
    f: Any
    targets: LocalTargets


class _Heads:
    """The heads' real rows, and their evaluation on a chunk of tokens."""

    def __init__(
        self,
        student: Head,
        teacher: Head | None,
        critic: CriticHead | None,
        targets: Tensor,
        vocabulary: Vocabulary,
    ):
        self.num_tokens, self.device = targets.shape[0], student.hidden.device
        self.dtype = _arithmetic(student.hidden)
        self.vocabulary, self.critic, self.all_targets = vocabulary, critic, targets
        self.rows = student.weight.shape[0]
        self.real_rows = vocabulary.real_rows(self.rows)
        self.student = self._real(student)
        self.teacher = None if teacher is None else self._real(teacher)
        self.terms = []
        if critic is not None:
            self.terms = [(self._real(Head(hidden, weight)), sign) for hidden, weight, sign in critic.terms]

    def _real(self, head: Head) -> Head:
        if head.weight.shape[0] != self.rows or head.hidden.shape[0] != self.num_tokens:
            raise ValueError(
                f"a head of {head.weight.shape[0]} rows on {head.hidden.shape[0]} tokens does not go with a student of "
                f"{self.rows} rows and {self.num_tokens} targets"
            )
        return Head(head.hidden.detach(), head.weight.detach()[: self.real_rows])

    def chunks(self, chunk_tokens: int | None) -> Iterator[slice]:
        """Slices of at most `chunk_tokens` tokens that cover all N."""
        size = chunk_tokens or default_chunk_tokens(self.rows, self.dtype)
        for first in range(0, self.num_tokens, size):
            yield slice(first, min(first + size, self.num_tokens))

    def _logits(self, head: Head, rows: slice) -> Tensor:
        """[n, R]. Products are taken in the heads' own type, everything after them in fp32 (or fp64)."""
        return (head.hidden[rows] @ head.weight.T).to(self.dtype)

    def evaluate(self, rows: slice) -> _Chunk:
        """Softmaxes and critic on these tokens; one exchange with the other shards."""
        logits = [self._logits(self.student, rows)]
        if self.teacher is not None:
            logits.append(self._logits(self.teacher, rows))
        raw = self._raw_critic(rows, logits)
        centered = self.critic is not None and self.critic.center
        softmaxes = partitions(logits, raw if centered else None, self.vocabulary.group)
        f = None if raw is None else self._squash(raw, softmaxes)
        targets = LocalTargets(self.all_targets[rows], self.vocabulary.shard_start, self.real_rows)
        of_student = _normalize(logits[0], softmaxes[0])
        of_teacher: tuple[Any, Any, Any] = (
            (None, None, None) if self.teacher is None else _normalize(logits[1], softmaxes[1])
        )
        return _Chunk(*of_student, *of_teacher, f, targets)

    def _raw_critic(self, rows: slice, logits: Sequence[Tensor]) -> Tensor | None:
        """The raw values, up to a number per token that `_squash` subtracts."""
        if self.critic is None:
            return None
        raw = torch.zeros_like(logits[0])
        for head, sign in self.terms:
            raw.add_(self._logits(head, rows), alpha=sign)
        if self.critic.prior == "log_ratio":
            # Logits instead of log-probabilities, which are not known before the exchange.
            raw.add_(logits[1] - logits[0], alpha=self.critic.prior_scale)
        return raw

    def _squash(self, raw: Tensor, softmaxes: Sequence[Partition]) -> Tensor:
        assert self.critic is not None
        of_student, of_teacher = softmaxes
        if self.critic.center:
            raw.sub_(0.5 * (of_teacher.expectation + of_student.expectation)[:, None])  # type: ignore[operator]
        elif self.critic.prior == "log_ratio":
            # ln p - ln q = (z_p - z_q) - (lse_p - lse_q)
            gap = (of_teacher.top - of_student.top) + (of_teacher.log_total - of_student.log_total)
            raw.sub_(self.critic.prior_scale * gap[:, None])
        return raw.tanh_().mul_(self.critic.bound) if self.critic.squash == "tanh" else raw


def _normalize(logits: Tensor, softmax: Partition) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities, in the logits' memory; probabilities; whether this shard holds the largest)."""
    holds_top = local_max(logits) == softmax.top
    log_probs = logits.sub_(softmax.top[:, None]).sub_(softmax.log_total[:, None])
    return log_probs, log_probs.exp(), holds_top


def _value_and_slope(objective: str, chunk: _Chunk, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """The shard's part of D, [n], and q (a - sum(q a)), [n, R]."""
    slope_sum: float | Tensor | None = None
    if objective == "amm":
        value = ((chunk.p - chunk.q) * chunk.f).sum(1)
        slope = -chunk.q * chunk.f
    else:
        divergence = DIVERGENCES[objective]
        distributions = (chunk.p, chunk.q, chunk.log_p, chunk.log_q)
        value, slope, slope_sum = (
            divergence.value(*distributions),
            divergence.slope(*distributions),
            divergence.slope_sum,
        )
    if slope_sum is None:
        slope_sum = sum_over_group(slope.sum(1), vocabulary.group)[:, None]
    return value, slope.sub_(chunk.q * slope_sum)


def _raw_critic_gradient(
    chunk: _Chunk, critic: CriticHead, weights: Tensor, on_policy: bool, estimator: str, vocabulary: Vocabulary
) -> Tensor:
    """Gradient of -sum weights * U in the critic's linear values, [n, R]."""
    if estimator == "full_vocabulary":
        gradient = chunk.q - chunk.p
    elif on_policy:
        gradient = -chunk.p
        chunk.targets.add_(gradient, 1.0)
    else:
        gradient = chunk.q.clone()
        chunk.targets.add_(gradient, -1.0)
    gradient.mul_(weights[:, None])
    if critic.squash == "tanh":
        gradient.mul_(critic.bound - chunk.f.square() / critic.bound)
    if critic.center:
        total = sum_over_group(gradient.sum(1), vocabulary.group)
        gradient.sub_(0.5 * (chunk.p + chunk.q) * total[:, None])
    return gradient


def _moments(statistics: TokenStatistics, on_policy: bool, estimator: str) -> Tensor:
    """U of each token, [N]."""
    values = (statistics.delta, statistics.f_target, statistics.expected_f_teacher, statistics.expected_f_student)
    delta, f_target, expected_f_teacher, expected_f_student = cast("tuple[Tensor, ...]", values)
    if estimator == "full_vocabulary":
        return delta
    return expected_f_teacher - f_target if on_policy else f_target - expected_f_student


def _statistics(chunk: _Chunk, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """This shard's part of the sums, [8 or 12, n] in the order of `TokenStatistics`, and of the maxima, [2 or 4, n]."""
    distributions = (chunk.p, chunk.q, chunk.log_p, chunk.log_q)
    sums = [DIVERGENCES[name].value(*distributions) for name in ("kl", "rkl", "tv", "js")]
    sums += [-(chunk.q * chunk.log_q).sum(1), -(chunk.p * chunk.log_p).sum(1)]
    sums += [chunk.targets.take(chunk.log_q), chunk.targets.take(chunk.log_p)]
    maxima = [
        -_top_id(chunk.log_q, chunk.q_holds_top, vocabulary),
        -_top_id(chunk.log_p, chunk.p_holds_top, vocabulary),
    ]
    if chunk.f is not None:
        sums += [((chunk.p - chunk.q) * chunk.f).sum(1), chunk.targets.take(chunk.f)]
        sums += [(chunk.p * chunk.f).sum(1), (chunk.q * chunk.f).sum(1)]
        maxima += [local_max(-chunk.f), local_max(chunk.f)]
    return torch.stack(sums), torch.stack(maxima)


def _top_id(log_probs: Tensor, holds_top: Tensor, vocabulary: Vocabulary) -> Tensor:
    """[n] id of the likeliest token if it is on this shard, else the vocabulary's size. Exact in fp32 up to 2^24."""
    if not log_probs.shape[1]:
        return log_probs.new_full((log_probs.shape[0],), vocabulary.size)
    ids = (log_probs.argmax(1) + vocabulary.shard_start).to(log_probs.dtype)
    return torch.where(holds_top, ids, vocabulary.size)


def _finish_statistics(heads: _Heads, parts: Sequence[tuple[Tensor, Tensor]]) -> TokenStatistics:
    """Join the chunks and reduce over the shards: one SUM and one MAX."""
    group = heads.vocabulary.group
    if parts:
        sums = sum_over_group(torch.cat([part[0] for part in parts], dim=1), group)
        maxima = max_over_group(torch.cat([part[1] for part in parts], dim=1), group)
    else:
        sums = torch.zeros(8 if heads.critic is None else 12, 0, dtype=heads.dtype, device=heads.device)
        maxima = torch.zeros(2 if heads.critic is None else 4, 0, dtype=heads.dtype, device=heads.device)
    top1_agreement = (maxima[0] == maxima[1]).to(heads.dtype)
    values = [*sums[:8], top1_agreement, *sums[8:]]
    if heads.critic is not None:
        values += [-maxima[2], maxima[3]]
    names = [field.name for field in fields(TokenStatistics)]
    return TokenStatistics(**dict(zip(names, values, strict=False)))


class _HeadGradient:
    """Gradient of one head's hidden states and weight, as far as they and the caller's grad mode ask for one."""

    def __init__(self, head: Head, dtype: torch.dtype):
        self.head = head
        self.hidden, self.weight = (
            torch.zeros_like(tensor, dtype=dtype) if tensor.requires_grad and torch.is_grad_enabled() else None
            for tensor in (head.hidden, head.weight)
        )

    def add(self, rows: slice, logits_gradient: Tensor, head: Head, sign: float = 1.0) -> None:
        """Carry the gradient [n, R] of a chunk's logits back through the head's real rows."""
        logits_gradient = logits_gradient.to(head.weight.dtype)
        if self.hidden is not None:
            self.hidden[rows].add_(logits_gradient @ head.weight, alpha=sign)
        if self.weight is not None:
            self.weight[: head.weight.shape[0]].add_(logits_gradient.T @ head.hidden[rows], alpha=sign)

    def reduce(self, vocabulary: Vocabulary) -> None:
        """Sum the hidden states' gradient over the shards: each gave only its own rows' part."""
        if self.hidden is not None:
            sum_over_group(self.hidden, vocabulary.group)


def _with_gradients(loss: Tensor, gradients: Sequence[_HeadGradient]) -> Tensor:
    """Connect a loss to the tensors whose gradients are already known."""
    tensors = [tensor for gradient in gradients for tensor in (gradient.head.hidden, gradient.head.weight)]
    known = [tensor for gradient in gradients for tensor in (gradient.hidden, gradient.weight)]
    return _KnownGradients.apply(loss, known, *tensors)


class _KnownGradients(torch.autograd.Function):
    """A scalar whose gradients were formed together with it."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple:  # type: ignore[override]
        # Scale in fp32, then round to the tensor's type: grad_output may hold a loss scale.
        scaled = [
            None if gradient is None else (gradient * grad_output).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        return None, None, *scaled
