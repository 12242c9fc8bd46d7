"""config.json -> Architecture: every family, every refusal, and the numbers that follow from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_amd.errors import InputError
from megatron_amd.models.architecture import Architecture, gelu_tanh, load_architecture
from tests.hf_models import MODELS, T5_MODELS, make_hf_model, save_hf_model

LLAMA: dict[str, Any] = MODELS["llama"]
QWEN2: dict[str, Any] = MODELS["qwen2"]
GPT2: dict[str, Any] = MODELS["gpt2"]
T5: dict[str, Any] = T5_MODELS["t5"]
YARN = "rope_scaling: type 'yarn' is not supported, only 'default' and 'llama3'"


def _without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}


@pytest.mark.parametrize("kind", list(MODELS))
def test_sizes_switches_and_parameter_count_are_those_of_transformers(kind: str) -> None:
    model = make_hf_model(kind)
    architecture = Architecture.from_hf(model.config.to_dict(), kind)
    assert architecture.count_parameters() == model.num_parameters()
    assert architecture == Architecture.from_hf(MODELS[kind], kind)  # defaults are transformers' own
    names = dict(model.named_parameters())
    assert architecture.tied == ("lm_head.weight" not in names)
    assert architecture.vocab_size == model.config.vocab_size
    assert architecture.num_layers == model.config.num_hidden_layers
    if architecture.position_embedding == "rope":
        assert architecture.rotary_base == model.config.rope_parameters["rope_theta"]
        assert architecture.qkv_bias == any("q_proj.bias" in name for name in names)
        assert architecture.attention_output_bias == any("o_proj.bias" in name for name in names)
        assert architecture.mlp_bias == any("up_proj.bias" in name for name in names)


def test_padded_rows_count_as_parameters() -> None:
    untied, tied = Architecture.from_hf(LLAMA, "a"), Architecture.from_hf(MODELS["llama-tied"], "b")
    assert untied.count_parameters(64) - untied.count_parameters() == 2 * 11 * 32
    assert tied.count_parameters(64) - tied.count_parameters() == 11 * 32


def test_a_large_model_counts_without_allocating() -> None:
    llama31_8b = {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    }  # fmt: skip
    assert Architecture.from_hf(llama31_8b, "8b").count_parameters() == 8_030_261_248


def test_gelu_tanh_is_the_gelu_new_of_gpt2() -> None:
    x = torch.linspace(-12, 12, 10_001)
    expected = transformers.activations.ACT2FN["gelu_new"](x)
    assert torch.allclose(gelu_tanh(x), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(torch.nn.functional.gelu(x), expected, rtol=0, atol=1e-4)


def test_rope_is_read_as_transformers_4_and_5_write_it() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    old = Architecture.from_hf(
        {**LLAMA, "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **scaling}}, "old"
    )
    new = Architecture.from_hf(
        {**LLAMA, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", **scaling}}, "new"
    )
    assert old == new
    assert new.rope_scaling == {"rope_type": "llama3", **scaling}
    assert new.gpt_model_fields()["rotary_base"] == 500000.0
    plain = Architecture.from_hf({**LLAMA, "rope_scaling": None, "rope_theta": 1e6}, "plain")
    assert plain.rope_scaling is None
    assert plain.rotary_base == 1e6


@pytest.mark.parametrize("kind", ["llama", "llama3-rope", "llama3-other-rope", "mistral", "qwen3"])
def test_frequencies_are_those_of_transformers(kind: str) -> None:
    model = make_hf_model(kind)
    found = Architecture.from_hf(MODELS[kind], kind).inverse_frequencies()
    assert torch.equal(found, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize(("low", "high", "original"), [(1, 4, 8192), (0.5, 2, 100), (3, 3.5, 4096)])
def test_any_llama3_scaling_is_that_of_transformers(base: float, low: float, high: float, original: int) -> None:
    scaling = {"factor": 32.0, "low_freq_factor": low, "high_freq_factor": high}
    scaling["original_max_position_embeddings"] = original
    settings = {**LLAMA, "head_dim": 128, "rope_parameters": {"rope_type": "llama3", "rope_theta": base, **scaling}}
    config = transformers.LlamaConfig(**settings)
    expected, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    assert torch.equal(Architecture.from_hf(settings, "llama").inverse_frequencies(), expected)


def test_the_original_length_beside_the_scaling_goes_first_as_in_transformers() -> None:
    settings = {**LLAMA, "head_dim": 128, "rope_parameters": MODELS["llama3-rope"]["rope_parameters"]}
    settings["original_max_position_embeddings"] = 100
    config = transformers.LlamaConfig(**json.loads(json.dumps(settings)))
    expected, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    assert torch.equal(Architecture.from_hf(settings, "llama").inverse_frequencies(), expected)
    del settings["original_max_position_embeddings"]
    assert not torch.equal(Architecture.from_hf(settings, "llama").inverse_frequencies(), expected)


def test_t5_scales_as_transformers_does() -> None:
    for said in ({}, {"tie_word_embeddings": None}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}):
        for scales in ({}, {"scale_decoder_outputs": True}, {"scale_decoder_outputs": False}):
            config = transformers.T5Config(**{**T5, **said, **scales})
            found = Architecture.from_hf({**T5, **said, **scales}, "t5").output_scale
            assert (found != 1) == config.scale_decoder_outputs, (said, scales)


def test_whether_a_t5_of_the_hub_has_its_own_head_does_not_depend_on_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is a folder here, from which the client's function copies what is asked for."""
    save_hf_model("mt5", tmp_path / "hub")  # config.json says tied, the weights say otherwise
    cache = tmp_path / "cache"
    cache.mkdir()

    def download(name: str, allow_patterns: list[str]) -> str:
        for pattern in allow_patterns:
            for file in (tmp_path / "hub").glob(pattern):
                shutil.copy(file, cache)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda _, name: f"{download(_, [name])}/{name}")
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("megatron_amd.models.model_files.check_hub_reachable", lambda *_: None)
    assert not load_architecture("somebody/mt5", None, "student").tied
    assert not load_architecture("somebody/mt5", None, "student").tied


def test_own_code_that_names_our_class_is_no_obstacle() -> None:
    config = {**LLAMA, "auto_map": {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM", "AutoConfig": "c.C"}}
    assert Architecture.from_hf(config, "llama") == Architecture.from_hf(LLAMA, "llama")


def test_a_window_that_no_sequence_reaches_is_no_window() -> None:
    mistral = {**LLAMA, "model_type": "mistral"}
    assert Architecture.from_hf({**mistral, "sliding_window": 64}, "a").max_position_embeddings == 64
    inactive = {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 2}
    assert Architecture.from_hf({**QWEN2, **inactive}, "b").family == "qwen2"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "model_type is missing; supported are llama, mistral, qwen2, qwen3, gpt2"),
        (
            {"model_type": "mamba"},
            "model_type 'mamba' is not supported; supported are llama, mistral, qwen2, qwen3, gpt2",
        ),
        ({**LLAMA, "quantization_config": {"bits": 4}}, "quantization_config: quantised weights are not supported"),
        ({**LLAMA, "num_local_experts": 8}, "num_local_experts: mixture-of-experts models are not supported"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor: only 1 is supported, not 0.5"),
        (
            {**LLAMA, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
            "rope_parameters.partial_rotary_factor: only 1 is supported",
        ),
        (
            {**LLAMA, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_scaling: type 'yarn' is not supported, only 'default' and 'llama3'",
        ),
        (
            {**LLAMA, "rope_parameters": {**MODELS["llama3-rope"]["rope_parameters"], "high_freq_factor": 1.0}},
            "rope_parameters: low_freq_factor must be less than high_freq_factor",
        ),
        (
            {**LLAMA, "rope_parameters": _without(MODELS["llama3-rope"]["rope_parameters"], "low_freq_factor")},
            "rope_parameters: low_freq_factor: must be a positive number, not null",
        ),
        (
            {**LLAMA, "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}},
            "auto_map: the model's own code (modeling_own.OwnForCausalLM) is not run; if it computes what Llama",
        ),
        (
            {**LLAMA, "rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters: different rotary embeddings per kind of layer are not supported",
        ),
        ({**LLAMA, "rope_scaling": "llama3"}, 'rope_scaling: must be a mapping, not "llama3"'),
        # Mistral's defaults where a key is missing: 8 key-value heads, a window of 4096.
        (_without({**LLAMA, "model_type": "mistral"}, "num_key_value_heads"), "num_key_value_heads 8"),
        ({**LLAMA, "model_type": "mistral", "max_position_embeddings": 8192}, "sliding_window: 4096 is not supported"),
        (
            {**LLAMA, "model_type": "mistral", "sliding_window": 32},
            "sliding_window: 32 is not supported; set it to null if no sequence is longer than that",
        ),
        (
            {**QWEN2, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
            "sliding_window: 16 is not supported",
        ),
        (
            {**QWEN2, "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types: 'sliding_attention' is not supported",
        ),
        ({**LLAMA, "hidden_act": "quick_gelu"}, 'hidden_act: "quick_gelu" is not supported, only silu'),
        ({**GPT2, "activation_function": "tanh"}, 'activation_function: "tanh" is not supported'),
        (
            {**LLAMA, "attention_bias": True},
            "attention_bias true with mlp_bias false is not supported; Megatron-Core needs both or neither",
        ),
        ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: only false is supported"),
        ({**GPT2, "scale_attn_weights": False}, "scale_attn_weights: only true is supported, not false"),
        ({**GPT2, "add_cross_attention": True}, "add_cross_attention: only false is supported"),
        ({**LLAMA, "num_key_value_heads": 3}, "num_attention_heads 4 must be a multiple of num_key_value_heads 3"),
        ({**LLAMA, "hidden_size": 30}, "hidden_size 30 must be a multiple of the 4 attention heads"),
        ({**LLAMA, "head_dim": 5}, "head_dim 5 must be even for rotary embeddings"),
        ({**LLAMA, "hidden_size": "32"}, 'hidden_size: must be a positive integer, not "32"'),
        ({**LLAMA, "vocab_size": None}, "vocab_size is missing"),
        ({**LLAMA, "num_hidden_layers": 0}, "num_hidden_layers: must be a positive integer, not 0"),
        ({**LLAMA, "rms_norm_eps": "tiny"}, 'rms_norm_eps: must be a positive number, not "tiny"'),
        ({**LLAMA, "rms_norm_eps": float("nan")}, "rms_norm_eps: must be a positive number, not NaN"),
        ({**LLAMA, "rope_theta": float("inf")}, "rope_theta: must be a positive number, not Infinity"),
        ({**LLAMA, "rope_theta": 10**400}, "rope_theta: must be a positive number, not 1000"),
        ({**LLAMA, "rope_scaling": {"type": "yarn", "factor": 4}, "rope_parameters": {"rope_type": "default"}}, YARN),
        ({**LLAMA, "layer_types": 5}, "layer_types: must be a list, not 5"),
        ({**LLAMA, "layer_types": ["full_attention"]}, "layer_types: names 1 layers, but num_hidden_layers is 4"),
        ({**LLAMA, "num_local_experts": "8"}, 'num_local_experts: must be a whole number from 0 on, not "8"'),
        ({**LLAMA, "num_experts": [8]}, "num_experts: must be a whole number from 0 on, not [8]"),
        ({**LLAMA, "hidden_act": ["silu"]}, 'hidden_act: ["silu"] is not supported, only silu'),
        ({**GPT2, "activation_function": {"a": 1}}, 'activation_function: {"a": 1} is not supported'),
        ({**LLAMA, "model_type": ["llama"]}, "model_type ['llama'] is not supported; supported are llama"),
        ({**LLAMA, "tie_word_embeddings": "false"}, 'tie_word_embeddings: must be true or false, not "false"'),
        ({**T5, "tie_word_embeddings": 1}, "tie_word_embeddings: must be true or false, not 1"),
        ({**T5, "scale_decoder_outputs": "no"}, 'scale_decoder_outputs: must be true or false, not "no"'),
        ({**LLAMA, "mlp_bias": "no"}, 'mlp_bias: must be true or false, not "no"'),
        ({**QWEN2, "use_sliding_window": "false"}, 'use_sliding_window: must be true or false, not "false"'),
        ({**QWEN2, "use_sliding_window": True, "max_window_layers": []}, "max_window_layers: must be a whole number"),
        ({**LLAMA, "model_type": "mistral", "sliding_window": "x"}, "sliding_window: must be a positive integer, not"),
        ({**LLAMA, "rope_interleaved": True}, "rope_interleaved: only false is supported, not true"),
        ({**QWEN2, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping: only null is supported, not 50.0"),
        ({**QWEN2, "final_logit_softcapping": 30.0}, "final_logit_softcapping: only null is supported, not 30.0"),
        ({**QWEN2, "logit_scale": 0.5}, "logit_scale: only 1 is supported, not 0.5"),
        ({**GPT2, "n_embd": 33}, "n_embd 33 must be a multiple of the 4 attention heads"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        Architecture.from_hf(config, "teacher.architecture")
    text = str(error.value)
    assert text.startswith("teacher.architecture: ")
    assert message in text
    assert "\n" not in text


def test_a_cut_model_keeps_everything_but_its_layers() -> None:
    config = {**QWEN2, "layer_types": ["full_attention"] * 4, "eos_token_id": 7}
    whole = Architecture.from_hf(config, "teacher")
    cut = whole.with_layers((0, 3, 3))
    assert cut.num_layers == 3
    assert cut.hf_config == {**config, "num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    assert whole.hf_config == config
    assert Architecture.from_hf(cut.hf_config, "cut") == cut
    assert Architecture.from_hf(GPT2, "gpt2").with_layers((1,)).hf_config["n_layer"] == 1
    assert json.loads(json.dumps(cut.sizes())) == {**whole.sizes(), "num_layers": 3}
    with pytest.raises(InputError, match=r"^student.init.layers: 4 is not one of the model's layers 0 to 3$"):
        whole.with_layers((0, 4), "student.init.layers")
    with pytest.raises(InputError, match="must name at least one layer"):
        whole.with_layers(())


@pytest.mark.parametrize(
    ("tensor", "pipeline", "message"),
    [
        (8, 1, "its 4 attention heads cannot be divided by parallel.tensor_model_parallel_size 8"),
        (4, 1, "its 2 key-value heads cannot be divided by parallel.tensor_model_parallel_size 4"),
        (1, 3, "its 4 layers cannot be divided by parallel.pipeline_model_parallel_size 3"),
    ],
)
def test_impossible_layouts(tensor: int, pipeline: int, message: str) -> None:
    architecture = Architecture.from_hf(LLAMA, "teacher")
    architecture.check_layout(2, 2, "teacher")
    with pytest.raises(InputError, match=f"^teacher: {message}$"):
        architecture.check_layout(tensor, pipeline, "teacher")
    odd = Architecture.from_hf({**LLAMA, "intermediate_size": 41}, "odd")
    with pytest.raises(InputError, match="^odd: its 41 MLP columns cannot be divided"):
        odd.check_layout(2, 1, "odd")


def test_load_from_a_folder_or_inline(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    assert load_architecture(str(tmp_path), None, "teacher") == load_architecture(None, GPT2, "teacher")


def test_errors_of_a_folder(tmp_path: Path) -> None:
    def error_of(path: str | None) -> str:
        with pytest.raises(InputError) as error:
            load_architecture(path, None, "teacher")
        assert "\n" not in str(error.value)
        return str(error.value)

    assert error_of(None) == "teacher: needs a path (a folder or hub name) or an architecture"
    assert error_of("/does/not/exist") == "teacher.path: there is no folder /does/not/exist"
    assert "has no config.json" in error_of(str(tmp_path))
    config = tmp_path / "config.json"
    config.write_text("{}")
    assert "is not a folder" in error_of(str(config))
    config.write_text('{"model_type": ')
    assert error_of(str(tmp_path)).startswith(f"{config}: is not valid JSON: ")
    config.write_bytes(b"\xff\xfe\x00")
    assert error_of(str(tmp_path)).startswith(f"{config}: is not valid JSON: ")
    config.write_text("[1]")
    assert error_of(str(tmp_path)) == f"{config}: must hold a JSON object, not list"
    config.write_text(json.dumps({"model_type": "bloom"}))
    assert error_of(str(tmp_path)).startswith(f"{config}: model_type 'bloom' is not supported")


def test_a_hub_name_without_a_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as error:
        load_architecture("nobody/no-such-model", None, "teacher")
    assert str(error.value).startswith("teacher.path: nobody/no-such-model cannot be read from the hub: ")
    assert "\n" not in str(error.value)
