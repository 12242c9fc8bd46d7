"""A model's identity, found in seconds whatever its size."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from megatron_amd.checkpoint.hf_files import WeightFiles
from megatron_amd.config import ModelConfig
from megatron_amd.errors import InputError
from megatron_amd.models.roles import role_architecture
from megatron_amd.training.first_weights import has_pretrained_weights

_PIECE = 64 * 1024
"""Bytes of a sample."""
_ONLY_SPEED = ("recompute", "fusion", "overlap", "offload", "deallocate")
"""In the names of settings of `transformer` that change no number beyond its rounding."""
_PIECES = 16
"""Samples of a file, evenly spaced from its beginning to its end."""


def model_hash(settings: ModelConfig, role: str, seed: int) -> str:
    """Hash of the model that a role's settings describe and of where its first weights come from.

    Of safetensors: the size of each file, its head (names, types and shapes of its tensors) and samples of its bytes.
    A change of all weights, as training makes, is seen; one of a few numbers may not be. The files' names and place do
    not matter. Of random weights: the seed and the role. Of `transformer`: what changes the arithmetic.

    Raises:
        InputError: the model's files are missing or cannot be read.
    """
    digest = hashlib.sha256()
    architecture = dataclasses.asdict(role_architecture(settings, role))
    computed = {name: value for name, value in settings.transformer.items() if not any(w in name for w in _ONLY_SPEED)}
    digest.update(json.dumps([architecture, settings.init.layers, computed], sort_keys=True, default=str).encode())
    if not has_pretrained_weights(settings):
        digest.update(f"{seed}:{role}".encode())
        return digest.hexdigest()
    with WeightFiles(str(settings.path), f"{role}.path") as weights:
        files = weights.files()
    # Sorted by what is hashed, so that a file's name counts for nothing.
    digest.update(b"".join(sorted(_file_hash(file) for file in files)))
    return digest.hexdigest()


def _file_hash(file: Path) -> bytes:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            # https://huggingface.co/docs/safetensors: the head's length in 8 bytes, the head, the tensors.
            head = int.from_bytes(stream.read(8), "little")
            digest.update(f"{size} {head} ".encode())
            digest.update(stream.read(head))
            for piece in range(_PIECES):
                stream.seek(max(0, size - _PIECE) * piece // (_PIECES - 1))
                digest.update(stream.read(_PIECE))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    return digest.digest()
