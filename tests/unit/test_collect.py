"""What is said of the responses of a run."""

from __future__ import annotations

import json

from megatron_amd.training.collect import capped_more


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
