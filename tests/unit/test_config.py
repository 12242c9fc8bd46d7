"""The configuration: what is accepted, what each mistake says, and that nothing gets lost on the way."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import get_args

import pytest

from megatron_amd.config import Config, ObjectiveName, config_to_dict, config_to_yaml, describe_fields, load_config
from megatron_amd.errors import InputError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def setting(config: Config, name: str) -> object:
    """The value at a dotted name, as YAML would hold it."""
    return functools.reduce(lambda node, part: node[part], name.split("."), config_to_dict(config))


REUSE = ("objective.policy_gradient=per_step", "rollout.reuse.mode=replay")


def test_defaults_are_a_valid_run():
    assert load_config(None) == Config()


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "{}", "critic:\n  # optim: {}\n"])
def test_an_empty_file_or_section_leaves_the_defaults(tmp_path, text):
    assert load_config(write(tmp_path, text)) == Config()


def test_values_of_every_type_are_read(tmp_path):
    text = """
    student:
      path: models/student
      init: {layers: [0, 2, 4]}
      transformer: {recompute_granularity: selective}
    parallel: {sequence_parallel: true, tensor_model_parallel_size: 2}
    training: {steps: 1.0e+3, optim: {adam_betas: [0.8, 0], learning_rate: 1}}
    critic: {tightness_threshold: 0.5, prior: log_ratio}
    """
    config = load_config(write(tmp_path, text))
    assert config.student.init.layers == (0, 2, 4)
    assert config.student.transformer == {"recompute_granularity": "selective"}
    assert config.parallel.sequence_parallel is True
    assert config.training.steps == 1000
    assert isinstance(config.training.steps, int)
    assert config.training.optim.adam_betas == (0.8, 0.0)
    assert isinstance(config.training.optim.learning_rate, float)
    assert config.critic.tightness_threshold == 0.5
    assert config.critic.prior == "log_ratio"


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().run.seed = 3


# ---- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("1E-5", 1e-5), ("3e0", 3.0), ("+1.5e-3", 1.5e-3), (".5e-1", 0.05), ("2e-6", 2e-6)],
)
def test_exponents_need_no_point(tmp_path, text, value):
    path = write(tmp_path, f"training: {{optim: {{learning_rate: {text}}}}}")
    assert load_config(path).training.optim.learning_rate == value


@pytest.mark.parametrize("text", ['"1e-5"', "'1e-5'", "e5", "1e", "v1e5", "1e5x"])
def test_quoted_and_other_scalars_stay_text(tmp_path, text):
    assert load_config(write(tmp_path, f"run: {{directory: {text}}}")).run.directory == text.strip("\"'")


def test_yaml_anchors_and_merges_work(tmp_path):
    text = "training: {optim: &o {learning_rate: 2e-5, clip_grad: 0.5}}\nwarmup: {optim: {<<: *o, clip_grad: 2}}"
    config = load_config(write(tmp_path, text))
    assert config.warmup.optim.learning_rate == 2e-5
    assert config.warmup.optim.clip_grad == 2.0


@pytest.mark.parametrize(
    "text", ["a: {b: {}}\na: {}", "run:\n  seed: 1\n  seed: 2", "student: {transformer: {x: 1, x: 1}}"]
)
def test_a_key_written_twice_is_an_error_with_its_line(tmp_path, text):
    with pytest.raises(InputError, match=r"line \d+: key '\w+' is written twice"):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {seed: 1", "line 1"),
        ("run:\n\tseed: 1", "line 2"),
        ("run: !!python/name:os.system x", "could not determine a constructor"),
        ("a: 1\n---\nb: 2", "another document"),
        ("run: \x00", "is not valid YAML"),
        ("- 1\n- 2", "must be a mapping of sections"),
        ("just text", "must be a mapping of sections"),
        ("0", "must be a mapping of sections"),
        ("[]", "must be a mapping of sections"),
        ("run: 3", "run: must be a section with named fields, not 3"),
        ("critic: {optim: [1]}", r"critic.optim: must be a section with named fields, not \[1\]"),
    ],
)
def test_bad_yaml_is_one_line_that_names_the_file(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(InputError, match=message) as raised:
        load_config(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"absent.yaml: cannot be read \(No such file or directory\)"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00run")
    with pytest.raises(InputError, match="binary.yaml: is not UTF-8 text"):
        load_config(tmp_path / "binary.yaml")


# ---- unknown keys and wrong types


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.betta=1", "objective.betta: unknown key; did you mean objective.beta?"),
        ("trainning.steps=1", "trainning: unknown key; did you mean training?"),
        ("critic.optim.lr=1", "critic.optim.lr: unknown key; known here: learning_rate, min_learning_rate,"),
        ("student.init.layer=[0]", "student.init.layer: unknown key; did you mean student.init.layers?"),
        ("zzz=1", "zzz: unknown key; known here: run, parallel, student"),
    ],
)
def test_unknown_keys_name_the_nearest(override, message):
    with pytest.raises(InputError, match=re.escape(message)):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps=1.5", "training.steps: must be integer, not 1.5"),
        ("training.steps=true", "training.steps: must be integer, not True"),
        ("training.steps=ten", "training.steps: must be integer, not 'ten'"),
        ("training.steps=", "training.steps: must be integer, not None"),
        ("objective.beta=half", "objective.beta: must be number, not 'half'"),
        ("objective.beta=.inf", "objective.beta: must be number, not inf"),
        ("objective.beta=.nan", "objective.beta: must be number, not nan"),
        ("objective.beta=false", "objective.beta: must be number, not False"),
        ("parallel.sequence_parallel=1", "parallel.sequence_parallel: must be true or false, not 1"),
        ("run.directory=2024", "run.directory: must be text, not 2024"),
        (
            "objective.name=AMM",
            f"objective.name: must be {' | '.join(get_args(ObjectiveName))}, not 'AMM'",
        ),
        ("critic.prior=false", "critic.prior: must be none | log_ratio, not False"),
        ("student.init.layers=3", "student.init.layers: must be list of integer, not 3"),
        ("student.init.layers=[0,a]", "student.init.layers[1]: must be integer, not 'a'"),
        ("training.optim.adam_betas=[0.9]", "training.optim.adam_betas: must be list of 2 number, not [0.9]"),
        ("student.transformer=[1]", "student.transformer: must be mapping, not [1]"),
        ("critic.tightness_threshold=x", "critic.tightness_threshold: must be number, not 'x'"),
    ],
)
def test_wrong_types_say_what_is_wanted(override, message):
    with pytest.raises(InputError, match=re.escape(message)):
        load_config(None, [override])


# ---- values that cannot be right


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.beta=1.1"], "objective.beta: must be in [0, 1], not 1.1"),
        (["objective.beta=-0.1"], "objective.beta: must be in [0, 1], not -0.1"),
        (["warmup.beta=2"], "warmup.beta: must be in [0, 1], not 2"),
        (["objective.gamma=0"], "objective.gamma: must be in (0, 1], not 0"),
        (["rollout.top_p=0"], "rollout.top_p: must be in (0, 1], not 0"),
        (["objective.critic_steps=-1"], "objective.critic_steps: must be zero or more, not -1"),
        (["run.seed=-1"], "run.seed: must be zero or more"),
        (["rollout.temperature=-1"], "rollout.temperature: must be zero or more"),
        (["critic.optim.learning_rate=-1"], "critic.optim.learning_rate: must be zero or more"),
        (["warmup.optim.clip_grad=-1"], "warmup.optim.clip_grad: must be zero or more"),
        (["training.global_batch_size=0"], "training.global_batch_size: must be at least 1, not 0"),
        (["data.limit=0"], "data.limit: must be at least 1"),
        (["training.head_chunk_tokens=0"], "training.head_chunk_tokens: must be at least 1"),
        (["rollout.batch_size=0"], "rollout.batch_size: must be at least 1"),
        (["critic.bound=0"], "critic.bound: must be positive, not 0"),
        (
            ["rollout.cache_tokens=60", "data.max_prompt_length=40", "rollout.max_response_length=21"],
            "rollout.cache_tokens: 60 positions have no room",
        ),
        (
            [
                "rollout.cache_tokens=99",
                "data.max_prompt_length=40",
                "rollout.max_response_length=10",
                "rollout.teacher_share=0.1",
                "objective.name=kl",
            ],
            "rollout.cache_tokens: 99 positions have no room for data.max_prompt_length and the longest response of "
            "training (of both models with teacher_share) or evaluation, 100 tokens; raise",
        ),
        (
            ["rollout.min_response_length=300"],
            "rollout.min_response_length: must not exceed rollout.max_response_length 256, but is 300",
        ),
        (["rollout.min_p=1.5"], "rollout.min_p: must be in [0, 1]"),
        (["objective.skew=0.0001"], "objective.skew: must be in [0.001, 0.999]"),
        (["parallel.timeout_minutes=0"], "parallel.timeout_minutes: must be positive"),
        (["training.optim.adam_betas=[1,0.5]"], "training.optim.adam_betas: must be in [0, 1), not [1, 0.5]"),
        (["parallel.virtual_pipeline_model_parallel_size=2"], "is not supported yet"),
        (["parallel.context_parallel_size=2"], "is not supported yet"),
        (["parallel.expert_model_parallel_size=2"], "mixture-of-experts is not supported yet"),
        (["parallel.sequence_parallel=true"], "needs parallel.tensor_model_parallel_size > 1"),
        (["warmup.name=amm"], "warmup.name: must not be amm"),
        (["objective.name=sft"], "objective.beta: must be 1 for sft"),
        (["warmup.steps=1", "warmup.beta=0.5"], "warmup.beta: must be 1 for sft"),
        (
            ["objective.estimator=sampled", "rollout.off_policy=data", "data.response_field=r"],
            "sampled needs rollout.off",
        ),
        (
            ["rollout.temperature=0.7"],
            "rao_blackwell is unbiased only for sequences of the student as it is, that is with rollout.temperature 1",
        ),
        (["rollout.top_k=50", "objective.policy_gradient=reinforce"], "reinforce is unbiased only"),
        (["rollout.top_p=0.9"], "that is with rollout.top_p 1; set that, or policy_gradient: per_step"),
        (["rollout.teacher_share=0.2", "rollout.min_p=0.1"], "with rollout.min_p 0 and rollout.teacher_share 0; set"),
        (["rollout.teacher_share=1.2"], "rollout.teacher_share: must be in [0, 1], not 1.2"),
        (["rollout.reuse.mode=steps"], "that is with rollout.reuse.mode none; set that"),
        ([*REUSE, "objective.resample=true"], "objective.resample: draws a fresh batch for each critic step"),
        ([*REUSE, "rollout.reuse.capacity=7"], "rollout.reuse.capacity: 7 does not hold one iteration's 8 sequences"),
        (
            ["objective.policy_gradient=per_step", "rollout.reuse.mode=adaptive"],
            "adaptive follows the held-out distance and alternates with fixed sequences; set evaluation.prompts",
        ),
        (
            ["objective.beta=1", "rollout.reuse.mode=adaptive", "evaluation.prompts=8", "evaluation.interval=1"],
            "adaptive is about the student's sequences, of which objective.beta 1 takes none",
        ),
        (
            [*REUSE, "rollout.reuse.mode=adaptive", "evaluation.prompts=8", "evaluation.interval=1"],
            "adaptive alternates with fixed sequences; set rollout.off_policy: data or file, or use replay",
        ),
        (['rollout.stop_strings=["a", ""]'], "rollout.stop_strings: must not hold an empty text"),
        (
            ['rollout.stop_strings="\\n\\n"'],
            r"""rollout.stop_strings: must be list of text, not '\n\n'; write ["\n\n"]""",
        ),
        (["rollout.off_policy=data"], "data needs data.response_field or data.messages_field"),
        (["rollout.off_policy=file"], "rollout.off_policy: file needs rollout.responses, a folder"),
        (
            [
                "objective.estimator=sampled",
                "rollout.off_policy=file",
                "rollout.responses=x",
                "objective.teacher_temperature=2",
            ],
            "objective.estimator: sampled needs objective.teacher_temperature 1",
        ),
        (["objective.beta=0", "warmup.steps=1", "rollout.off_policy=data"], "data needs data.response_field"),
        (["evaluation.prompts=1", "data.train=x.jsonl"], "evaluation.prompts: needs data.evaluation"),
        (["student.path=x", "student.architecture={a: 1}"], "student: give path or architecture, not both"),
        (["critic.model.path=x", "critic.model.architecture={a: 1}"], "critic.model: give path or architecture"),
        (["student.architecture={a: 1}", "student.init.layers=[0]"], "student.init.layers: cuts a pretrained model"),
    ],
)
def test_values_out_of_range_and_impossible_combinations(overrides, message):
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        load_config(None, overrides)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.beta=0"],
        ["objective.beta=1", "rollout.temperature=0.7"],
        ["objective.policy_gradient=per_step", "rollout.top_k=50"],
        ["objective.name=kl", "rollout.top_p=0.9"],
        ["objective.name=sft", "objective.beta=1", "rollout.off_policy=data", "data.response_field=answer"],
        ["objective.beta=0", "rollout.off_policy=data"],
        ["objective.beta=0", "rollout.off_policy=file"],
        ["rollout.off_policy=file", "rollout.responses=x", "objective.estimator=sampled"],
        ["rollout.off_policy=data", "data.messages_field=messages"],
        ["warmup.beta=0.5"],
        [*REUSE, "rollout.reuse.capacity=8"],
        ["objective.beta=1", "rollout.reuse.mode=steps", "rollout.teacher_share=1"],
        ["objective.critic_steps=0", "training.steps=0", "training.optim.clip_grad=0"],
        ["parallel.sequence_parallel=true", "parallel.tensor_model_parallel_size=2"],
    ],
)
def test_what_is_next_to_a_mistake_is_accepted(overrides):
    load_config(None, overrides)


def test_a_config_built_in_code_is_checked_too():
    with pytest.raises(InputError, match=re.escape("objective.beta: must be in [0, 1]")):
        dataclasses.replace(Config(), objective=dataclasses.replace(Config().objective, beta=2.0))


# ---- overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("objective.beta=0", 0.0),
        ("objective.beta=0.0", 0.0),
        ("checkpoint.resume=false", False),
        ("checkpoint.resume=False", False),
        ("student.init.layers=[]", []),
        ("student.init.layers=[0, 2]", [0, 2]),
        ("student.transformer={}", {}),
        ("student.transformer={a: 0}", {"a": 0}),
        ("training.optim.learning_rate=3e-4", 3e-4),
        ("data.train=a=b.jsonl", "a=b.jsonl"),
        ("data.train='0'", "0"),
        ('run.directory=""', ""),
    ],
)
def test_overrides_are_yaml_values_falsy_ones_included(override, value):
    name = override.partition("=")[0]
    found = setting(load_config(None, [override]), name)
    assert found == value
    assert type(found) is type(value)


def test_an_override_can_name_a_key_of_a_mapping():
    config = load_config(None, ["student.transformer.recompute_granularity=full", "student.transformer.a=0"])
    assert config.student.transformer == {"recompute_granularity": "full", "a": 0}


def test_overrides_win_over_the_file_and_later_ones_over_earlier(tmp_path):
    path = write(tmp_path, "objective: {beta: 0.9, gamma: 0.5}\ncritic:\n")
    config = load_config(path, ["objective.beta=0.1", "objective.beta=0.2", "critic.bound=2"])
    assert (config.objective.beta, config.objective.gamma, config.critic.bound) == (0.2, 0.5, 2.0)


@pytest.mark.parametrize("text", ["null", "~", ""])
def test_null_unsets(tmp_path, text):
    path = write(tmp_path, "critic: {tightness_threshold: 0.5}\nstudent: {transformer: {a: 1}, init: {layers: [1]}}")
    names = ("critic.tightness_threshold", "student.transformer", "student.init.layers", "warmup")
    config = load_config(path, [f"{name}={text}" for name in names])
    assert config == Config()


@pytest.mark.parametrize("override", ["objective.beta", "=1", "", "--objective.beta 1"])
def test_an_override_without_a_name_and_an_equals_sign(override):
    with pytest.raises(InputError, match="is not section.field=value"):
        load_config(None, [override])


def test_an_override_below_a_value():
    with pytest.raises(InputError, match="'seed' is not a section"):
        load_config(None, ["run.seed=1", "run.seed.more=2"])


def test_an_override_with_bad_yaml_names_its_field():
    with pytest.raises(InputError, match=r"command line: student.init.layers, line 1: "):
        load_config(None, ["student.init.layers=[0,"])


# ---- defaults of sections


def test_a_partial_section_keeps_its_own_defaults(tmp_path):
    """critic.optim starts from other values than the class OptimConfig; naming one field must not lose them."""
    default = Config().critic.optim
    assert (default.learning_rate, default.decay) == (1e-4, "constant")
    for config in (
        load_config(write(tmp_path, "critic: {optim: {clip_grad: 0.3}}")),
        load_config(None, ["critic.optim.clip_grad=0.3"]),
    ):
        assert config.critic.optim == dataclasses.replace(default, clip_grad=0.3)
    for text in ("critic: {optim: null}", "critic: {optim: {}}", "critic: null"):
        assert load_config(write(tmp_path, text)).critic.optim == default


# ---- writing and describing


def test_a_config_survives_yaml(tmp_path):
    overrides = [
        "student.path='a: b'",
        "student.init.layers=[0,5]",
        "training.optim.learning_rate=1e-7",
        "training.optim.adam_betas=[0.5,0.25]",
        "critic.tightness_threshold=0.5",
        "student.transformer={note: '1e-5', eps: 1e-6, flag: false, nothing: null}",
        "data.system=\"line one\\nline 'two' é\"",
        "run.directory='007'",
    ]
    config = load_config(None, overrides)
    assert config.student.transformer == {"note": "1e-5", "eps": 1e-6, "flag": False, "nothing": None}
    assert load_config(write(tmp_path, config_to_yaml(config))) == config
    assert load_config(write(tmp_path, config_to_yaml(Config()))) == Config()


def leaf_names(section: object, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        name = prefix + field.name
        names += leaf_names(value, name + ".") if dataclasses.is_dataclass(value) else [name]
    return names


def test_describe_fields_covers_every_field_with_its_text_and_default():
    described = list(describe_fields())
    assert [name for name, *_ in described] == leaf_names(Config())
    assert len(described) > 100
    for name, kind, default, text in described:
        assert len(text) > 5, name
        assert text[-1] in ".)", name
        assert kind, name
        assert default == setting(Config(), name), name
    rows = {name: (kind, default) for name, kind, default, _ in described}
    assert rows["critic.optim.learning_rate"] == ("number", 1e-4)
    assert rows["training.optim.learning_rate"] == ("number", 1e-5)
    assert rows["student.init.layers"] == ("list of integer or unset", None)
    assert rows["training.optim.adam_betas"] == ("list of 2 number", [0.9, 0.95])


def test_what_the_command_line_breaks_is_not_the_files_fault(tmp_path: Path) -> None:
    """Also where a setting of the one does not go with a setting of the other, or is out of its range."""
    file = tmp_path / "run.yaml"
    file.write_text("objective: {beta: 0.5}\n")
    for override, message in (
        ("rollout.off_policy=file", "command line: rollout.off_policy: file needs rollout.responses"),
        ("rollout.top_p=1.5", "command line: rollout.top_p: must be in (0, 1]"),
        ("rollout.top_p=0.5", "command line: objective.policy_gradient: rao_blackwell is unbiased only"),
        ("rollout.stop_strings=#", "command line: rollout.stop_strings: must be list of text, not None; write a list"),
    ):
        with pytest.raises(InputError) as error:
            load_config(file, [override])
        assert str(error.value).startswith(message)
    file.write_text("rollout: {top_p: 1.5}\n")
    with pytest.raises(InputError, match=r"run\.yaml: rollout\.top_p: must be in"):
        load_config(file, ["run.seed=3"])
