"""Peak memory of stage two, by what it holds: `python -m bench.memory --shards data/teacher/train`.

Each mode runs a few steps in a process of its own. On the CPU it is the peak resident set above what it was after the
imports; on a GPU what torch has allocated at most. Beside it what `rats plan` counts without running anything.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.harness import UNSPLIT, opened, where
from rats.pipeline.families.open import Model
from rats.schemas.params import load_params
from rats.stages.plan.memory import train_memory

LORA = "train.lora={rank: 32}"
LIVE = "train.teacher.mode=live-ema"
CHECKPOINTED = "train.gradient_checkpointing=true"
TEXT = "text encoders"
"""No parameter: they are opened beside the run, and kept, as a trainer without stored embeddings would."""

MODES: dict[str, tuple[str, ...]] = {
    "frozen": (),
    "frozen, gradient checkpointing": (CHECKPOINTED,),
    "frozen, LoRA": (LORA,),
    "frozen, LoRA, gradient checkpointing": (LORA, CHECKPOINTED),
    "frozen, text encoders kept": (TEXT,),
    "refresh": ("train.teacher.mode=refresh",),
    "live-ema": (LIVE,),
    "live-ema, LoRA": (LIVE, LORA),
    "live-ema, text encoders kept": (LIVE, TEXT),
}
HOLDS = {
    "frozen": "student, AdamW's two moments, gradients, EMA, decoder, reward, activations",
    "frozen, gradient checkpointing": "the same, fewer activations",
    "frozen, LoRA": "student; moments, gradients and EMA of the adapters only",
    "frozen, LoRA, gradient checkpointing": "the same, fewer activations",
    "frozen, text encoders kept": "and both text encoders, which stored embeddings make needless",
    "refresh": "and the average that the next generation is rolled from",
    "live-ema": "and a second network",
    "live-ema, LoRA": "and a second network with adapters of its own",
    "live-ema, text encoders kept": "and a second network and both text encoders",
}


def peak(params: Path, shards: Path, changes: Sequence[str], steps: int = 2) -> int:
    """Bytes at most, measured in a new process."""
    line = [sys.executable, "-m", "bench.memory", "--child", str(steps), "--params", str(params)]
    line += ["--shards", str(shards), *(word for change in changes for word in ("--set", change))]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


def estimate(params: Path, changes: Sequence[str]) -> int:
    """Bytes that `rats plan` counts for the same step; text encoders are no part of a step."""
    changes = [UNSPLIT, *(change for change in changes if change != TEXT)]
    values = load_params(params, changes)
    return train_memory(values, Model.of(values), split=False).peak


def measure(params: Path, shards: Path, changes: Sequence[str], steps: int) -> int:
    """Bytes at most of some steps in this process."""
    before = resident()
    with opened(params, shards, [change for change in changes if change != TEXT]) as bench:
        text = None
        if TEXT in changes:
            text = bench.model.open_text()
        for _ in range(steps):
            bench.step()
        del text
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else resident() - before


def resident() -> int:
    """The largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux's ru_maxrss begins with the peak of the process that started this one
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(argv: Sequence[str] | None = None) -> dict[str, int]:
    """Measure each mode and print a table."""
    parser = argparse.ArgumentParser(description="peak memory of stage two, by mode")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES), metavar="MODE")
    parser.add_argument("--nfe", type=int, default=8)
    parser.add_argument("--child", type=int, metavar="STEPS", help="measure in this process")
    arguments = parser.parse_args(argv)
    if arguments.child:
        found = measure(arguments.params, arguments.shards, arguments.set, arguments.child)
        print(json.dumps({"peak": found}))
        return {"peak": found}
    print(f"peak memory of 2 steps at {arguments.nfe} NFE, {arguments.params} {' '.join(arguments.set)}, {where()}\n")
    print("| mode | peak MiB | counted MiB | against frozen | holds |\n| --- | ---: | ---: | ---: | --- |")
    peaks: dict[str, int] = {}
    for mode in arguments.modes:
        changes = [f"train.nfe=[{arguments.nfe}]", *arguments.set, *MODES[mode]]
        peaks[mode] = peak(arguments.params, arguments.shards, changes)
        ratio = peaks[mode] / next(iter(peaks.values()))
        counted = estimate(arguments.params, changes)
        print(
            f"| {mode} | {peaks[mode] / 2**20:,.0f} | {counted / 2**20:,.0f} | {ratio:.2f} | {HOLDS[mode]} |",
            flush=True,
        )
    return peaks


if __name__ == "__main__":
    main()
