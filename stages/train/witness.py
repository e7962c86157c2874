"""Measures what the claim "stage two never runs a teacher" says; nobody sets these counters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from blake3 import blake3
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from rats.pipeline.protocols import Conditioning, Student
from rats.pipeline.store.shards import as_stored
from rats.trainer.data import Sample, SampleStream


class Witness:
    """Counts network evaluations by a forward hook, and compares what is scored with what is stored.

    `student_forwards`: evaluations of the student's network. `teacher_forwards`: of any other network of its class.
    `teacher_reward_calls`: decoded latents that are, to the bit, a stored final that the stream has handed out.
    """

    def __init__(self) -> None:
        """All counts are zero."""
        self.student_forwards = 0
        self.teacher_forwards = 0
        self.teacher_reward_calls = 0
        self._finals: set[bytes] = set()

    @contextmanager
    def watching(self, network: nn.Module) -> Iterator[None]:
        """Count every forward of `network`, and of other modules of its class, inside the block."""
        own, family = {id(module) for module in network.modules()}, type(network)

        def hook(module: nn.Module, args: Any) -> None:
            self.student_forwards += module is network
            self.teacher_forwards += type(module) is family and id(module) not in own

        handle = register_module_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def stored(self, x_TC: Tensor) -> None:
        """Remember a stored final latent."""
        self._finals.add(_digest(x_TC))

    def scored(self, x_BTC: Tensor) -> None:
        """Compare latents that are decoded for a reward."""
        self.teacher_reward_calls += sum(_digest(x) in self._finals for x in x_BTC)


class WatchedStream:
    """A stream whose stored finals the witness remembers."""

    def __init__(self, stream: SampleStream, witness: Witness) -> None:
        """Hands out what `stream` does."""
        self._stream, self._witness = stream, witness

    @property
    def position(self) -> int:
        """The stream's own."""
        return self._stream.position

    def take(self) -> list[Sample]:
        """The stream's next samples."""
        samples = self._stream.take()
        for sample in samples:
            self._witness.stored(sample.x_HTC[-1])
        return samples


class WatchedStudent:
    """A student whose decoded latents the witness sees."""

    def __init__(self, student: Student, witness: Witness) -> None:
        """Does what `student` does."""
        self._student, self._witness = student, witness
        self.network = student.network

    def velocity(self, x_BTC: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        """The student's own."""
        return self._student.velocity(x_BTC, sigma, conditioning)

    def decode(self, x_BTC: Tensor) -> Tensor:
        """The student's own, seen by the witness."""
        self._witness.scored(x_BTC)
        return self._student.decode(x_BTC)

    def decode_teachers(self, x_BTC: Tensor) -> Tensor:
        """Decode finals of a teacher that runs in the loop, which are no student's."""
        for x_TC in x_BTC:
            self._witness.stored(x_TC)
        return self.decode(x_BTC)

    def stock_sigmas(self, steps: int) -> list[float]:
        """The student's own."""
        return self._student.stock_sigmas(steps)


def _digest(x: Tensor) -> bytes:
    return blake3(as_stored(x.detach().cpu()).contiguous().numpy().tobytes()).digest()
