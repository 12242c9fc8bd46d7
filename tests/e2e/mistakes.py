"""What a user can do wrong, and what the program must say. `test_errors.py` makes the files and runs them all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One mistake. `{}` in an argument stands for the folder of tests' files."""

    name: str
    arguments: tuple[str, ...]
    says: str
    """A pattern that the line must match from its beginning, after "error: "."""
    models: bool = False
    """Found only once models are built."""
    faults: dict[str, Any] = field(default_factory=dict)
    second_rank: tuple[str, ...] | None = None
    """Arguments of rank 1 where they differ: files that one node sees and the other does not."""


RUN = ("--config", "{}/run.yaml")

SETTINGS = [
    Case("unknown key", (*RUN, "objective.betta=0.5"), r".*objective\.betta: unknown key; did you mean"),
    Case("wrong type", (*RUN, "training.steps=many"), r".*training\.steps: must be integer, not 'many'"),
    Case("negative K", (*RUN, "objective.critic_steps=-1"), r".*objective\.critic_steps: must be zero or more"),
    Case("beta", (*RUN, "objective.beta=1.5"), r".*objective\.beta: must be in \[0, 1\], not 1\.5"),
    Case(
        "sampled estimator of other samples",
        (*RUN, "objective.estimator=sampled", "objective.policy_gradient=per_step", "rollout.temperature=0.5"),
        r".*objective\.estimator: sampled is unbiased only for sequences of the student as it is, that is with "
        r"rollout\.temperature 1; set that, or estimator: full_vocabulary",
    ),
    Case(
        "threshold of a critic that does not train",
        (*RUN, "critic.tightness_threshold=0.5", "objective.critic_steps=0"),
        r".*critic\.tightness_threshold: needs objective\.critic_steps of at least 1",
    ),
    Case("adversarial warm-up", (*RUN, "warmup.name=amm"), r".*warmup\.name: must not be amm"),
    Case(
        "rates",
        (*RUN, "training.optim.min_learning_rate=1"),
        r".*training\.optim\.min_learning_rate: must not exceed learning_rate 0\.001, but is 1",
    ),
    Case(
        "virtual pipeline",
        (*RUN, "parallel.virtual_pipeline_model_parallel_size=2"),
        r".*virtual_pipeline_model_parallel_size: is not supported yet",
    ),
    Case("context parallel", (*RUN, "parallel.context_parallel_size=2"), r".*context_parallel_size: is not supported"),
    Case("experts", (*RUN, "parallel.expert_model_parallel_size=2"), r".*mixture-of-experts is not supported yet"),
    Case("not YAML", ("--config", "{}/broken.yaml"), r".*broken\.yaml, line 3: .*; correct the YAML"),
    Case("no config file", ("--config", "{}/none.yaml"), r"config .*none\.yaml: cannot be read \(No such file"),
    Case("unknown option", (*RUN, "--reseme"), r"command line: unrecognized arguments: --reseme; --help"),
    Case("option without its value", ("--config",), r"command line: argument --config: expected one argument"),
    Case("override without a value", (*RUN, "objective.beta"), r"command line: 'objective\.beta' is not section"),
]  # fmt: skip

LAYOUT = [
    Case(
        "world size",
        (*RUN, "parallel.tensor_model_parallel_size=3"),
        r"parallel: \d rank\(s\) cannot be split into groups of 3",
    ),
    Case(
        "sequence parallel alone",
        (*RUN, "parallel.sequence_parallel=true"),
        r".*sequence_parallel: needs parallel\.tensor_model_parallel_size > 1",
    ),
]

FILES = [
    Case("no model folder", (*RUN, "student.path={}/none"), r"student\.path: there is no folder .*none"),
    Case("no config.json", (*RUN, "student.path={}/empty"), r"student\.path: .*empty has no config\.json"),
    Case("config.json is not JSON", (*RUN, "student.path={}/bad_json"), r".*config\.json: is not valid JSON"),
    Case("unknown architecture", (*RUN, "student.path={}/mamba"), r".*model_type 'mamba' is not supported"),
    Case("no weights", (*RUN, "student.path={}/no_weights"), r"student\.path: .*no_weights has no model\.safetensors"),
    Case(
        "truncated safetensors",
        (*RUN, "student.path={}/truncated"),
        r".*truncated/model\.safetensors: is truncated or corrupt \(\d+ bytes;",
    ),
    Case(
        "weights of other sizes",
        (*RUN, "student.path={}/other_sizes"),
        r".*tensor model\.layers\.0\.mlp\.gate_proj\.weight has shape \[40, 24\], but config\.json makes it \[44, 24\]",
    ),
    Case("vocabularies", (*RUN, "student.path={}/other_words"), r"vocabularies differ: id \d+ is .* in .*teacher but"),
    Case(
        "tokenizer larger than embedding",
        (*RUN, "student.path={}/few_rows"),
        r"student: its embedding has 100 rows, fewer than the tokenizer's \d+ tokens",
    ),
    Case("no tokenizer", (*RUN, "data.tokenizer={}/empty"), r"data\.tokenizer: the folder .*empty holds no tokenizer"),
    Case("no data file", (*RUN, "data.train={}/none.jsonl"), r"data\.train: .*none\.jsonl does not exist"),
    Case("empty data set", (*RUN, "data.train={}/empty.jsonl"), r"data\.train: .*empty\.jsonl is empty"),
    Case(
        "bad row",
        (*RUN, "data.train={}/bad_row.jsonl"),
        r"data\.train: .*bad_row\.jsonl line 3: no field 'prompt' \(it",
    ),
    Case("bad JSON", (*RUN, "data.train={}/bad_line.jsonl"), r"data\.train: .*bad_line\.jsonl line 2: invalid JSON"),
    Case(
        "long prompt",
        (*RUN, "data.max_prompt_length=4"),
        r"data\.train: .*train\.jsonl line 1: the prompt has \d+ tokens, more than data\.max_prompt_length 4",
    ),
    Case("few held-out rows", (*RUN, "evaluation.prompts=11"), r"evaluation\.prompts: 11 .* has 10 usable rows"),
    Case("positions", (*RUN, "rollout.max_response_length=65"), r"student: takes 128 positions, .* together need 129"),
    Case("layers of a cut", (*RUN, "student.init.layers=[0,2]"), r"student\.init\.layers: 2 is not one of .* 0 to 1"),
]

MEGATRON = [
    Case(
        "unknown field of TransformerConfig",
        (*RUN, "teacher.transformer.recompute=full"),
        r"teacher\.transformer\.recompute: Megatron-Core's TransformerConfig has no such field",
    ),
    Case(
        "field that the model decides",
        (*RUN, "student.transformer.num_layers=3"),
        r"student\.transformer\.num_layers: is decided by config\.json",
    ),
    Case(
        "refused by Megatron-Core",
        (*RUN, "student.transformer.recompute_granularity=sometimes"),
        r"student: Megatron-Core refuses this model: .*sometimes must be",
    ),
    Case(
        "unknown field of OptimizerConfig",  # of an optimizer that is made after the warm-up
        (*RUN, "warmup.steps=100", "critic.optim.optimizer.momentum=0.9"),
        r"critic\.optim\.optimizer\.momentum: Megatron-Core's OptimizerConfig has no such field",
    ),
    Case(
        "unknown field of DistributedDataParallelConfig",
        (*RUN, "training.ddp.bucket=1"),
        r"training\.ddp\.bucket: Megatron-Core's DistributedDataParallelConfig has no such field",
    ),
    *(
        Case(
            f"reserved field {name} of DistributedDataParallelConfig",
            (*RUN, f"training.ddp.{name}=true"),
            rf"training\.ddp\.{name}: cannot be set here: .*; leave it out",
        )
        for name in ("overlap_param_gather", "average_in_collective")
    ),
    *(
        Case(
            f"reserved field {name} of {section}'s OptimizerConfig",
            (*RUN, "warmup.steps=100", f"{section}.optim.optimizer.{name}={value}"),
            rf"{section}\.optim\.optimizer\.{name}: cannot be set here: .*; leave it out",
        )
        for section, name, value in (
            ("training", "optimizer", "sgd"),
            ("critic", "loss_scale", "8.0"),
            ("warmup", "use_distributed_optimizer", "false"),
            ("critic", "lr", "0.1"),
        )
    ),
    Case(
        "gradients averaged over tokens by Megatron-Core",
        (*RUN, "student.transformer.calculate_per_token_loss=false"),
        r"student\.transformer\.calculate_per_token_loss: is decided by .*; leave it out",
    ),
    Case("unknown field of FP8", (*RUN, "training.fp8.recipe=e4m3"), r"training\.fp8\.recipe: .* has no such field"),
]
NO_GPU = [
    Case(
        "fp8 without a GPU", (*RUN, "training.precision=fp8"), r"training\.precision: fp8 cannot be used: there is no"
    ),
    Case(
        "Transformer Engine without a GPU",
        (*RUN, "training.transformer_impl=transformer_engine"),
        r"training\.transformer_impl: transformer_engine cannot be used: there is no GPU",
    ),
    Case(
        "fused gradients without Apex",  # which is made for GPUs
        (*RUN, "student.transformer.gradient_accumulation_fusion=true"),
        r"student\.transformer\.gradient_accumulation_fusion: needs NVIDIA's Apex, built with .*; leave it out",
    ),
]

DIRECTORY = [
    Case(
        "run directory under a file",
        (*RUN, "run.directory={}/run.yaml/run"),
        r"run\.directory: .* cannot be written \(Not a directory\)",
    ),
    Case(
        "no permission",  # of which the kernel's own folder is an example that holds for root
        (*RUN, "run.directory=/sys/amd"),
        r"run\.directory: /sys/amd cannot be written \(.*\)",
    ),
    Case(
        "full disk at the start",
        (*RUN, "run.directory={}/full-0"),
        r"run\.directory: .*full-0 cannot be written \(File too large\)",
        faults={"file_limit": {"rank": 0, "bytes": 0}},
    ),
    Case(
        "full disk at a checkpoint",
        (*RUN, "run.directory={}/full-1"),
        r".*full-1/checkpoints: the checkpoint cannot be written: (File too large|a file was cut short).*intact",
        models=True,
        faults={"file_limit": {"rank": 0, "bytes": 20_000}},
    ),
    Case(
        "full disk at metrics",
        (*RUN, "run.directory={}/full-2"),
        r".*full-2/metrics\.jsonl: cannot be written \(No space left on device\)",
        models=True,
    ),
    Case(
        "a file in place of the student",
        (*RUN, "run.directory={}/blocked"),
        r".*blocked/student: is a file, where the exported model would be",
    ),
    Case(
        "a run is there",
        (*RUN, "run.directory={}/run", "checkpoint.resume=false"),
        r".*run: already holds a run; set checkpoint\.resume: true",
    ),
    Case(
        "checkpoint of another model",
        (*RUN, "run.directory={}/run", "student.path={}/teacher"),
        r".*step-00000001: does not fit this run: student\.ffn_hidden_size is 40, here 48",
    ),
    Case(
        "checkpoint of another seed",
        (*RUN, "run.directory={}/run", "run.seed=99"),
        r".*step-00000001: does not fit this run: seed is 7, here 99; choose another run\.directory",
    ),
    Case(
        "checkpoint of another teacher",
        (*RUN, "run.directory={}/run", "teacher.path={}/three_heads", "data.tokenizer={}/teacher"),
        r".*step-00000001: does not fit this run: teacher\..* is .*, here .*; choose another run\.directory",
    ),
    Case(
        "checkpoint without the run's progress",
        (*RUN, "run.directory={}/no_progress"),
        r".*step-00000001: holds no progress; it is no checkpoint of a run of this program",
    ),
    Case(
        "checkpoint without the critic",
        (*RUN, "run.directory={}/kl-run"),
        r".*step-00000001: holds no critic, only student",
    ),
    Case(
        "checkpoint of other data",
        (*RUN, "run.directory={}/run", "data.limit=5"),
        r"data\.train: rows, tokenizer, template or responses differ from those of the checkpoint",
    ),
    Case(
        "damaged checkpoint",
        (*RUN, "run.directory={}/damaged"),
        r".*\.distcp: is damaged \(\d+ bytes instead",
        models=True,
    ),
    Case(
        "damaged state of a checkpoint",
        (*RUN, "run.directory={}/damaged_state"),
        r".*state\.json: is damaged \(.*restore",
    ),
]

ONE_RANK = [*SETTINGS, *LAYOUT, *FILES, *MEGATRON, *NO_GPU, *DIRECTORY]

LAYOUT_OF_TWO = [
    Case(
        "heads",
        (*RUN, "student.path={}/three_heads", "parallel.tensor_model_parallel_size=2"),
        r"student: its 3 attention heads cannot be divided by parallel\.tensor_model_parallel_size 2",
    ),
    Case(
        "layers",
        (*RUN, "student.init.layers=[0]", "parallel.pipeline_model_parallel_size=2"),
        r"student: its 1 layers cannot be divided by parallel\.pipeline_model_parallel_size 2",
    ),
    Case(
        "batch", (*RUN, "training.global_batch_size=3"), r"training\.global_batch_size: 3 prompts cannot be shared by 2"
    ),
    Case(
        "held-out prompts",
        (*RUN, "evaluation.prompts=1"),
        r"evaluation\.prompts: 1 cannot be shared by 2 data-parallel",
    ),
    Case(
        "checkpoint of another layout",
        (*RUN, "run.directory={}/run"),
        r".*was saved at tensor 1 x pipeline 1 x data 1 ranks and cannot go on at tensor 1 x pipeline 1 x data 2",
    ),
]

ONE_OF_TWO = [
    Case(
        "data on the first rank only",
        RUN,
        r"data\.train: .*none\.jsonl does not exist",
        second_rank=(*RUN, "data.train={}/none.jsonl"),
    ),
    Case(
        "data on the second rank only",
        (*RUN, "data.train={}/none.jsonl"),
        r"data\.train: .*none\.jsonl does not exist",
        second_rank=RUN,
    ),
    Case(
        "weights on the first rank only",
        RUN,
        r".*truncated/model\.safetensors: is truncated",
        second_rank=(*RUN, "student.path={}/truncated"),
    ),
    Case(
        "checkpoint on the first rank only",
        (*RUN, "run.directory={}/run-of-two"),
        r".*run-of-two: ranks see no checkpoint and step-00000001 there; give a folder that is the same on all nodes",
        second_rank=(*RUN, "run.directory={}/new"),
    ),
    Case(
        "run directory that is not shared",
        (*RUN, "run.directory={}/node-0"),
        r".*checkpoints: is not the same folder on all ranks; put it where all nodes see it",
        models=True,
        second_rank=(*RUN, "run.directory={}/node-1"),
    ),
    Case(
        "rows that the second rank cannot read",
        (*RUN, "run.directory={}/rows"),
        r"train\.jsonl: Input/output error; mend it and start again",
        models=True,
        faults={"unreadable": {"rank": 1}},
    ),
    Case(
        "full disk of the second rank at a checkpoint",
        (*RUN, "run.directory={}/full-3", "parallel.tensor_model_parallel_size=2"),
        r".*full-3/checkpoints: the checkpoint cannot be written: (File too large|a file was cut short).*intact",
        models=True,
        faults={"file_limit": {"rank": 1, "bytes": 20_000}},
    ),
]
TWO_RANKS = [
    *(case for case in SETTINGS if case.name in ("unknown key", "beta", "no config file", "unknown option")),
    *LAYOUT,
    *(case for case in FILES if case.name in ("no model folder", "truncated safetensors", "vocabularies", "bad row")),
    *(case for case in MEGATRON if case.name == "unknown field of OptimizerConfig"),
    NO_GPU[0],
    *(case for case in DIRECTORY if not case.name.startswith(("checkpoint", "damaged", "a run"))),
    *LAYOUT_OF_TWO,
    *ONE_OF_TWO,
]  # fmt: skip
