"""Write a Megatron-Core checkpoint as a Hugging Face folder that `transformers` loads.

    python tools/convert_mcore_to_hf.py runs/mine student-hf                                  # the newest checkpoint
    python tools/convert_mcore_to_hf.py runs/mine/checkpoints/step-00000100 student-step-100 --verify
    python tools/convert_mcore_to_hf.py smollm2-mcore smollm2-hf --dtype bf16

The source is a run of megatron_amd.train, of which the student is written, or one of its checkpoints, or a folder that
tools/convert_hf_to_mcore.py wrote. A run's student and tokenizer folders must still be where its settings say: their
config.json and tokenizer files are read again. No code that a checkpoint may name is run.

Runs as one process, without a GPU, whatever the layout that wrote the checkpoint, and holds one parameter at a time.
Exit status: 0; 2 with one line about what is wrong; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_amd.config import Config, load_config
from megatron_amd.errors import InputError
from megatron_amd.program import Parser, leave_at_sigterm, run_program

if TYPE_CHECKING:
    from megatron_amd.models.architecture import Architecture


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    return run_program(lambda: _run(_parse(arguments)), goes_on="from the beginning")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="convert_mcore_to_hf.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "source", type=Path, help="run directory, one of its checkpoints, or a converted model's folder"
    )
    parser.add_argument("output", type=Path, help="folder to write; an earlier export is replaced, nothing else")
    parser.add_argument(
        "--dtype",
        choices=("keep", "bf16", "fp16", "fp32"),
        default="keep",
        help="of the weights written (default: keep, each tensor's own)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="run the source in Megatron-Core and the result in transformers on a few texts, and print the largest "
        "difference of logits",
    )
    parser.add_argument(
        "--shard-gib", type=float, default=4.0, metavar="N", help="largest size of a file of weights (default: 4)"
    )
    options = parser.parse_args(arguments)
    if not options.shard_gib > 0:
        raise InputError(f"--shard-gib: must be positive, not {options.shard_gib}")
    return options


def _run(options: argparse.Namespace) -> int:
    import torch  # heavy imports wait until the arguments are known to be right

    from megatron_amd.checkpoint.hf import mcore_to_hf
    from megatron_amd.checkpoint.hf_files import MCORE_MARKS
    from megatron_amd.distributed.quiet import silence_known_warnings

    silence_known_warnings()
    is_converted = all((options.source / mark).is_file() for mark in MCORE_MARKS)
    checkpoint, architecture, copy_others = (_converted if is_converted else _student)(options.source)
    dtypes = {"keep": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    mcore_to_hf(
        checkpoint,
        options.output,
        architecture,
        copy_others,
        dtype=dtypes[options.dtype],
        max_shard_bytes=int(options.shard_gib * 2**30),
    )
    print(f"{options.output}: {'the model' if is_converted else 'the student'} of {checkpoint}")
    if options.verify:
        from megatron_amd.checkpoint.verify import compare

        print(compare(checkpoint, str(options.output), architecture))
    return 0


def _converted(source: Path) -> tuple[Path, Architecture, Callable[[Path], None]]:
    """Of a folder that convert_hf_to_mcore.py wrote: itself, its model, and what copies the files beside it."""
    from megatron_amd.checkpoint.hf_files import copy_carried
    from megatron_amd.models.architecture import folder_architecture

    return source, folder_architecture(str(source), "source"), functools.partial(copy_carried, source)


def _student(source: Path) -> tuple[Path, Architecture, Callable[[Path], None]]:
    """The same of a run or one of its checkpoints. Raises InputError where there is none or it is damaged."""
    from megatron_amd.checkpoint import store
    from megatron_amd.data import load_tokenizer
    from megatron_amd.models.roles import role_architecture

    checkpoint = find_checkpoint(source)
    config = settings_of(store.read_state(checkpoint), checkpoint)
    tokenizer_source = config.data.tokenizer or config.teacher.path
    tokenizer = load_tokenizer(tokenizer_source) if tokenizer_source else None
    store.check_role(checkpoint, "student")
    copy_others = tokenizer.save_files if tokenizer else lambda folder: None
    return checkpoint / "student", role_architecture(config.student, "student"), copy_others


def find_checkpoint(source: Path) -> Path:
    """`source` itself, or the newest checkpoint of the run directory `source`."""
    from megatron_amd.checkpoint import store

    if (source / store.STATE_FILE).is_file():
        return source
    if not source.is_dir():
        raise InputError(f"source: there is no folder {source}")
    newest = store.latest(source / "checkpoints")
    if newest is None and (source / ".metadata").is_file():
        raise InputError(
            f"{source}: has no config.json or metadata.json beside its .metadata; give a folder as "
            "convert_hf_to_mcore.py wrote it"
        )
    if newest is None and (source / "config.json").is_file():
        raise InputError(f"{source}: is a Hugging Face folder already; tools/convert_hf_to_mcore.py is the other way")
    if newest is None:
        raise InputError(
            f"{source}: is neither a checkpoint nor a run directory with one, nor a folder that convert_hf_to_mcore.py "
            "wrote; give run.directory"
        )
    return newest


def settings_of(state: dict[str, Any], checkpoint: Path) -> Config:
    """The settings of the run that wrote a checkpoint."""
    if "config" not in state:
        raise InputError(f"{checkpoint}: holds no settings; it was not written by megatron_amd.train")
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        json.dump(state["config"], file)  # JSON is YAML
        file.flush()
        return load_config(file.name)


if __name__ == "__main__":
    leave_at_sigterm()
    sys.exit(main())
