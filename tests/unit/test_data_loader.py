"""The loader: order, shares of the data-parallel ranks, epochs, resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from megatron_amd.batch import Prompts
from megatron_amd.config import DataConfig
from megatron_amd.data import PromptDataset, PromptLoader, first_prompts, load_rows, load_tokenizer
from megatron_amd.data.loader import deal, epoch_order
from megatron_amd.errors import InputError
from tests.small_tokenizers import make_hf_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_tokenizer(tmp_path_factory.mktemp("plain"))


def rows(folder: Path, path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> PromptDataset:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path.parent / "cache")
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return load_rows(DataConfig(train=str(path)), "train", load_tokenizer(str(folder)))


@pytest.fixture
def ten(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PromptDataset:
    return rows(folder, tmp_path / "ten.jsonl", [f"Row {n}" for n in range(10)], monkeypatch)


def loaders(dataset: PromptDataset, batch: int, dp_size: int = 1, **settings: Any) -> list[PromptLoader]:
    settings = {"seed": 1, "shuffle": True, **settings}
    return [
        PromptLoader(dataset, global_batch_size=batch, dp_rank=rank, dp_size=dp_size, **settings)
        for rank in range(dp_size)
    ]


def drawn(parts: list[Prompts]) -> list[tuple[int, int]]:
    """(row, visit) of the parts of a global batch, in order."""
    return [pair for part in parts for pair in zip(part.ids, part.visits, strict=True)]


def global_batches(ranks: list[PromptLoader], count: int) -> list[list[tuple[int, int]]]:
    return [drawn([rank.next() for rank in ranks]) for _ in range(count)]


def in_any_order(batches: list[list[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
    return [sorted(batch) for batch in batches]


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_sequence_does_not_depend_on_the_ranks(shuffle: bool, ten: PromptDataset) -> None:
    reference = global_batches(loaders(ten, 4, 1, shuffle=shuffle), 8)
    for dp_size in (2, 4):
        found = global_batches(loaders(ten, 4, dp_size, shuffle=shuffle), 8)
        assert in_any_order(found) == in_any_order(reference)
    # Nor on the batch size.
    flat = [pair for batch in reference for pair in batch]
    assert [pair for batch in global_batches(loaders(ten, 2, shuffle=shuffle), 16) for pair in batch] == flat


def test_every_row_once_per_epoch(ten: PromptDataset) -> None:
    flat = [pair for batch in global_batches(loaders(ten, 4), 10) for pair in batch]
    assert sorted(flat) == [(row, visit) for row in range(10) for visit in range(4)]
    assert [visit for _, visit in flat] == [visit for visit in range(4) for _ in range(10)]
    orders = {tuple(row for row, visit in flat if visit == epoch) for epoch in range(4)}
    assert len(orders) == 4
    assert tuple(range(10)) not in orders


def test_without_shuffle_rows_come_in_order(ten: PromptDataset) -> None:
    (first, second, third) = global_batches(loaders(ten, 4, shuffle=False), 3)
    assert first + second == [(row, 0) for row in range(8)]
    assert third == [(8, 0), (9, 0), (0, 1), (1, 1)]


def test_order_is_a_fixed_function_of_seed_and_epoch() -> None:
    # Golden values: a change would break the resuming of old runs.
    assert epoch_order(8, seed=1234, epoch=0, shuffle=True).tolist() == [1, 6, 2, 0, 3, 5, 7, 4]
    orders = {tuple(epoch_order(50, seed, epoch, True)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    # Each row is equally likely to come first: 10 rows, 2000 epochs, 5 standard deviations of a count.
    first = np.bincount([epoch_order(10, 0, epoch, True)[0] for epoch in range(2000)], minlength=10)
    assert np.abs(first - 200).max() < 5 * np.sqrt(2000 * 0.1 * 0.9)


def test_fewer_rows_than_a_batch(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = rows(folder, tmp_path / "three.jsonl", ["a", "b", "c"], monkeypatch)
    for ranks in (1, 2):
        batch = global_batches(loaders(dataset, 8, ranks), 1)[0]
        assert len(set(batch)) == 8
        assert sorted(visit for _, visit in batch) == [0, 0, 0, 1, 1, 1, 2, 2]


def test_ranks_get_equally_many_prompts_and_nearly_equally_many_tokens(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = rows(folder, tmp_path / "uneven.jsonl", ["word " * (1 + 7 * n % 50) for n in range(40)], monkeypatch)
    ranks = loaders(dataset, 20, 4)
    for _ in range(4):
        parts = [rank.next() for rank in ranks]
        assert [len(part) for part in parts] == [5] * 4
        tokens = [sum(map(len, part.tokens)) for part in parts]
        assert max(tokens) < 1.1 * min(tokens), tokens
        for part in parts:
            assert [len(tokens) for tokens in part.tokens] == dataset.lengths[list(part.ids)].tolist()


def test_deal() -> None:
    assert deal([5, 1, 1, 1, 1, 1], 2) == [[0], [1, 2, 3, 4, 5]]
    assert deal([5, 1, 1, 1, 1, 1], 2, 3) == [[0, 4, 5], [1, 2, 3]]
    assert deal([3, 3, 2, 2, 2], 2) == [[0, 2, 4], [1, 3]]
    assert deal([1.0], 3) == [[0], [], []]
    assert deal([], 2) == [[], []]


def test_prompts_are_those_of_the_rows(ten: PromptDataset) -> None:
    prompts = loaders(ten, 6)[0].next()
    assert prompts.texts == tuple(f"Row {row}" for row in prompts.ids)
    assert prompts.responses is None
    assert len(prompts.tokens) == 6


def test_resume_goes_on_with_the_next_batch_on_any_number_of_ranks(ten: PromptDataset) -> None:
    (loader,) = loaders(ten, 4)
    global_batches([loader], 4)
    state = json.loads(json.dumps(loader.state_dict()))  # a checkpoint may keep it as text
    expected = global_batches([loader], 5)
    resumed = loaders(ten, 4, 2)
    for rank in resumed:
        rank.load_state_dict(state)
    assert in_any_order(global_batches(resumed, 5)) == in_any_order(expected)
    assert resumed[0].state_dict() == resumed[1].state_dict() == loader.state_dict()


def test_resume_with_other_data(
    ten: PromptDataset, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = rows(folder, tmp_path / "other.jsonl", [f"Row {n}" for n in range(9)] + ["Row x"], monkeypatch)
    with pytest.raises(
        InputError, match=r"^data.train: rows, tokenizer, template or responses differ from those of the check"
    ):
        loaders(other, 4)[0].load_state_dict(loaders(ten, 4)[0].state_dict())


def test_batch_that_ranks_cannot_share(ten: PromptDataset) -> None:
    message = (
        r"^training.global_batch_size: 6 is not divisible by the data-parallel size 4 \(world size / "
        r"\(parallel.tensor_model_parallel_size \* parallel.pipeline_model_parallel_size\)\)"
    )
    with pytest.raises(InputError, match=message):
        loaders(ten, 6, 4)


@pytest.mark.parametrize("dp_size", [1, 2, 3, 8])
def test_first_prompts_are_shared_evenly(dp_size: int, ten: PromptDataset) -> None:
    parts = [first_prompts(ten, 7, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    assert drawn(parts) == [(row, 0) for row in range(7)]
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1


def test_more_held_out_prompts_than_rows(ten: PromptDataset) -> None:
    with pytest.raises(InputError, match=r"^evaluation.prompts: 11 prompts are asked for, but data.evaluation has 10"):
        first_prompts(ten, 11)
