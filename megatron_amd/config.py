"""Every setting of a run: frozen dataclasses, strict YAML, `section.field=value` overrides.

One YAML file per run. A key that does not exist is an error that names the nearest one that does. The docstring
under a field is its documentation: `--help` prints it. Symbols in parentheses are those of docs/algorithm.md.

Megatron-Core's own settings are not repeated here. They pass through `transformer` (fields of its
`TransformerConfig`), `optimizer` (its `OptimizerConfig`) and `ddp` (its `DistributedDataParallelConfig`).
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from megatron_amd.config_checks import check
from megatron_amd.config_yaml import apply_override, build_section, parse_yaml, type_name, write_yaml
from megatron_amd.errors import InputError

ObjectiveName = Literal["amm", "kl", "rkl", "js", "gjs", "skew_kl", "skew_rkl", "tv", "sft"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives and what makes it reproducible."""

    directory: str = "runs/amm"
    """Folder for checkpoints, TensorBoard events, evaluation tables and the exported student. Made if missing."""
    seed: int = 1234
    """Seed of everything random: initial weights, data order and sampling noise. Two runs with the same seed and
    settings sample the same tokens, whatever their parallel layout (fp32)."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the models are split. Data parallelism is what remains: world size / (tensor * pipeline)."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer (TP). Must divide the number of attention heads."""
    pipeline_model_parallel_size: int = 1
    """Consecutive groups of layers (PP). Must divide the number of layers of each model that has a trunk."""
    sequence_parallel: bool = False
    """Also split activations along the sequence between the tensor-parallel regions. Needs TP > 1."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Not supported yet: leave unset."""
    context_parallel_size: int = 1
    """Not supported yet: leave at 1."""
    expert_model_parallel_size: int = 1
    """Not supported yet: leave at 1 (mixture-of-experts models are refused)."""
    timeout_minutes: float = 10.0
    """How long a collective may wait for a missing rank before the job is ended, in minutes."""


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Where a model's first weights come from."""

    weights: Literal["pretrained", "random"] = "pretrained"
    """`pretrained` reads the safetensors beside `config.json`; `random` uses the sizes of the config alone."""
    layers: tuple[int, ...] | None = None
    """Keep only these layers of the folder's model, by index from 0: `[0, 2, 4]` cuts a three-layer student."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model: a Hugging Face folder or hub name, or sizes written out."""

    path: str | None = None
    """Folder or hub name with `config.json`, safetensors and tokenizer files. Families: Llama, Mistral, Qwen2, Qwen3,
    GPT-2, T5, mT5. No code from the folder is run."""
    architecture: dict[str, Any] | None = None
    """Instead of `path`: the contents of a Hugging Face `config.json`, for a model trained from scratch."""
    init: InitConfig = field(default_factory=InitConfig)
    """First weights."""
    transformer: dict[str, Any] = field(default_factory=dict)
    """Further fields of Megatron-Core's TransformerConfig, such as `recompute_granularity: selective`."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with a warm-up and a decay, for one trained role."""

    learning_rate: float = 1e-5
    """Peak learning rate."""
    min_learning_rate: float = 0.0
    """Learning rate at the end of the decay."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises linearly from 0."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay from the peak to `min_learning_rate`."""
    decay_steps: int | None = None
    """Optimizer steps until `min_learning_rate` is reached. Unset: the role's steps in this run."""
    weight_decay: float = 0.01
    """Decoupled weight decay; biases and norms are exempt."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's two moment estimates."""
    adam_eps: float = 1e-8
    """Added to Adam's denominator."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """Further fields of Megatron-Core's OptimizerConfig."""


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The two Q-value functions (f_1 on teacher states, f_2 on student states). Used by `objective.name: amm`."""

    features: Literal["own", "teacher", "pair"] = "pair"
    """What the two heads read. `own`: a trained trunk of the critic's own. `teacher`: the frozen teacher's final
    hidden states, so no trunk at all. `pair`: a difference of one head on the teacher's states and one on the
    student's, the nearest of the three to a useful critic before any training (docs/log.md)."""
    trunk: Literal["student", "teacher", "model"] = "student"
    """For `own`: which model the trunk starts from; `model` uses `critic.model`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """For `own` with `trunk: model`: the trunk."""
    head_init: Literal["lm_head", "zero", "random"] = "lm_head"
    """First weights of the heads: the LM heads of the models they read, zero, or normal noise."""
    head_scale: float = 0.25
    """Factor on heads started from LM heads; keeps tanh away from saturation."""
    center: bool = True
    """Subtract from a state's raw values their mean under (p+q)/2. The objective does not see a shift, tanh does."""
    prior: Literal["none", "log_ratio"] = "none"
    """`log_ratio` adds prior_scale * (ln p - ln q), detached, to the raw values. Ours, not the paper's: it makes the
    critic tight from the first step where there are too few states to learn one (docs/log.md)."""
    prior_scale: float = 1.0
    """Slope of the log-ratio prior (kappa)."""
    bound: float = 1.0
    """Largest |f| (c): f = c * tanh(raw). d_MM then lies in [-2c, 2c] per state."""
    squash: Literal["tanh", "none"] = "tanh"
    """`none` leaves f unbounded: for tests of linear critics; d_MM then means nothing across runs."""
    warmup_steps: int = 0
    """Critic-only steps before the student moves for the first time."""
    tightness_threshold: float | None = None
    """The student waits while the critic's tightness d_MM / (2 c d_TV) on fresh states is below this; unset: never."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=1e-4, decay="constant"))
    """The critic's own optimizer. It should learn faster than the student."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the student minimises."""

    name: ObjectiveName = "amm"
    """`amm`: adversarial moment matching. `kl`, `rkl`, `js`, `gjs`, `skew_kl`, `skew_rkl`, `tv`: step-wise distances
    between teacher and student. `sft`: cross-entropy on the off-policy responses."""
    gjs_weight: float = 0.1
    """Weight b of the teacher in `gjs`: b KL(p||m) + (1-b) KL(q||m), m = b p + (1-b) q. In [0.001, 0.999]; 0.5 is
    `js`."""
    skew: float = 0.1
    """Share lambda of the own distribution that `skew_kl` and `skew_rkl` mix into the other, in [0.001, 0.999]."""
    student_temperature: float = 1.0
    """The objective's q is softmax(logits / this). Gradients are not rescaled by its square."""
    teacher_temperature: float = 1.0
    """The objective's p is softmax(logits / this). Responses are sampled at `rollout.temperature` (student) and 1
    (teacher) all the same, and evaluation measures the models as they are."""
    beta: float = 0.5
    """Weight of the off-policy term (beta): L = beta * off + (1 - beta) * on. 1: teacher states only; 0: student
    states only. Which term beta multiplies is our choice."""
    gamma: float = 1.0
    """Discount per generated token (gamma), in (0, 1]."""
    critic_steps: int = 1
    """Critic ascent steps per student step (K). `amm` only; 0 keeps the critic as it starts."""
    estimator: Literal["full_vocabulary", "sampled"] = "full_vocabulary"
    """How the critic's moments are estimated: exact over the vocabulary at each state, or from the sampled token."""
    policy_gradient: Literal["rao_blackwell", "reinforce", "per_step"] = "rao_blackwell"
    """The student's on-policy gradient. `rao_blackwell`: exact over the next token, score function for the states.
    `reinforce`: score function alone, unbiased with about 3 times the variance. `per_step`: ignores that the states
    depend on the student; biased, low variance."""
    normalization: Literal["per_sequence", "per_token"] = "per_sequence"
    """Divide each term by the global batch's number of sequences (the paper's sum over t) or of response tokens."""
    resample: bool = False
    """Draw a fresh batch for each critic step. Otherwise the K critic steps and the student step share one batch."""


@dataclass(frozen=True, kw_only=True)
class WarmupConfig:
    """An easier objective before the main one: a student cut from a larger model must first speak."""

    steps: int = 0
    """Student steps of warm-up; 0: none. The main phase then starts with fresh optimizer moments."""
    name: ObjectiveName = "sft"
    """Any objective but `amm`."""
    beta: float = 1.0
    """As objective.beta, for the warm-up."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The student's optimizer during the warm-up."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts, and responses where the data has them."""

    train: str | None = None
    """A .jsonl, .json, .csv or .parquet file, a folder of such files, or a hub data set's name."""
    train_split: str = "train"
    """Split of a hub data set."""
    evaluation: str | None = None
    """Held-out prompts, in the same format; needed when evaluation.prompts > 0."""
    evaluation_split: str = "test"
    """Split of a hub data set for evaluation."""
    prompt_field: str = "prompt"
    """Column with the prompt text."""
    response_field: str | None = None
    """Column with the gold response; needed for rollout.off_policy: data."""
    messages_field: str | None = None
    """Instead of prompt_field: a column with chat messages [{role, content}, ...]. A last assistant turn is the
    gold response."""
    input_field: str | None = None
    """Column with an optional extra input for templates that have a place for it (alpaca)."""
    template: Literal["auto", "none", "chat", "alpaca", "chatml", "llama2"] = "auto"
    """How a prompt becomes text. `chat`: the tokenizer's own chat template. `auto`: `chat` when the tokenizer has
    one, else `none`."""
    system: str | None = None
    """System message put before every conversation; unset: what the template does by default."""
    tokenizer: str | None = None
    """Folder, hub name, or sentencepiece .model file. Unset: the teacher's folder."""
    max_prompt_length: int = 256
    """Longest prompt in tokens, template included."""
    on_long_prompt: Literal["error", "skip", "truncate"] = "error"
    """A longer prompt is an error that names its row, is skipped and counted, or loses tokens at its beginning."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row with a missing or mistyped field is an error that names it, or is skipped and counted."""
    shuffle: bool = True
    """A new order of the rows each epoch, drawn from run.seed."""
    limit: int | None = None
    """Use only the first so many rows."""


@dataclass(frozen=True, kw_only=True)
class ReuseConfig:
    """Generated sequences that serve more than one iteration. A student's own are stale from its next step on."""

    mode: Literal["none", "steps", "replay", "adaptive"] = "none"
    """`none`: each iteration generates its own. `steps`: a batch serves `steps` iterations. `replay`: some iterations
    generate (`fresh`), all draw from a buffer. `adaptive`: DistiLLM's schedule (Ko et al. 2024). An iteration learns
    from the student's sequences with a probability that rises by 0.1 when the held-out kl_off has risen, else from
    off-policy ones alone; of the former a share that falls from 1 to 0 over the main phase generates."""
    steps: int = 2
    """Iterations that a batch serves (`steps`)."""
    fresh: float = 0.5
    """Probability that an iteration generates, in (0, 1] (`replay`)."""
    capacity: int = 1000
    """Sequences of each kind that the buffer keeps, the newest, over all replicas (`replay`, `adaptive`)."""
    initial_probability: float = 0.0
    """First probability of learning from the student's sequences, in [0, 1] (`adaptive`)."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Sequences generated during training."""

    max_response_length: int = 256
    """Longest response in tokens, EOS included."""
    samples_per_prompt: int = 1
    """On-policy responses per prompt."""
    off_policy: Literal["teacher", "data", "file"] = "teacher"
    """Off-policy responses: generated by the teacher during training, the gold responses of the data, or those that
    tools/generate.py has written before."""
    responses: str | None = None
    """Folder written by tools/generate.py; needed for `off_policy: file`. Of several samples of a prompt, each epoch
    uses the next."""
    temperature: float = 1.0
    """Sampling temperature of student rollouts; 0 is greedy. Policy gradients are unbiased only at
    `objective.student_temperature` and with nothing cut off below."""
    top_k: int = 0
    """Sample the student's tokens among the k likeliest; 0: all."""
    top_p: float = 1.0
    """Sample the student's tokens among the likeliest whose probabilities reach p."""
    min_p: float = 0.0
    """Sample the student's tokens among those at least this many times as likely as the likeliest; 0: all."""
    min_response_length: int = 0
    """The student's EOS is not sampled before a response has this many tokens."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a response like EOS, student's and teacher's, with the token that completes them."""
    teacher_share: float = 0.0
    """Share of the teacher's distribution in the one that student rollouts are drawn from, token by token (MiniLLM's
    teacher-mixed sampling), in [0, 1]. The states are then not the student's own."""
    reuse: ReuseConfig = field(default_factory=ReuseConfig)
    """Several iterations on the same sequences."""
    batch_size: int | None = None
    """Most sequences in work at once per replica; a finished one makes room for the next. Unset: all of an
    iteration's."""
    pass_tokens: int = 1024
    """Tokens that go through a model together: one of each sequence being written, and pieces of prompts up to so
    many in all."""
    cache_tokens: int | None = None
    """Most positions per replica whose keys and values are kept, of both models where they are mixed, which bounds the
    caches' memory; fewer sequences are in work at once where each may grow long. Unset: no bound but batch_size."""
    look_interval: int | None = None
    """Tokens that each sequence is given between two looks of the host, so that a GPU need not wait for it after each;
    what was drawn after a sequence's end is dropped. Unset: 8 on a GPU, 1 on a CPU and with a pipeline."""
    cuda_graphs: bool = False
    """On a GPU, record the passes in which every sequence is being written as CUDA graphs and replay them. Not for FP8
    and T5. Tested on a CPU, where nothing is recorded; not yet run on a GPU, hence off."""
    release_memory: bool = False
    """On a GPU, give the memory of a generation's keys and values back to the driver after it. Otherwise PyTorch keeps
    it for what follows in the same process."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The loop."""

    steps: int = 100
    """Iterations of the main phase. Each ends with one student step, unless the student waits for the critic."""
    global_batch_size: int = 8
    """Prompts per iteration over all data-parallel ranks."""
    micro_batch_size: int = 4
    """Sequences per forward and backward pass on one rank. Changes memory and speed, never the result."""
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Arithmetic of the models. bf16 keeps fp32 main weights and gradients. fp8 needs Transformer Engine and a GPU
    of compute capability 8.9 or newer."""
    fp8: dict[str, Any] = field(default_factory=dict)
    """Megatron-Core's FP8 fields, such as {fp8: hybrid, fp8_recipe: tensorwise}."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer implementation. `auto`: Transformer Engine on a GPU when it can be imported, else `local`."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The student's optimizer in the main phase."""
    ddp: dict[str, Any] = field(default_factory=dict)
    """Further fields of Megatron-Core's DistributedDataParallelConfig."""
    head_chunk_tokens: int | None = None
    """Tokens per chunk in the fused head and objective; unset: as many as head_memory_mib allows, on a CPU at most
    512."""
    head_memory_mib: int = 512
    """Working set of a chunk in the fused head and objective, in MiB. Small chunks cost time: each reads and writes
    the heads' whole gradient."""
    compile_heads: bool = True
    """On a GPU, make kernels of the objective's element-wise part with torch.compile."""
    max_nonfinite_steps: int = 5
    """Steps in a row with a NaN or infinite gradient, each skipped and counted, after which the run stops."""
    log_interval: int = 1
    """Iterations between TensorBoard points and progress lines."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving, resuming and exporting. A checkpoint of one's own is trusted when it is loaded."""

    save_interval: int = 0
    """Iterations between checkpoints; 0: only at the end and on SIGINT or SIGTERM."""
    keep: int = 2
    """Newest checkpoints to keep."""
    resume: bool = True
    """Go on from the newest checkpoint in run.directory when there is one. Otherwise a directory that holds one is
    an error."""
    export: bool = True
    """Write the student as a Hugging Face folder, `run.directory`/student, at the end."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Distances between teacher and student on held-out prompts, before and after the main phase."""

    prompts: int = 0
    """Held-out prompts to measure on; 0: no evaluation."""
    interval: int = 0
    """Iterations of the main phase between further evaluations; 0: only before and after."""
    max_response_length: int = 64
    """Longest response in tokens."""
    samples: int = 3
    """Held-out prompts whose answers are shown."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    """Place and seed."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout of the ranks."""
    student: ModelConfig = field(default_factory=ModelConfig)
    """The model to train (pi_theta, q)."""
    teacher: ModelConfig = field(default_factory=ModelConfig)
    """The frozen model to learn from (pi_*, p)."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The Q-value functions (f_1, f_2)."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What is minimised."""
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    """An easier objective first."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts and responses."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Generation."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The loop, its precision and the student's optimizer."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and exporting."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out distances."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt and response that training or evaluation may see."""
        evaluated = self.evaluation.max_response_length if self.evaluation.prompts else 0
        return self.data.max_prompt_length + max(self.rollout.max_response_length, evaluated)

    @property
    def uses_off_policy(self) -> bool:
        """Whether any iteration learns from off-policy responses."""
        in_warmup = self.warmup.steps > 0 and self.warmup.beta > 0
        return self.objective.beta > 0 or self.rollout.reuse.mode == "adaptive" or in_warmup


def load_config(path: str | Path | None, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file (or start from the defaults), apply `section.field=value` overrides, check everything.

    Args:
        path: the YAML file, or None for the defaults.
        overrides: strings such as `objective.beta=0.7` or `student.init.layers=[0,2,4]`; values are YAML.

    Raises:
        InputError: the file cannot be read, a key does not exist, a value has the wrong type or is out of range.
    """
    tree: Any = {}
    source = "command line"
    if path is not None:
        source = str(path)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"config {path}: cannot be read ({error.strerror}); give an existing YAML file") from None
        except UnicodeDecodeError:
            raise InputError(f"config {path}: is not UTF-8 text; give a YAML file") from None
        tree = parse_yaml(text, source)
        if tree is None:  # an empty file
            tree = {}
        if not isinstance(tree, dict):
            raise InputError(f"config {path}: must be a mapping of sections, such as 'student: {{path: ...}}'")
    for override in overrides:
        apply_override(tree, override)
    names = {override.partition("=")[0] for override in overrides}
    return build_section(Config(), tree, source=source, overridden=names)


def config_to_dict(config: Any) -> Any:
    """The same settings as plain dicts, lists and scalars, ready for YAML or JSON."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: config_to_dict(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, (list, tuple)):
        return [config_to_dict(item) for item in config]
    return config


def config_to_yaml(config: Config) -> str:
    """The resolved settings as YAML text that `load_config` reads back to an equal object."""
    return write_yaml(config_to_dict(config))


def describe_fields(section: Any = None, prefix: str = "") -> typing.Iterator[tuple[str, str, Any, str]]:
    """Yield (dotted name, type, default, docstring) of every setting, in the order of the file.

    Args:
        section: the (sub)section whose values are the defaults; unset: a whole default config.
        prefix: the section's own dotted name with a dot at its end.
    """
    section = Config() if section is None else section
    docs = _field_docstrings(type(section))
    hints = typing.get_type_hints(type(section))
    for f in fields(section):
        value = getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            yield from describe_fields(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", type_name(hints[f.name]), config_to_dict(value), docs[f.name]


def _field_docstrings(cls: type) -> dict[str, str]:
    """The string literal under each field, which Python itself does not keep."""
    body = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for here, below in zip(body.body, body.body[1:], strict=False):
        match here, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs
