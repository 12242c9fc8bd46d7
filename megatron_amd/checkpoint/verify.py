"""Whether a Megatron-Core checkpoint and a Hugging Face folder compute the same: both models run on a few texts."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_amd.config import Config, TrainingConfig
from megatron_amd.data.tokenizer import TOKENIZER_FILES, load_tokenizer
from megatron_amd.distributed.initialize import initialize, shutdown
from megatron_amd.errors import InputError, first_line
from megatron_amd.models.architecture import Architecture
from megatron_amd.models.gpt import transformer_config
from megatron_amd.models.roles import VOCABULARY_MULTIPLE, build_language_model
from megatron_amd.models.t5 import EncoderDecoderLM

# isort: split
from megatron.core import dist_checkpointing

TOLERANCE = 1e-4
"""Largest difference of two logits, as a share of the largest logit, that rounding in fp32 makes of one model."""

_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Question: What is 17 * 24? Answer: 17 * 24 = 17 * 20 + 17 * 4 = 340 + 68 = 408.",
    "def mean(values):\n    return sum(values) / len(values)\n",
)
_LONGEST = 64


class Comparison(NamedTuple):
    """What the two models' logits say of each other."""

    difference: float
    """Largest absolute difference of two logits."""
    largest: float
    """Largest absolute logit of `transformers`."""
    tokens: int
    """Positions compared, each over the whole vocabulary."""

    def __str__(self) -> str:
        return (
            f"verified: logits differ from those of transformers by at most {self.difference:.2g}, where the largest "
            f"is {self.largest:.3g} ({self.tokens} tokens, fp32)"
        )


def compare(checkpoint: Path, folder: str, architecture: Architecture) -> Comparison:
    """Run Megatron-Core's model and that of `transformers`, one after the other, in fp32.

    Args:
        checkpoint: folder in `torch_dist` format; Megatron-Core itself loads it. Trust: that unpickles its list of
            tensors, so an unknown one must have gone through `MegatronWeights`, as in a conversion.
        folder: Hugging Face folder or hub name.

    Raises:
        InputError: a folder cannot be loaded, or the logits differ by more than TOLERANCE.
    """
    rows = _token_rows(folder, architecture)
    expected = _logits_of_transformers(folder, rows, with_encoder=architecture.has_encoder)
    found = _logits_of_megatron(checkpoint, architecture, rows)
    pairs = list(zip(found, expected, strict=True))
    difference = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
    largest = max(theirs.abs().max().item() for theirs in expected)
    if not difference <= TOLERANCE * largest:  # nor NaN
        raise InputError(
            f"{checkpoint}: differs from {folder}: logits by up to {difference:.3g}, where the largest is "
            f"{largest:.3g}; do not use the conversion, and report this"
        )
    return Comparison(difference, largest, sum(map(len, rows)))


def _token_rows(folder: str, architecture: Architecture) -> list[list[int]]:
    longest = min(_LONGEST, architecture.max_position_embeddings)
    path = Path(folder).expanduser()
    if path.is_dir() and not any((path / name).is_file() for name in TOKENIZER_FILES):
        noise = torch.Generator().manual_seed(0)
        return torch.randint(architecture.vocab_size, (len(_TEXTS), longest), generator=noise).tolist()
    tokenizer = load_tokenizer(folder)
    return [tokenizer.encode(text)[:longest] for text in _TEXTS]


@torch.no_grad()
def _logits_of_transformers(folder: str, rows: list[list[int]], *, with_encoder: bool) -> list[Tensor]:
    """[length, V] of each row."""
    import transformers  # here because it takes seconds to import

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        classes = transformers.AutoModelForSeq2SeqLM if with_encoder else transformers.AutoModelForCausalLM
        model = classes.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    except Exception as error:  # its exceptions differ between versions and families
        raise InputError(f"{folder}: transformers cannot load it: {first_line(error)}") from error
    if with_encoder:  # the decoder is given what the encoder reads
        return [model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).logits[0] for row in rows]
    return [model(input_ids=torch.tensor([row])).logits[0] for row in rows]


@torch.no_grad()
def _logits_of_megatron(checkpoint: Path, architecture: Architecture, rows: list[list[int]]) -> list[Tensor]:
    config = Config(training=TrainingConfig(precision="fp32", transformer_impl="local"))
    layout = initialize(config)
    try:
        padded = -(-architecture.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        transformer = transformer_config(architecture, config.training, layout, {}, "model")
        model = build_language_model(architecture, transformer, layout, "local", padded).eval()
        # Megatron-Core warns of the vocabulary's padding, which may be another
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            loaded = dist_checkpointing.load(
                {"model": model.sharded_state_dict()}, str(checkpoint), validate_access_integrity=False
            )
        model.load_state_dict(loaded["model"])
        head = model.head_weight()[: architecture.vocab_size]
        if isinstance(model, EncoderDecoderLM):
            inputs = [torch.tensor([[*row, model.decoder_start_id, *row[:-1]]], device=layout.device) for row in rows]
            lengths = [torch.tensor([len(row)], device=layout.device) for row in rows]
            states = [model(*both, len(row)) for *both, row in zip(inputs, lengths, rows, strict=True)]
        else:
            states = [model(torch.tensor([row], device=layout.device)) for row in rows]
        return [(hidden[:, 0] @ head.t()).cpu() for hidden in states]
    finally:
        shutdown()
