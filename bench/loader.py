"""The trainer's loader, which verifies, against plain WebDataset, which does not: `python -m bench.loader`.

Both read the same shards, those of `rats stage rollout`, with the page cache warm, and both end in torch tensors in the
trainer's process. Rounds are paired: each reads the set once with either, in turn. Beyond what WebDataset does, the
loader hashes every byte, reads in training order, and joins embeddings and scores.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
import webdataset
from safetensors.torch import load

from bench.rollout import where
from bench.store import Rats, make_arrays, timed
from rats.pipeline.store.embeddings import write_embedding
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import LATENTS
from rats.trainer.data import StoredSamples

NFE, CHANNELS, TOKENS = (3,), 64, 3511
"""Four states and three predictions a sample: at 3511 tokens of 64 channels 3.00 MiB."""
BATCH = 16


def stored(folder: Path, samples: int, tokens: int) -> ShardSet:
    """A set as a rollout leaves it, with small embeddings."""
    made = Rats(folder, NFE, (tokens, CHANNELS), samples)
    made.write(make_arrays(len(made.shards.recipe.horizons), tokens, CHANNELS))
    for plan in made.plans:
        for sample in plan.samples:
            write_embedding(made.shards, sample.prompt_id, {"prompt_embeds": torch.zeros(8, 32)})
    return made.shards


def ours(stream: StoredSamples, samples: int) -> int:
    """A pass over as many samples as the set has."""
    return sum(sample.x_HTC.numel() for _ in range(samples // BATCH) for sample in stream.take())


def plain(shards: ShardSet, workers: int) -> int:
    """A pass as WebDataset's users write it."""
    paths = sorted(str(path) for path in shards.root.glob("shards/*.tar"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = webdataset.WebDataset(paths, shardshuffle=False).map(_parsed)
        loader = webdataset.WebLoader(data, batch_size=None, num_workers=workers) if workers else data
        return sum(int(x.numel()) for x, _, _ in loader)


def _parsed(sample: dict) -> tuple[torch.Tensor, torch.Tensor, str]:
    tensors = load(sample[LATENTS])
    return tensors["x"], tensors["x0"], sample["__key__"]


def measure(samples: int, rounds: int, tokens: int, workers: int) -> list[tuple[float, float]]:
    """Seconds of either in each round, after one that warms the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        shards = stored(Path(folder), samples, tokens)
        snapshot = shards.snapshot()
        scores = {row.key: (0.0,) for row in shards.index(snapshot)}
        stream = StoredSamples(shards, snapshot, scores, 0, BATCH, workers=workers)
        assert ours(stream, samples) == plain(shards, workers)
        pairs = [(timed(ours, stream, samples), timed(plain, shards, workers)) for _ in range(rounds)]
        stream.close()
    return pairs


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="the verifying loader against plain WebDataset")
    parser.add_argument("--samples", type=int, default=256, help=f"a multiple of {BATCH}")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--workers", type=int, default=0, help="loader threads of ours, processes of WebDataset")
    options = parser.parse_args(argv)
    pairs = measure(options.samples, options.rounds, options.tokens, options.workers)
    mebibytes = 7 * options.tokens * CHANNELS * 2 / 2**20
    print(f"the loader, verifying, against WebDataset {webdataset.__version__}, which does not, on {where()}")
    print(f"{options.samples} samples of {mebibytes:.2f} MiB, page cache warm, {options.rounds} paired rounds,")
    print(f"{options.workers} loader threads (ours) and processes (theirs)" if options.workers else "in one process")
    for name, seconds in zip(("rats", "webdataset"), zip(*pairs, strict=True), strict=True):
        print(f"{name:>12} {options.samples / median(seconds):8.0f} samples/s (median), {_best(options, seconds)}")
    ratios = sorted(theirs / our for our, theirs in pairs)
    print(f"{'speed ratio':>12} {median(ratios):8.2f} (median of the pairs; {ratios[0]:.2f} to {ratios[-1]:.2f})")


def _best(options: argparse.Namespace, seconds: Sequence[float]) -> str:
    return f"{options.samples / min(seconds):.0f} at best"


if __name__ == "__main__":
    main()
