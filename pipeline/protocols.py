"""What a model family and a reward must offer. Shapes: B samples, T latent tokens, C channels."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

Conditioning = dict[str, Tensor]
"""A family's prompt embeddings, by its own names; the first axis of each is the batch."""


@runtime_checkable
class Reward(Protocol):
    """Scores pictures against prompts, with gradient to the pixels."""

    name: str
    fingerprint: str
    """sha256 over weights, preprocessing version and adapter."""

    def score(self, images_B3HW: Tensor, prompts: list[str]) -> Tensor:
        """Scores (B,), float32, higher is better, of images in [0, 1]; differentiable."""
        ...


class RewardAdapter(Reward, Protocol):
    """How a reward is opened: what an entry point of `rats.rewards` names."""

    checkpoints: ClassVar[tuple[str, ...]]
    """Names that the file of weights may have, the preferred one first; empty if `path` is no file (but a server).
    From a hub repository the first one that exists is fetched, with the .json and .txt files beside it."""

    def __init__(self, path: Any, name: str, device: str) -> None:
        """Loads the checkpoint at `path`, a file or folder that is there."""

    @classmethod
    def identify(cls, path: Any) -> str:
        """The fingerprint of what lies there, without loading it."""
        ...


@runtime_checkable
class Decoder(Protocol):
    """What is needed of a family to score and to show stored final latents."""

    def decode(self, x_BTC: Tensor) -> Tensor:
        """Images (B, 3, H, W), clamped to [0, 1], of clean latents; of videos (B, K, 3, H, W); differentiable."""
        ...


@runtime_checkable
class Student(Decoder, Protocol):
    """What training holds of a family: one network and the decoder, but no text encoder."""

    network: nn.Module

    def velocity(self, x_BTC: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        """Velocity eps - x0 (B, T, C) at one sigma, in one network evaluation; differentiable."""
        ...

    def stock_sigmas(self, steps: int) -> list[float]:
        """The family's own grid for `steps` evaluations, shift applied: steps + 1 values, 1.0 first, 0.0 last."""
        ...


@runtime_checkable
class Teacher(Student, Protocol):
    """A whole family: the student's parts, the text encoders and guidance."""

    evaluations_per_step: int
    """2 with classifier-free guidance, else 1."""

    is_guided: bool
    """Whether `guided_velocity` and `unguided_velocity` differ."""

    def latent_shape(self) -> tuple[int, ...]:
        """Shape (T, C) of one latent at the recipe's resolution."""
        ...

    def encode(self, prompts: list[str]) -> Conditioning:
        """Prompt embeddings, padded to the recipe's max sequence length."""
        ...

    def guided_velocity(self, x_BTC: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        """Velocity with the recipe's guidance, in `evaluations_per_step` network evaluations."""
        ...

    def unguided_velocity(self, x_BTC: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        """Velocity of the network without guidance, in one evaluation."""
        ...
