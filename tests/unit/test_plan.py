"""The dry run: its world, its parameters and memory against formulas, its text and its errors."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_amd.config import Config, build_section
from megatron_amd.distributed.fake import LiveBytes, fake_world, on_meta
from megatron_amd.errors import InputError
from megatron_amd.training.plan import RunPlan, describe, describe_plan, plan_run, rank_groups

# Megatron-Core calls collectives by their former names.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch.distributed")

LLAMA = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-tied": {**LLAMA, "tie_word_embeddings": True},
    "qwen2": {**LLAMA, "model_type": "qwen2"},
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 300, "n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 2048,
    },
}  # fmt: skip
T5 = {
    "model_type": "t5", "vocab_size": 300, "d_model": 64, "d_kv": 12, "d_ff": 96, "num_layers": 2,
    "num_decoder_layers": 3, "num_heads": 4, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
STUDENT = {**LLAMA, "hidden_size": 32, "num_hidden_layers": 2, "tie_word_embeddings": True}
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]


def make_config(tensor: int = 1, pipeline: int = 1, **sections: Any) -> Config:
    settings = {
        "teacher": {"architecture": LLAMA},
        "student": {"architecture": STUDENT},
        "data": {"max_prompt_length": 24},
        "rollout": {"max_response_length": 8},
        **sections,
    }
    settings["parallel"] = {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        **sections.get("parallel", {}),
    }
    return build_section(Config(), settings, source="test", where="")


def whole_parameters(plan: RunPlan, role: str) -> int:
    return sum(stage.roles[role].whole_parameters for stage in plan.stages)


# The fake world.


@pytest.mark.parametrize(("tensor", "pipeline", "data"), [(1, 1, 1), (2, 1, 3), (2, 3, 2), (4, 2, 1)])
def test_groups_are_those_that_megatron_makes(tensor: int, pipeline: int, data: int):
    config = make_config(tensor, pipeline)
    groups = rank_groups(tensor, pipeline, data)
    for rank in range(tensor * pipeline * data):
        with fake_world(config, tensor * pipeline * data, rank) as layout:
            for kind, group in (
                ("tensor", layout.groups.tp),
                ("data", layout.groups.dp),
                ("pipeline", layout.groups.pp),
            ):
                assert [g for g in groups[kind] if rank in g] == [dist.get_process_group_ranks(group)]


def test_a_fake_world_leaves_no_trace():
    """Also when something fails inside."""
    names = [(F, "scaled_dot_product_attention"), (F, "rms_norm"), (torch.Tensor, "type"), (dist, "all_gather_object")]
    before = [getattr(owner, name) for owner, name in names]
    state = torch.get_rng_state()

    def fail() -> None:
        with fake_world(make_config(), 8, 5), on_meta():
            assert torch.zeros(3, device="cpu").is_meta
            assert torch.tensor([1.0]).is_meta
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [getattr(owner, name) for owner, name in names] == before
    assert not dist.is_initialized()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.zeros(3).device.type == "cpu"


def test_collectives_of_a_fake_world_keep_shapes():
    with fake_world(make_config(tensor=4), 8, 1) as layout, on_meta():
        ours, all_of_them = torch.ones(3, 5), torch.empty(12, 5)
        dist.all_gather_into_tensor(all_of_them, ours, group=layout.groups.tp)
        dist.all_reduce(ours, group=layout.groups.tp)
        gathered: list[Any] = [None] * 4
        dist.all_gather_object(gathered, "mine", group=layout.groups.tp)
    assert all_of_them.is_meta
    assert gathered == ["mine"] * 4


def test_live_bytes_counts_storages_once_and_forgets_the_dead():
    old = torch.zeros(1000)
    with LiveBytes() as live:
        old.add_(1.0).view(10, 100)
        assert live.now == 0
        made = old.double()
        view = made.view(10, 100)
        assert live.now == 8000
        del made
        assert live.now == 8000
        view = view.sum()
        assert (live.now, live.peak) == (8, 8008)
        weight = torch.ones(1000, requires_grad=True)
        loss = (weight.exp() * weight).sum()
        kept = live.now
        torch.autograd.backward(loss)
    assert kept == 8 + 4 + 2 * 4000  # the weight and its exponential, which the backward pass needs
    assert live.now == 8 + 4 + 2 * 4000  # the weight and its gradient
    del view


# Parameters.


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
@pytest.mark.parametrize("kind", MODELS)
def test_parameters_are_those_of_the_architecture(kind: str, tensor: int, pipeline: int):
    plan = plan_run(make_config(tensor, pipeline, teacher={"architecture": MODELS[kind]}), None)
    models = plan.models
    assert whole_parameters(plan, "teacher") == models.teacher.count_parameters(models.padded_vocab_size)
    assert whole_parameters(plan, "student") == models.student.count_parameters(models.padded_vocab_size)


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_parameters_of_critics(tensor: int, pipeline: int):
    def critic(features: str) -> tuple[int, RunPlan]:
        plan = plan_run(make_config(tensor, pipeline, critic={"features": features}), None)
        return whole_parameters(plan, "critic"), plan

    count, plan = critic("own")
    rows = plan.models.padded_vocab_size
    assert plan.models.critic_trunk is not None
    assert count == plan.models.critic_trunk.count_parameters(rows) + rows * 32
    assert critic("teacher")[0] == 2 * rows * 64
    assert critic("pair")[0] == 2 * rows * (64 + 32)


@pytest.mark.parametrize(("tensor", "pipeline"), [*LAYOUTS, (1, 3), (2, 5)])
@pytest.mark.parametrize("features", ["own", "pair"])
def test_parameters_of_t5(tensor: int, pipeline: int, features: str):
    models: dict[str, Any] = {
        "teacher": {"architecture": T5},
        "student": {"architecture": {**T5, "d_model": 32, "num_decoder_layers": 5, "tie_word_embeddings": True}},
    }
    plan = plan_run(make_config(tensor, pipeline, **models, critic={"features": features}), None)
    rows = plan.models.padded_vocab_size
    teacher, student = (model.count_parameters(rows) for model in (plan.models.teacher, plan.models.student))
    assert whole_parameters(plan, "teacher") == teacher
    assert whole_parameters(plan, "student") == student
    assert whole_parameters(plan, "critic") == (student + 2 * rows * 32 if features == "own" else 2 * rows * (64 + 32))
    layers = [stage.roles["teacher"].layers for stage in plan.stages]
    assert layers[0] is not None
    assert layers[-1] is not None
    assert (layers[0][0], layers[-1][1]) == (0, 4)
    assert "teacher" in describe(plan)


def test_layers_of_stages():
    plan = plan_run(make_config(pipeline=2), None)
    assert [stage.roles["teacher"].layers for stage in plan.stages] == [(0, 1), (2, 3)]
    assert [stage.roles["student"].layers for stage in plan.stages] == [(0, 0), (1, 1)]
    assert [stage.roles["critic"].layers for stage in plan.stages] == [None, None]


# Memory.


@pytest.mark.parametrize("data", [1, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_gradients_and_optimizer_states(precision: str, data: int):
    """bf16: 2 bytes a weight, 4 a gradient, 12/DP of main weight and moments. fp32: 4, 4 and 8/DP."""
    wide = {**LLAMA, "hidden_size": 256, "intermediate_size": 512}
    config = make_config(student={"architecture": wide}, training={"precision": precision})
    plan = plan_run(config, data)
    (stage,) = plan.stages
    weight, states = (2, 12) if precision == "bf16" else (4, 8)
    for role in ("student", "critic"):
        use = stage.roles[role]
        assert use.weights == pytest.approx(weight * use.parameters, rel=0.01)  # buffers are padded
        assert use.gradients == pytest.approx(4 * use.parameters, rel=0.01)
        assert use.optimizer == pytest.approx(states * use.parameters / data, rel=0.01)
    teacher = stage.roles["teacher"]
    assert (teacher.weights, teacher.gradients, teacher.optimizer) == (weight * teacher.parameters, 0, 0)
    assert stage.held == sum(use.held for use in stage.roles.values())


def test_gradients_in_bf16_and_an_optimizer_that_is_not_distributed():
    training = {"ddp": {"grad_reduce_in_fp32": False, "use_distributed_optimizer": False}}
    use = plan_run(make_config(training=training), 4).stages[0].roles["student"]
    assert use.gradients == pytest.approx(2 * use.parameters, rel=0.01)
    assert use.optimizer == pytest.approx(12 * use.parameters, rel=0.01)


def test_key_value_cache_and_hidden_states():
    """Keys and values of all rows, positions and layers of a stage; N (H_student + H_teacher) numbers on the last."""
    plan = plan_run(make_config(2, 2), 8)
    first, last = plan.stages
    rows, positions, layers, groups, width = 4, 24 + 8, 2, 1, 16  # the teacher's; 8 prompts over 2 replicas
    for stage in plan.stages:
        assert stage.parts["rollout"]["key-value cache"] == 2 * 2 * rows * positions * layers * groups * width
    states = 2 * rows * 8
    assert last.parts["student step"]["hidden states"] == states * (64 + 32) * 2
    assert first.parts["student step"]["hidden states"] == 0
    assert first.parts["critic step"]["heads and loss"] == 0
    assert last.parts["critic step"]["heads and loss"] > 0


def test_rollouts_in_parts_take_less():
    whole, parts = (plan_run(make_config(rollout=r), None).stages[0].parts["rollout"] for r in ({}, {"batch_size": 2}))
    assert parts["key-value cache"] * 4 == whole["key-value cache"]
    assert parts["activations"] < whole["activations"]


def test_long_evaluations_count():
    plain = plan_run(make_config(), None).stages[0]
    held_out = plan_run(make_config(evaluation={"prompts": 64, "max_response_length": 8}), None).stages[0]
    for part, kind in (("rollout", "key-value cache"), ("hidden pass", "hidden states")):
        assert held_out.parts[part][kind] == 8 * plain.parts[part][kind]


def activations(*, tensor: int = 1, prompts: int = 4, **sections: Any) -> list[int]:
    """Bytes on the two stages in a student step on micro-batches of two sequences of 256 tokens; 4 layers, H 256."""
    student = {"architecture": {**MODELS["gpt2"], "n_embd": 256}, "transformer": sections.pop("transformer", {})}
    config = make_config(
        tensor,
        2,
        student=student,
        training={"global_batch_size": prompts, "micro_batch_size": 2},
        objective={"name": "kl", "beta": 1.0},
        data={"max_prompt_length": 192},
        rollout={"max_response_length": 64},
        **sections,
    )
    return [stage.parts["student step"]["activations"] for stage in plan_run(config, None).stages]


def test_activations_are_those_of_the_formula():
    """Korthikanti et al. 2022, "Reducing activation recomputation", table 2: a layer keeps s b h (34 + 5 a s / h).

    In bytes. Without dropout two of the 34 (its masks) are not there, and fused attention keeps no scores: 32 remain.
    On the first of two stages two micro-batches are in flight where there are as many, on the last always one.
    """
    one, two, three = (activations(prompts=prompts) for prompts in (2, 4, 6))
    s, b, h, layers = 256, 2, 256, 2
    assert two[0] - one[0] == pytest.approx(32 * s * b * h * layers, rel=0.1)
    assert three == two
    assert two[1] == one[1]


def test_recomputation_and_sequence_parallelism_take_less():
    plain = activations(tensor=2)
    split = activations(tensor=2, parallel={"sequence_parallel": True})
    full = activations(
        tensor=2,
        transformer={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    )
    assert split[0] < plain[0]
    assert full[0] < plain[0]


# Text.


def test_every_size_is_in_the_text(capsys: pytest.CaptureFixture):
    plan = plan_run(make_config(2, 2, parallel={"sequence_parallel": True}), 8)
    text = describe(plan)
    assert max(map(len, text.splitlines())) <= 120
    assert text == "\n".join(line.rstrip() for line in text.splitlines())
    assert "8 = tensor 2 x pipeline 2 x data 2" in text
    assert "{0-1} {2-3} {4-5} {6-7}" in text
    assert "8 = 2 replicas x 4" in text
    for line in ("teacher (llama)", "student (llama)", "critic (pair)", "held all the time", "GiB at the peak"):
        assert line in text
    for stage in plan.stages:
        assert stage.peak == stage.held + max(sum(part.values()) for part in stage.parts.values())
    assert capsys.readouterr().out == ""


def test_many_stages_are_shown_below_each_other():
    deep = {**LLAMA, "num_hidden_layers": 16}
    text = describe_plan(make_config(1, 16, teacher={"architecture": deep}, student={"architecture": deep}), None)
    assert max(map(len, text.splitlines())) <= 120
    assert [f"stage {stage}" in text for stage in range(17)] == [True] * 16 + [False]


@pytest.mark.parametrize(
    "objective",
    [{"name": "kl", "beta": 0.0}, {"name": "sft", "beta": 1.0}, {"name": "tv", "beta": 1.0}, {"critic_steps": 3}],
    ids=str,
)
def test_other_objectives(objective: dict[str, Any]):
    plan = plan_run(make_config(pipeline=2, objective=objective), None)
    amm = objective.get("name", "amm") == "amm"
    assert ("critic" in plan.stages[0].roles) == ("critic (pair)" in describe(plan)) == amm
    assert plan.batch.off_policy == (0 if objective.get("beta") == 0 else 8)
    assert plan.batch.on_policy == (0 if objective.get("beta") == 1 else 8)


@pytest.mark.parametrize(("kind", "source"), [("teacher", "the teacher"), ("data", "the data"), ("file", "files")])
def test_only_a_teacher_that_speaks_needs_a_cache(kind: str, source: str):
    """With fewer layers the student's own rollouts take less."""
    rollout = {"off_policy": kind, "responses": "no/such/folder", "max_response_length": 16}
    student = {"architecture": {**LLAMA, "num_hidden_layers": LLAMA["num_hidden_layers"] // 2}}
    config = make_config(student=student, rollout=rollout, data={"response_field": "answer"})
    plan = plan_run(config, None)
    assert f"off-policy (from {source})" in describe(plan)
    smaller = plan_run(dataclasses.replace(config, teacher=config.student), None)
    caches = [p.stages[0].parts["rollout"]["key-value cache"] for p in (plan, smaller)]
    assert caches[0] == (2 if kind == "teacher" else 1) * caches[1]


def test_fp8_is_planned_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch):
    """On a login node. A launched run must have what it needs."""
    config = make_config(training={"precision": "fp8"})
    if torch.cuda.is_available():
        pytest.skip("here it may be able to run")
    assert "fp8" in describe_plan(config, None)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(InputError, match="training.precision: fp8 cannot be used"):
        describe_plan(config, None)


def test_under_torchrun_the_world_is_torchruns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert plan_run(make_config(tensor=2), None).world_size == 4
    assert not dist.is_initialized()


# Errors.


@pytest.mark.parametrize(
    ("sections", "world_size", "message"),
    [
        ({"tensor": 2}, 3, "parallel: 3 rank"),
        ({}, 0, "--world-size: must be at least 1"),
        ({"training": {"global_batch_size": 6}}, 4, "training.global_batch_size: 6 prompts cannot be shared by 4"),
        ({"evaluation": {"prompts": 2}}, 4, "evaluation.prompts: 2 cannot be shared by 4"),
        ({"tensor": 8}, None, "student: its 4 attention heads"),
        ({"pipeline": 4}, None, "student: its 2 layers"),
        ({"data": {"max_prompt_length": 4096}}, None, "student: takes 2048 positions"),
        ({"training": {"ddp": {"nonsense": 1}}}, None, "training.ddp.nonsense"),
        ({"warmup": {"optim": {"optimizer": {"nonsense": 1}}}}, None, "warmup.optim.optimizer.nonsense"),
        ({"student": {"architecture": STUDENT, "transformer": {"nonsense": 1}}}, None, "student.transformer.nonsense"),
        ({"training": {"precision": "fp8", "fp8": {"nonsense": 1}}}, None, "training.fp8.nonsense"),
        ({"teacher": {"path": "/no/such/folder"}}, None, "teacher.path: there is no folder"),
        ({"teacher": {"architecture": {"model_type": "bloom"}}}, None, "model_type 'bloom' is not supported"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_a_start_would_find_wrong(sections: dict[str, Any], world_size: int | None, message: str):
    with pytest.raises(InputError) as caught:
        describe_plan(make_config(**sections), world_size)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not dist.is_initialized()


@pytest.mark.e2e
def test_70b_on_64_ranks_takes_seconds_and_no_memory(tmp_path: Path):
    """From config.json files alone, by the command line; a 70B model in bf16 would be 131 GiB."""
    sizes = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072, "model_type": "llama"}
    teacher = {**sizes, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    student = {**sizes, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    for name, heads, model in (("teacher", 64, teacher), ("student", 32, student)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**model, "num_attention_heads": heads}))
    program = (
        "import resource, sys; from megatron_amd.train import main; status = main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(status)"
    )
    arguments = [
        "--dry-run", "--world-size", "64", f"teacher.path={tmp_path}/teacher", f"student.path={tmp_path}/student",
        "parallel.tensor_model_parallel_size=8", "parallel.pipeline_model_parallel_size=4",
        "parallel.sequence_parallel=true", "training.global_batch_size=64",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "64 = tensor 8 x pipeline 4 x data 2" in done.stdout
    assert "70.566 B" in done.stdout
    assert "Warning" not in done.stderr
    assert int(done.stderr.splitlines()[-1]) < 1.5 * 2**20, "KiB"
