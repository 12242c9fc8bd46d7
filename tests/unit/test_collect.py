"""What is said of the responses of a run."""

from __future__ import annotations

import json
import types
from typing import Any

import pytest

from megatron_amd.batch import Prompts
from megatron_amd.config import Config, ObjectiveConfig, RolloutConfig
from megatron_amd.training import collect
from megatron_amd.training.collect import capped_more

SETTINGS: dict[str, Any] = {
    "max_response_length": 7, "samples_per_prompt": 2, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1,
    "min_response_length": 4,
}  # fmt: skip
WORK: dict[str, Any] = {
    "batch_size": 6, "pass_tokens": 50, "cache_tokens": 2000, "look_interval": 3, "cuda_graphs": True
}  # fmt: skip


def test_rollout_settings_reach_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of sampling the student's rollouts alone, those of the work both models'."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(collect, "generate", lambda *_, **settings: asked.append(settings))
    rollout = RolloutConfig(**SETTINGS, **WORK, teacher_share=0.25)
    players: Any = types.SimpleNamespace(
        config=Config(rollout=rollout, objective=ObjectiveConfig(name="kl")),
        layout=None,
        vocabulary=types.SimpleNamespace(size=90),
        is_complete="rule",
        student="student",
        teacher="teacher",
    )
    prompts = Prompts((1,), (0,), ((5,),))
    collect.student_responses(players, prompts, (2,))
    collect.off_policy_responses(players, prompts, (2,))
    student, teacher = asked
    assert student.items() >= {**SETTINGS, **WORK, "mixed_with": ("teacher", 0.25), "is_complete": "rule"}.items()
    assert teacher.items() >= {**WORK, "max_response_length": 7, "is_complete": "rule"}.items()
    assert not teacher.keys() & (SETTINGS.keys() - {"max_response_length"})
    assert student["seed"] != teacher["seed"]


def warnings_of(shares: list[float], history: dict[str, list[float]] | None = None) -> list[tuple[int, str]]:
    """(batch, warning) of the student's responses, the share of cut ones given batch by batch."""
    history = {} if history is None else history
    metrics = ({"rollout/capped_fraction_on": share, "rollout/eos_fraction_on": 1 - share} for share in shares)
    return [(i, text) for i, values in enumerate(metrics) for text in capped_more(history, values)]


def test_clearly_more_cut_responses_are_told_of_once() -> None:
    assert warnings_of([0.3] * 100) == []
    assert warnings_of([1.0] * 100) == [], "they always were"
    assert warnings_of([0.2, 0.4] * 50) == [], "which is no change"
    assert warnings_of([0.9, *[0.1] * 99]) == [], "fewer"
    ((batch, text),) = warnings_of([0.1] * 20 + [0.4] * 80)
    assert 20 < batch < 35
    assert text.startswith("warning: 3")
    assert "% of the student's responses are cut at rollout.max_response_length, 10% before: raise it" in text
    assert len(warnings_of([0.0] * 20 + [0.3] * 50 + [0.6] * 50)) == 2


def test_off_policy_and_restarts() -> None:
    history: dict[str, list[float]] = {}
    assert capped_more(history, {"rollout/capped_fraction_off": 0.5}) == []
    assert capped_more({}, {}) == []
    shares = [0.1] * 20 + [0.9] * 5
    whole = warnings_of(shares)
    history = {}
    first = warnings_of(shares[:12], history)
    resumed = json.loads(json.dumps(history))
    assert whole == first + [(12 + batch, text) for batch, text in warnings_of(shares[12:], resumed)]
    assert whole
