"""Write the student of a run's checkpoint as a Hugging Face folder that `transformers` loads.

    python tools/convert_mcore_to_hf.py runs/demo student-hf                                  # the newest checkpoint
    python tools/convert_mcore_to_hf.py runs/demo/checkpoints/step-00000100 student-step-100

Runs as one process, without torchrun and without a GPU, whatever the layout of the run. The run's student and tokenizer
folders must still be where its settings say: their config.json and tokenizer files are read again. A checkpoint is
trusted when it is loaded: convert only your own. Exit status: 0, or 2 with one line about what is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_amd.checkpoint import store
from megatron_amd.checkpoint.hf import export_hf
from megatron_amd.config import Config, CriticConfig, ParallelConfig, load_config
from megatron_amd.data import load_tokenizer
from megatron_amd.distributed.initialize import initialize, shutdown
from megatron_amd.distributed.quiet import silence_known_warnings
from megatron_amd.errors import InputError
from megatron_amd.models.roles import build_model, plan_models


def convert(source: Path, output: Path) -> Path:
    """Export the student of `source`, a run directory or one of its checkpoints; returns the checkpoint used.

    Raises:
        InputError: no or a damaged checkpoint, missing folders of the run, or `output` cannot be written.
    """
    silence_known_warnings()
    checkpoint = find_checkpoint(source)
    config = settings_of(store.read_state(checkpoint), checkpoint)
    tokenizer_source = config.data.tokenizer or config.teacher.path
    tokenizer = load_tokenizer(tokenizer_source) if tokenizer_source else None
    # One rank and the student alone. FP8 is arithmetic: the weights are kept in bf16.
    training = replace(
        config.training,
        transformer_impl="local",
        precision="bf16" if config.training.precision == "fp8" else config.training.precision,
    )
    config = replace(
        config, training=training, parallel=ParallelConfig(), teacher=config.student, critic=CriticConfig()
    )
    plan = plan_models(config, None)
    try:
        layout = initialize(config)
        model = build_model("student", config, plan, layout)
        store.load_weights(checkpoint, "student", model, layout)
        export_hf(model, output, plan.student, layout, copy_tokenizer=tokenizer.save_files if tokenizer else None)
    finally:
        shutdown()
    return checkpoint


def find_checkpoint(source: Path) -> Path:
    """`source` itself, or the newest checkpoint of the run directory `source`."""
    if (source / store.STATE_FILE).is_file():
        return source
    newest = store.latest(source / "checkpoints")
    if newest is None:
        raise InputError(f"{source}: is neither a checkpoint nor a run directory with one; give runs/NAME")
    return newest


def settings_of(state: dict[str, Any], checkpoint: Path) -> Config:
    """The settings of the run that wrote a checkpoint."""
    if "config" not in state:
        raise InputError(f"{checkpoint}: holds no settings; it was not written by megatron_amd.train")
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        json.dump(state["config"], file)  # JSON is YAML
        file.flush()
        return load_config(file.name)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", type=Path, help="run directory, or one of its checkpoints/step-XXXXXXXX")
    parser.add_argument("output", type=Path, help="Hugging Face folder to write; an earlier export is replaced")
    options = parser.parse_args(arguments)
    try:
        checkpoint = convert(options.source, options.output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: the student of {checkpoint}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
