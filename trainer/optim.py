"""The student's network in training, its optimizer, and the moving average of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from rats.schemas.errors import DataError
from rats.schemas.train_params import TrainParams
from rats.trainer.distributed import Ranks, copy_into, full_tensor, full_tensors, sharded_like
from rats.trainer.sampling import Bridge

NonFinite = Callable[[str], Exception]


DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
"""The share of the rate that is left when this share of the way from the warm-up to `lr_steps` is done."""


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each step: it rises in a line over the first `warmup` steps, and then stays or falls.

    It sees its own fields and the step, nothing else. Each is a field of `params.train` that is in the settings' hash,
    as a test holds: a rate that depended on `train.steps`, which is not in it, would change without notice if a
    longer run is resumed. So a rate that falls has its own length, `lr_steps`, at which it is 0.
    """

    lr: float
    warmup: int
    lr_schedule: str = "constant"
    lr_steps: int | None = None

    @classmethod
    def of(cls, settings: TrainParams) -> Schedule:
        """Each field by its name."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    def at(self, step: int) -> float:
        """The rate of a step, counted from 0."""
        if step < self.warmup:
            return self.lr * ((step + 1) / self.warmup)
        if self.lr_steps is None:
            return self.lr
        done = (step - self.warmup) / (self.lr_steps - self.warmup)
        return self.lr * DECAYS[self.lr_schedule](done)


def norm(tensors: Sequence[Tensor]) -> float:
    """L2 norm over all elements of all tensors, sharded or not."""
    return float(full_tensor(torch.nn.utils.get_total_norm(tensors))) if tensors else 0.0


class Learner:
    """A network under training: AdamW without weight decay, linear warm-up, clipping, optional EMA."""

    def __init__(self, network: nn.Module, settings: TrainParams, ranks: Ranks | None = None) -> None:
        """Trains all parameters of `network` that require a gradient; `ranks` may shard them in place."""
        self.network = network
        self.settings = settings
        self.schedule = Schedule.of(settings)
        self.ranks = ranks or Ranks()
        self.ranks.shard(network)
        self.named = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.parameters: list[Tensor] = list(self.named.values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.lr, weight_decay=0.0)
        self.ema = {name: p.detach().clone() for name, p in self.named.items()} if settings.ema else {}
        self._reward_gradient: list[Tensor | None] = []

    def accumulate(self, loss_reward: Tensor, loss_shape: Tensor, split: bool, bridge: Bridge | None = None) -> None:
        """Add one micro-batch's gradients of both terms (scalars, already weighted).

        There is one backward pass for the sum. With `split` there is one for each term, so that `update` can give both
        norms. A reward whose gradient reaches only the last steps (`bridge`) always needs its own pass.
        """
        if self.ranks.is_sharded:  # FSDP takes the mean over the ranks, the loss is a sum
            loss_reward = loss_reward * self.ranks.world
            loss_shape = loss_shape * self.ranks.world
        if bridge is None and not split:
            terms = [loss for loss in (loss_reward, loss_shape) if loss.requires_grad]
            if terms:
                torch.autograd.backward(terms)
            return
        with self._reward_slot(), (bridge or Bridge()).closed():
            if loss_reward.requires_grad:
                # both terms share the student's path: the second pass needs the graph again
                loss_reward.backward(retain_graph=loss_shape.requires_grad)
        if loss_shape.requires_grad:
            loss_shape.backward()

    @contextmanager
    def _reward_slot(self) -> Iterator[None]:
        """Gradients from inside the block are accumulated separately from those outside."""
        outside = [p.grad for p in self.parameters]
        inside = self._reward_gradient or [None] * len(outside)
        for p, grad in zip(self.parameters, inside, strict=True):
            p.grad = grad
        yield
        self._reward_gradient = [p.grad for p in self.parameters]
        for p, grad in zip(self.parameters, outside, strict=True):
            p.grad = grad

    def forget(self) -> None:
        """Drops all gradients, after a step or if a step is abandoned."""
        self._reward_gradient = []
        self.optimizer.zero_grad(set_to_none=True)

    def update(self, step: int, split: bool, refuse: NonFinite) -> dict[str, float]:
        """Clip and step; gives the norms before clipping (`reward` and `shape` only with `split`).

        The gradients stay: `forget` drops them.

        If a norm is not finite, raises `refuse(term)` before any weight has changed.
        """
        norms = self._join(split)
        for term, value in norms.items():
            if not value < float("inf"):  # NaN is not below anything
                raise refuse(f"the gradient ({term})")
        if self.settings.clip_norm is not None:
            total_norm = torch.tensor(norms["total"])
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.settings.clip_norm, total_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.at(step)
        self.optimizer.step()
        self._follow()
        return norms

    def _join(self, split: bool) -> dict[str, float]:
        """Both terms' gradients as one, summed over the ranks; their norms."""
        if self._reward_gradient:
            with self._reward_slot():
                self.ranks.sum_gradients(self.parameters)
        self.ranks.sum_gradients(self.parameters)
        norms = {}
        if split:
            norms["reward"] = norm([grad for grad in self._reward_gradient if grad is not None])
            norms["shape"] = norm(self._gradient())
        # no reward gradient lies apart where one backward pass made both
        for p, grad in zip(self.parameters, self._reward_gradient, strict=False):
            if grad is not None:
                p.grad = grad if p.grad is None else p.grad.add_(grad)
        norms["total"] = norm(self._gradient())
        return norms

    def _gradient(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    @torch.no_grad()
    def _follow(self) -> None:
        if self.ema:
            share_of_now = 1.0 - self.settings.ema
            torch._foreach_lerp_(list(self.ema.values()), [*self.parameters], share_of_now)

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The network with the EMA's weights inside the block (its own when there is no EMA)."""
        own = {name: self.named[name].detach().clone() for name in self.ema}
        self._put(self.ema)
        try:
            yield self.network
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, value in weights.items():
            self.named[name].copy_(value)

    def _kept(self) -> dict[str, Tensor]:
        """Trained parameters and buffers: those of the whole network, or of its adapters."""
        frozen = {name for name, p in self.network.named_parameters() if not p.requires_grad}
        return {name: value for name, value in self.network.state_dict().items() if name not in frozen}

    def size(self) -> int:
        """Bytes of a checkpoint: weights, two moments and, if there is one, the moving average."""
        copies = 4 if self.ema else 3
        return copies * sum(p.numel() * p.element_size() for p in self.parameters)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything for a bit-exact resume, by file name: `network`, `optimizer` and, if there is one, `ema`.

        Full tensors on the CPU. If they are sharded, all ranks must call this together.
        """
        files = {"network": full_tensors(self._kept()), "optimizer": self._moments()}
        if self.ema:
            files["ema"] = full_tensors(self.ema)
        return files

    def _moments(self) -> dict[str, Tensor]:
        """The optimizer's state by the parameters' names, in place of their numbers."""
        slots_by_number = self.optimizer.state_dict()["state"]
        moments = {}
        for number, name in enumerate(self.named):
            for slot, tensor in slots_by_number.get(number, {}).items():
                moments[f"{name}.{slot}"] = full_tensor(tensor)
        return moments

    def weights(self) -> dict[str, Tensor]:
        """The final weights, full on the CPU: those of the moving average, if any. All ranks must call together."""
        return full_tensors(self._kept() | self.ema)

    def restore(self, files: dict[str, dict[str, Tensor]]) -> None:
        """Loads what `tensors` gave. Raises DataError if the names are those of another network."""
        copy_into(files.get("network", {}), self._kept(), "network")
        copy_into(files.get("ema", {}), self.ema, "ema")
        self._restore_moments(files["optimizer"])

    def _restore_moments(self, moments: dict[str, Tensor]) -> None:
        numbers = {name: number for number, name in enumerate(self.named)}
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in moments.items():
            name, _, slot = key.rpartition(".")
            if name not in numbers:
                raise DataError(f"the checkpoint's optimizer has a state for {name!r}, which is not trained")
            # moments lie as their parameter does; a step counter is a scalar, whole on every rank
            placed = sharded_like(tensor, self.named[name]) if tensor.ndim else tensor
            state.setdefault(numbers[name], {})[slot] = placed
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
