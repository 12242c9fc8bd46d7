"""Write a Hugging Face model as a Megatron-Core checkpoint.

    python tools/convert_hf_to_mcore.py HuggingFaceTB/SmolLM2-135M-Instruct -o smollm2-mcore

megatron_amd itself reads Hugging Face folders and needs no conversion: this is for other programs on Megatron-Core. The
result is in its `torch_dist` format, under the key prefix of a GPTModel, and loads into any parallel layout with
`megatron.core.dist_checkpointing.load`. Exit status: 0, or 2 with one line about what is wrong.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from megatron_amd.config import Config, TrainingConfig
from megatron_amd.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder or hub name of a Hugging Face model")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the weights written")
    parser.add_argument("--pad-vocabulary-to", type=int, default=128, help="make its rows a multiple of this")
    options = parser.parse_args(arguments)
    try:
        convert(options.source, options.output, options.precision, options.pad_vocabulary_to)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.source} -> {options.output}")
    return 0


def convert(source: str, folder: Path, precision: Literal["bf16", "fp32"], multiple: int) -> None:
    """Write `source` to `folder`, which appears complete or not at all. Raises InputError."""
    from megatron_amd.checkpoint.hf import (
        load_hf_weights,
    )  # heavy imports wait until the arguments are known to be right
    from megatron_amd.distributed.initialize import initialize, shutdown
    from megatron_amd.models.architecture import load_architecture
    from megatron_amd.models.gpt import build_gpt, transformer_config

    # isort: split
    from megatron.core import dist_checkpointing

    if multiple < 1:
        raise InputError(f"--pad-vocabulary-to: must be at least 1, not {multiple}")
    if folder.exists():
        raise InputError(f"{folder}: exists already; choose another folder")
    architecture = load_architecture(source, None, "source")
    config = Config(training=TrainingConfig(precision=precision, transformer_impl="local"))
    partial = folder.with_name(f".{folder.name}.partial")
    layout = initialize(config)
    try:
        rows = -(-architecture.vocab_size // multiple) * multiple
        transformer = transformer_config(architecture, config.training, layout, {}, "source")
        model = build_gpt(architecture, transformer, layout, "local", rows)
        load_hf_weights(model, source, architecture, where="source")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        dist_checkpointing.save({"model": model.sharded_state_dict()}, str(partial))
        partial.rename(folder)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutdown()


if __name__ == "__main__":
    sys.exit(main())
