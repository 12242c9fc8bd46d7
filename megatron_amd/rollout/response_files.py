"""Writing a model's responses to a data set into a folder (data/response_files.py), shard by shard.

Replicas share the shards and work apart. A response depends on its prompt, the model and its own noise, so who writes
a shard, and in which start, makes no difference.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_amd.batch import Prompts
from megatron_amd.checkpoint.folder import sync, write
from megatron_amd.checkpoint.store import differences
from megatron_amd.data import PromptDataset, Tokenizer
from megatron_amd.data.loader import deal
from megatron_amd.data.response_files import HEADER, SAMPLING, Header, read_header
from megatron_amd.data.tokenizer import stopping_rule
from megatron_amd.distributed.initialize import agreed, apart
from megatron_amd.distributed.layout import Layout
from megatron_amd.errors import InputError
from megatron_amd.rollout.generate import generate, has_ended


@dataclass
class Written:
    """What has been generated so far."""

    responses: int = 0
    tokens: int = 0
    ended: int = 0
    """Responses that an EOS or a stop string ended, rather than the length."""


def prepare_folder(folder: Path, header: Header, shard_size: int | None = None) -> tuple[Header, list[int]]:
    """Make the folder or go on in it. For one rank.

    Args:
        header: what is going to be written, with any size of shards.
        shard_size: asked for; unset: the folder's, or the header's.

    Returns:
        The header with its size of shards, and the shards to be written.

    Raises:
        InputError: the folder holds other things, or responses that came about otherwise, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in folder.iterdir()]
    except FileExistsError:
        raise InputError(f"{folder}: is no folder; choose another --output") from None
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another --output") from None
    header = replace(header, shard_size=shard_size or header.shard_size)
    if HEADER in names:
        there = read_header(folder)
        header = replace(header, shard_size=shard_size or there.shard_size)
        changes = differences(there.causes(), header.causes())
        if changes:
            shown = ", ".join(f"{name} {_short(old)} -> {_short(new)}" for name, old, new in changes[:3])
            raise InputError(
                f"{folder}: holds responses of other settings ({shown}); use those, or choose another --output"
            )
    else:
        if foreign := sorted(name for name in names if name != _partial(folder / HEADER).name):
            raise InputError(f"{folder}: holds {foreign[0]} and no {HEADER}; choose an empty folder for --output")
        _publish(folder / HEADER, header.to_json())
    return header, header.missing(folder)


def share_of(header: Header, shards: Sequence[int], prompt_lengths: Sequence[int], layout: Layout) -> list[int]:
    """This replica's shards, dealt by the tokens of their prompts and of their responses at their longest."""
    response = header.samples * header.sampling["max_response_length"]
    costs = [sum(prompt_lengths[position] + response for position in header.positions(shard)) for shard in shards]
    return [shards[place] for place in deal(costs, layout.dp_size)[layout.dp_rank]]


def write_responses(
    model: torch.nn.Module,
    dataset: PromptDataset,
    tokenizer: Tokenizer,
    header: Header,
    folder: Path,
    shards: Sequence[int],
    *,
    layout: Layout,
    vocab_size: int,
    report: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Written:
    """Generate and write this replica's shards. Collective over all ranks, which leave together.

    Args:
        shards: the same on all ranks of the replica.
        vocab_size: real entries of the vocabulary.
        report: told how many responses of the replica are complete, and their tokens.
        settings: go to `generate`, beside those of the header.

    Raises:
        InputError: rows cannot be read or shards not written, on any replica. The others then end what they are at.
    """
    done = Written()

    def report_all(responses: int, tokens: int) -> None:
        if report is not None:
            report(done.responses + responses, done.tokens + tokens)

    replica, is_complete = layout.groups.mp, stopping_rule(tokenizer, header.sampling["stop_strings"])
    with apart() as check_others:
        for shard in shards:
            with agreed(replica):
                check_others()
                positions = header.positions(shard)
                prompts = dataset.prompts(positions, [0] * len(positions))
            rollouts = generate(
                model,
                prompts,
                layout=layout,
                vocab_size=vocab_size,
                eos_ids=tokenizer.eos_ids,
                report=report_all,
                is_complete=is_complete,
                **{name: header.sampling[name] for name in SAMPLING},
                **settings,
            )
            assert rollouts.log_probs is not None
            responses, log_probs = rollouts.responses(), rollouts.log_probs.tolist()
            ended = [has_ended(response, tokenizer.eos_ids, is_complete) for response in responses]
            with agreed(replica):
                if replica.rank() == 0:
                    lines = _lines(prompts, header.samples, responses, log_probs, ended, tokenizer)
                    _publish(folder / header.file_name(shard), "".join(lines))
            done.responses += len(responses)
            done.tokens += sum(map(len, responses))
            done.ended += sum(ended)
    return done


def _lines(
    prompts: Prompts,
    samples: int,
    responses: Sequence[Sequence[int]],
    log_probs: Sequence[Sequence[float]],
    ended: Sequence[bool],
    tokenizer: Tokenizer,
) -> list[str]:
    """The lines of a shard. log_probs: of each response's tokens, and perhaps more behind them."""
    rows = prompts.repeat(samples)
    assert rows.texts is not None
    lines = []
    for number, response in enumerate(responses):
        line = {
            "row": rows.ids[number],
            "sample": number % samples,
            "prompt": rows.texts[number],
            "response": tokenizer.decode(response),
            "tokens": response,
            "log_probs": [round(value, 6) for value in log_probs[number][: len(response)]],
            "ended": ended[number],
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return lines


def _partial(file: Path) -> Path:
    return file.with_name(f".{file.name}.partial")


def _publish(file: Path, text: str) -> None:
    """Write a file that is complete from the moment it has its name. Raises InputError."""
    partial = _partial(file)
    try:
        write(partial, text.encode())
        partial.rename(file)
        sync(file.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(
            f"{file}: cannot be written ({error.strerror}); mend that, and the same command goes on with the shards "
            "that are missing"
        ) from None


def _short(value: Any) -> str:
    """A value for a message, hashes cut."""
    return f"{value[:8]}…" if isinstance(value, str) and len(value) > 16 else str(value)
