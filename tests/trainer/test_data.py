"""What stage two reads: one order for any number of ranks and loader threads."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from rats.pipeline.store.shard_set import ShardSet
from rats.schemas.errors import ConfigError, DataError
from rats.trainer import data as order
from rats.trainer.data import Sample, StoredSamples, row_at
from tests.support.rolled import roll
from tests.support.shards import in_order, wanted

BATCH = 12
"""Of 200 samples: epochs end within a batch."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return roll(tmp_path_factory.mktemp("store"), wanted(25, 8), shard_samples=50)


@lru_cache
def scores_of(shards: ShardSet) -> dict[str, tuple[float, ...]]:
    return {row.key: (number / 2, -1.0) for number, row in enumerate(shards.index(shards.snapshot()))}


def opened(shards: ShardSet, batch: int = BATCH, position: int = 0, **share: int) -> StoredSamples:
    return StoredSamples(shards, shards.snapshot(), scores_of(shards), 3, batch, position, **share)


def expected(shards: ShardSet, count: int, position: int = 0) -> list[str]:
    """Keys by the order's own definition, without the loader."""
    rows = shards.index(shards.snapshot())
    return [rows[row_at(3, len(rows), place)].key for place in range(position, position + count)]


def ranks_keys(shards: ShardSet, world: int, workers: int, steps: int) -> list[str]:
    """Keys in the order in which the loop of `world` ranks sees them: step by step, rank by rank."""
    shares: list[list[list[str]]] = []
    for rank in range(world):
        stream = opened(shards, rank=rank, world=world, workers=workers)
        shares.append([keys_of(stream.take()) for _ in range(steps)])
        assert stream.position == steps * BATCH
        stream.close()
    return [key for step in zip(*shares, strict=True) for share in step for key in share]


def keys_of(samples: Sequence[Sample]) -> list[str]:
    return [sample.key for sample in samples]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_reads_one_order(shards: ShardSet, world: int) -> None:
    assert ranks_keys(shards, world, 0, 42) == expected(shards, 42 * BATCH)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_loader_threads_reads_that_order(shards: ShardSet, world: int, workers: int) -> None:
    assert ranks_keys(shards, world, workers, 42) == expected(shards, 42 * BATCH)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_every_sample_comes_once_an_epoch_with_its_own_data(shards: ShardSet) -> None:
    stream, scores = opened(shards, batch=8), scores_of(shards)
    samples = [sample for _ in range(50) for sample in stream.take()]
    keys = keys_of(samples)
    assert sorted(keys[:200]) == sorted(keys[200:]) == sorted(scores) and keys[:200] != keys[200:]
    for sample, (row, arrays) in zip(samples, in_order(shards, shards.snapshot(), 3), strict=False):
        assert torch.equal(sample.x_HTC, torch.from_numpy(arrays["x"]))
        assert torch.equal(sample.x0_HTC, torch.from_numpy(arrays["x0"]))
        assert sample.conditioning["context"][0] == len(row.prompt)
        assert (sample.prompt, sample.scores) == (row.prompt, scores[row.key])


@pytest.mark.parametrize(
    ("resumes", "workers"),
    [(20, 0), (20, 2), pytest.param(100, 0, marks=pytest.mark.slow), pytest.param(100, 4, marks=pytest.mark.slow)],
)
def test_a_resume_at_any_step_goes_on_with_the_same_fifty_keys(shards: ShardSet, resumes: int, workers: int) -> None:
    whole, states, keys = opened(shards), ['{"position": 0}'], []
    for _ in range(500 // BATCH + 5):  # 2.5 epochs, and what is compared after the last resume
        keys += keys_of(whole.take())
        states.append(json.dumps({"position": whole.position}))
    assert max(map(len, states)) <= 200
    choose = random.Random(resumes)
    for step in (choose.randrange(500 // BATCH + 1) for _ in range(resumes)):
        stream = opened(shards, **json.loads(states[step]), workers=workers)
        assert keys_of([s for _ in range(5) for s in stream.take()])[:50] == keys[step * BATCH :][:50]
        stream.close()


def test_a_sample_without_a_score_is_no_part_of_the_order(shards: ShardSet) -> None:
    rows = shards.index(shards.snapshot())
    scores = {key: value for key, value in scores_of(shards).items() if key not in {rows[3].key, rows[150].key}}
    stream = StoredSamples(shards, shards.snapshot(), scores, 3, 9)
    kept = [row.key for row in rows if row.key in scores]
    assert keys_of([s for _ in range(22) for s in stream.take()]) == [kept[row_at(3, 198, i)] for i in range(198)]
    with pytest.raises(DataError, match="21 of 200 samples .* have no score: mend the reward"):
        StoredSamples(shards, shards.snapshot(), dict(islice(scores.items(), 179)), 3, 9)


def test_a_batch_that_the_ranks_cannot_share_is_refused(shards: ShardSet) -> None:
    with pytest.raises(ConfigError, match="train.batch is 12, which 5 ranks cannot share: use a multiple of 5"):
        opened(shards, world=5)


def test_a_place_among_a_million_samples_is_found_in_the_time_of_a_few_shuffles() -> None:
    """Of numpy's own, in the processor's own time, since machines differ: three where this was written."""
    found = min(seconds(lambda epoch: row_at(0, 1_000_000, 1_000_000 * epoch + 777)) for _ in range(3))
    shuffled = min(seconds(lambda epoch: np.random.default_rng(epoch).permutation(1_000_000)) for _ in range(3))
    assert found <= 10 * shuffled


def seconds(work: Callable[[int], object]) -> float:
    """Of five epochs, none of which is cached."""
    order._permutation.cache_clear()
    start = time.process_time()
    for epoch in range(5):
        work(epoch)
    return time.process_time() - start


@pytest.mark.parametrize("workers", [0, 2])
def test_after_an_error_the_stream_goes_on_where_it_was(tmp_path: Path, workers: int) -> None:
    shards = roll(tmp_path, wanted(4, 4), shard_samples=16)
    stream = opened(shards, batch=4, workers=workers)
    assert keys_of(stream.take()) == expected(shards, 4)
    (tar,) = shards.root.glob("shards/*.tar")
    tar.rename(tmp_path / "aside")
    with pytest.raises(DataError, match="is missing"):
        [stream.take() for _ in range(9)]
    at = stream.position
    assert at < 36
    (tmp_path / "aside").rename(tar)
    assert keys_of(stream.take()) == expected(shards, 4, at)
    stream.close()


def test_a_loader_thread_gives_the_same_samples_and_errors(tmp_path: Path) -> None:
    shards, generator = roll(tmp_path, wanted(4, 4), shard_samples=16), torch.random.get_rng_state()
    here, there = opened(shards, batch=4), opened(shards, batch=4, workers=2)
    for _ in range(6):
        for one, other in zip(here.take(), there.take(), strict=True):
            assert (one.key, one.prompt, one.scores) == (other.key, other.prompt, other.scores)
            assert torch.equal(one.x_HTC, other.x_HTC) and torch.equal(one.x0_HTC, other.x0_HTC)
            assert torch.equal(one.conditioning["context"], other.conditioning["context"])
    assert torch.equal(generator, torch.random.get_rng_state())
    (tar,) = shards.root.glob("shards/*.tar")
    data = bytearray(tar.read_bytes())
    for row in shards.index(shards.snapshot()):
        data[row.offset + row.length - 1] ^= 1
    tar.write_bytes(data)
    for stream in (here, there):
        with pytest.raises(DataError, match="is damaged at sample"):
            [stream.take() for _ in range(9)]  # threads have read a few batches ahead
        stream.close()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_twenty_epochs_take_no_more_memory_than_two(tmp_path: Path, workers: int) -> None:
    from bench.loader import stored

    shards = stored(tmp_path, samples=128, tokens=512)
    stream = StoredSamples(shards, shards.snapshot(), scores_of(shards), 0, 16, workers=workers)
    resident = []
    for _ in range(20):
        for _ in range(8):
            stream.take()
        resident.append(psutil.Process().memory_info().rss / 2**20)
    stream.close()
    assert max(resident[2:]) - min(resident[2:]) <= 24  # of 1 GiB read: a sixteenth kept would show
