"""A rank of a toy training, with one global batch for any number of ranks.

Started as `torchrun -m tests.support.ranks OUT MODE STEPS`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed

from rats.stages.train.resume import stop_flag
from rats.trainer.distributed import Accelerated
from rats.trainer.loop import train
from tests.support import toy


class ShareStream(toy.ToyStream):
    """A rank's contiguous share of every global batch."""

    def __init__(self, position: int, batch: int, rank: int, world: int) -> None:
        super().__init__(position, batch)
        self.rank, self.share = rank, batch // world

    def take(self):
        return super().take()[self.rank * self.share : (self.rank + 1) * self.share]


def main(out: Path, mode: str, steps: int) -> None:
    """`mode`: ddp or fsdp; a run that finds checkpoints in `out` goes on from the newest."""
    chosen = toy.settings(steps=steps, augment=0.5, ema=0.9, last_k=1, checkpoint_every=3)
    ranks = Accelerated("cpu", fsdp=mode == "fsdp")
    given = toy.objective(chosen, ranks=ranks)
    run = toy.run_of(given, out, resume=True)
    stream = ShareStream(run.state.position, chosen.train.batch, ranks.rank, ranks.world)
    with stop_flag() as stopping:
        run.stop_when(stopping)
        train(given, stream, run)
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
