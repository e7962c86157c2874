"""A reward without any gradient raises itself: `python -m bench.black_box --shards data/teacher/train`.

The reward is minus the size, in bytes, of the picture as a JPEG file of quality 95 (compressibility, as in Black et al.
2023, arXiv 2305.13301): a whole number that no gradient leads to. It is served as any judge would be, by `rats serve`'s
server behind a url, scored onto the stored finals by stage score, and climbed by stage train through
`trainer.black_box`. A control trains the same steps with the reward's weight at 0. Both are compared with the untrained
student on the validation prompts, from the same noises, by that reward and by those of params.yaml, which are held out.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rats.schemas.params import Params, load_params
from rats.stages.evaluate.evaluate import evaluate_stage
from rats.stages.measure.intervals import paired_estimate
from rats.stages.rollout.rollout import rollout_stage
from rats.stages.rollout.score import score_stage
from rats.stages.serve.reward import RewardServer, open_callable
from rats.stages.train.train import train_stage
from rats.stages.workers.target import WorkerTarget

NAME = "jpeg"
QUALITY = 95
HERE = WorkerTarget(workers=0)


def compressibility(pictures: NDArray[np.uint8], prompts: Sequence[str]) -> list[int]:
    """Minus the bytes of each picture (B, H, W, 3) as a JPEG file."""
    return [-_bytes(picture) for picture in pictures]


def _bytes(picture: NDArray[np.uint8]) -> int:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=QUALITY)
    return file.tell()


@contextmanager
def served() -> Iterator[str]:
    """The url of a server of the reward, in a thread of this process."""
    server = RewardServer(open_callable("bench.black_box:compressibility", NAME), "127.0.0.1", 0, 64, 4)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        thread.join()


def settings(options: argparse.Namespace, url: str, folder: Path) -> Params:
    """params.yaml, with the reward behind the url that trains, and the control beside it."""
    base = load_params(options.params).model_dump()
    train = {
        "reward": NAME,
        "nfe": [options.nfe],
        "steps": options.steps,
        "alpha": options.alpha,
        "reward_weight": options.weight,
        "lr": options.lr,
        "ema": 0.0,
        "checkpoint_every": options.steps,
        "black_box": {"pairs": options.pairs, "spread": options.spread},
    }
    changes: dict[str, Any] = {
        "rewards": [*base["rewards"], {"name": NAME, "adapter": "url", "path": url}],
        "train": base["train"] | train,
        "variants": {"black-box": {}, "control": {"reward_weight": 0.0}},
        "teacher": base["teacher"] | {"noises_per_prompt": options.noises},
        "store": base["store"] | {"path": str(folder / "store"), "workers": 0},
        "evaluate": base["evaluate"] | {"variants": ["black-box", "control"], "judges": []},
    }
    return Params.model_validate(base | changes)


def measure(params: Params, shards: Path, folder: Path) -> list[dict[str, str]]:
    """Train both, evaluate them on the validation prompts; every sample's score, a row each."""
    shutil.copytree(shards, folder / "train")
    score_stage(params, shards=str(folder / "train"), rewards=[NAME], where=HERE)
    rollout_stage(params, "validation", folder / "validation", HERE)
    for variant in params.variants:
        started = time.monotonic()
        train_stage(params, variant, folder / "train", folder / "runs" / variant)
        print(f"{variant}: {params.train.steps} steps in {time.monotonic() - started:.0f} s")
    evaluate_stage(params, folder / "validation", folder / "runs", folder / "evaluate.json")
    with (folder / "values.csv").open() as file:
        return list(csv.DictReader(file))


def compare(rows: Sequence[dict[str, str]], metric: str, after: str, before: str) -> str:
    """One line: both means, and the difference with its interval over concepts."""
    values = {
        name: [row for row in rows if (row["column"], row["metric"]) == (name, metric)] for name in (after, before)
    }
    concepts = [row["concept"] for row in values[after]]
    new, old = ([float(row["value"]) for row in values[name]] for name in (after, before))
    found = paired_estimate(new, old, concepts)
    low, high = found.delta_ci
    means = f"{np.mean(old):>10.4f} {np.mean(new):>10.4f}"
    return f"{metric:<14} {before:<15} {after:<13} {means} {found.delta:>+10.4f} [{low:+.4f}, {high:+.4f}]"


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, default=Path("data/teacher/train"), help="the published training set")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--out", type=Path, help="keep everything there")
    parser.add_argument("--nfe", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=4, help="perturbed pairs a sample")
    parser.add_argument("--spread", type=float, default=0.1, help="of the perturbation, in the latents' units")
    parser.add_argument("--alpha", type=float, default=15.0, help="weight of the shaping loss")
    parser.add_argument("--weight", type=float, default=0.01, help="weight of the reward, whose unit is a byte")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--noises", type=int, default=2, help="a validation prompt")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, served() as url:
        folder = options.out or Path(temporary)
        params = settings(options, url, folder)
        rows = measure(params, options.shards, folder)
    student, control, base = (f"{name}-{options.nfe}" for name in ("black-box", "control", "base_guided"))
    print(f"{'metric':<14} {'before':<15} {'after':<13} {'before':>10} {'after':>10} {'difference':>10} 95 %")
    for metric in (NAME, *(reward.name for reward in params.rewards if reward.name != NAME)):
        for after, before in ((student, base), (control, base), (student, control)):
            print(compare(rows, metric, after, before))


if __name__ == "__main__":
    main()
