"""Puts deliberate faults into a copy of the code, one at a time, and shows that the tests catch each.

    python tests/mutations.py [--only NAME]

Run by hand (some minutes); the table it prints stands in docs/log.md. Exits with 1 where a fault goes unnoticed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
UNIT = ("tests/unit/test_objectives.py", "tests/unit/test_objectives_oracles.py")
SHARDS = ("tests/distributed/test_objectives.py",)
STEPS = ("tests/distributed/test_step_gradients.py",)
T5 = ("tests/distributed/test_t5.py",)
T5_STEPS = ("tests/distributed/test_step_gradients.py::test_every_gradient_of_a_t5_student_is_the_dense_one",)
REPLAY = ("tests/distributed/test_replay.py",)


class Fault(NamedTuple):
    """One text in one file replaced by another."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    """What is run, up to the first failure."""


FAULTS = (
    Fault(
        "all-reduce of sum q a dropped",
        "objectives/fused_head.py",
        "return sum_over_group(torch.cat(sums), vocabulary.group).split(",
        "return torch.cat(sums).split(",
        SHARDS,
    ),
    Fault(
        "all-reduce of the hidden states' gradient dropped",
        "objectives/head_gradient.py",
        "sum_over_group(self.hidden, vocabulary.group)",
        "pass",
        SHARDS,
    ),
    Fault(
        "softmax over one's own shard",
        "objectives/vocab_parallel.py",
        "    for shard in shards:\n        sums +=",
        "    for shard in shards[:1]:\n        sums +=",
        SHARDS,
    ),
    Fault(
        "hidden states' gradient doubled",
        "objectives/head_gradient.py",
        "_add_product(self.hidden[rows], logits_gradient, head.weight, scale)",
        "_add_product(self.hidden[rows], logits_gradient, head.weight, 2 * scale)",
        UNIT,
    ),
    Fault(
        "gradient of a sequence-parallel gather summed again",
        "distributed/schedule.py",
        "tensor_parallel_output_grad=False",
        "tensor_parallel_output_grad=True",
        STEPS,
    ),
    Fault("sign of the student's AMM gradient", "objectives/blocks.py", "f.mul_(q).neg_()", "f.mul_(q)", UNIT),
    Fault(
        "sign of the sampled on-policy critic",
        "objectives/blocks.py",
        "        direction = p.neg_()\n        block.targets.add_(direction, 1.0)",
        "        direction = p\n        block.targets.add_(direction, -1.0)",
        UNIT,
    ),
    Fault(
        "score function's token left out",
        "objectives/blocks.py",
        "    block.targets.add_(block.student, scores)\n",
        "",
        UNIT,
    ),
    Fault(
        "derivative of tanh left out",
        "objectives/blocks.py",
        "f.div_(block.bound).square_().neg_().add_(1.0).mul_(block.bound).mul_(direction)",
        "f.copy_(direction)",
        UNIT,
    ),
    Fault(
        "centring's gradient left out",
        "objectives/blocks.py",
        "    block.raw.sub_(block.teacher.exp_().add_(block.student.exp_()).mul_(0.5 * total[:, None]))",
        "    pass",
        UNIT,
    ),
    Fault(
        "padded rows let in",
        "objectives/vocab_parallel.py",
        "return min(max(self.size - self.shard_start, 0), rows)",
        "return rows",
        UNIT,
    ),
    Fault(
        "temperature left out of the gradient",
        "objectives/fused_head.py",
        "heads.student, student.logit_scale)",
        "heads.student, 1.0)",
        UNIT,
    ),
    Fault(
        "critic no longer detached from the student's loss",
        "objectives/fused_head.py",
        "return with_gradients(loss, [gradient]), StudentTokens",
        "others = [HeadGradient(Head(h, w), heads.dtype) for h, w, _ in (critic.terms if critic else ())]\n"
        "    return with_gradients(loss, [gradient, *others]), StudentTokens",
        UNIT,
    ),
    Fault(
        "main_grad overwritten instead of added to",
        "objectives/head_gradient.py",
        "self.weight = main_grad if",
        "self.weight = main_grad.zero_() if",
        UNIT,
    ),
    Fault(
        "GJS's weight on the wrong side",
        "objectives/divergences.py",
        ".mul_(q).mul_(1 - weight)",
        ".mul_(q).mul_(weight)",
        UNIT,
    ),
    Fault(
        "skew's share on the wrong side",
        "objectives/divergences.py",
        "_, q_to_m = log_ratios_to_mixture(log_p, log_q, 1 - skew)\n        return q_to_m.sub_",
        "_, q_to_m = log_ratios_to_mixture(log_p, log_q, skew)\n        return q_to_m.sub_",
        UNIT,
    ),
    Fault(
        "discount left out",
        "objectives/moments.py",
        "return torch.full(steps.shape, gamma, dtype=dtype, device=steps.device) ** steps",
        "return torch.ones(steps.shape, dtype=dtype, device=steps.device)",
        UNIT,
    ),
    Fault(
        "mask of the returns left out",
        "objectives/moments.py",
        "    rewards = rewards.masked_fill(~mask, 0)\n",
        "",
        UNIT,
    ),
    Fault(
        "return from this token on instead of the next",
        "objectives/moments.py",
        "torch.cat([returns[:, 1:], returns.new_zeros(returns.shape[0], 1)], dim=1)",
        "torch.cat([returns, returns.new_zeros(returns.shape[0], 1)], dim=1)",
        UNIT,
    ),
    Fault(
        "baseline that includes the sequence itself",
        "objectives/moments.py",
        "(total - values) / (count - 1).clamp(min=1)",
        "total / count.clamp(min=1)",
        UNIT,
    ),
    Fault(
        "normaliser of one rank instead of the global batch",
        "training/collect.py",
        "    dist.all_reduce(total, group=layout.groups.dp)\n    return max",
        "    return max",
        STEPS,
    ),
    Fault(
        "a block takes the targets of the first",
        "objectives/heads.py",
        "targets=self._targets[tokens],",
        "targets=self._targets[slice(rows.start, rows.start + part.stop - part.start)],",
        UNIT,
    ),
    Fault(
        "later blocks normalised with the first one's partition",
        "objectives/heads.py",
        "normalised = ([partition[part] for partition in whole] for part in parts)",
        "normalised = ([p[slice(0, part.stop - part.start)] for p in whole] for part in parts)",
        SHARDS,
    ),
    Fault(
        "only the first block's critic gradient centred",
        "objectives/fused_head.py",
        "for (_, block, _), total in zip(waiting, _over_shards(waiting, vocabulary), strict=True):",
        "for (_, block, _), total in [*zip(waiting, _over_shards(waiting, vocabulary), strict=True)][:1]:",
        SHARDS,
    ),
    Fault(
        "sums of q a given to the blocks the other way round",
        "objectives/fused_head.py",
        "return sum_over_group(torch.cat(sums), vocabulary.group).split([len(part) for part in sums])",
        "return sum_over_group(torch.cat(sums), vocabulary.group).split([len(part) for part in sums])[::-1]",
        SHARDS,
    ),
    Fault(
        "the last rank's random state not restored",
        "training/trainer.py",
        '            _restore_random_states(rank_state["rng"])',
        "            if dist.get_rank() != dist.get_world_size() - 1:\n"
        '                _restore_random_states(rank_state["rng"])',
        ("tests/distributed/test_trainer.py",),
    ),
    Fault(
        "all-reduce of a generating layer dropped",
        "models/lean.py",
        "        dist.all_reduce(output, group=self.group)",
        "        pass",
        ("tests/distributed/test_generate.py",),
    ),
    Fault(
        "gradients of the stages' position biases not summed",
        "models/t5.py",
        "            dist.all_reduce(none if bias is None else bias.weight.main_grad, group=self.pp_group)",
        "            none = none if bias is None else bias.weight.main_grad",
        T5_STEPS,
    ),
    Fault(
        "a response that its decoder reads unshifted",
        "batch.py",
        "    before = F.pad(responses[:, :-1], (1, 0), value=start_id)\n",
        "    before = responses\n",
        T5,
    ),
    Fault(
        "states of a tied T5 not scaled",
        "models/t5.py",
        "return decoded * self.output_scale if self.post_process else torch.cat([encoded, decoded])",
        "return decoded if self.post_process else torch.cat([encoded, decoded])",
        T5,
    ),
    Fault(
        "one position of a prompt's padding seen",
        "models/t5.py",
        "    return (columns >= lengths.clamp(min=1)[:, None])[:, None, None]",
        "    return (columns > lengths.clamp(min=1)[:, None])[:, None, None]",
        T5,
    ),
    Fault(
        "a row that sees the rest of the prompt before its own",
        "models/kv_cache.py",
        "            self._prompt_lengths[row] = length\n",
        "            self._prompt_lengths[row] = max(length, self._prompt_lengths[row])\n",
        T5,
    ),
    Fault(
        "the same draw from the buffer in every iteration",
        "rollout/replay.py",
        'self._random(turn.iteration, f"draw {on_policy}"',
        'self._random(0, f"draw {on_policy}"',
        REPLAY,
    ),
    Fault(
        "both kinds of sequences drawn alike",
        "rollout/replay.py",
        'self._random(turn.iteration, f"draw {on_policy}"',
        'self._random(turn.iteration, "draw"',
        REPLAY,
    ),
    Fault(
        "a distance held against the best instead of the last",
        "rollout/replay.py",
        "        self._distance = distance\n",
        "        self._distance = min(distance, self._distance or distance)\n",
        REPLAY,
    ),
    Fault(
        "the last distance forgotten by a resume",
        "rollout/replay.py",
        '    self.probability, self._distance = state["probability"], state["distance"]',
        '    self.probability = state["probability"]',
        REPLAY,
    ),
    Fault(
        "a buffer that is taken for full too early",
        "rollout/replay.py",
        "few = any(len(self._memories[kind]) < settings.capacity for kind in kinds)",
        "few = any(len(self._memories[kind]) < self._needed[kind] for kind in kinds)",
        REPLAY,
    ),
    Fault(
        "ids of the next shard drawn",
        "rollout/sampling.py",
        "    real = min(max(vocab_size - shard_start, 0), size)\n",
        "    real = max(vocab_size - shard_start, 0)\n",
        ("tests/distributed/test_sampling.py",),
    ),
    Fault(
        "head gradient of its first rows alone",
        "objectives/head_gradient.py",
        "for first in range(0, head.weight.shape[0], PRODUCT_ROWS):",
        "for first in range(0, min(head.weight.shape[0], PRODUCT_ROWS), PRODUCT_ROWS):",
        UNIT,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="part of a fault's name")
    options = parser.parse_args()
    unnoticed = 0
    print("| fault | file | caught by |\n|---|---|---|")
    for fault in FAULTS:
        if options.only and options.only not in fault.name:
            continue
        caught_by = first_failure(fault)
        unnoticed += caught_by is None
        print(f"| {fault.name} | `{fault.file}` | {caught_by or '**nothing**'} |", flush=True)
    sys.exit(unnoticed > 0)


def first_failure(fault: Fault) -> str | None:
    """The first test that fails with the fault in place; None if all pass."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("megatron_amd", "tests", "docs", "pyproject.toml"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        path = copy / "megatron_amd" / fault.file
        text = path.read_text(encoding="utf-8")
        if text.count(fault.old) != 1:
            sys.exit(f"{fault.name}: {fault.file} does not hold its text exactly once")
        path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *fault.tests]
        environment = {**os.environ, "PYTHONPATH": str(copy)}
        result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return None
    found = re.search(r"^FAILED \S+::(\w+)", result.stdout, re.MULTILINE)
    if found is None:
        sys.exit(f"{fault.name}: the tests did not run:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return f"`{found.group(1)}`"


if __name__ == "__main__":
    main()
