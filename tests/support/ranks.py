"""A rank of a toy training, with one global batch for any number of ranks.

Started as `torchrun -m tests.support.ranks OUT MODE STEPS`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed

from rats.stages.train.resume import stop_flag
from rats.trainer.checkpoint import Checkpoints
from rats.trainer.distributed import Accelerated
from rats.trainer.loop import train
from rats.trainer.metrics import CsvLog, columns
from rats.trainer.optim import Learner
from rats.trainer.run import METRICS, Run
from tests.support.toy import IDENTITY, ToyReward, ToyStream, ToyStudent, settings


class ShareStream(ToyStream):
    """A rank's contiguous share of every global batch."""

    def __init__(self, position: int, batch: int, rank: int, world: int) -> None:
        super().__init__(position, batch)
        self.rank, self.share = rank, batch // world

    def take(self):
        return super().take()[self.rank * self.share : (self.rank + 1) * self.share]


def main(out: Path, mode: str, steps: int) -> None:
    """`mode`: ddp or fsdp; a run that finds checkpoints in `out` goes on from the newest."""
    chosen = settings(steps=steps, augment=0.5, ema=0.9, last_k=1, checkpoint_every=3)
    ranks = Accelerated("cpu", fsdp=mode == "fsdp")
    student = ToyStudent()
    learner = Learner(student.network, chosen.train, ranks)
    run = Run(learner, Checkpoints(out / "checkpoints"), {}, IDENTITY, 1, ranks=ranks)
    if saved := run.checkpoints.newest():
        run.restore(saved)
    ranks.wait()
    if ranks.is_main:
        run.logs[METRICS] = CsvLog(out / METRICS, columns(3), saved.log(METRICS) if saved else None)
    stream = ShareStream(run.state.position, chosen.train.batch, ranks.rank, ranks.world)
    with stop_flag() as run.stopping:
        train(student, stream, [ToyReward()], chosen, run)
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
