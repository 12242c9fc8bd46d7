"""Conversion of whole folders: Hugging Face to Megatron-Core and back, as functions and as a user runs the tools.

The student of a run is in tests/e2e/test_convert_mcore_to_hf.py.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as torch_checkpoint

from megatron_amd.checkpoint.hf import hf_to_mcore, load_hf_weights, mcore_to_hf
from megatron_amd.checkpoint.hf_files import CONVERSION_MARK, copy_carried
from megatron_amd.config import ParallelConfig
from megatron_amd.errors import InputError
from megatron_amd.models.architecture import load_architecture
from tests.distributed.runner import run_distributed
from tests.hf_models import (
    MODELS,
    T5_MODELS,
    build_megatron,
    hf_logits,
    make_hf_model,
    random_tokens,
    save_hf_model,
    state_dict,
)
from tests.small_tokenizers import make_hf_tokenizer

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
KINDS = (*MODELS, *T5_MODELS)
NO_CONVERSION = "exists and is not an earlier conversion of megatron_amd, or not that alone; move it"
NO_EXPORT = "exists and is not an exported model of megatron_amd, or not that alone; move it"


def export(converted: Path, folder: Path, **options: Any) -> None:
    """A folder of `hf_to_mcore` back to Hugging Face."""
    architecture = load_architecture(str(converted), None, "converted")
    mcore_to_hf(converted, folder, architecture, partial(copy_carried, converted), **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each kind of model a folder with `hf` and `mcore`, in fp32."""
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        save_hf_model(kind, root / kind / "hf")
        hf_to_mcore(str(root / kind / "hf"), root / kind / "mcore", vocabulary_multiple=64)
    return {kind: root / kind for kind in KINDS}


# Weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_there_and_back_is_bit_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    for kind in KINDS:
        save_hf_model(kind, tmp_path / "hf", dtype=dtype)
        hf_to_mcore(str(tmp_path / "hf"), tmp_path / "mcore")
        export(tmp_path / "mcore", tmp_path / "back")
        before, after = state_dict(tmp_path / "hf"), state_dict(tmp_path / "back")
        assert before.keys() == after.keys(), kind
        for name, tensor in before.items():
            assert tensor.dtype == after[name].dtype == dtype, (kind, name)
            assert torch.equal(tensor, after[name]), (kind, name)
        source, config = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "back"))
        assert config.pop("torch_dtype") == source.pop("dtype")
        if kind in T5_MODELS:  # transformers 5 writes true also where the two differ
            source["tie_word_embeddings"] = "lm_head.weight" not in before
        assert config == source, kind


def test_an_exported_folder_loads_in_transformers(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind, folder in folders.items():
        export(folder / "mcore", tmp_path / kind, max_shard_bytes=30_000)
        assert len(list((tmp_path / kind).glob("model-*-of-*.safetensors"))) > 1
        classes = transformers.AutoModelForSeq2SeqLM if kind in T5_MODELS else transformers.AutoModelForCausalLM
        model = classes.from_pretrained(tmp_path / kind)
        assert torch.equal(hf_logits(model, random_tokens()), hf_logits(make_hf_model(kind), random_tokens())), kind


def test_the_type_can_be_another(folders: dict[str, Path], tmp_path: Path) -> None:
    source = state_dict(folders["qwen3"] / "hf")
    hf_to_mcore(str(folders["qwen3"] / "hf"), tmp_path / "mcore", dtype=torch.bfloat16)
    export(tmp_path / "mcore", tmp_path / "kept")
    export(folders["qwen3"] / "mcore", tmp_path / "converted", dtype=torch.bfloat16)
    for folder in (tmp_path / "kept", tmp_path / "converted"):
        found = state_dict(folder)
        assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in source.items())
        assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"


def load_and_save(folders: dict[str, Path], saved: Path, tensor: int, pipeline: int) -> None:
    """On each rank: Megatron-Core itself loads what was converted; then it writes a checkpoint of this layout."""
    parallel = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    layout = None
    for kind, folder in folders.items():
        model, architecture, layout = build_megatron(folder / "hf", parallel, layout=layout)
        loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder / "mcore"))
        model.load_state_dict(loaded["model"])
        expected, _, _ = build_megatron(folder / "hf", parallel, layout=layout)
        load_hf_weights(expected, folder / "hf", architecture)
        for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(ours, theirs), (kind, name)
        # dist_checkpointing.save starts processes, which a forked child may not
        sharded, _ = save_preprocess({"model": model.sharded_state_dict()}, validate_access_integrity=False)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(by_key),
            storage_writer=torch_checkpoint.FileSystemWriter(saved / kind),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_every_layout_loads_it_and_every_layouts_checkpoint_is_exported_the_same(
    folders: dict[str, Path], tmp_path: Path, tensor: int, pipeline: int
) -> None:
    run_distributed(load_and_save, tensor * pipeline, folders, tmp_path / "saved", tensor, pipeline)
    for kind, folder in folders.items():
        architecture = load_architecture(str(folder / "hf"), None, kind)
        for number, source in enumerate((folder / "mcore", tmp_path / "saved" / kind)):
            mcore_to_hf(source, tmp_path / str(number), architecture, lambda _: None)
        assert (tmp_path / "0/model.safetensors").read_bytes() == (tmp_path / "1/model.safetensors").read_bytes(), kind
        assert state_dict(tmp_path / "1").keys() == state_dict(folder / "hf").keys()


def peak_memory(work: Callable[[], Any]) -> float:
    """MiB that `work` adds to a process at its most: its own memory and the pages of mapped files that it touches."""

    def child(writer: Connection) -> None:
        torch.set_num_threads(1)
        status = Path("/proc/self/status")
        before = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        work()
        most = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        writer.send((most - before) / 1024)

    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(writer,))
    process.start()
    writer.close()
    try:
        return reader.recv()
    finally:
        process.join()


def test_memory_is_that_of_a_few_parameters_not_of_the_model(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8, vocab_size=4096
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")  # 144 MiB; the largest parameters have 8
    assert peak_memory(lambda: hf_to_mcore(str(tmp_path / "hf"), tmp_path / "mcore")) < 72
    assert peak_memory(lambda: export(tmp_path / "mcore", tmp_path / "back")) < 72
    assert (tmp_path / "back" / "model.safetensors").stat().st_size > 140 * 2**20


def test_harmless_constants_are_left_out(tmp_path: Path) -> None:
    extra = {
        "llama": ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"],
        "gpt2": ["transformer.h.1.attn.bias", "h.0.attn.masked_bias"],
    }
    for kind, names in extra.items():
        save_hf_model(kind, tmp_path / kind)
        weights = state_dict(tmp_path / kind)
        save_file({**weights, **{name: torch.ones(3) for name in names}}, tmp_path / kind / "model.safetensors")
        hf_to_mcore(str(tmp_path / kind), tmp_path / f"{kind}-mcore")
        export(tmp_path / f"{kind}-mcore", tmp_path / f"{kind}-back")
        assert state_dict(tmp_path / f"{kind}-back").keys() == weights.keys()


def test_the_scaling_before_a_t5s_own_head_is_kept_where_config_json_does_not_name_it(tmp_path: Path) -> None:
    model = save_hf_model("t5-own-head", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["tie_word_embeddings"]
    assert config.pop("scale_decoder_outputs")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    hf_to_mcore(str(tmp_path / "hf"), tmp_path / "mcore")
    export(tmp_path / "mcore", tmp_path / "back")
    back = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "back")
    assert torch.allclose(hf_logits(back, random_tokens()), hf_logits(model, random_tokens()), rtol=1e-5, atol=1e-6)


def test_equal_copies_of_a_t5s_embedding_are_dropped(tmp_path: Path) -> None:
    save_hf_model("t5", tmp_path / "hf")
    weights = state_dict(tmp_path / "hf")
    copies = {f"{stack}.embed_tokens.weight": weights["shared.weight"].clone() for stack in ("encoder", "decoder")}
    save_file({**weights, **copies}, tmp_path / "hf" / "model.safetensors")
    hf_to_mcore(str(tmp_path / "hf"), tmp_path / "mcore")
    export(tmp_path / "mcore", tmp_path / "back")
    assert state_dict(tmp_path / "back").keys() == weights.keys()


def test_an_equal_head_beside_a_tied_embedding_is_dropped(tmp_path: Path) -> None:
    save_hf_model("llama-tied", tmp_path / "hf")
    weights = state_dict(tmp_path / "hf")
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file({**weights, **head}, tmp_path / "hf" / "model.safetensors")
    hf_to_mcore(str(tmp_path / "hf"), tmp_path / "mcore")
    export(tmp_path / "mcore", tmp_path / "back")
    assert state_dict(tmp_path / "back").keys() == weights.keys()


def test_an_earlier_conversion_is_replaced_and_nothing_else(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("llama", "gpt2"):
        hf_to_mcore(str(folders[kind] / "hf"), tmp_path / "mcore")
        export(tmp_path / "mcore", tmp_path / "back", max_shard_bytes=30_000)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "gpt2"
    with pytest.raises(InputError, match=f"back: {NO_CONVERSION}"):
        hf_to_mcore(str(folders["llama"] / "hf"), tmp_path / "back")
    with pytest.raises(InputError, match=f"mcore: {NO_EXPORT}"):
        export(tmp_path / "mcore", tmp_path / "mcore")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "mcore"]


def a_project(folder: Path) -> None:
    """A program's own folder that happens to have a config.json."""
    (folder / ".git").mkdir(parents=True)
    for name in ("config.json", "metadata.json", ".metadata", ".git/HEAD", "thesis.tex"):
        (folder / name).write_text("{}")


def a_downloaded_model(folder: Path) -> None:
    """As transformers saved it: no mark of an export."""
    save_hf_model("llama", folder)


def an_export_with_notes(folder: Path) -> None:
    save_hf_model("llama", folder.with_name("source"))
    hf_to_mcore(str(folder.with_name("source")), folder.with_name("converted"))
    export(folder.with_name("converted"), folder)
    (folder / "notes.md").write_text("BLEU 31.2")


def an_export_with_a_folder(folder: Path) -> None:
    an_export_with_notes(folder)
    (folder / "notes.md").unlink()
    (folder / "checkpoints").mkdir()


def a_conversion_with_notes(folder: Path) -> None:
    save_hf_model("llama", folder.with_name("source"))
    hf_to_mcore(str(folder.with_name("source")), folder)
    (folder / "notes.md").write_text("BLEU 31.2")


def a_checkpoint_of_megatron(folder: Path) -> None:
    """With a second rank's file, and a config.json put beside."""
    a_conversion_with_notes(folder)
    (folder / "notes.md").rename(folder / "__1_0.distcp")


def another_programs_checkpoint(folder: Path) -> None:
    a_conversion_with_notes(folder)
    (folder / "notes.md").unlink()
    (folder / CONVERSION_MARK).unlink()


def an_export_with_another_kind_of_model(folder: Path) -> None:
    an_export_with_notes(folder)
    (folder / "notes.md").rename(folder / "reward.model")


@pytest.mark.parametrize(
    "make",
    [
        a_project, a_downloaded_model, an_export_with_notes, an_export_with_a_folder, a_conversion_with_notes,
        a_checkpoint_of_megatron, another_programs_checkpoint, an_export_with_another_kind_of_model,
    ],
)  # fmt: skip
def test_nothing_of_the_users_is_destroyed(
    folders: dict[str, Path], tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "mine")
    before = {file: file.read_bytes() for file in (tmp_path / "mine").rglob("*") if file.is_file()}
    with pytest.raises(InputError, match=f"mine: {NO_CONVERSION}"):
        hf_to_mcore(str(folders["llama"] / "hf"), tmp_path / "mine")
    with pytest.raises(InputError, match=f"mine: {NO_EXPORT}"):
        export(folders["llama"] / "mcore", tmp_path / "mine")
    assert {file: file.read_bytes() for file in (tmp_path / "mine").rglob("*") if file.is_file()} == before


def test_what_appears_while_a_model_is_written_stays(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def appear(*_: Any) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").touch()

    source = folders["llama"] / "mcore"
    with pytest.raises(InputError, match=f"out: {NO_EXPORT}"):
        mcore_to_hf(source, tmp_path / "out", load_architecture(str(source), None, "converted"), appear)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.tex"]
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr("megatron_amd.checkpoint.hf.copy_carried", appear)
    with pytest.raises(InputError, match=f"out: {NO_CONVERSION}"):
        hf_to_mcore(str(folders["llama"] / "hf"), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.tex"]


def test_the_output_may_be_the_working_directory_or_a_link(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = {"mcore": partial(hf_to_mcore, str(folders["llama"] / "hf")), "hf": partial(export, tmp_path / "mcore")}
    for name, convert in steps.items():
        (tmp_path / name).mkdir()
        (tmp_path / "link").symlink_to(tmp_path / name)
        for _ in range(2):
            monkeypatch.chdir(tmp_path / name)
            convert(Path("."))
            convert(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        (tmp_path / "link").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mcore"]
    assert state_dict(tmp_path / "hf").keys() == state_dict(folders["llama"] / "hf").keys()


def test_the_earlier_folder_stays_where_the_new_one_cannot_take_its_name(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(folders["llama"] / "mcore", tmp_path / "back")
    before = (tmp_path / "back" / "model.safetensors").read_bytes()
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(InputError, match="back: the model cannot be written: Permission denied; "):
        export(folders["qwen2"] / "mcore", tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["back"]
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == before


def test_numbers_too_large_for_a_type_are_not_made_infinite(folders: dict[str, Path], tmp_path: Path) -> None:
    save_hf_model("llama", tmp_path / "hf")
    weights = state_dict(tmp_path / "hf")
    weights["model.norm.weight"][0] = 1e5
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    message = r"^\S+norm.weight: holds numbers that are too large for torch.float16; convert to bf16, or keep the type$"
    with pytest.raises(InputError, match=message):
        hf_to_mcore(str(tmp_path / "hf"), tmp_path / "mcore", dtype=torch.float16)
    hf_to_mcore(str(tmp_path / "hf"), tmp_path / "mcore")
    with pytest.raises(InputError, match=message):
        export(tmp_path / "mcore", tmp_path / "back", dtype=torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mcore"]


def test_a_full_disk_leaves_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # a write beyond this many bytes fails
    try:
        for convert in (
            partial(hf_to_mcore, str(folders["llama"] / "hf")),
            partial(export, folders["llama"] / "mcore"),
        ):
            with pytest.raises(InputError, match=f"^{tmp_path}/new: the model cannot be written: File too large; "):
                convert(tmp_path / "new")
            assert list(tmp_path.iterdir()) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# The tools


def run_tool(*command: Any) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment
    )


@pytest.fixture
def complete_folder(tmp_path: Path) -> Path:
    """A small model of everyday shape, in bf16, with a tokenizer and generation settings."""
    settings = {**MODELS["qwen3-tied"], "vocab_size": 411, "eos_token_id": 1}
    settings.pop("model_type")
    torch.manual_seed(3)
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**settings)).bfloat16().save_pretrained(tmp_path / "hf")
    make_hf_tokenizer(tmp_path / "hf", vocab_size=300, generation_eos=[1, 3])
    (tmp_path / "hf" / "pieces.model").write_bytes(b"sentencepiece")
    return tmp_path / "hf"


VERIFIED = r"verified: logits differ from those of transformers by at most \S+, where the largest is \S+ \(\d+ tokens"


def test_both_tools_verify_and_carry_the_files_beside_the_weights(complete_folder: Path, tmp_path: Path) -> None:
    there = run_tool("tools/convert_hf_to_mcore.py", complete_folder, tmp_path / "mcore", "--verify")
    back = run_tool("tools/convert_mcore_to_hf.py", tmp_path / "mcore", tmp_path / "back", "--verify")
    for done, words in (
        (there, f"{tmp_path}/mcore: {complete_folder} as a Megatron-Core checkpoint"),
        (back, f"{tmp_path}/back: the model of {tmp_path}/mcore"),
    ):
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        first, second = done.stdout.splitlines()
        assert first == words
        assert re.match(VERIFIED, second)
    names = {file.name for file in complete_folder.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "pieces.model"} < names
    assert {file.name for file in (tmp_path / "back").iterdir()} == names
    for name in names - {"config.json", "model.safetensors"}:
        assert (tmp_path / "back" / name).read_bytes() == (complete_folder / name).read_bytes(), name
    before, after = state_dict(complete_folder), state_dict(tmp_path / "back")
    assert all(torch.equal(before[name], after[name]) for name in before | after)
    tokens = random_tokens()
    generated = [
        transformers.AutoModelForCausalLM.from_pretrained(folder).generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=20, pad_token_id=0
        )
        for folder in (complete_folder, tmp_path / "back")
    ]
    assert torch.equal(*generated)


COMPARE = """
import sys
from pathlib import Path
from megatron_amd.checkpoint.verify import compare
from megatron_amd.errors import InputError
from megatron_amd.models.architecture import load_architecture
try:
    compare(Path(sys.argv[1]), sys.argv[2], load_architecture(sys.argv[2], None, "source"))
except InputError as error:
    print(error)
"""


def test_verification_finds_one_changed_row(folders: dict[str, Path], tmp_path: Path) -> None:
    changed = make_hf_model("llama")
    with torch.no_grad():
        changed.model.layers[3].self_attn.k_proj.weight[5] *= 1.05
    changed.save_pretrained(tmp_path)
    done = run_tool("-c", COMPARE, folders["llama"] / "mcore", tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.match(rf"{folders['llama']}/mcore: differs from {tmp_path}: logits by up to ", done.stdout)


def tool(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refusal(capsys: pytest.CaptureFixture[str], name: str, source: Path, output: Path) -> str:
    """The one line that a tool says of what it refuses."""
    capsys.readouterr()
    assert tool(name).main([str(source), str(output)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize("name", ["convert_hf_to_mcore", "convert_mcore_to_hf"])
def test_help_has_examples_and_the_two_are_alike(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tool(name).main(["--help"])
    text = capsys.readouterr().out
    assert f"    python tools/{name}.py " in text
    usage = " ".join(text.split())
    assert re.match(r"usage: \S+ \[-h\] \[--dtype \{keep,bf16,fp16,fp32\}\] \[--verify\] \[.*\] source output ", usage)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("convert_hf_to_mcore", [], "command line: the following arguments are required: source, output; --help shows"),
        ("convert_hf_to_mcore", ["{0}/hf", "{0}/new"], "source: there is no folder {0}/hf"),
        (
            "convert_hf_to_mcore",
            ["{0}", "{0}/x", "--pad-vocabulary-to", "0"],
            "--pad-vocabulary-to: must be at least 1",
        ),
        ("convert_mcore_to_hf", ["{0}", "{0}/x", "--dtype", "int8"], "command line: argument --dtype: invalid choice"),
        ("convert_mcore_to_hf", ["{0}", "{0}/x", "--shard-gib", "0"], "--shard-gib: must be positive, not 0.0"),
        ("convert_mcore_to_hf", ["{0}", "{0}/x"], "{0}: is neither a checkpoint nor a run directory with one, nor a"),
    ],
)
def test_mistakes_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, arguments: list[str], message: str
) -> None:
    assert tool(name).main([argument.format(tmp_path) for argument in arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message.format(tmp_path)}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "source", "output", "message"),
    [
        ("convert_mcore_to_hf", "nowhere", "new", "source: there is no folder {0}/nowhere"),
        ("convert_mcore_to_hf", "hf", "new", "{0}/hf: is a Hugging Face folder already; tools/convert_hf_to_mcore.py"),
        ("convert_mcore_to_hf", "cut", "new", "{0}/cut: has no config.json or metadata.json beside its .metadata"),
        ("convert_hf_to_mcore", "mcore", "new", "source: {0}/mcore is a Megatron-Core checkpoint; tools/convert_mcore"),
        ("convert_hf_to_mcore", "hf", "hf/new", "{0}/hf/new: lies in the model's own folder; choose another folder"),
    ],
)
def test_folders_that_are_another_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, source: str, output: str, message: str
) -> None:
    for folder, files in {"hf": ["config.json"], "cut": [".metadata"], "mcore": ["config.json", ".metadata"]}.items():
        (tmp_path / folder).mkdir()
        for file in files:
            (tmp_path / folder / file).write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    said = refusal(capsys, name, tmp_path / source, tmp_path / output)
    assert said.startswith(f"error: {message.format(tmp_path)}")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_without_a_tokenizer_is_told_of(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool("convert_hf_to_mcore").main([str(folders["llama"] / "hf"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == (
        f"warning: {folders['llama'] / 'hf'} has no tokenizer files, so none lie beside the result\n"
    )


# Broken folders

INDEX = "model.safetensors.index.json"


def config_of(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def tensors_of(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of the first file."""
    file = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def set_number(name: str, number: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors[name].view(-1)[7].fill_(number)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def index_of(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERIES = "model.layers.0.self_attn.q_proj.weight"
EIGHT_BITS = torch.zeros(32, 32, dtype=torch.int8)
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing shard": (
        lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(),
        f"{{0}}/{INDEX}: names model-00002-of-00004.safetensors, which is not in the folder; download or copy it again",
    ),
    "truncated shard": (
        lambda folder: cut_short(sorted(folder.glob("*.safetensors"))[2]),
        "{0}/model-00003-of-00004.safetensors: is truncated or corrupt (",
    ),
    "empty shard": (
        lambda folder: sorted(folder.glob("*.safetensors"))[0].write_bytes(b""),
        "{0}/model-00001-of-00004.safetensors: is truncated or corrupt (0 bytes; ",
    ),
    "a web page for a shard": (
        lambda folder: sorted(folder.glob("*.safetensors"))[0].write_text("<html>not found</html>" * 10),
        "{0}/model-00001-of-00004.safetensors: is truncated or corrupt (220 bytes; ",
    ),
    "wrong shape": (
        lambda folder: tensors_of(folder, lambda t: t.update({EMBEDDING: torch.zeros(50, 32)})),
        f"{{0}}/model-00001-of-00004.safetensors: tensor {EMBEDDING} has shape [50, 32], but config.json makes it",
    ),
    "missing tensor": (
        lambda folder: (
            tensors_of(folder, lambda t: t.pop(EMBEDDING)),
            index_of(folder, lambda names: names.pop(EMBEDDING)),
        ),
        f"{{0}}: its weights have no tensor {EMBEDDING}; they are incomplete or not of this config.json",
    ),
    "extra tensor": (
        lambda folder: (
            tensors_of(folder, lambda t: t.update({"score.weight": torch.zeros(2, 32)})),
            index_of(folder, lambda names: names.update({"score.weight": "model-00001-of-00004.safetensors"})),
        ),
        "{0}/model-00001-of-00004.safetensors: holds score.weight, for which config.json has no place; the folder is",
    ),
    "more layers than config.json": (
        lambda folder: config_of(folder, num_hidden_layers=3),
        "holds model.layers.3.input_layernorm.weight, model.layers.3.mlp.down_proj.weight, model.layers.3.mlp.g",
    ),
    "fewer layers than config.json": (
        lambda folder: config_of(folder, num_hidden_layers=5),
        "{0}: its weights have no tensor model.layers.4.input_layernorm.weight; they are incomplete or not of",
    ),
    "NaN": (
        lambda folder: tensors_of(folder, set_number(QUERIES, float("nan"))),
        f"{{0}}/model-00001-of-00004.safetensors: tensor {QUERIES} holds NaN or infinite numbers; download or copy it",
    ),
    "infinity": (
        lambda folder: tensors_of(folder, set_number(EMBEDDING, float("-inf"))),
        f"{{0}}/model-00001-of-00004.safetensors: tensor {EMBEDDING} holds NaN or infinite numbers; download",
    ),
    "quantised tensors": (
        lambda folder: tensors_of(folder, lambda t: t.update({QUERIES: EIGHT_BITS})),
        f"tensor {QUERIES} is of type I8: quantised weights are not supported; save the model in bf16",
    ),
    "pickles": (
        lambda folder: (
            [file.rename(file.with_suffix(".bin")) for file in folder.glob("*.safetensors")]
            + [(folder / INDEX).unlink()]
        ),
        "source: {0} has no model.safetensors, only PyTorch .bin files; load it with transformers and save it with",
    ),
    "no weights": (
        lambda folder: [file.unlink() for file in folder.glob("model*")],
        "source: {0} has no model.safetensors; give the folder of a Hugging Face model with its weights",
    ),
    "no index": (
        lambda folder: (folder / INDEX).unlink(),
        f"source: {{0}} has no model.safetensors and no {INDEX} for its shards; download or copy that again",
    ),
    "index in no language": (
        lambda folder: (folder / INDEX).write_text("{"),
        f"{{0}}/{INDEX}: is not valid JSON: ",
    ),
    "index that promises a tensor": (
        lambda folder: index_of(folder, lambda names: names.update({"more": "model-00001-of-00004.safetensors"})),
        f"{{0}}/{INDEX}: says that more is in model-00001-of-00004.safetensors, which does not hold it; copy",
    ),
    "index that hides a tensor": (
        lambda folder: index_of(folder, lambda names: names.pop(EMBEDDING)),
        f"{{0}}/model-00001-of-00004.safetensors: holds {EMBEDDING}, but {INDEX} does not say so; download",
    ),
    "index that leads elsewhere": (
        lambda folder: index_of(folder, lambda names: names.update({EMBEDDING: "../../secret.safetensors"})),
        f"{{0}}/{INDEX}: names ../../secret.safetensors, which is not in the folder; download or copy it again",
    ),
    "tied in name only": (
        lambda folder: config_of(folder, tie_word_embeddings=True),
        f"tensor {HEAD} differs from {EMBEDDING}, but config.json says tie_word_embeddings: true; set it to false",
    ),
    "own code": (
        lambda folder: config_of(folder, auto_map={"AutoModelForCausalLM": "modeling_x.XForCausalLM"}),
        "{0}/config.json: auto_map: the model's own code (modeling_x.XForCausalLM) is not run; if it computes what",
    ),
    "no config.json": (
        lambda folder: (folder / "config.json").unlink(),
        "source: {0} has no config.json; give the folder of a Hugging Face model",
    ),
    "config.json cut short": (
        lambda folder: cut_short(folder / "config.json"),
        "{0}/config.json: is not valid JSON: ",
    ),
    "unknown family": (
        lambda folder: config_of(folder, model_type="mamba"),
        "{0}/config.json: model_type 'mamba' is not supported; supported are llama, ",
    ),
    "sliding window": (
        lambda folder: config_of(folder, model_type="mistral", sliding_window=16),
        "{0}/config.json: sliding_window: 16 is not supported; set it to null if no sequence is longer than that",
    ),
    "yarn": (
        lambda folder: config_of(folder, rope_parameters=YARN),
        "{0}/config.json: rope_parameters: type 'yarn' is not supported, only 'default' and 'llama3'",
    ),
    "experts": (
        lambda folder: config_of(folder, num_local_experts=8),
        "{0}/config.json: num_local_experts: mixture-of-experts models are not supported",
    ),
    "quantisation": (
        lambda folder: config_of(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
        "{0}/config.json: quantization_config: quantised weights are not supported; save the model in bf16",
    ),
    "another model's tokenizer": (
        lambda folder: make_hf_tokenizer(folder, vocab_size=300),
        "{0}: its tokenizer has 301 tokens, but the embedding only 53 rows (vocab_size in config.json); the tokenizer",
    ),
    "broken tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "no tokenizer can be read from the folder {0}: ",
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in four files, which converts."""
    folder = tmp_path_factory.mktemp("whole")
    save_hf_model("llama", folder, max_shard_size="40KB")
    hf_to_mcore(str(folder), folder.with_name("converted"))
    return folder


@pytest.mark.parametrize("kind", list(BROKEN))
def test_a_broken_folder_is_one_line_and_leaves_nothing(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    damage, message = BROKEN[kind]
    source = tmp_path / "hf"
    shutil.copytree(whole, source)
    damage(source)
    assert message.format(source) in refusal(capsys, "convert_hf_to_mcore", source, tmp_path / "mcore")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def second_embedding(folder: Path, stack: str) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{stack}.embed_tokens.weight"] = tensors["shared.weight"].flip(0)

    tensors_of(folder, add)


CROSS = "decoder.block.2.layer.1.EncDecAttention.k.weight"
BROKEN_T5: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another embedding for the encoder": (
        lambda folder: second_embedding(folder, "encoder"),
        "tensor encoder.embed_tokens.weight differs from shared.weight; two embeddings in one model are not supported",
    ),
    "another embedding for the decoder": (
        lambda folder: second_embedding(folder, "decoder"),
        "tensor decoder.embed_tokens.weight differs from shared.weight; two embeddings in one model are not supported",
    ),
    "the embedding under another name alone": (
        lambda folder: tensors_of(folder, lambda t: t.update({"encoder.embed_tokens.weight": t.pop("shared.weight")})),
        "{0}: its weights have no tensor shared.weight; they are incomplete or not of this config.json",
    ),
    "no cross-attention": (
        lambda folder: tensors_of(folder, lambda t: t.pop(CROSS)),
        f"{{0}}: its weights have no tensor {CROSS}; they are incomplete or not of this config.json",
    ),
    "fewer layers of the encoder in config.json": (
        lambda folder: config_of(folder, num_layers=2),
        "model.safetensors: holds encoder.block.2.layer.0.SelfAttention.k.weight, ",
    ),
    "an embedding that is no table": (
        lambda folder: tensors_of(folder, lambda t: t.update({"shared.weight": torch.tensor(1.0)})),
        "model.safetensors: tensor shared.weight has shape [], but config.json makes it [53, 32]",
    ),
}


@pytest.mark.parametrize("kind", list(BROKEN_T5))
def test_a_broken_t5_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    damage, message = BROKEN_T5[kind]
    source = tmp_path / "hf"
    save_hf_model("mt5", source)
    damage(source)
    assert message.format(source) in refusal(capsys, "convert_hf_to_mcore", source, tmp_path / "mcore")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def flip(file: Path, place: float) -> None:
    """Change one byte, at a fraction of the file's length."""
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 0x20
    file.write_bytes(content)


class RunsCode:
    """What a hostile file holds."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch code-was-run",)


BROKEN_CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no list of tensors": (
        lambda folder: (folder / ".metadata").unlink(),
        "{0}: has no .metadata, so it is no checkpoint in Megatron-Core's torch_dist format; give a folder that",
    ),
    "cut list of tensors": (lambda folder: cut_short(folder / ".metadata"), "{0}/.metadata: is damaged ("),
    "code for a list of tensors": (
        lambda folder: (folder / ".metadata").write_bytes(pickle.dumps(RunsCode())),
        "{0}/.metadata: is damaged (posix.system has no place in a list of tensors); copy it again",
    ),
    "code behind a known class": (
        lambda folder: (folder / ".metadata").write_bytes(
            b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x09os.system\x93"
            b"\x8c\x12touch code-was-run\x85R."
        ),
        "{0}/.metadata: is damaged (torch.distributed.checkpoint.metadata.os.system has no place in a list of tensors)",
    ),
    "a change of a known class": (
        lambda folder: (folder / ".metadata").write_bytes(
            b"\x80\x04cpathlib\nPosixPath\nN}X\x0b\x00\x00\x00was_changedK\x01s\x86b."
        ),
        "{0}/.metadata: is damaged (<class 'pathlib.PosixPath'> is to be changed by a list of tensors); copy it again",
    ),
    "a changed number": (
        lambda folder: flip(folder / "__0_0.distcp", 0.5),
        "cannot be read, a .distcp file is missing or damaged (the checksums in __0_0.distcp are others); copy",
    ),
    "no tensors": (
        lambda folder: (folder / "__0_0.distcp").unlink(),
        "{0}: embedding.word_embeddings.weight cannot be read, a .distcp file is missing or damaged (",
    ),
    "cut tensors": (
        lambda folder: cut_short(folder / "__0_0.distcp"),
        "{0}: output_layer.weight cannot be read, a .distcp file is missing or damaged (",
    ),
    "fewer layers in config.json": (
        lambda folder: config_of(folder, num_hidden_layers=3),
        "{0}: holds 4 layers, but config.json says 3",
    ),
    "another width in config.json": (
        lambda folder: config_of(folder, intermediate_size=44),
        "{0}: parameter decoder.layers.0.mlp.linear_fc1.weight has shape [80, 32], but config.json makes it [88, 32]",
    ),
    "another family": (
        lambda folder: config_of(folder, model_type="qwen2"),
        "{0}: has no parameter decoder.layers.0.self_attention.linear_qkv.bias; it is incomplete or not of this config",
    ),
    "tied in name only": (
        lambda folder: config_of(folder, tie_word_embeddings=True),
        "{0}: holds output_layer.weight, for which config.json has no place; one of the two is of another model",
    ),
}


@pytest.mark.parametrize("kind", list(BROKEN_CHECKPOINTS))
def test_a_broken_checkpoint_is_one_line_and_leaves_nothing(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    damage, message = BROKEN_CHECKPOINTS[kind]
    source = tmp_path / "mcore"
    shutil.copytree(folders["llama"] / "mcore", source)
    damage(source)
    assert message.format(source) in refusal(capsys, "convert_mcore_to_hf", source, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["mcore"]
    assert not Path("code-was-run").exists()
    assert not hasattr(Path, "was_changed")


def test_any_changed_byte_in_the_list_of_tensors_is_one_line_or_harmless(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["llama"] / "mcore", tmp_path / "mcore")
    file = tmp_path / "mcore" / ".metadata"
    content = file.read_bytes()
    expected = state_dict(folders["llama"] / "hf")
    noise, refused = random.Random(0), 0
    for _ in range(60):
        changed = bytearray(content)
        changed[noise.randrange(len(content))] = noise.randrange(256)
        file.write_bytes(changed)
        try:
            export(tmp_path / "mcore", tmp_path / "hf")
        except InputError as error:
            refused += 1 if "\n" not in str(error) else -100
        else:
            assert all(torch.equal(expected[name], tensor) for name, tensor in state_dict(tmp_path / "hf").items())
    assert refused > 10
