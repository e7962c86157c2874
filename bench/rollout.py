"""Stage one against a bare diffusers loop: `python -m bench.rollout`.

The same weights, prompts, batch, steps and threads, in one process, by turns. Ours is what a worker does with one
shard (`stages.rollout.worker.do_task`, no rewards): encode the prompts, sample, keep and check the horizons, hash,
write, fsync and read back. Theirs is `FluxPipeline(..., output_type="latent")`, whose result is thrown away.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rats.pipeline.families.flux import FluxPipeline
from rats.pipeline.families.open import Model
from rats.pipeline.machine import software
from rats.pipeline.prompts import planned_samples, read_prompts
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.weights.loading import quiet_loading
from rats.schemas.manifest import ShardPlan
from rats.schemas.params import Params, load_params
from rats.stages.rollout.rollout import read_recipe
from rats.stages.rollout.worker import RolloutSetup, RolloutTask, do_task


def bare(params: Params) -> Callable[[ShardPlan], None]:
    """The loop of a diffusers user."""
    with quiet_loading():
        pipeline = FluxPipeline.from_pretrained(params.model.path).to(getattr(torch, params.model.dtype))
    pipeline.set_progress_bar_config(disable=True)
    names = ("guidance_scale", "true_cfg_scale", "max_sequence_length", "height", "width")
    settings = {name: getattr(params.teacher, name) for name in names}
    settings |= {"num_inference_steps": params.teacher.steps, "output_type": "latent"}

    def run(plan: ShardPlan) -> None:
        generator = torch.Generator().manual_seed(params.teacher.seed)
        pipeline([sample.prompt for sample in plan.samples], generator=generator, **settings)

    return run


def ours(params: Params, shards: ShardSet) -> Callable[[ShardPlan], None]:
    """What a worker does with a shard."""
    context = RolloutSetup(params, shards.root, software(params))()

    def run(plan: ShardPlan) -> None:
        do_task(context, RolloutTask(shard=plan.shard, plan=plan, columns={}))

    return run


def compare(params: Params, store: Path, repeats: int) -> dict[str, float]:
    """Wall seconds a task of both, and the medians of the paired ratios, wall and CPU."""
    shards = ShardSet.open_or_create(store, read_recipe(params, Model.of(params)))
    batch = params.compute.micro_batch
    wanted = planned_samples(read_prompts(params.prompts.train), params.teacher.noises_per_prompt)
    plans = shards.plan(wanted[: (repeats + 1) * batch], batch)
    theirs, mine = bare(params), ours(params, shards)
    pairs = []
    for number, plan in enumerate(plans):
        if number % 2:
            pairs.append((timed(theirs, plan), timed(mine, plan)))
        else:
            pairs.append((timed(mine, plan), timed(theirs, plan))[::-1])
    wall, cpu = np.array(pairs[1:]).transpose(2, 0, 1)  # the first pair warmed both up
    medians = {"bare": np.median(wall[:, 0]), "rats": np.median(wall[:, 1])}
    ratios = {name: np.median(times[:, 1] / times[:, 0]) for name, times in (("ratio", wall), ("cpu_ratio", cpu))}
    return {"batch": batch, "steps": params.teacher.steps, **medians, **ratios}


def timed(run: Callable[[ShardPlan], None], plan: ShardPlan) -> tuple[float, float]:
    """Wall and CPU seconds of one task: the second tells what a busy machine hides in the first."""
    wall, cpu = time.perf_counter(), time.process_time()
    run(plan)
    return time.perf_counter() - wall, time.process_time() - cpu


def settings(arguments: argparse.Namespace, batch: int) -> Params:
    """The parameter file with this benchmark's batch, steps and threads."""
    changes = {"compute.micro_batch": batch, "compute.threads": arguments.threads, "teacher.steps": arguments.steps}
    texts = [f"{name}={value}" for name, value in changes.items()]
    return load_params(arguments.params, [*texts, *arguments.set])


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure each batch and print a table."""
    parser = argparse.ArgumentParser(description="stage one against a bare FluxPipeline loop")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 4], metavar="N", help="samples a task")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    rows = []
    print(
        f"stage one (encode, sample, hash, fsync, read back; no rewards) against FluxPipeline, by turns, on {where()}"
    )
    print(f"medians of {arguments.repeats} pairs, {arguments.threads} torch threads, {arguments.params}")
    print(f"{'batch':>6} {'steps':>6} {'bare s':>9} {'rats s':>9} {'ratio':>7} {'cpu':>7}")
    for batch in arguments.batches:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(compare(settings(arguments, batch), Path(folder), arguments.repeats))
        row = rows[-1]
        seconds = f"{row['bare']:>9.3f} {row['rats']:>9.3f}"
        print(f"{row['batch']:>6} {row['steps']:>6} {seconds} {row['ratio']:>7.3f} {row['cpu_ratio']:>7.3f}")
    return rows


def where() -> str:
    """The machine, in words."""
    return f"{os.cpu_count()} cores ({platform.machine()}), load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
