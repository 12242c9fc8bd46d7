"""Write a model's responses to a run's data set into a folder, for training with `rollout.off_policy: file`.

    python tools/generate.py --config run.yaml --output runs/responses
    torchrun --nproc-per-node 8 tools/generate.py --config run.yaml --output runs/responses \\
        parallel.tensor_model_parallel_size=4 rollout.samples_per_prompt=4
    python tools/generate.py --config run.yaml --output runs/greedy --role student rollout.temperature=0

The settings are the run's own. Used are `parallel`, `data`, the role's model, `rollout`, `run.seed` and
`training.precision`; `rollout.temperature`, `top_k`, `top_p`, `min_p` and `min_response_length` hold for both roles,
`rollout.teacher_share` and `rollout.reuse` for none.
With the defaults of these a teacher's responses are those that `off_policy: teacher` would sample in the first epoch.

Data-parallel replicas share the shards and do not wait for each other. The same command goes on after an interruption,
on as many ranks as there are. Exit status: 0, 2 with one line about what is wrong, 3 where a rank was lost, or 130
after Ctrl-C.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_amd.config import Config, CriticConfig, EvaluationConfig, load_config
from megatron_amd.errors import InputError
from megatron_amd.program import Parser, run_program, say, warn

if TYPE_CHECKING:
    from megatron_amd.data import PromptDataset, Tokenizer
    from megatron_amd.data.response_files import Header
    from megatron_amd.distributed.layout import Layout
    from megatron_amd.rollout.response_files import Written


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    return run_program(lambda: _run(_parse(arguments)), goes_on="with the shards that are missing")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="generate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="the run's settings (YAML)")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="to write, or to go on in")
    parser.add_argument("--role", choices=("teacher", "student"), default="teacher", help="who responds")
    parser.add_argument(
        "--shard-size",
        type=int,
        metavar="N",
        help="prompts in a file; an interruption loses those that are not complete (default: the folder's, 256 for a "
        "new one)",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_intermixed_args(arguments)  # options may stand between overrides
    if options.shard_size is not None and options.shard_size < 1:
        raise InputError(f"--shard-size: must be at least 1, not {options.shard_size}")
    return options


def _run(options: argparse.Namespace) -> int:
    # What the objective and the reuse of sequences ask of settings is asked when there is training.
    config = load_config(options.config, [*options.overrides, "objective.name=kl", "rollout.reuse={}"])

    from megatron_amd.distributed.initialize import shutdown  # heavy imports wait until the settings are right
    from megatron_amd.distributed.quiet import silence_known_warnings

    silence_known_warnings()
    try:
        return _generate(config, options)
    finally:
        shutdown()


def only_role(config: Config, role: str, world_size: int) -> Config:
    """The settings of a run in which a role plays alone, with the run's own tokenizer."""
    model = getattr(config, role)
    return replace(
        config,
        student=model,
        teacher=model,
        critic=CriticConfig(),
        evaluation=EvaluationConfig(),
        data=replace(config.data, tokenizer=config.data.tokenizer or config.teacher.path),
        training=replace(config.training, global_batch_size=world_size),  # any that the replicas can share
    )


def _generate(run: Config, options: argparse.Namespace) -> int:
    import torch.distributed as dist

    from megatron_amd.data import load_rows
    from megatron_amd.distributed.initialize import agreed, initialize, world_size_from_environment
    from megatron_amd.models.roles import build_model
    from megatron_amd.rollout.response_files import prepare_folder, share_of, write_responses
    from megatron_amd.training.collect import noise_seed, ways_of_working
    from megatron_amd.training.first_weights import fill_model, freeze
    from megatron_amd.training.progress import ResponsesLine
    from megatron_amd.training.setup import check_models

    folder, role = options.output.expanduser(), options.role
    config = only_role(run, role, world_size_from_environment())
    layout = initialize(config)
    with agreed():
        try:
            tokenizer, plan = check_models(config, layout, warn)
        except InputError as error:  # both roles are the one model here, and the student is looked at first
            raise InputError(re.sub(r"^student\b", role, str(error))) from None
        dataset = load_rows(
            config.data, "train", tokenizer, responses=False, end_prompts=plan.student.has_encoder, warn=warn
        )
        header = _header(config, options, tokenizer, dataset)
        box: list[Any] = [None, None]
        if dist.get_rank() == 0:
            box = list(prepare_folder(folder, header, options.shard_size))
    dist.broadcast_object_list(box)  # one look at the folder for all
    header, shards = box
    if not shards:
        say(f"{folder}: all {header.shards} shards are there, nothing to do")
    elif len(shards) < header.shards:
        say(f"{folder}: {header.shards - len(shards)} of {header.shards} shards are there already")
    if not shards:
        return 0
    model = build_model(role, config, plan, layout)
    with agreed():
        fill_model(model, role, getattr(config, role), getattr(plan, role), config.run.seed)
    freeze(model)
    share = share_of(header, shards, dataset.lengths.tolist(), layout)
    count = header.samples * sum(len(header.positions(shard)) for shard in share)
    line = None
    if dist.get_rank() == 0 and share:
        place = f"replica 0 of {layout.dp_size}" if layout.dp_size > 1 else ""
        line = ResponsesLine(sys.stderr, count, place)
    began = time.monotonic()
    try:
        done = write_responses(
            model, dataset, tokenizer, header, folder, share,
            layout=layout,
            vocab_size=plan.vocab_size,
            report=None if line is None else line.show,
            seed=noise_seed(config.run.seed, role),
            **ways_of_working(config.rollout),
        )  # fmt: skip
    finally:
        if line is not None:
            line.close()
    _say_totals(folder, done, layout, time.monotonic() - began)
    return 0


def _header(config: Config, options: argparse.Namespace, tokenizer: Tokenizer, dataset: PromptDataset) -> Header:
    from megatron_amd.data.response_files import SAMPLING, Header
    from megatron_amd.training.model_hash import model_hash

    model = getattr(config, options.role)
    return Header(
        model={
            "path": model.path or "from scratch",
            "role": options.role,
            "hash": model_hash(model, options.role, config.run.seed),
        },
        tokenizer={"source": tokenizer.source, "hash": tokenizer.fingerprint()},
        data={"path": str(config.data.train), "rows": len(dataset), "fingerprint": dataset.fingerprint},
        sampling={
            **{name: getattr(config.rollout, name) for name in SAMPLING},
            "stop_strings": list(config.rollout.stop_strings),
            "seed": config.run.seed,
            "precision": config.training.precision,
        },
        shard_size=options.shard_size or 256,
    )


def _say_totals(folder: Path, done: Written, layout: Layout, seconds: float) -> None:
    """Add up what all replicas have written in this start. Collective."""
    import torch.distributed as dist

    parts: list[Any] = [None] * layout.dp_size
    dist.all_gather_object(parts, done, group=layout.groups.dp)
    responses, tokens, ended = (sum(getattr(part, name) for part in parts) for name in ("responses", "tokens", "ended"))
    over = f" over {layout.dp_size} replicas" if layout.dp_size > 1 else ""
    say(
        f"{folder}: {responses:,} responses, {tokens:,} tokens in {seconds:,.0f} s, {tokens / seconds:,.0f} tokens/s"
        f"{over}; {100 * ended / responses:.0f} % ended by themselves"
    )


if __name__ == "__main__":
    sys.exit(main())
