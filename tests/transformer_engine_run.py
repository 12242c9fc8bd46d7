"""Builds models as on a GPU with Transformer Engine, whose stand-in it uses, and prints as JSON what they are like.

python -m tests.transformer_engine_run LLAMA_FOLDER GPT2_FOLDER
"""

# ruff: noqa: E402
from tests import transformer_engine

transformer_engine.install()

import functools
import json
import sys
from typing import Any

import torch

from megatron_amd.batch import Prompts
from megatron_amd.checkpoint.hf import load_hf_weights
from megatron_amd.config import Config, TrainingConfig
from megatron_amd.distributed.initialize import initialize, shutdown
from megatron_amd.distributed.layout import Layout
from megatron_amd.models.architecture import load_architecture
from megatron_amd.models.gpt import CausalLM, build_gpt, transformer_config
from megatron_amd.models.layer_specs import block_spec
from megatron_amd.models.lean import lean_layers
from megatron_amd.rollout.generate import generate

# isort: split
from megatron.core.fp8_utils import get_fp8_recipe

FP32 = TrainingConfig(precision="fp32")


def build(folder: str, training: TrainingConfig, layout: Layout, implementation: Any) -> CausalLM:
    """A model with the folder's weights."""
    architecture = load_architecture(folder, None, "model")
    config = transformer_config(architecture, training, layout, {}, "model")
    model = build_gpt(architecture, config, layout, implementation, 128 * -(-architecture.vocab_size // 128))
    load_hf_weights(model, folder, architecture)
    return model.eval()


def describe_spec(folder: str, layout: Layout) -> dict[str, str]:
    """Place in a layer -> the class that it is built from."""
    config = transformer_config(load_architecture(folder, None, "model"), FP32, layout, {}, "model")
    block = block_spec(config, "transformer_engine", 0)
    layer = block.layer_specs[0].submodules
    attention = layer.self_attention.submodules
    mlp = layer.mlp.keywords["submodules"] if isinstance(layer.mlp, functools.partial) else layer.mlp.submodules
    return {
        "input_layernorm": name_of(layer.input_layernorm),
        "linear_qkv": name_of(attention.linear_qkv),
        "core_attention": name_of(attention.core_attention),
        "linear_proj": name_of(attention.linear_proj),
        "pre_mlp_layernorm": name_of(layer.pre_mlp_layernorm),
        "linear_fc1": name_of(mlp.linear_fc1),
        "linear_fc2": name_of(mlp.linear_fc2),
        "final_layernorm": name_of(block.layer_norm),
    }


def name_of(module: Any) -> str:
    return getattr(module, "module", module).__name__


def describe_recipes(folder: str, layout: Layout) -> dict[str, str]:
    """`training.fp8` -> Transformer Engine's recipe and format."""
    architecture = load_architecture(folder, None, "model")
    found = {}
    for fp8 in ({}, {"fp8": "e4m3", "fp8_recipe": "mxfp8"}, {"fp8_recipe": "blockwise"}):
        config = transformer_config(architecture, TrainingConfig(precision="fp8", fp8=fp8), layout, {}, "model")
        recipe = get_fp8_recipe(config)
        found[json.dumps(fp8)] = f"{type(recipe).__name__} {recipe.fp8_format.value}"
    return found


def compare_with_local(folder: str, layout: Layout) -> dict[str, Any]:
    """The same folder in both kinds of layers."""
    tokens = torch.arange(24).view(2, 12)
    local, engine = (build(folder, FP32, layout, name) for name in ("local", "transformer_engine"))
    with torch.no_grad():
        difference = float((local(tokens) - engine(tokens)).abs().max())
    return {
        "difference": difference,
        "classes": sorted({type(module).__name__ for module in engine.modules() if module._parameters}),
        "names": [name for name, _ in engine.named_parameters()],
    }


@torch.no_grad()
def roll_out_after_a_change(folder: str, layout: Layout) -> dict[str, Any]:
    """Greedy responses of one model before and after its weights change, and of a model that never had others."""
    training = TrainingConfig(precision="fp8")
    model, fresh = (build(folder, training, layout, "transformer_engine") for _ in range(2))
    before = respond(model, layout)
    for changed in (model, fresh):
        for name, parameter in changed.named_parameters():
            if "linear" in name and parameter.dim() == 2:
                parameter.mul_(-1.5)
    return {
        "before": before,
        "after": respond(model, layout),
        "fresh": respond(fresh, layout),
        "tokens": sorted(transformer_engine.FP8_TOKENS),
    }


def roll_out_without_fp8(folder: str, layout: Layout) -> dict[str, Any]:
    """Responses of both kinds of layers, and whether each goes the lean way in fp32 and in FP8."""
    local, engine = (build(folder, FP32, layout, name) for name in ("local", "transformer_engine"))
    fp8 = build(folder, TrainingConfig(precision="fp8"), layout, "transformer_engine")
    return {
        "local": respond(local, layout, 50, temperature=1.0),
        "engine": respond(engine, layout, 50, temperature=1.0),
        "lean": [lean_layers(model) is not None for model in (local, engine, fp8)],
    }


def respond(model: CausalLM, layout: Layout, vocab_size: int = 200, temperature: float = 0.0) -> list[list[int]]:
    prompts = Prompts(ids=(0, 1, 2), visits=(0, 0, 0), tokens=((5, 6, 7), (8, 9), (10, 11, 12, 13, 14)))
    rollouts = generate(
        model, prompts, layout=layout, vocab_size=vocab_size, eos_ids=(3,), seed=1, max_response_length=6,
        temperature=temperature,
    )  # fmt: skip
    return rollouts.responses()


if __name__ == "__main__":
    layout = initialize(Config())
    folder, other = sys.argv[1:]
    facts = {
        "spec": describe_spec(folder, layout),
        "recipes": describe_recipes(folder, layout),
        "model": compare_with_local(folder, layout),
        "rollouts": roll_out_after_a_change(folder, layout),
        "without fp8": [roll_out_without_fp8(each, layout) for each in (folder, other)],
    }
    shutdown()
    print(json.dumps(facts))
