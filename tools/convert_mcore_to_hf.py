"""Write the student of a run's checkpoint as a Hugging Face folder.

    python tools/convert_mcore_to_hf.py runs/demo                       # newest checkpoint -> runs/demo/student
    python tools/convert_mcore_to_hf.py runs/demo --step 40 -o my-model

One process, whatever layout the run had, on the CPU or a GPU that holds the student. Start it in the folder that the
run was started in, so that relative paths of its settings mean the same. Exit status: 0, or 2 with one line about what
is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_amd.config import Config, ParallelConfig, load_config
from megatron_amd.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's directory")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("-o", "--output", type=Path, help="folder to write (default: student in the run's directory)")
    options = parser.parse_args(arguments)
    try:
        folder = options.output or options.run / "student"
        checkpoint = convert(options.run, options.step, folder)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{checkpoint} -> {folder}")
    return 0


def convert(run: Path, step: int | None, folder: Path) -> Path:
    """Export the student of one checkpoint; returns the checkpoint's folder. Raises InputError."""
    from megatron_amd.checkpoint import store  # heavy imports wait until the arguments are known to be right
    from megatron_amd.checkpoint.hf import export_hf
    from megatron_amd.data import load_tokenizer
    from megatron_amd.distributed.initialize import initialize, shutdown
    from megatron_amd.models.roles import build_model, plan_models

    if not (run / "config.yaml").is_file():
        raise InputError(f"{run}: has no config.yaml; give the directory of a run")
    config = _for_conversion(load_config(run / "config.yaml"))
    checkpoint = store.latest(run / "checkpoints") if step is None else run / "checkpoints" / f"step-{step:08d}"
    if checkpoint is None or not checkpoint.is_dir():
        raise InputError(f"{run / 'checkpoints'}: has no checkpoint{'' if step is None else f' of step {step}'}")
    plan = plan_models(config, None)  # with the run's layout, on which the padding of the vocabulary depends
    source = config.data.tokenizer or config.teacher.path
    copy_tokenizer = load_tokenizer(source).save_files if source is not None else None
    config = replace(config, parallel=ParallelConfig())
    layout = initialize(config)
    try:
        student = build_model("student", config, plan, layout)
        store.load_weights(checkpoint, "student", student, layout)
        export_hf(student, folder, plan.student, layout, copy_tokenizer=copy_tokenizer)
    finally:
        shutdown()
    return checkpoint


def _for_conversion(config: Config) -> Config:
    """FP8 is a way to compute, which a conversion does not: its weights are kept in bf16."""
    precision = "bf16" if config.training.precision == "fp8" else config.training.precision
    return replace(config, training=replace(config.training, precision=precision, transformer_impl="local"))


if __name__ == "__main__":
    sys.exit(main())
