"""Weights from and to Hugging Face folders under tensor and pipeline parallelism."""

from __future__ import annotations

import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import save_file
from torch import Tensor

from megatron_amd.checkpoint.hf import check_hf_weights, export_hf, load_hf_weights, read_head
from megatron_amd.config import ParallelConfig
from megatron_amd.distributed.layout import Layout
from megatron_amd.errors import InputError
from megatron_amd.models.architecture import load_architecture
from megatron_amd.models.critic import CausalCritic
from megatron_amd.models.gpt import CausalLM, build_gpt
from tests.distributed.runner import run_distributed
from tests.hf_models import (
    MODELS,
    PADDED_VOCAB,
    build_megatron,
    hf_logits,
    random_tokens,
    save_hf_model,
    state_dict,
)

pytestmark = pytest.mark.distributed


@torch.no_grad()
def megatron_logits(model: CausalLM, layout: Layout, tokens: Tensor, vocab_size: int) -> Tensor | None:
    """[rows, length, V] logits of the whole model, on the last stage: hidden states through the stages by hand."""
    if not layout.is_first_stage:
        received = torch.empty(tokens.shape[1], tokens.shape[0], model.config.hidden_size)
        dist.recv(received, src=dist.get_global_rank(layout.groups.pp, layout.pp_rank - 1), group=layout.groups.pp)
        model.set_input_tensor(received)
    hidden = model(tokens)
    if not layout.is_last_stage:
        dist.send(hidden, dst=dist.get_global_rank(layout.groups.pp, layout.pp_rank + 1), group=layout.groups.pp)
        return None
    local = hidden @ model.head_weight().t()
    shards = [torch.empty_like(local) for _ in range(layout.tp_size)]
    dist.all_gather(shards, local.contiguous(), group=layout.groups.tp)
    return torch.cat(shards, dim=-1)[..., :vocab_size].transpose(0, 1)


def load_and_export(folders: dict[str, Path], exported: Path, tensor: int, pipeline: int) -> dict[str, float]:
    """On every rank: for each folder, load it, compare logits, export it. Largest differences on the last stage."""
    parallel = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    tokens, worst, layout = random_tokens(), {}, None
    for kind, folder in folders.items():
        model, architecture, layout = build_megatron(folder, parallel, layout=layout)
        load_hf_weights(model, folder, architecture)
        logits = megatron_logits(model, layout, tokens, architecture.vocab_size)
        if logits is not None:
            expected = torch.load(folder / "logits.pt")
            assert expected.abs().max() > 0.5
            worst[kind] = (logits - expected).abs().max().item()
            head = read_head(
                folder, architecture, tp_rank=layout.tp_rank, tp_size=tensor, padded_vocab_size=PADDED_VOCAB
            )
            assert torch.equal(head, model.head_weight())
            assert not head[max(0, architecture.vocab_size - layout.tp_rank * head.shape[0]) :].any()
        export_hf(model, exported / kind, architecture, layout)
    return worst


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for kind in MODELS:
        model = save_hf_model(kind, root / kind)
        torch.save(hf_logits(model, random_tokens()), root / kind / "logits.pt")
    return {kind: root / kind for kind in MODELS}


@pytest.mark.parametrize(("tensor", "pipeline", "world"), [(1, 1, 1), (2, 1, 2), (1, 2, 2), (2, 2, 4), (2, 1, 4)])
def test_logits_equal_transformers_and_the_round_trip_is_bit_exact(
    folders: dict[str, Path], tmp_path: Path, tensor: int, pipeline: int, world: int
) -> None:
    results = run_distributed(load_and_export, world, folders, tmp_path, tensor, pipeline)
    compared = [worst for worst in results if worst]
    assert len(compared) == world // pipeline
    for worst in compared:
        assert set(worst) == set(folders)
        assert max(worst.values()) < 1e-4, worst
    for kind, folder in folders.items():
        before, after = state_dict(folder), state_dict(tmp_path / kind)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), kind


def test_exported_folder_loads_in_transformers(folders: dict[str, Path], tmp_path: Path) -> None:
    run_distributed(load_and_export, 2, folders, tmp_path, 1, 2)
    for kind in MODELS:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        assert model.dtype == torch.float32
        assert torch.equal(hf_logits(model, random_tokens()), torch.load(folders[kind] / "logits.pt")), kind


def load_critic(folder: Path) -> None:
    lm, architecture, layout = build_megatron(folder, ParallelConfig())
    load_hf_weights(lm, folder, architecture)
    untied = replace(architecture, tied=False)
    critic = build_gpt(untied, lm.config, layout, "local", PADDED_VOCAB, model_class=CausalCritic)
    load_hf_weights(critic, folder, architecture)
    assert isinstance(critic, CausalCritic)
    for on_policy in (False, True):
        assert torch.equal(critic.head_weights(on_policy)["own"], lm.head_weight())
    assert torch.equal(critic(random_tokens()), lm(random_tokens()))


def test_a_critic_starts_as_the_tied_model_with_two_heads(folders: dict[str, Path]) -> None:
    run_distributed(load_critic, 1, folders["qwen2-tied"])


def cut(folder: Path, exported: Path, layers: tuple[int, ...]) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    model, architecture, layout = build_megatron(folder, parallel, layers=layers, precision="bf16")
    load_hf_weights(model, folder, architecture, layers=layers)
    export_hf(model, exported, architecture, layout, max_shard_bytes=10_000)


def test_a_cut_bf16_model_keeps_the_chosen_layers(tmp_path: Path) -> None:
    source, exported = tmp_path / "source", tmp_path / "exported"
    save_hf_model("qwen2-tied", source, dtype=torch.bfloat16)
    run_distributed(cut, 4, source, exported, (3, 1))
    assert len(list(exported.glob("*.safetensors"))) > 1
    before, after = state_dict(source), state_dict(exported)
    for new, old in enumerate((3, 1)):
        names = [name for name in before if name.startswith(f"model.layers.{old}.")]
        assert len(names) == 12
        for name in names:
            assert torch.equal(before[name], after[name.replace(f"layers.{old}.", f"layers.{new}.")]), name
    assert not any(name.startswith("model.layers.2.") for name in after)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    assert model.config.num_hidden_layers == 2
    assert model.dtype == torch.bfloat16


def load_what_is_broken(folder: Path) -> str | None:
    """What each of two tensor-parallel ranks says."""
    model, architecture, _ = build_megatron(folder, ParallelConfig(tensor_model_parallel_size=2))
    check_hf_weights(folder, architecture)  # the heads of the files are right
    try:
        load_hf_weights(model, folder, architecture)
    except InputError as error:
        return str(error)
    return None


def test_the_rank_that_reads_a_nan_says_so(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["gpt2"], tmp_path, dirs_exist_ok=True)
    weights = state_dict(tmp_path)
    weights["transformer.h.2.mlp.c_fc.weight"][3, -1] = float("nan")  # stored [in, out]: in the last rank's rows
    save_file(weights, tmp_path / "model.safetensors")
    first, second = run_distributed(load_what_is_broken, 2, tmp_path)
    assert first is None
    assert second == (
        f"{tmp_path}/model.safetensors: tensor transformer.h.2.mlp.c_fc.weight holds NaN or infinite numbers; download "
        "or copy it again"
    )


def test_tensors_without_a_place_are_refused_before_training(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["qwen2"], tmp_path, dirs_exist_ok=True)
    architecture = load_architecture(str(tmp_path), None, "student")
    check_hf_weights(tmp_path, architecture)
    check_hf_weights(tmp_path, architecture.with_layers((3, 1)), layers=(3, 1))  # the other layers are no strangers
    save_file({**state_dict(tmp_path), "model.layers.1.self_attn.sinks": torch.ones(4)}, tmp_path / "model.safetensors")
    for layers in (None, (3, 1)):
        cut = architecture if layers is None else architecture.with_layers(layers)
        with pytest.raises(
            InputError, match=r"holds model\.layers\.1\.self_attn\.sinks, for which config\.json has no"
        ):
            check_hf_weights(tmp_path, cut, layers=layers)


def export_into_a_file(folder: Path, target: Path) -> str:
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    model, architecture, layout = build_megatron(folder, parallel)
    with pytest.raises(InputError) as error:
        export_hf(model, target / "student", architecture, layout)
    return str(error.value)


def test_a_failing_export_is_one_error_on_all_ranks(folders: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "taken"
    target.write_text("a file where a folder should be")
    messages = run_distributed(export_into_a_file, 4, folders["llama"], target)
    assert len(set(messages)) == 1
    assert messages[0].startswith(f"{target / 'student'}: the model cannot be written: ")
    assert "\n" not in messages[0]


def export_on_a_full_disk(folder: Path, exported: Path) -> str:
    model, architecture, layout = build_megatron(folder, ParallelConfig())
    load_hf_weights(model, folder, architecture)
    export_hf(model, exported, architecture, layout)
    before = state_dict(exported)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # a write beyond this many bytes fails
    with pytest.raises(InputError) as error:
        export_hf(model, exported, architecture, layout)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = state_dict(exported)
    assert all(torch.equal(before[name], after[name]) for name in before)
    return str(error.value)


def test_a_full_disk_leaves_the_earlier_export_whole(folders: dict[str, Path], tmp_path: Path) -> None:
    exported = tmp_path / "runs" / "student"
    (message,) = run_distributed(export_on_a_full_disk, 1, folders["llama"], exported)
    assert message.startswith(f"{exported}: the model cannot be written: ")
    assert "File too large" in message
    assert "\n" not in message
    assert [path.name for path in exported.parent.iterdir()] == ["student"]


def export_with_extras(folder: Path, root: Path) -> None:
    model, architecture, layout = build_megatron(folder, ParallelConfig())
    load_hf_weights(model, folder, architecture)

    def copy_tokenizer(target: Path) -> None:
        (target / "tokenizer.json").write_text("{}")

    def fail(target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(target))

    def interrupt(target: Path) -> None:
        raise KeyboardInterrupt

    export_hf(model, root / "good", architecture, layout, copy_tokenizer=copy_tokenizer)
    export_hf(model, root / "good", architecture, layout, copy_tokenizer=copy_tokenizer)  # replaces itself
    with pytest.raises(InputError, match="bad: the model cannot be written: Permission denied; "):
        export_hf(model, root / "bad", architecture, layout, copy_tokenizer=fail)
    with pytest.raises(KeyboardInterrupt):
        export_hf(model, root / "stopped", architecture, layout, copy_tokenizer=interrupt)
    (root / "mine").mkdir()
    (root / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(
        InputError, match="mine: exists and is not an exported model of megatron_amd, or not that alone; move it"
    ):
        export_hf(model, root / "mine", architecture, layout)


def test_an_export_has_its_tokenizer_and_replaces_only_exports(folders: dict[str, Path], tmp_path: Path) -> None:
    run_distributed(export_with_extras, 1, folders["qwen2"], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "mine"]
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    files = sorted(path.name for path in (tmp_path / "good").iterdir())
    assert files == ["config.json", "model.safetensors", "tokenizer.json"]
    assert len({path.stat().st_mode for path in (tmp_path / "good").iterdir()}) == 1  # weights as readable as config
    source = json.loads((folders["qwen2"] / "config.json").read_text())
    config = json.loads((tmp_path / "good" / "config.json").read_text())
    assert config.pop("torch_dtype") == source.pop("dtype") == "float32"
    assert config == source
