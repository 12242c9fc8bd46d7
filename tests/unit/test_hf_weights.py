"""Reading a folder's safetensors: slices, prefixes, shards, and one line for each thing that can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_amd.checkpoint.hf import read_head
from megatron_amd.checkpoint.hf_files import WeightFiles
from megatron_amd.checkpoint.hf_tensors import model_weights, stage_parameters
from megatron_amd.errors import InputError
from megatron_amd.models.architecture import Architecture
from tests.hf_models import MODELS, make_hf_model, save_hf_model

LLAMA = Architecture.from_hf(MODELS["llama"], "llama")


def head(folder: Path, architecture: Architecture = LLAMA, tp_rank: int = 0, tp_size: int = 1) -> torch.Tensor:
    return read_head(folder, architecture, tp_rank=tp_rank, tp_size=tp_size, padded_vocab_size=64, where="teacher.path")


@pytest.mark.parametrize("kind", list(MODELS))
def test_the_description_names_exactly_the_tensors_of_the_family(kind: str) -> None:
    described: dict[str, tuple[int, ...]] = {}
    for weight in model_weights(Architecture.from_hf(MODELS[kind], kind)).values():
        described.update(weight.tensor_shapes())
    assert described == {name: tuple(tensor.shape) for name, tensor in make_hf_model(kind).named_parameters()}


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
def test_head_shards_make_the_whole_head(tmp_path: Path, kind: str) -> None:
    model = save_hf_model(kind, tmp_path)
    architecture = Architecture.from_hf(MODELS[kind], kind)
    expected = torch.nn.functional.pad(model.get_output_embeddings().weight.detach(), (0, 0, 0, 11))
    for size in (1, 2, 8):  # of 8 shards the last holds padding alone
        shards = [head(tmp_path, architecture, rank, size) for rank in range(size)]
        assert torch.equal(torch.cat(shards), expected)


def test_a_folder_in_several_files_reads_as_one_file(tmp_path: Path) -> None:
    save_hf_model("llama", tmp_path / "one")
    save_hf_model("llama", tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    with WeightFiles(tmp_path / "one", "a") as one, WeightFiles(tmp_path / "many", "b") as many:
        for weight in model_weights(LLAMA).values():
            for name, shape in weight.tensor_shapes().items():
                whole = tuple(slice(None) for _ in shape)
                assert torch.equal(one.read(name, shape, whole), many.read(name, shape, whole))


def test_names_without_the_first_part_are_found(tmp_path: Path) -> None:
    model = make_hf_model("gpt2")
    save_file(
        {name.removeprefix("transformer."): p.detach() for name, p in model.named_parameters()},
        tmp_path / "model.safetensors",
    )
    architecture = Architecture.from_hf(MODELS["gpt2"], "gpt2")
    assert torch.equal(head(tmp_path, architecture)[:53], model.transformer.wte.weight)


def test_norms_that_transformer_engine_fuses_are_known_by_their_plain_names() -> None:
    class Layer(torch.nn.Module):
        """The names of a layer built from Transformer Engine's spec, on the second of two stages."""

        def __init__(self, layer_number: int) -> None:
            super().__init__()
            self.layer_number = layer_number
            self.self_attention, self.mlp = torch.nn.Module(), torch.nn.Module()
            for owner, name in ((self.self_attention, "linear_qkv"), (self.mlp, "linear_fc1")):
                linear = torch.nn.Linear(2, 2, bias=False)
                linear.layer_norm_weight = torch.nn.Parameter(torch.ones(2))
                linear.layer_norm_bias = torch.nn.Parameter(torch.zeros(2))
                setattr(owner, name, linear)

    stage = torch.nn.Module()
    stage.decoder = torch.nn.Module()
    stage.decoder.layers = torch.nn.ModuleList([Layer(3), Layer(4)])
    wrapped = torch.nn.Module()
    wrapped.module = stage
    names = (
        "self_attention.linear_qkv.weight", "input_layernorm.weight", "input_layernorm.bias",
        "mlp.linear_fc1.weight", "pre_mlp_layernorm.weight", "pre_mlp_layernorm.bias",
    )  # fmt: skip
    parameters = stage_parameters(wrapped)
    assert set(parameters) == {f"decoder.layers.{layer}.{name}" for layer in (2, 3) for name in names}
    fused = stage.decoder.layers[1].mlp.linear_fc1.layer_norm_bias
    assert parameters["decoder.layers.3.pre_mlp_layernorm.bias"] is fused


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def cut_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>" * 10)


def only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def only_gguf(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-Q4_1.gguf")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def absent_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def bad_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")


def index_that_lies(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": {"lm_head.weight": "a.safetensors"}}
    save_file({"other": torch.zeros(2)}, folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_with_too_much(folder: Path) -> None:
    index_that_lies(folder)
    index = {"weight_map": {"other": "a.safetensors", "more": "a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def absent_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")


def missing_tensor(folder: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(32)}, folder / "model.safetensors")


def wrong_shape(folder: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(53, 16)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "model.safetensors: is truncated or corrupt ("),
        (cut_header, "model.safetensors: is truncated or corrupt (50 bytes; "),
        (empty, "model.safetensors: is truncated or corrupt (0 bytes; "),
        (garbage, "model.safetensors: is truncated or corrupt (220 bytes; "),
        (only_bin, " has no model.safetensors, only PyTorch .bin files; load it with transformers and save it with"),
        (only_gguf, " has no model.safetensors, only GGUF files; load it with transformers"),
        (no_weights, " has no model.safetensors; give the folder of a Hugging Face model with its weights"),
        (absent_shard, "index.json: names model-00001-of-00002.safetensors, which is not in the folder"),
        (bad_index, "index.json: has no weight_map"),
        (
            index_that_lies,
            "a.safetensors: holds other, but model.safetensors.index.json does not say so; download or copy",
        ),
        (
            index_with_too_much,
            "index.json: says that more is in a.safetensors, which does not hold it; copy both again",
        ),
        (absent_index, " has no model.safetensors and no model.safetensors.index.json for its shards; download"),
        (missing_tensor, ": its weights have no tensor lm_head.weight; they are incomplete or not of this config"),
        (wrong_shape, ": tensor lm_head.weight has shape [53, 16], but config.json makes it [53, 32]"),
    ],
)
def test_damaged_folders(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    save_hf_model("llama", tmp_path)
    head(tmp_path)  # whole, it reads
    damage(tmp_path)
    with pytest.raises(InputError) as error:
        head(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^teacher.path: there is no folder /"):
        head(tmp_path / "nowhere")
