"""Counts how often a teacher is run or scored during training. Hooks count; no other code sets these numbers.

B samples, T latent tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from rats.pipeline.protocols import Conditioning, Student
from rats.pipeline.store.shards import as_stored
from rats.trainer.checkpoint import COUNTERS
from rats.trainer.data import Sample, SampleStream

PENDING = 64
"""Batches of fingerprints that stay on the device until they are compared: to fetch each one would stall it."""


class TeacherCallCounter:
    """Counts network evaluations by a hook on the network's class, and compares what is scored with what is stored.

    `student_forwards`: evaluations of the student's network. `teacher_forwards`: of any other network of its class.
    """

    def __init__(self) -> None:
        """All counts are zero."""
        self.student_forwards = 0
        self.teacher_forwards = 0
        self._found = 0
        self._told: dict[str, int] = {}
        self._finals: set[int] = set()
        self._pending: list[Tensor] = []

    @contextmanager
    def watching(self, network: nn.Module) -> Iterator[None]:
        """Count every call of `network`, and of other networks of its class, inside the block.

        The hook is on the class, so that modules inside the network and other networks run without one.
        """
        kind, own = hooked_class(network), {id(module) for module in network.modules()}
        call, is_its_own = kind.__call__, "__call__" in vars(kind)

        def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.student_forwards += module is network
            self.teacher_forwards += id(module) not in own
            return call(module, *args, **kwargs)

        kind.__call__ = counted  # type: ignore[method-assign]
        try:
            yield
        finally:
            if is_its_own:
                kind.__call__ = call  # type: ignore[method-assign]
            else:
                del kind.__call__  # inherited again

    @property
    def teacher_reward_calls(self) -> int:
        """Number of decoded latents that equal, to the bit, a stored final latent from the stream."""
        self._compare()
        return self._found

    def taken(self) -> dict[str, int]:
        """What was counted since this was asked last."""
        counts = {name: getattr(self, name) for name in COUNTERS}
        more = {name: count - self._told.get(name, 0) for name, count in counts.items()}
        self._told = counts
        return more

    def stored(self, x_BTC: Tensor) -> None:
        """Remember stored final latents."""
        self._finals.update(fingerprints(x_BTC).tolist())

    def scored(self, x_BTC: Tensor) -> None:
        """Compares latents that are decoded for a reward with the stored ones."""
        self._pending.append(fingerprints(x_BTC))
        if len(self._pending) == PENDING:
            self._compare()

    def _compare(self) -> None:
        for marks_B in self._pending:
            self._found += sum(mark in self._finals for mark in marks_B.tolist())
        self._pending.clear()


def hooked_class(network: nn.Module) -> type[nn.Module]:
    """The class that defines the network's `forward`. (FSDP makes a subclass for the network that it shards.)"""
    return next(kind for kind in type(network).__mro__ if "forward" in vars(kind))


@torch.no_grad()
def fingerprints(x_BTC: Tensor) -> Tensor:
    """A hash of 64 bits (B,) of each sample's latents as stored, computed on their device.

    Different latents have equal hashes with a probability below 2^-48. The bits of each element are multiplied by a
    random number of its own and summed modulo 2^64 (multilinear hashing). Sums of integers do not depend on the order.
    """
    bits_BD = as_stored(x_BTC).flatten(1).view(torch.int16).long()
    return (bits_BD * _factors(bits_BD.shape[1], bits_BD.device)).sum(1)


@lru_cache(maxsize=4)
def _factors(count: int, device: torch.device) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.empty(count, dtype=torch.int64).random_(generator=draw).to(device)


class CountedStream:
    """A stream that passes its stored final latents to the witness."""

    def __init__(self, stream: SampleStream, witness: TeacherCallCounter) -> None:
        """Gives the samples of `stream`."""
        self._stream, self._witness = stream, witness

    @property
    def position(self) -> int:
        """The stream's own."""
        return self._stream.position

    def take(self) -> list[Sample]:
        """The stream's next samples."""
        samples = self._stream.take()
        self._witness.stored(torch.stack([sample.x_HTC[-1] for sample in samples]))
        return samples


class CountedStudent:
    """A student that passes its decoded latents to the witness."""

    def __init__(self, student: Student, witness: TeacherCallCounter) -> None:
        """Does what `student` does."""
        self._student, self._witness = student, witness
        self.network = student.network

    def velocity(self, x_BTC: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        """The student's own."""
        return self._student.velocity(x_BTC, sigma, conditioning)

    def decode(self, x_BTC: Tensor) -> Tensor:
        """The student's own, after passing the latents to the witness."""
        self._witness.scored(x_BTC)
        return self._student.decode(x_BTC)

    def decode_teachers(self, x_BTC: Tensor) -> Tensor:
        """Decodes final latents of a teacher that runs in the loop, which count as stored ones."""
        self._witness.stored(x_BTC)
        return self.decode(x_BTC)

    def stock_sigmas(self, steps: int) -> list[float]:
        """The student's own."""
        return self._student.stock_sigmas(steps)
