"""From per-token statistics on one rank to a batch's metrics on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_amd.batch import Batch
from megatron_amd.distributed.layout import Layout
from megatron_amd.objectives.fused_head import TokenStatistics
from megatron_amd.training.metrics import peak_memory_gib

_MEANS = ("kl", "rkl", "tv", "js", "entropy_student", "entropy_teacher", "top1_agreement", "teacher_mass")


def batch_metrics(
    batch: Batch, statistics: Sequence[TokenStatistics] | None, layout: Layout, bound: float
) -> dict[str, float]:
    """Means over all tokens of the global batch, and the moment-matching distances in the objective's units.

    Args:
        statistics: of each micro-batch; None where this rank is not on the last stage.
        bound: c, for the TV bound.

    Returns:
        `distance/*`, and with a critic `amm/d_mm_*`, `amm/tv_bound_*`, `amm/tightness_*`, `critic/f_*`; equal on all
        ranks. Collective.
    """
    sums = torch.zeros(2, len(_MEANS) + 3, dtype=torch.float64)
    extremes = torch.tensor([-torch.inf, -torch.inf, 0.0], dtype=torch.float64)  # -f_min, f_max, whether there is f
    for index, token in enumerate(statistics or ()):
        microbatch, weights = batch.microbatches[index], batch.weights[index].double()
        row = sums[int(microbatch.on_policy)]
        for column, name in enumerate(_MEANS):
            row[column] += getattr(token, name).double().sum().item()
        row[-3] += microbatch.num_states
        row[-2] += (weights * token.tv.double()).sum().item()
        if token.delta is not None:
            row[-1] += (weights * token.delta.double()).sum().item()
            extremes[2] = 1.0
            if microbatch.num_states:
                assert token.f_min is not None and token.f_max is not None
                extremes[0] = max(extremes[0].item(), -token.f_min.min().item())
                extremes[1] = max(extremes[1].item(), token.f_max.max().item())
    share_sums(sums, layout)
    share_sums(extremes, layout, dist.ReduceOp.MAX)
    metrics: dict[str, float] = {}
    for policy, row in zip(("off", "on"), sums.tolist(), strict=True):
        count, tv, d_mm = row[-3:]
        if not count:
            continue
        for name, total in zip(_MEANS, row, strict=False):
            metrics[f"distance/{name}_{policy}"] = total / count
        if extremes[2]:
            metrics[f"amm/d_mm_{policy}"] = d_mm
            metrics[f"amm/tv_bound_{policy}"] = 2 * bound * tv
            metrics[f"amm/tightness_{policy}"] = d_mm / (2 * bound * tv) if tv > 0 else 1.0
    if extremes[2]:
        metrics["critic/f_min"], metrics["critic/f_max"] = -extremes[0].item(), extremes[1].item()
    return metrics


def share_sums(values: torch.Tensor, layout: Layout, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
    """Reduce numbers of the last stages over data parallelism and give every stage the result, in place.

    TP ranks hold equal numbers, so they are not summed over. Collective over all ranks.
    """
    on_device = values.to(layout.device)
    dist.all_reduce(on_device, op=op, group=layout.groups.dp)
    values.copy_(on_device)
    broadcast_from_last_stage(values, layout)


def broadcast_from_last_stage(values: torch.Tensor, layout: Layout) -> None:
    """Give every pipeline stage the last one's numbers, in place. Collective over the replica's stages."""
    on_device = values.to(layout.device)
    dist.broadcast(on_device, src=layout.last_stage_rank, group=layout.groups.pp)
    values.copy_(on_device)


def memory_metrics(layout: Layout) -> dict[str, float]:
    """Peak memory of the worst rank and of all ranks together. Collective."""
    peak = torch.tensor([peak_memory_gib()], dtype=torch.float64, device=layout.device)
    total = peak.clone()
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    dist.all_reduce(total)
    return {"memory/peak_gib": peak.item(), "memory/total_gib": total.item()}
