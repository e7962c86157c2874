"""The store against plain WebDataset and Parquet blobs: `python -m bench.store`.

One process, one temporary folder, the page cache warm. All three hold the same samples as the same safetensors bytes
beside the same JSON, and all reads end in NumPy arrays. Only `rats` hashes what it reads and writes, fsyncs, and reads
back what it wrote; WebDataset has no random access, Parquet is read at random by row groups of one sample.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from safetensors.numpy import load, save

from bench.rollout import where
from rats.pipeline.prompts import Prompt, planned_samples
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import LATENTS, read_sample, verify_shard, write_shard
from rats.schemas.canonical import canonical_json
from rats.schemas.horizons import snap, union
from rats.schemas.manifest import ShardPlan
from rats.schemas.params import Params
from rats.schemas.recipe import make_recipe
from rats.trainer.data import row_at

SIZES = {"flux-512": ((3,), 1024, 64), "miniature": ((3, 5, 8), 16, 64)}
"""By name: the student grids whose horizons are kept, latent tokens, channels."""
SHARD = 32
"""Samples a shard."""

Arrays = dict[str, np.ndarray]
Work = Callable[[], object]


def make_set(store: Path, nfe: Sequence[int], shape: tuple[int, int], samples: int) -> tuple[ShardSet, list[ShardPlan]]:
    """An empty set of the size's recipe, with its shards planned."""
    values = {"model": {"path": "m"}, "prompts": {"train": "p.txt"}, "train": {"reward": "r"}, "teacher": {"nfe": nfe}}
    grids = [[1 - i / steps for i in range(steps)] + [0.0] for steps in (50, *nfe)]
    sigmas, horizons = snap(grids[0], grids[1:]), union(grids[1:])
    recipe = make_recipe(Params.model_validate(values), {"transformer": "a" * 64}, "c" * 64, sigmas, horizons, shape)
    shards = ShardSet.open_or_create(store, recipe)
    prompts = [Prompt(f"picture {i}", f"picture {i}") for i in range(samples)]
    return shards, shards.plan(planned_samples(prompts, 1), SHARD)


def make_arrays(horizons: int, tokens: int, channels: int) -> Arrays:
    """A sample's latents; every sample has the same ones under another key."""
    x = np.random.default_rng(0).standard_normal((horizons, tokens, channels)).astype(np.float16)
    return {"x": x, "x0": x[1:] / np.float16(2)}


class Rats:
    """Our store."""

    def __init__(self, folder: Path, nfe: Sequence[int], shape: tuple[int, int], samples: int) -> None:
        self.shards, self.plans = make_set(folder, nfe, shape, samples)

    def write(self, arrays: Arrays) -> None:
        """Shards and a snapshot."""
        for plan in self.plans:
            write_shard(self.shards, plan, [(sample, arrays) for sample in plan.samples])
        self.shards.write_snapshot(sample.key for plan in self.plans for sample in plan.samples)

    def ordered(self) -> int:
        """All samples, by key."""
        return sum(len(read_sample(self.shards, row)) for row in self.shards.index(self.shards.snapshot()))

    def at_random(self) -> int:
        """All samples, as training reads them."""
        rows = self.shards.index(self.shards.snapshot())
        order = [rows[row_at(0, len(rows), position)] for position in range(len(rows))]
        return sum(len(read_sample(self.shards, row)) for row in order)

    def verify(self) -> int:
        """Every byte."""
        return sum(verify_shard(self.shards, name).bytes for name in self.shards.snapshot().shards)


class WebDataset:
    """`ShardWriter`, and its own reader."""

    def __init__(self, folder: Path, plans: Sequence[ShardPlan]) -> None:
        self.folder, self.plans = folder, plans

    def write(self, arrays: Arrays) -> None:
        """Shards."""
        self.folder.mkdir(parents=True)
        with webdataset.ShardWriter(str(self.folder / "%06d.tar"), maxcount=SHARD, verbose=0) as writer:
            for plan in self.plans:
                for sample in plan.samples:
                    about = canonical_json(sample.model_dump())
                    writer.write({"__key__": sample.key, LATENTS: save(arrays), "json": about})

    def ordered(self) -> int:
        """All samples, as they lie."""
        paths = sorted(str(path) for path in self.folder.glob("*.tar"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stream = webdataset.WebDataset(paths, shardshuffle=False)
            return sum(len(load(sample[LATENTS])) for sample in stream)


class Parquet:
    """A file a shard, a row group a sample."""

    def __init__(self, folder: Path, plans: Sequence[ShardPlan]) -> None:
        self.folder, self.plans = folder, plans

    def write(self, arrays: Arrays) -> None:
        """Tables with a binary column, uncompressed: random latents do not shrink."""
        self.folder.mkdir(parents=True)
        for plan in self.plans:
            columns = {
                "key": [sample.key for sample in plan.samples],
                "latents": pa.array([save(arrays) for _ in plan.samples], pa.large_binary()),
                "json": [canonical_json(sample.model_dump()) for sample in plan.samples],
            }
            path = self.folder / f"{plan.shard}.parquet"
            pq.write_table(pa.table(columns), path, row_group_size=1, compression="none", use_dictionary=False)

    def ordered(self) -> int:
        """All samples, as they lie."""
        return self._read(self._places())

    def at_random(self) -> int:
        """All samples, in a random order."""
        places = self._places()
        random.Random(0).shuffle(places)
        return self._read(places)

    def _places(self) -> list[tuple[pq.ParquetFile, int]]:
        files = [pq.ParquetFile(path) for path in sorted(self.folder.glob("*.parquet"))]
        return [(file, group) for file in files for group in range(file.num_row_groups)]

    @staticmethod
    def _read(places: Sequence[tuple[pq.ParquetFile, int]]) -> int:
        groups = (file.read_row_group(group, columns=["latents"], use_threads=False) for file, group in places)
        return sum(len(load(table["latents"][0].as_py())) for table in groups)


def measure(size: str, samples: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each verb and each store (rats, WebDataset, Parquet; NaN: it has none), medians."""
    nfe, tokens, channels = SIZES[size]
    seconds: dict[str, list[list[float]]] = {"write": [], "ordered": [], "at_random": [], "verify": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            ours = Rats(Path(folder) / "rats", nfe, (tokens, channels), samples)
            arrays = make_arrays(len(ours.shards.recipe.horizons), tokens, channels)
            stores = [ours, WebDataset(Path(folder) / "wds", ours.plans), Parquet(Path(folder) / "pq", ours.plans)]
            for verb, rows in seconds.items():
                given = (arrays,) if verb == "write" else ()
                rows.append([timed(getattr(store, verb, None), *given) for store in stores])
    return {verb: [median(column) for column in zip(*rows, strict=True)] for verb, rows in seconds.items()}


def timed(work: Callable[..., object] | None, *given: object) -> float:
    """Wall seconds."""
    if work is None:
        return float("nan")
    start = time.perf_counter()
    work(*given)
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="the store against WebDataset and Parquet blobs")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    arguments = parser.parse_args(argv)
    print(f"rats against WebDataset {webdataset.__version__} and Parquet blobs (pyarrow {pa.__version__}) on {where()}")
    for size in arguments.sizes:
        nfe, tokens, channels = SIZES[size]
        arrays = make_arrays(len(union([[1 - i / n for i in range(n)] + [0.0] for n in nfe])), tokens, channels)
        mebibytes = sum(array.nbytes for array in arrays.values()) / 2**20
        print(f"{size}: {arguments.samples} samples of {mebibytes:.2f} MiB, medians of {arguments.repeats}")
        print(f"{'':>10} {'rats s':>9} {'MiB/s':>7} {'webdataset':>11} {'ratio':>6}{'parquet':>11} {'ratio':>6}")
        for verb, (ours, plain, parquet) in measure(size, arguments.samples, arguments.repeats).items():
            rate = mebibytes * arguments.samples / ours
            others = "".join(f"{theirs:>11.3f} {ours / theirs:>6.2f}" for theirs in (plain, parquet)).replace(
                "nan", "  -"
            )
            print(f"{verb:>10} {ours:>9.3f} {rate:>7.0f} {others}")


if __name__ == "__main__":
    main()
