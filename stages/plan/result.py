"""What `rats plan` says: the work of a rollout before it starts, and what stored trajectories save."""

from __future__ import annotations

from rats.schemas.manifest import Record


class Work(Record):
    """What a split needs and what of it is there.

    `samples_to_make` may exceed what is missing: a shard that was planned earlier is made whole. `evaluations` are
    network evaluations of one sample; `forwards` those of a micro-batch, which is always padded to full.
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
    """Evaluations of the teacher's network, seconds of one worker, and USD where there is a price."""

    evaluations: int
    worker_seconds: float
    usd: float | None


class Comparison(Record):
    """The teacher's part in `experiments` trainings of `steps` steps of `batch` samples.

    `stored`: all of the split's samples, once. `live`: a teacher that is run for every sample of every step.
    From experiment `pays_from` on, stored trajectories cost less.
    """

    experiments: int
    steps: int
    batch: int
    pays_from: int
    stored: Expense
    live: Expense


class Memory(Record):
    """Bytes of a device's memory by what they are; their sum is the most at once.

    `stand_ins`: how many rewards are not on this disk, and counted as a ViT-H-14.
    """

    parts: dict[str, int]
    stand_ins: int

    @property
    def peak(self) -> int:
        """The most at once."""
        return sum(self.parts.values())


class Plan(Record):
    """`rats plan`. `rate` is FLOP/s of one worker, `price` USD an hour of one worker; sizes are bytes.

    `flops` count whole micro-batches. `decode_flops` is for one picture; decoding, rewards and text encoders are
    part neither of `flops` nor of the times. `seconds` takes `workers` to be as fast together as one alone.
    `bytes_free` is None for a remote store.
    """

    split: str
    work: Work
    evaluation_flops: int
    decode_flops: int
    flops: int
    rate: float
    rate_measured: bool
    device: str
    workers: int
    worker_seconds: float
    seconds: float
    price: float | None
    usd: float | None
    bytes_to_write: int
    bytes_per_sample: int
    bytes_per_prompt: int
    bytes_free: int | None
    rollout_memory: Memory
    train_memory: Memory
    comparison: Comparison
