"""A step of stage two against the same step with a live teacher: `python -m bench.step --shards data/teacher/train`.

Both are the stage's own step, on the same weights, samples and settings, by turns: one reads the stored trajectories,
the other has `teacher.mode: live-ema` with decay 1 walk them again and score their ends. With E evaluations of the
teacher and N of the student, whose backward pass costs two more, 3 N / (3 N + E) is what the networks alone should
give; decoding and rewards are in both steps and are stated apart. `--rollout` also measures stage one, and draws what
1, 2 and 5 experiments over one set cost in all.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from bench.harness import Bench, Cost, opened, timed, where
from bench.memory import LIVE, peak
from rats.pipeline.machine import software
from rats.pipeline.store.scores import record_reward
from rats.pipeline.store.shard_set import ShardSet
from rats.schemas.manifest import PlannedSample
from rats.stages.rollout.columns import column_hashes
from rats.stages.rollout.rollout import read_recipe
from rats.stages.rollout.worker import RolloutSetup, RolloutTask, do_task
from rats.trainer.augment import RandomDraws, augment
from rats.trainer.randomness import generator
from rats.trainer.sampling import rounded_as_stored

FROZEN_LIVE = (LIVE, "train.teacher.ema=1")
EXPERIMENTS = (1, 2, 5)


def compare(params: Path, shards: Path, overrides: Sequence[str], nfe: int, rounds: int) -> dict[str, Any]:
    """Medians over the rounds, after one that warms up: a step of each kind, the ratio, and what is in both."""
    changes = [*overrides, f"train.nfe=[{nfe}]"]
    pairs, sides = [], []
    with opened(params, shards, changes) as stored, opened(params, shards, [*changes, *FROZEN_LIVE]) as live:
        for number in range(rounds + 1):
            if number % 2:
                costs = [timed(live.step), timed(stored.step)][::-1]
            else:
                costs = [timed(stored.step), timed(live.step)]
            pairs.append([astuple(cost) for cost in costs])
            sides.append(
                [astuple(timed(lambda: pictures(stored, True))), astuple(timed(lambda: pictures(live, False)))]
            )
        evaluations = live.params.teacher.evaluations
    # rounds x (stored, live) x (wall, cpu)
    steps, aside = np.array(pairs[1:]), np.array(sides[1:])
    networks = steps - np.stack([aside[:, 0], aside.sum(1)], 1)
    return {
        "nfe": nfe,
        "evaluations": evaluations,
        "expected": 3 * nfe / (3 * nfe + evaluations),
        **{name: Cost(*np.median(steps[:, i], 0)) for i, name in enumerate(("stored", "live"))},
        **{name: Cost(*np.median(aside[:, i], 0)) for i, name in enumerate(("student_pictures", "teacher_pictures"))},
        "ratio": Cost(*np.median(steps[:, 0] / steps[:, 1], 0)),
        "networks": Cost(*np.median(networks[:, 0] / networks[:, 1], 0)),
    }


def pictures(bench: Bench, trained: bool) -> None:
    """What a step does beside its network: decode and score with gradient and without (`trained`), or without alone."""
    train, final_BTC = bench.objective.settings.train, _finals(bench)
    prompts = [""] * train.batch
    for start in range(0, train.batch, train.micro_batch):
        part_BTC = final_BTC[start : start + train.micro_batch].requires_grad_(trained)
        texts = prompts[start : start + train.micro_batch]
        with torch.set_grad_enabled(trained):
            images_B3HW = bench.student.decode(rounded_as_stored(part_BTC))
        if trained:
            seen_B3HW = augment(images_B3HW, RandomDraws(generator(0, 0), start, train.batch), train.augment)
            torch.autograd.grad(sum(r.score(seen_B3HW, texts).sum() for r in bench.objective.rewards), part_BTC)
        if not trained or train.augment:
            with torch.no_grad():
                for reward in bench.objective.rewards:
                    reward.score(images_B3HW.detach(), texts)


def _finals(bench: Bench) -> torch.Tensor:
    shape, device = (bench.objective.settings.train.batch, *bench.student.latent_shape()), bench.run.ranks.device
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def rollout_cost(params: Path, shards: Path, overrides: Sequence[str], tasks: int) -> Cost:
    """A sample of stage one in this process, all rewards included: medians over tasks of one shard each."""
    with opened(params, shards, overrides) as bench, tempfile.TemporaryDirectory() as folder:
        recipe, vae = read_recipe(bench.params, bench.model), bench.model.folder.hash_of("vae")
        made, fields = ShardSet.open_or_create(folder, recipe), set(PlannedSample.model_fields)
        rows = bench.source.shards.index(bench.source.snapshot)
        size = bench.params.store.shard_samples
        wanted = [PlannedSample(**row.model_dump(include=fields)) for row in rows[: (tasks + 1) * size]]
        columns = {n: record_reward(made, n, parts) for n, parts in column_hashes(bench.params, vae).items()}
        context, costs = RolloutSetup(bench.params, made.root, software(bench.params))(), []
        for plan in made.plan(wanted, size):
            task = RolloutTask(shard=plan.shard, plan=plan, columns=columns)
            costs.append(np.array(astuple(timed(lambda task=task: do_task(context, task)))) / len(plan.samples))
    return Cost(*np.median(costs[1:], 0))


def experiments(rows: Sequence[dict[str, Any]], cycle: Sequence[int], sample: Cost, samples: int, steps: int) -> dict:
    """Seconds of n experiments over one set, and of n with a live teacher: rollout + n x training, by `cpu`."""
    by_nfe = {row["nfe"]: row for row in rows}
    stored, live = (fmean(by_nfe[nfe][kind].cpu for nfe in cycle) * steps for kind in ("stored", "live"))
    rollout = sample.cpu * samples
    return {
        "rollout": rollout,
        "training": stored,
        "live": live,
        "totals": {n: (rollout + n * stored, n * live) for n in EXPERIMENTS},
    }


def draw(found: dict[str, Any], path: Path, title: str) -> None:
    """Bars: one rollout and n trainings beside n trainings with a live teacher."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), dpi=100)
    place = np.arange(len(EXPERIMENTS))
    rollout, training = found["rollout"] / 60, np.array([n * found["training"] for n in EXPERIMENTS]) / 60
    axes.bar(place - 0.2, rollout, 0.36, color="#4c72b0", label="rollout, once")
    axes.bar(place - 0.2, training, 0.36, bottom=rollout, color="#9bb4d8", label="training on the shards")
    live = np.array([n * found["live"] for n in EXPERIMENTS]) / 60
    axes.bar(place + 0.2, live, 0.36, color="#c44e52", label="training with a live teacher")
    for x, y in [*zip(place - 0.2, rollout + training, strict=True), *zip(place + 0.2, live, strict=True)]:
        axes.text(x, y, f"{y:.1f}", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(place, [f"{n} experiment{'s' if n > 1 else ''}" for n in EXPERIMENTS])
    axes.set_ylabel("core minutes")
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def show(row: dict[str, Any], memory: tuple[int, int] | None) -> None:
    """One line by the clock and one by processor time, then memory."""
    for kind in ("wall", "cpu"):
        get = lambda name: getattr(row[name], kind)  # noqa: B023, E731
        off = get("networks") / row["expected"] - 1
        print(
            f"{row['nfe']:>4} {kind:>5} {get('stored'):>9.3f} {get('live'):>9.3f} {get('student_pictures'):>9.3f} "
            f"{get('teacher_pictures'):>9.3f} {get('ratio'):>7.3f} {get('networks'):>9.3f} {row['expected']:>9.3f} "
            f"{off:>+7.1%}",
            flush=True,
        )
    if memory:
        stored, live = (size / 2**20 for size in memory)
        print(f"     peak {stored:>6.0f} MiB {live:>5.0f} MiB, {stored / live:.2f}", flush=True)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure each N and print a table."""
    parser = argparse.ArgumentParser(description="a step of stage two against one with a live teacher")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--nfe", type=int, nargs="+", default=[3, 5, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true", help="peak memory too, a process for each kind of step")
    parser.add_argument("--rollout", type=int, metavar="TASKS", help="measure stage one on so many shards")
    parser.add_argument("--draw", type=Path, metavar="PNG")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    given = (arguments.params, arguments.shards, arguments.set)
    print(f"a step on stored trajectories against one with a live teacher (decay 1), by turns, on {where()}")
    print(f"medians of {arguments.rounds} rounds, seconds, {arguments.threads} torch threads, {arguments.params}")
    print(
        f"{'N':>4} {'':>5} {'stored':>9} {'live':>9} {'pictures':>9} {'+ R_T':>9} {'ratio':>7} {'networks':>9}", end=""
    )
    print(f" {'3N/(3N+E)':>9} {'off':>7}")
    rows = []
    for nfe in arguments.nfe:
        rows.append(compare(*given, nfe, arguments.rounds))
        changes = [*arguments.set, f"train.nfe=[{nfe}]"]
        kinds = ([*changes], [*changes, *FROZEN_LIVE])
        peaks = [peak(arguments.params, arguments.shards, kind) for kind in kinds] if arguments.memory else None
        show(rows[-1], tuple(peaks) if peaks else None)  # type: ignore[arg-type]
    if arguments.rollout:
        total(arguments, rows)
    return rows


def total(arguments: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """What several experiments cost, printed and drawn."""
    sample = rollout_cost(arguments.params, arguments.shards, arguments.set, arguments.rollout)
    with opened(arguments.params, arguments.shards, arguments.set) as bench:
        samples, train = bench.source.snapshot.samples, bench.params.train
    found = experiments(rows, train.nfe, sample, samples, train.steps)
    print(f"stage one: {sample.wall:.3f} s by the clock, {sample.cpu:.3f} s of processor time a sample, all rewards")
    print(f"{samples} samples; {train.steps} steps of {train.batch}, N in turn {', '.join(map(str, train.nfe))}")
    for n, (stored, live) in found["totals"].items():
        print(f"{n} experiments: {stored:,.0f} s with stored trajectories, {live:,.0f} s live, {stored / live:.2f}")
    if arguments.draw:
        title = f"{samples} trajectories once, {train.steps} steps an experiment (flux-mini, one core)"
        draw(found, arguments.draw, title)


if __name__ == "__main__":
    main()
