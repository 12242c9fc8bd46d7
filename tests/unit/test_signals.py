"""SIGINT and SIGTERM at a process that trains."""

from __future__ import annotations

import multiprocessing
import os
import signal
import types
from collections.abc import Sequence

import pytest

from megatron_amd import program, train
from megatron_amd.training.signals import StopSignals


def receive(signals: Sequence[int]) -> None:
    """Send this process the signals while it trains; status 7 if it lives on."""
    before = signal.getsignal(signal.SIGINT)
    with StopSignals(types.SimpleNamespace(device="cpu")):  # type: ignore[arg-type]
        for number in signals:
            os.kill(os.getpid(), number)
    os._exit(7 if signal.getsignal(signal.SIGINT) is before else 8)


@pytest.mark.parametrize(
    ("signals", "status"),
    [
        ([signal.SIGTERM], 7),
        ([signal.SIGTERM] * 3, 7),  # Slurm signals every process, and torchrun passes its own on
        ([signal.SIGINT], 7),
        ([signal.SIGINT, signal.SIGTERM], 7),
        ([signal.SIGINT, signal.SIGINT], -signal.SIGINT),  # at once: not even Python hears of it
        ([signal.SIGTERM, signal.SIGINT], -signal.SIGINT),
    ],
)
def test_only_a_sigint_after_another_signal_ends_the_process(signals: Sequence[int], status: int) -> None:
    process = multiprocessing.get_context("fork").Process(target=receive, args=(signals,))
    process.start()
    process.join(timeout=30)
    assert process.exitcode == status


def test_ctrl_c_before_the_first_step_is_no_stack_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "load_config", interrupted)
    assert train.main([]) == 128 + signal.SIGINT


def test_sigterm_leaves_a_conversion_through_its_cleaning_up() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        program.leave_at_sigterm()
        with pytest.raises(SystemExit) as left:
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left.value.code == 128 + signal.SIGTERM
