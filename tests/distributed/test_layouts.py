"""One run under every layout: the same rollout tokens, losses, moments and gradient norms as on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_amd.config import Config
from megatron_amd.distributed.initialize import set_seeds
from megatron_amd.distributed.layout import build_layout
from megatron_amd.training.setup import set_up
from tests.distributed.runner import run_distributed
from tests.tiny_run import make_files, read_metrics, write_config

# (TP, PP, DP) and further settings
LAYOUTS: dict[str, tuple[int, int, int, tuple[str, ...]]] = {
    "tp2": (2, 1, 1, ()),
    "pp2": (1, 2, 1, ()),
    "dp2": (1, 1, 2, ()),
    "tp2-pp2": (2, 2, 1, ()),
    "tp2-dp2": (2, 1, 2, ()),
    "tp2-sp": (2, 1, 1, ("parallel.sequence_parallel=true",)),
    "tp2-pp2-sp": (2, 2, 1, ("parallel.sequence_parallel=true",)),
    "pp2-dp2": (1, 2, 2, ()),
    "micro1": (1, 1, 1, ("training.micro_batch_size=1",)),
    "micro4-pp2": (1, 2, 1, ("training.micro_batch_size=4",)),
    "micro3-pp2": (1, 2, 1, ("training.micro_batch_size=3",)),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "pair": {},
    "own": {"critic": {"features": "own", "optim": {"learning_rate": 1e-3}}, "objective": {"critic_steps": 2}},
}
FLOOR = 1e-6 * 2.0  # times 2 * bound


def train(config: Config) -> tuple[list[Any], list[dict[str, Any]]]:
    """One rank's part of a run: the sequences of each iteration (of this replica) and the metrics of the run."""
    layout = build_layout(config.parallel, torch.device("cpu"))
    set_seeds(config.run.seed, layout)
    trainer, _ = set_up(config, layout)
    sequences = []
    sample = trainer.sample

    def recording_sample() -> Any:
        is_new = trainer.batch is None
        batch = sample()
        if is_new:
            for m in batch.microbatches:
                for row in range(m.tokens.shape[0]):
                    targets = m.targets[m.state_rows == row].tolist()
                    if targets:  # not an empty row that fills a micro-batch up
                        sequences.append((trainer.progress.iteration, m.on_policy, targets))
        return batch

    trainer.sample = recording_sample  # type: ignore[method-assign]
    assert trainer.train() is None
    return sequences if layout.tp_rank == 0 and layout.is_last_stage else [], read_metrics(Path(config.run.directory))


def assert_equal_runs(metrics: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    """Every number of every iteration within 1e-4 relative."""
    assert len(metrics) == len(reference) == 5
    for row, expected in zip(metrics, reference, strict=True):
        assert row.keys() == expected.keys()
        for name, value in row.items():
            if isinstance(value, str):
                assert value == expected[name]
            else:
                assert value == pytest.approx(expected[name], rel=1e-4, abs=FLOOR), (row["iteration"], name)


@pytest.fixture(scope="module", params=VARIANTS)
def one_process(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    settings = {**make_files(folder), **VARIANTS[request.param]}
    settings["run"]["directory"] = str(folder / "one")
    (result,) = run_distributed(train, 1, write_config(folder, settings))
    return folder, settings, result


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_changes_nothing(one_process: Any, name: str) -> None:
    folder, settings, (sequences, reference) = one_process
    tensor, pipeline, data, overrides = LAYOUTS[name]
    config = write_config(
        folder,
        settings,
        f"parallel.tensor_model_parallel_size={tensor}",
        f"parallel.pipeline_model_parallel_size={pipeline}",
        f"run.directory={folder / name}",
        *overrides,
    )
    results = run_distributed(train, tensor * pipeline * data, config)
    assert sorted(s for own, _ in results for s in own) == sorted(sequences)
    assert_equal_runs(results[0][1], reference)
