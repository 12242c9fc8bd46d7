"""Write a Hugging Face model as a Megatron-Core checkpoint.

    python tools/convert_hf_to_mcore.py HuggingFaceTB/SmolLM2-135M-Instruct smollm2-mcore
    python tools/convert_hf_to_mcore.py models/llama llama-mcore --dtype bf16 --verify

For other programs on Megatron-Core: megatron_amd itself reads Hugging Face folders. The result is in Megatron-Core's
torch_dist format, its tensors named as a GPTModel names them (a T5's as megatron_amd.models.t5 does), and loads into
any tensor- and pipeline-parallel layout. config.json, generation_config.json and the tokenizer's files lie beside it;
tools/convert_mcore_to_hf.py turns it back.

Runs as one process, without a GPU, and holds one parameter at a time. Exit status: 0; 2 with one line about what is
wrong; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_amd.errors import InputError
from megatron_amd.program import Parser, leave_at_sigterm, run_program, warn


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    return run_program(lambda: _run(_parse(arguments)), goes_on="from the beginning")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="convert_hf_to_mcore.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", help="folder or hub name of a Hugging Face model")
    parser.add_argument("output", type=Path, help="folder to write; an earlier conversion is replaced, nothing else")
    parser.add_argument(
        "--dtype",
        choices=("keep", "bf16", "fp16", "fp32"),
        default="keep",
        help="of the weights written (default: keep, each tensor's own)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="run the result in Megatron-Core and the source in transformers on a few texts, and print the largest "
        "difference of logits",
    )
    parser.add_argument(
        "--pad-vocabulary-to",
        type=int,
        default=128,
        metavar="N",
        help="make the rows of embedding and head a multiple of this, with zeros (default: 128)",
    )
    options = parser.parse_args(arguments)
    if options.pad_vocabulary_to < 1:
        raise InputError(f"--pad-vocabulary-to: must be at least 1, not {options.pad_vocabulary_to}")
    return options


def _run(options: argparse.Namespace) -> int:
    import torch  # heavy imports wait until the arguments are known to be right

    from megatron_amd.checkpoint.hf import hf_to_mcore
    from megatron_amd.data.tokenizer import TOKENIZER_FILES
    from megatron_amd.distributed.quiet import silence_known_warnings

    silence_known_warnings()
    dtypes = {"keep": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    architecture = hf_to_mcore(
        options.source,
        options.output,
        dtype=dtypes[options.dtype],
        vocabulary_multiple=options.pad_vocabulary_to,
    )
    print(f"{options.output}: {options.source} as a Megatron-Core checkpoint")
    if not any((options.output / name).is_file() for name in TOKENIZER_FILES):
        warn(f"{options.source} has no tokenizer files, so none lie beside the result")
    if options.verify:
        from megatron_amd.checkpoint.verify import compare

        print(compare(options.output, options.source, architecture))
    return 0


if __name__ == "__main__":
    leave_at_sigterm()
    sys.exit(main())
