"""The result of `rats plan`: the work of a rollout, and what stored trajectories save."""

from __future__ import annotations

from rats.pipeline.lengths import Lengths
from rats.schemas.record import Record


class RolloutWork(Record):
    """The samples of a split, and how many of them must still be made.

    `samples_to_make` may exceed `samples_missing`, since a planned shard is always made whole. `evaluations` counts
    network evaluations of single samples; `forwards` counts those of micro-batches, which are always full.
    """

    fingerprint: str
    store: str
    samples: int
    samples_missing: int
    samples_to_make: int
    shards: int
    shards_missing: int
    embeddings_to_make: int
    horizons: int
    evaluations: int
    forwards: int


class Expense(Record):
    """Evaluations of the teacher's network, seconds of one worker if known, and USD if a price was given too."""

    evaluations: int
    worker_seconds: float | None
    usd: float | None


class Comparison(Record):
    """The teacher's part in `experiments` trainings of `steps` steps of `batch` samples.

    `stored` makes all samples of the split once. `live` runs the teacher for every sample of every step.
    From experiment number `pays_from` on, stored trajectories cost less.
    """

    experiments: int
    steps: int
    batch: int
    pays_from: int
    stored: Expense
    live: Expense


class Memory(Record):
    """Bytes of a device's memory by their use. Their sum is the peak.

    `stand_ins`: number of rewards that are not on this disk, and are counted as a ViT-H-14.
    """

    parts: dict[str, int]
    stand_ins: int

    @property
    def peak(self) -> int:
        """The peak in bytes."""
        return sum(self.parts.values())


class Plan(Record):
    """`rats plan`. `rate` is FLOP/s of one worker, `price` USD an hour of one worker; sizes are bytes.

    `flops` counts full micro-batches. `decode_flops` is for one picture. Decoding, rewards and text encoders are
    neither in `flops` nor in the times. `seconds` assumes that `workers` do not slow each other down. `bytes_free` is
    None for a remote store. FLOPs, times, USD and memory are None where they cannot be known before the rollout: of a
    network that reads values of tensors, as it is looked at without values. So is `rate`, unless it was given.
    """

    split: str
    loras: tuple[str, ...] = ()
    work: RolloutWork
    lengths: Lengths
    evaluation_flops: int | None
    decode_flops: int | None
    flops: int | None
    rate: float | None
    rate_measured: bool
    device: str
    workers: int
    worker_seconds: float | None
    seconds: float | None
    price: float | None
    usd: float | None
    bytes_to_write: int
    bytes_per_sample: int
    bytes_per_prompt: int
    bytes_free: int | None
    rollout_memory: Memory | None
    train_memory: Memory | None
    comparison: Comparison
