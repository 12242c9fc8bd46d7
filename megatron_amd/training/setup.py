"""From settings to a trainer: everything that can be wrong is found before anything large is allocated."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from megatron_amd.checkpoint.hf import check_export_folder, check_hf_weights
from megatron_amd.config import Config
from megatron_amd.data import (
    PromptDataset,
    PromptLoader,
    Tokenizer,
    check_same_vocabulary,
    first_prompts,
    load_rows,
    load_tokenizer,
    open_response_files,
)
from megatron_amd.data.response_files import Header
from megatron_amd.data.tokenizer import TOKENIZER_FILES, check_stop_strings, stopping_rule
from megatron_amd.distributed.initialize import agreed
from megatron_amd.distributed.layout import Layout
from megatron_amd.errors import InputError
from megatron_amd.evaluation.distances import HeldOut
from megatron_amd.models.roles import (
    ModelPlan,
    plan_models,
    role_architecture,
    role_transformer_config,
)
from megatron_amd.training.first_weights import has_pretrained_weights
from megatron_amd.training.model_hash import model_hash
from megatron_amd.training.optimizer import ddp_config, optimizer_config
from megatron_amd.training.players import build_players
from megatron_amd.training.trainer import Trainer, changed_settings, find_checkpoint


def set_up(config: Config, layout: Layout, warn: Callable[[str], None] = print) -> tuple[Trainer, Tokenizer]:
    """Check the run directory, tokenizer, models and data, then build the models and the trainer. Collective.

    Args:
        warn: called with a line about what works but may not be meant; speaks on one rank.

    Raises:
        InputError: on all ranks, whatever does not fit.
    """
    with agreed():
        _check_directory(config)
        if config.checkpoint.export:
            check_export_folder(Path(config.run.directory) / "student")
        tokenizer, plan = check_models(config, layout, warn)
        train, held_out = _open_data(config, tokenizer, plan, layout, warn)
        loader = PromptLoader(
            train,
            global_batch_size=config.training.global_batch_size,
            dp_rank=layout.dp_rank,
            dp_size=layout.dp_size,
            seed=config.run.seed,
            shuffle=config.data.shuffle,
        )
        _warn_of_settings(config, warn)
    checkpoint = find_checkpoint(config, plan, layout)
    if checkpoint is not None:
        loader.load_state_dict(checkpoint[1]["loader"])  # raises where the data has changed
        if changes := changed_settings(checkpoint, config):
            warn(f"goes on with other settings than {checkpoint[0].name} was saved with: {', '.join(changes)}")
    players = build_players(config, plan, layout, stopping_rule(tokenizer, config.rollout.stop_strings))
    return Trainer(config, plan, players, loader, tokenizer.eos_ids, held_out, checkpoint), tokenizer


def check_models(config: Config, layout: Layout, warn: Callable[[str], None]) -> tuple[Tokenizer, ModelPlan]:
    """Check everything about tokenizer and models that can be known before one is built. Raises InputError."""
    for role, model in (("student", config.student), ("teacher", config.teacher)):
        role_architecture(model, role)  # first, so that a wrong path is not taken for a missing tokenizer
    tokenizer = _shared_tokenizer(config, warn)
    check_stop_strings(tokenizer, config.rollout.stop_strings)
    plan = plan_models(config, tokenizer.vocab_size)
    check_megatron_settings(config, plan, layout)
    _check_weights(config, plan)
    return tokenizer, plan


_REUSE_SETTINGS = {
    "none": (),
    "steps": ("steps",),
    "replay": ("fresh", "capacity"),
    "adaptive": ("capacity", "initial_probability"),
}
"""What each mode of `rollout.reuse` looks at."""


def _warn_of_settings(config: Config, warn: Callable[[str], None]) -> None:
    """Warn of settings that change nothing, and of a buffer that the run cannot fill."""
    rollout, reuse = config.rollout, config.rollout.reuse
    if rollout.responses is not None and rollout.off_policy != "file":
        warn(f"rollout.responses: is not read with rollout.off_policy: {rollout.off_policy}; file would read it")
    for field in fields(reuse):
        known = ("mode", *_REUSE_SETTINGS[reuse.mode])
        if field.name not in known and getattr(reuse, field.name) != field.default:
            warn(f"rollout.reuse.{field.name}: changes nothing with rollout.reuse.mode: {reuse.mode}")
    iterations = config.training.steps + config.critic.warmup_steps
    iterations += config.warmup.steps if config.warmup.beta < 1 else 0
    most = iterations * config.training.global_batch_size * rollout.samples_per_prompt
    if reuse.mode == "adaptive" and reuse.capacity > most:
        warn(
            f"rollout.reuse.capacity: {reuse.capacity} sequences are more than the run can generate, {most}; adaptive "
            "generates in each iteration until the buffer is full: lower it"
        )


def _check_directory(config: Config) -> None:
    """Raise InputError unless the run directory can be made and written."""
    directory = Path(config.run.directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:  # its name is no other rank's
            probe.write(b"x")
    except OSError as error:
        raise InputError(
            f"run.directory: {directory} cannot be written ({error.strerror}); choose another place or free some space"
        ) from None


def _shared_tokenizer(config: Config, warn: Callable[[str], None]) -> Tokenizer:
    """The run's tokenizer, after checking that student and teacher agree with it on every token.

    Warns where one of them ends its responses otherwise.
    """
    source = config.data.tokenizer or config.teacher.path
    if source is None:
        raise InputError("data.tokenizer: give a folder, hub name or .model file, since the teacher has no path")
    tokenizer = load_tokenizer(source)
    for path in {config.teacher.path, config.student.path} - {None, source}:
        folder = Path(str(path)).expanduser()
        if not folder.is_dir() or any((folder / name).is_file() for name in TOKENIZER_FILES):
            own = load_tokenizer(str(path))
            check_same_vocabulary(tokenizer, own)
            if set(own.eos_ids) != set(tokenizer.eos_ids):
                warn(
                    f"{path} ends a response with {_tokens(own, own.eos_ids)}, {source} with "
                    f"{_tokens(tokenizer, tokenizer.eos_ids)}: the run takes the latter; a model that was trained to "
                    "end otherwise may write on to the length limit"
                )
    return tokenizer


def _tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return ", ".join(repr(tokenizer.token(id)) for id in ids)


def check_megatron_settings(config: Config, plan: ModelPlan, layout: Layout) -> None:
    """Make every configuration object of Megatron-Core's once, for what it refuses: some are needed hours later."""
    for role in ("student", "teacher", "critic"):
        role_transformer_config(role, config, plan, layout)
    ddp_config(config.training.ddp)
    for section, settings in (("training", config.training), ("critic", config.critic), ("warmup", config.warmup)):
        optimizer_config(settings.optim, f"{section}.optim")


def _check_weights(config: Config, plan: ModelPlan) -> None:
    """Raise InputError unless the folders hold every tensor that is to be read."""
    roles = [("student", config.student, plan.student), ("teacher", config.teacher, plan.teacher)]
    if plan.critic_trunk is not None and config.critic.trunk == "model":
        model = config.critic.model  # as in its folder: the plan's trunk has its head untied
        roles.append(("critic.model", model, role_architecture(model, "critic.model")))
    for role, model, architecture in roles:
        if has_pretrained_weights(model):
            check_hf_weights(str(model.path), architecture, layers=model.init.layers, where=f"{role}.path")


def _open_data(
    config: Config, tokenizer: Tokenizer, plan: ModelPlan, layout: Layout, warn: Callable[[str], None]
) -> tuple[PromptDataset, HeldOut | None]:
    rollout = config.rollout
    kind = rollout.off_policy if config.uses_off_policy else None
    train = load_rows(
        config.data,
        "train",
        tokenizer,
        responses=kind == "data",
        max_response_length=rollout.max_response_length,
        end_prompts=plan.student.has_encoder,
        warn=warn,
    )
    if kind == "file":
        files = open_response_files(
            str(rollout.responses),
            train.rows,
            fingerprint=train.fingerprint,
            tokenizer_hash=tokenizer.fingerprint(),
            vocab_size=tokenizer.vocab_size,
            setting="rollout.responses",
        )
        _check_author(config, files.header, warn)
        _compare_ends(config, files.header, warn)
        train.use_responses(files.tokens, files.fingerprint, rollout.max_response_length)
    count = config.evaluation.prompts
    if not count:
        return train, None
    rows = load_rows(
        config.data, "evaluation", tokenizer, responses=False, count=count, end_prompts=plan.student.has_encoder
    )
    prompts = first_prompts(rows, count, dp_rank=layout.dp_rank, dp_size=layout.dp_size)
    return train, HeldOut(prompts, tokenizer.eos_ids, tokenizer.decode)


def _check_author(config: Config, header: Header, warn: Callable[[str], None]) -> None:
    """Look at who wrote the responses, and how.

    Raises InputError where the objective needs samples of the run's own teacher and these are not; elsewhere warns of
    another model, and of another way of sampling.
    """
    own = model_hash(config.teacher, "teacher", config.run.seed) == header.model["hash"]
    plain = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "min_response_length": 0}
    changed = [f"{name} {header.sampling[name]}" for name, value in plain.items() if header.sampling[name] != value]
    objective = config.objective
    if objective.name == "amm" and objective.beta > 0 and objective.estimator == "sampled" and (changed or not own):
        how = f"with {', '.join(changed)}" if own else f"by another model, {header.model['path']}"
        raise InputError(
            f"rollout.responses: {config.rollout.responses} was generated {how}, but objective.estimator: sampled "
            "needs the teacher's own at temperature 1 with nothing cut off; use full_vocabulary, or generate them anew"
        )
    if not own:
        path = header.model["path"]
        changed_since = ", whose weights or layers were others then" if path == config.teacher.path else ""
        warn(
            f"the responses in {config.rollout.responses} come from another model than the run's teacher: the "
            f"{header.model['role']} {path}{changed_since}"
        )
    if changed:
        warn(
            f"the responses in {config.rollout.responses} were generated with {', '.join(changed)}: their states are "
            "not those of the model's own distribution"
        )


def _compare_ends(config: Config, header: Header, warn: Callable[[str], None]) -> None:
    """Warn where the responses of files end otherwise than those that the run generates."""
    rollout, how = config.rollout, header.sampling
    if how["max_response_length"] < rollout.max_response_length:
        warn(
            f"the responses in {rollout.responses} were cut at {how['max_response_length']} tokens, before "
            f"rollout.max_response_length {rollout.max_response_length}: those without an end teach the student none"
        )
    if set(how["stop_strings"]) != set(rollout.stop_strings):
        warn(
            f"the responses in {rollout.responses} end at the texts {how['stop_strings']}, the student's at "
            f"rollout.stop_strings {list(rollout.stop_strings)}"
        )
