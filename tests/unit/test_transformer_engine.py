"""What would be built on a GPU with Transformer Engine and FP8, as far as a CPU can tell."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from typing import Any

import pytest
import torch

from megatron_amd.config import Config, DataConfig, ModelConfig, ParallelConfig, RolloutConfig, TrainingConfig
from megatron_amd.errors import InputError
from megatron_amd.models.architecture import Architecture
from megatron_amd.models.gpt import transformer_config
from megatron_amd.models.layer_specs import choose_implementation, fp8_multiple
from megatron_amd.models.roles import plan_models
from megatron_amd.rollout.passes import Generator, padded_count
from megatron_amd.rollout.pool import Pass
from megatron_amd.training.collect import padded_width
from tests.e2e.launch import ROOT, environment
from tests.hf_models import save_hf_model
from tests.tiny_run import save_model

SIZES = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
ONE_RANK = types.SimpleNamespace(tp_size=1, pp_size=1, sequence_parallel=False)


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/transformer_engine_run.py finds, in a process where Megatron-Core sees the stand-in."""
    folder, gpt2 = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("gpt2")
    save_model(folder, {**SIZES, "tie_word_embeddings": False}, vocab_size=200, seed=1)
    save_hf_model("gpt2", gpt2)
    done = subprocess.run(
        [sys.executable, "-m", "tests.transformer_engine_run", str(folder), str(gpt2)],
        cwd=ROOT, env=environment(folder), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_layers_are_transformer_engines_but_for_our_attention(facts: dict[str, Any]) -> None:
    assert facts["spec"] == {
        "input_layernorm": "IdentityOp",  # part of linear_qkv
        "linear_qkv": "TELayerNormColumnParallelLinear",
        "core_attention": "CoreAttention",
        "linear_proj": "TERowParallelLinear",
        "pre_mlp_layernorm": "IdentityOp",  # part of linear_fc1
        "linear_fc1": "TELayerNormColumnParallelLinear",
        "linear_fc2": "TERowParallelLinear",
        "final_layernorm": "TENorm",
    }


def test_fp8_settings_become_transformer_engines_recipe(facts: dict[str, Any]) -> None:
    assert {json.dumps(json.loads(key)): value for key, value in facts["recipes"].items()} == {
        "{}": "Float8CurrentScaling HYBRID",
        '{"fp8": "e4m3", "fp8_recipe": "mxfp8"}': "MXFP8BlockScaling E4M3",
        '{"fp8_recipe": "blockwise"}': "Float8BlockScaling HYBRID",
    }


def test_a_folder_fills_both_kinds_of_layers_alike(facts: dict[str, Any]) -> None:
    assert "TELayerNormColumnParallelLinear" in facts["model"]["classes"]
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in facts["model"]["names"]
    assert facts["model"]["difference"] < 1e-5


def test_rollouts_without_fp8_go_the_lean_way(facts: dict[str, Any]) -> None:
    """RMSNorm without biases, LayerNorm with them: Transformer Engine has both inside its linear layers."""
    for found in facts["without fp8"]:
        assert found["lean"] == [True, True, False]
        assert found["engine"] == found["local"]
        assert len({token for response in found["local"] for token in response}) > 3


def test_rollouts_after_a_step_use_the_new_weights(facts: dict[str, Any]) -> None:
    rollouts = facts["rollouts"]
    assert rollouts["after"] != rollouts["before"]
    assert rollouts["after"] == rollouts["fresh"]


def test_rollouts_in_fp8_have_token_counts_that_its_products_take(facts: dict[str, Any]) -> None:
    assert facts["rollouts"]["tokens"]
    assert all(count % 32 == 0 for count in facts["rollouts"]["tokens"])


def test_passes_in_fp8_are_filled_up() -> None:
    fp8, bf16 = (
        Generator(types.SimpleNamespace(config=types.SimpleNamespace(fp8=x)), 1.0, [], None, None)
        for x in ("e4m3", None)
    )
    coming = Pass([5] * 40, [], [], [], [])
    assert padded_count(fp8, 0, coming) == 64
    assert padded_count(bf16, 0, coming) == 40


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that says it has an H100, with Transformer Engine installed."""
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return monkeypatch


def test_transformer_engine_is_chosen_where_it_can_be_used(gpu: pytest.MonkeyPatch) -> None:
    assert choose_implementation("auto", "bf16") == "transformer_engine"
    assert choose_implementation("transformer_engine", "fp32") == "transformer_engine"
    assert choose_implementation("local", "bf16") == "local"
    assert choose_implementation("auto", "fp8") == "transformer_engine"


def test_fp8_needs_transformer_engine_and_a_recent_gpu(gpu: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="fp8 cannot be used: training.transformer_impl is local"):
        choose_implementation("local", "fp8")
    gpu.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert choose_implementation("auto", "bf16") == "transformer_engine"
    with pytest.raises(InputError, match=r"fp8 cannot be used: this GPU's compute capability is 8\.0"):
        choose_implementation("auto", "fp8")


def test_without_transformer_engine_a_gpu_has_local_layers(gpu: pytest.MonkeyPatch) -> None:
    gpu.setitem(sys.modules, "transformer_engine", None)  # importing it then fails
    gpu.delitem(sys.modules, "transformer_engine.pytorch")
    assert choose_implementation("auto", "bf16") == "local"
    with pytest.raises(InputError, match="transformer_engine cannot be used: it cannot be imported"):
        choose_implementation("transformer_engine", "bf16")
    with pytest.raises(InputError, match="fp8 cannot be used: it cannot be imported"):
        choose_implementation("auto", "fp8")


def test_without_a_gpu_layers_are_local(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_implementation("auto", "bf16") == "local"
    with pytest.raises(InputError, match="transformer_engine cannot be used: there is no GPU"):
        choose_implementation("transformer_engine", "bf16")


def made(training: TrainingConfig, **extra: Any) -> Any:
    architecture = Architecture.from_hf({**SIZES, "vocab_size": 200}, "model")
    return transformer_config(architecture, training, ONE_RANK, extra, "model")  # type: ignore[arg-type]


def test_fp8_fields_pass_through() -> None:
    config = made(TrainingConfig(precision="fp8", fp8={"fp8_recipe": "delayed", "fp8_amax_history_len": 16}))
    assert (config.fp8, config.fp8_recipe, config.fp8_amax_history_len) == ("hybrid", "delayed", 16)
    assert config.bf16
    assert config.params_dtype == torch.bfloat16
    assert not config.fp8_param
    assert made(TrainingConfig(precision="fp8"), fp8=None).fp8 is None  # one role may stay in bf16
    assert made(TrainingConfig(precision="bf16", fp8={"fp8_recipe": "delayed"})).fp8 is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fp8_format": "hybrid"}, "training.fp8.fp8_format: Megatron-Core's TransformerConfig has no such field"),
        ({"fp8_recipe": "tensor"}, "training.fp8.fp8_recipe: must be delayed or tensorwise or mxfp8 or"),
        ({"fp8": "e5m2"}, "training.fp8.fp8: must be e4m3 or hybrid, not e5m2"),
        ({"fp8_param": True}, "training.fp8.fp8_param: is not supported yet"),
        ({"fp8_recipe": "custom"}, "Megatron-Core refuses this model: .*fp8_quantizer_factory"),
        ({"hidden_size": 128}, "training.fp8.hidden_size: is decided by config.json"),
    ],
)
def test_wrong_fp8_fields_are_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        made(TrainingConfig(precision="fp8", fp8=fields))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("precision", "recipe", "multiple"),
    [("fp8", "tensorwise", 16), ("fp8", "delayed", 16), ("fp8", "mxfp8", 32), ("bf16", "mxfp8", 1)],
)
def test_sequences_are_padded_to_what_fp8_takes(precision: Any, recipe: str, multiple: int) -> None:
    training = TrainingConfig(precision=precision, fp8={"fp8_recipe": recipe})
    assert fp8_multiple(training) == multiple
    split = types.SimpleNamespace(tp_size=2, sequence_parallel=True)
    for width in (1, 31, 33, 64):
        padded = padded_width(width, Config(training=training), split)  # type: ignore[arg-type]
        assert width <= padded < width + 2 * multiple
        assert padded % (2 * multiple) == 0  # a multiple on each of the ranks that share the sequence


@pytest.mark.parametrize(
    ("sizes", "tensor", "recipe", "message"),
    [
        ({}, 1, "tensorwise", None),
        ({"hidden_size": 72}, 1, "tensorwise", "its 72 hidden size on one rank are not a multiple of 16"),
        ({"intermediate_size": 72}, 1, "tensorwise", "its 72 MLP columns on one rank"),
        ({"head_dim": 18}, 1, "tensorwise", "its 72 query columns on one rank"),
        ({"head_dim": 8}, 2, "tensorwise", None),
        ({"intermediate_size": 96}, 4, "tensorwise", "its 24 MLP columns on one rank"),
        ({"head_dim": 8, "num_key_value_heads": 4}, 2, "mxfp8", "its 16 query columns .* not a multiple of 32"),
    ],
)  # fmt: skip
def test_models_whose_sizes_fp8_cannot_take_are_refused(
    gpu: pytest.MonkeyPatch, sizes: dict[str, Any], tensor: int, recipe: str, message: str | None
) -> None:
    kv_heads = {"num_key_value_heads": 4} if tensor == 4 else {}
    model = ModelConfig(architecture={**SIZES, **kv_heads, **sizes, "vocab_size": 200})
    config = Config(
        student=model,
        teacher=model,
        parallel=ParallelConfig(tensor_model_parallel_size=tensor),
        training=TrainingConfig(precision="fp8", fp8={"fp8_recipe": recipe}),
        data=DataConfig(max_prompt_length=8),
        rollout=RolloutConfig(max_response_length=8),
    )
    if message is None:
        assert plan_models(config, None).implementation == "transformer_engine"
        return
    with pytest.raises(InputError, match=message):
        plan_models(config, None)
