"""tools/generate.py: the same files under every layout and after interruptions; training on them; mistakes."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_amd import program
from megatron_amd.config import Config
from megatron_amd.data import PromptDataset
from megatron_amd.distributed import initialize
from megatron_amd.distributed.layout import Layout, build_layout
from megatron_amd.errors import InputError
from megatron_amd.rollout import response_files
from megatron_amd.training.collect import off_policy_responses
from megatron_amd.training.setup import set_up
from tests.distributed.runner import run_distributed
from tests.small_tokenizers import make_hf_tokenizer
from tests.tiny_run import PROMPTS, make_files, write_config
from tools import generate

pytestmark = pytest.mark.distributed

SAMPLES = 2
SHARDS = [f"responses-{shard:05}-of-00004.jsonl" for shard in range(4)]


Fault = Callable[..., contextlib.AbstractContextManager]


class Ended(NamedTuple):
    """How the program ended on a rank."""

    status: int
    stdout: str
    stderr: str


class Reference(NamedTuple):
    """Files of a run, and what one process wrote for it."""

    folder: Path
    settings: dict[str, Any]
    output: Path
    ended: Ended


def join(config: Config) -> Layout:
    """`initialize` on a rank of the test's own process group."""
    initialize.check_world_size(config.parallel, dist.get_world_size())
    layout = build_layout(config.parallel, torch.device("cpu"))
    initialize.set_seeds(config.run.seed, layout)
    return layout


def run_rank(arguments: Sequence[str], fault: Fault | None) -> Ended:
    """The program on this rank, as torchrun starts it."""
    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(initialize, "initialize", join))
        stack.enter_context(mock.patch.object(initialize, "shutdown"))
        stack.enter_context(mock.patch.object(program, "_WAIT_FOR_THE_SPEAKER", 0.0))
        stdout = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stderr = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        if fault is not None:
            stack.enter_context(fault())
        return Ended(generate.main(arguments), stdout.getvalue(), stderr.getvalue())


def run_tool(
    reference_folder: Path,
    output: Path,
    *overrides: str,
    ranks: int = 1,
    fault: Fault | None = None,
) -> list[Ended]:
    fixed = ["--config", str(reference_folder / "run.yaml"), "--output", str(output), "--shard-size", "3"]
    return run_distributed(run_rank, ranks, [*fixed, f"rollout.samples_per_prompt={SAMPLES}", *overrides], fault)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for shard in SHARDS for line in (folder / shard).read_text().splitlines()]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("responses")
    settings = make_files(folder)
    write_config(folder, settings)
    [ended] = run_tool(folder, folder / "out")
    assert ended.status == 0, ended.stderr
    return Reference(folder, settings, folder / "out", ended)


def same_files(ours: Path, theirs: Path) -> bool:
    names = sorted(path.name for path in theirs.iterdir())
    assert sorted(path.name for path in ours.iterdir()) == names
    return all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in names)


def test_every_row_and_sample_has_its_line(reference: Reference) -> None:
    lines = lines_of(reference.output)
    assert [(line["row"], line["sample"]) for line in lines] == [(r, s) for r in range(len(PROMPTS)) for s in (0, 1)]
    assert [line["prompt"] for line in lines[::2]] == list(PROMPTS)
    assert any(a["tokens"] != b["tokens"] for a, b in zip(lines[::2], lines[1::2], strict=True))
    assert {line["ended"] for line in lines} == {True, False}
    for line in lines:
        assert len(line["log_probs"]) == len(line["tokens"]) <= 8
        assert line["ended"] == (line["tokens"][-1] in (2, 3))  # EOS of the folder's generation config and tokenizer
        assert all(-20 < value < 0 for value in line["log_probs"])
    tokens = sum(len(line["tokens"]) for line in lines)
    share = 100 * sum(line["ended"] for line in lines) / len(lines)
    assert reference.ended.stdout.startswith(f"{reference.output}: {len(lines)} responses, {tokens} tokens in ")
    assert reference.ended.stdout.endswith(f"tokens/s; {share:.0f} % ended by themselves\n")
    assert reference.ended.stderr == ""


@pytest.mark.parametrize("ranks", [2, 5])
def test_replicas_write_the_same_bytes(reference: Reference, tmp_path: Path, ranks: int) -> None:
    """Five replicas for four shards: one has nothing to do but to wait."""
    ended = run_tool(reference.folder, tmp_path / "out", "rollout.batch_size=6", ranks=ranks)
    assert [end.status for end in ended] == [0] * ranks, ended
    assert f" over {ranks} replicas; " in ended[0].stdout
    assert [text for end in ended for text in (end.stdout, end.stderr) if text] == [ended[0].stdout]
    assert same_files(tmp_path / "out", reference.output)


def test_settings_that_are_trainings_own_do_not_matter(reference: Reference, tmp_path: Path) -> None:
    """The file of a run that trains on these responses."""
    adaptive = (
        "rollout.reuse.mode=adaptive",
        "rollout.off_policy=data",
        "evaluation.prompts=4",
        "evaluation.interval=1",
    )
    shared = ("rollout.teacher_share=0.3", "rollout.reuse.capacity=8", "objective.policy_gradient=per_step")
    [ended] = run_tool(reference.folder, tmp_path / "out", *adaptive, *shared)
    assert ended.status == 0, ended.stderr
    assert same_files(tmp_path / "out", reference.output)


@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_ranks_of_a_replica_write_the_same_tokens(reference: Reference, tmp_path: Path, axis: str) -> None:
    """Log-probabilities differ in the last digit, where sums are formed in another order."""
    ended = run_tool(reference.folder, tmp_path / "out", f"parallel.{axis}_model_parallel_size=2", ranks=2)
    assert [end.status for end in ended] == [0, 0], ended
    assert (tmp_path / "out" / "header.json").read_bytes() == (reference.output / "header.json").read_bytes()
    for ours, theirs in zip(lines_of(tmp_path / "out"), lines_of(reference.output), strict=True):
        assert ours.pop("log_probs") == pytest.approx(theirs.pop("log_probs"), rel=1e-5, abs=1e-5)
        assert ours == theirs


def test_what_is_missing_is_written_after_an_interruption(reference: Reference, tmp_path: Path) -> None:
    output = shutil.copytree(reference.output, tmp_path / "out")
    for shard in SHARDS[1:3]:
        (output / shard).unlink()
    (output / f".{SHARDS[1]}.partial").write_text('{"row": 3, "sam')
    kept = (output / SHARDS[0]).stat()
    [ended] = run_tool(reference.folder, output)
    first, last = ended.stdout.splitlines()
    assert first == f"{output}: 2 of 4 shards are there already"
    assert last.startswith(f"{output}: {6 * SAMPLES} responses, ")
    assert same_files(output, reference.output)
    assert (output / SHARDS[0]).stat().st_mtime_ns == kept.st_mtime_ns
    [ended] = run_tool(reference.folder, output)
    assert ended == Ended(0, f"{output}: all 4 shards are there, nothing to do\n", "")


def test_the_student_responds_with_its_own_noise_and_the_runs_tokenizer(reference: Reference, tmp_path: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert not (reference.folder / "student" / file).exists()
    [ended] = run_tool(reference.folder, tmp_path / "out", "--role", "student", "rollout.temperature=0")
    assert ended.status == 0, ended.stderr
    header = json.loads((tmp_path / "out" / "header.json").read_text())
    assert (header["model"]["role"], header["sampling"]["temperature"]) == ("student", 0)
    lines = lines_of(tmp_path / "out")
    assert all(a["tokens"] == b["tokens"] for a, b in zip(lines[::2], lines[1::2], strict=True)), "greedy"


def wait_for(found: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not found() and time.monotonic() < deadline:
        time.sleep(0.01)


@contextlib.contextmanager
def full_disk(rank: int, output: Path) -> Iterator[None]:
    """Rank `rank` cannot write a shard; a second replica tries when the first has written one."""

    def write(file: Path, content: bytes) -> None:
        if "responses" in file.name and dist.get_rank() == rank:
            wait_for(lambda: rank == 0 or list(output.glob("responses-*")))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write_bytes(content)

    with mock.patch.object(response_files, "write", write):
        yield


@contextlib.contextmanager
def unreadable(rank: int, output: Path) -> Iterator[None]:
    """Rank `rank` cannot read its rows, when the other has read some and before it has written them."""
    read, begun, failing = PromptDataset.prompts, output.with_name("begun"), output.with_name("failing")

    def prompts(self: PromptDataset, *args: Any) -> Any:
        if dist.get_rank() == rank:
            wait_for(begun.exists)
            failing.touch()
            raise OSError(errno.EIO, os.strerror(errno.EIO), "train.jsonl")
        begun.touch()
        return read(self, *args)

    def write(file: Path, content: bytes) -> None:
        if "responses" in file.name:
            wait_for(failing.exists)
            time.sleep(1)
        file.write_bytes(content)

    with mock.patch.object(PromptDataset, "prompts", prompts), mock.patch.object(response_files, "write", write):
        yield


@pytest.mark.parametrize(
    ("fault", "overrides", "says", "written"),
    [
        (partial(full_disk, 1), [], ": cannot be written (No space left on device); mend that, and the same", {1, 2}),
        (partial(unreadable, 1), [], "error: train.jsonl: Input/output error; mend it and start again", {1}),
        (partial(unreadable, 1), ["parallel.tensor_model_parallel_size=2"], "error: train.jsonl: Input/output", {0}),
        (partial(full_disk, 0), ["parallel.pipeline_model_parallel_size=2"], "00000-of-00004.jsonl: cannot be", {0}),
    ],
    ids=["disk-of-a-replica", "data-of-a-replica", "data-of-a-tensor-rank", "disk-of-a-stage"],
)
def test_a_rank_that_fails_ends_all_with_one_line(
    reference: Reference, tmp_path: Path, fault: Fault, overrides: list[str], says: str, written: set[int]
) -> None:
    """The other replica ends the shard that it is at, and begins none."""
    output = tmp_path / "out"
    ended = run_tool(reference.folder, output, *overrides, ranks=2, fault=partial(fault, output))
    assert [end.status for end in ended] == [2, 2]
    assert [end.stdout for end in ended] == ["", ""]
    assert ended[1].stderr == ""
    assert ended[0].stderr.startswith("error: ")
    assert says in ended[0].stderr
    assert ended[0].stderr.count("\n") == 1
    shards = [path for path in output.iterdir() if path.name != "header.json"]
    assert len(shards) in written
    for shard in shards:
        assert shard.read_bytes() == (reference.output / shard.name).read_bytes()
    [again] = run_tool(reference.folder, output)
    assert again.status == 0
    assert {line["row"] for line in lines_of(output)} == set(range(len(PROMPTS)))


def test_replicas_stop_after_their_shard_when_another_has_failed() -> None:
    """Also where they would have had much more to do."""

    def fail_or_go_on() -> None:
        with initialize.apart() as check_others:
            if dist.get_rank() == 1:
                raise InputError("the disk of rank 1 is full")
            while True:
                check_others()

    def work() -> tuple[str, bool]:
        with pytest.raises(InputError) as raised:
            fail_or_go_on()
        return str(raised.value), raised.value.on_all_ranks

    assert run_distributed(work, 3, timeout=30.0) == [("the disk of rank 1 is full", True)] * 3


def collect(config: Config, visits: int) -> list[list[list[int]]]:
    """Off-policy responses of the first epochs, by row."""
    layout = join(config)
    trainer, tokenizer = set_up(config, layout, warn=pytest.fail)
    epochs: list[dict[int, list[int]]] = [{} for _ in range(visits)]
    for _ in range(visits * len(PROMPTS) // config.training.global_batch_size):
        prompts = trainer.loader.next()
        responses = off_policy_responses(trainer.players, prompts, tokenizer.eos_ids).responses()
        for row, visit, response in zip(prompts.ids, prompts.visits, responses, strict=True):
            epochs[visit][row] = response
    return [[epoch[row] for row in sorted(epoch)] for epoch in epochs]


def test_training_uses_the_tokens_of_the_files(reference: Reference, tmp_path: Path) -> None:
    """Sample after sample; in the first epoch they are what the teacher would have said."""
    shared = ["training.global_batch_size=5"]
    file = ["rollout.off_policy=file", f"rollout.responses={reference.output}", *shared]
    settings = {**reference.settings, "run": {"directory": str(tmp_path / "run"), "seed": 7}}
    lines = lines_of(reference.output)
    samples = [[line["tokens"] for line in lines if line["sample"] == sample] for sample in range(SAMPLES)]
    [found] = run_distributed(collect, 1, write_config(tmp_path, settings, *file), 3)
    assert found == [samples[0], samples[1], samples[0]]
    [teacher] = run_distributed(collect, 1, write_config(tmp_path, settings, *shared), 1)
    assert teacher == [samples[0]]
    shorter = write_config(tmp_path, settings, *file, "rollout.max_response_length=3")
    [cut] = run_distributed(collect, 1, shorter, 1)
    assert cut == [[tokens[:3] for tokens in samples[0]]]


def attempt(configs: Sequence[Config]) -> list[tuple[str | None, list[str]]]:
    """What `set_up` says of each: its error, and its warnings."""
    said = []
    layout = join(configs[0])
    with mock.patch("megatron_amd.training.setup.build_players", side_effect=AssertionError("allocated")):
        for config in configs:
            warnings: list[str] = []
            try:
                set_up(config, layout, warn=warnings.append)
            except InputError as error:
                said.append((str(error), warnings))
            except AssertionError:
                said.append((None, warnings))
    return said


def test_training_refuses_files_that_are_not_its_own_before_it_allocates(reference: Reference, tmp_path: Path) -> None:
    folder, settings = tmp_path, reference.settings
    incomplete = shutil.copytree(reference.output, folder / "incomplete")
    (incomplete / SHARDS[2]).unlink()
    damaged = shutil.copytree(reference.output, folder / "damaged")
    rows = (damaged / SHARDS[1]).read_text().splitlines(keepends=True)
    (damaged / SHARDS[1]).write_text(
        "".join([*rows[:2], rows[2].replace('"tokens": [', '"tokens": [9999, '), *rows[3:]])
    )
    words = make_hf_tokenizer(folder / "words", vocab_size=280)
    rows = (reference.folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "fewer.jsonl").write_text("".join(rows[:-1]))
    [greedy] = run_tool(reference.folder, folder / "greedy", "rollout.temperature=0")
    assert greedy.status == 0
    student = {**settings, "run": {"directory": str(folder / "run"), "seed": 7}}
    cases: list[tuple[list[str], str | None, str | None]] = [
        ([], None, None),
        (["rollout.responses=/none"], "rollout.responses: /none: does not exist; give a folder that", None),
        ([f"rollout.responses={incomplete}"], f"rollout.responses: {incomplete}: has 3 of 4 shards; run tools", None),
        (
            [f"rollout.responses={damaged}"],
            f"rollout.responses: {damaged / SHARDS[1]} line 3: field 'tokens' holds 9999, which is no token id below",
            None,
        ),
        ([f"data.train={folder / 'fewer.jsonl'}"], "other settings: the data (rows, template or lengths of p", None),
        (["data.template=none"], "other settings: the data (rows, template or lengths of prompts) differ", None),
        (["teacher.init.layers=[0,1]"], None, "come from another model than the run's teacher: the teacher /"),
        (["objective.estimator=sampled"], None, None),
        (
            ["teacher.init.layers=[0,1]", "objective.estimator=sampled"],
            "was generated by another model, ",
            None,
        ),
        (
            [f"rollout.responses={folder / 'greedy'}", "objective.estimator=sampled"],
            "was generated with temperature 0.0, but objective.estimator: sampled needs the teacher's own",
            None,
        ),
        ([f"rollout.responses={folder / 'greedy'}"], None, "were generated with temperature 0.0: their states are"),
        (["rollout.responses=/none", "objective.beta=0"], None, None),
    ]  # fmt: skip
    fixed = ["rollout.off_policy=file", f"rollout.responses={reference.output}"]
    configs = [write_config(folder, student, *fixed, *overrides) for overrides, _, _ in cases]
    [said] = run_distributed(attempt, 1, configs)
    for (overrides, error, warning), (found, warnings) in zip(cases, said, strict=True):
        assert (found is None) == (error is None), (overrides, found)
        assert error is None or error in str(found), overrides
        assert len(warnings) == (warning is not None), (overrides, warnings)
        assert warning is None or warning in warnings[0], overrides
    other = {
        **student,
        "data": {**settings["data"], "tokenizer": str(words)},
        "teacher": {"architecture": ARCHITECTURE},
    }
    other["student"] = {"architecture": ARCHITECTURE}
    [[(found, _)]] = run_distributed(attempt, 1, [write_config(folder, other, *fixed)])
    assert "other settings: the tokenizer and the data (rows, template or" in str(found)


ARCHITECTURE = {
    "model_type": "llama", "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["rollout.temperature=0.5"],
            "{0}: holds responses of other settings (sampling.temperature 1.0 -> 0.5); use those, or choose",
        ),
        (
            ["--shard-size", "2"],
            "{0}: holds responses of other settings (shard_size 3 -> 2); use those, or choose another --output",
        ),
        (["run.seed=8", "--role", "student"], "{0}: holds responses of other settings (model.hash "),
        (["--output", "/dev/null/out"], "/dev/null/out: cannot be written (Not a directory); choose another --output"),
        (["--output", "{1}"], "{1}: holds out and no header.json; choose an empty folder for --output"),
        (["data.train=/none.jsonl"], "data.train: /none.jsonl does not exist"),
        (["teacher.path=/none"], "teacher.path: there is no folder /none"),
        (["--shard-size", "0"], "--shard-size: must be at least 1, not 0"),
        (["--role", "critic"], "command line: argument --role: invalid choice: 'critic'"),
        (["rollout.temprature=1"], "command line: rollout.temprature: unknown key"),
        (["parallel.tensor_model_parallel_size=2"], "parallel: 1 rank(s) cannot be split into groups of 2"),
    ],
)
def test_mistakes_are_one_line(reference: Reference, tmp_path: Path, arguments: list[str], says: str) -> None:
    """In a process of its own: one that has had a process group must not be forked from again."""
    output = shutil.copytree(reference.output, tmp_path / "out")
    before = sorted(path.name for path in output.iterdir())
    fixed = ["--config", str(reference.folder / "run.yaml"), "--output", str(output), "--shard-size", "3"]
    filled = [argument.replace("{1}", str(tmp_path)) for argument in arguments]
    [ended] = run_distributed(run_rank, 1, [*fixed, f"rollout.samples_per_prompt={SAMPLES}", *filled], None)
    assert ended.status == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: " + says.replace("{0}", str(output)).replace("{1}", str(tmp_path)))
    assert ended.stderr.count("\n") == 1
    assert sorted(path.name for path in output.iterdir()) == before
