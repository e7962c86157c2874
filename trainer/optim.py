"""What learns: the student's network, its optimizer and the moving average of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rats.schemas.errors import DataError
from rats.schemas.params import TrainParams
from rats.trainer.sampling import Bridge

NonFinite = Callable[[str], Exception]


def rate(lr: float, warmup: int, step: int) -> float:
    """Learning rate of a step (from 0): linear over the first `warmup` steps, then constant."""
    return lr * min(1.0, (step + 1) / warmup) if warmup else lr


def norm(tensors: Sequence[Tensor]) -> float:
    """L2 norm over all elements of all tensors."""
    return float(torch.nn.utils.get_total_norm(tensors)) if tensors else 0.0


class Learner:
    """A network under training: AdamW without weight decay, linear warm-up, clipping, optional EMA."""

    def __init__(self, network: nn.Module, settings: TrainParams) -> None:
        """Trains all of `network`'s parameters that ask for a gradient."""
        self.network = network
        self.settings = settings
        self.named = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.parameters: list[Tensor] = list(self.named.values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.lr, weight_decay=0.0)
        self.ema = {name: p.detach().clone() for name, p in self.named.items()} if settings.ema else {}
        self._reward_gradient: list[Tensor] = []

    def accumulate(self, loss_reward: Tensor, loss_shape: Tensor, split: bool, bridge: Bridge | None = None) -> None:
        """Add one micro-batch's gradients of both terms (scalars, already weighted).

        One backward pass for the sum, or, with `split`, one for each term, whose norms `update` then tells apart;
        a reward that reaches only the last steps (`bridge`) always needs its own pass.
        """
        terms = [loss for loss in (loss_reward, loss_shape) if loss.requires_grad]
        if bridge is None and not split:
            return torch.autograd.backward(terms, inputs=self.parameters)
        if loss_reward.requires_grad:
            self._add_reward(loss_reward, bridge or Bridge(), retain=loss_shape.requires_grad)
        if loss_shape.requires_grad:
            loss_shape.backward(inputs=self.parameters)

    def _add_reward(self, loss: Tensor, bridge: Bridge, retain: bool) -> None:
        with bridge.closed():
            grads = torch.autograd.grad(
                loss, self.parameters, retain_graph=retain, allow_unused=True, materialize_grads=True
            )
        if self._reward_gradient:
            torch._foreach_add_(self._reward_gradient, grads)
        else:
            self._reward_gradient = list(grads)

    def update(self, step: int, split: bool, refuse: NonFinite) -> dict[str, float]:
        """Clip, step, forget the gradients; norms before clipping (`reward` and `shape` only with `split`).

        `refuse(term)` makes the error to raise, before any weight has changed, when a norm is not finite.
        """
        norms = self._join(split)
        for term, value in norms.items():
            if not value < float("inf"):
                raise refuse(f"the gradient ({term})")
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.settings.clip_norm, torch.tensor(norms["total"]))
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.settings.lr, self.settings.warmup, step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._follow()
        return norms

    def _join(self, split: bool) -> dict[str, float]:
        norms = {}
        if split:
            norms = {"reward": norm(self._reward_gradient), "shape": norm(self._gradient())}
        for p, grad in zip(self.parameters, self._reward_gradient, strict=False):
            p.grad = grad if p.grad is None else p.grad.add_(grad)
        self._reward_gradient = []
        return {**norms, "total": norm(self._gradient())}

    def _gradient(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]

    @torch.no_grad()
    def _follow(self) -> None:
        if self.ema:
            torch._foreach_lerp_(list(self.ema.values()), [*self.parameters], 1.0 - self.settings.ema)

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

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that a bit-exact resume needs, by file name: `network`, `optimizer` and, if there is one, `ema`."""
        slots = self.optimizer.state_dict()["state"]
        moments = {f"{n}.{k}": t for i, n in enumerate(self.named) for k, t in slots.get(i, {}).items()}
        files = {"network": self.network.state_dict(), "optimizer": moments}
        return {**files, "ema": self.ema} if self.ema else files

    def restore(self, files: dict[str, dict[str, Tensor]]) -> None:
        """Take back what `tensors` gave. Raises DataError when the names are those of another network."""
        wanted = {"network": set(self.network.state_dict()), "ema": set(self.ema)}
        for name, keys in wanted.items():
            if set(files.get(name, {})) != keys:
                raise DataError(f"the checkpoint's {name} belongs to another network: train again without --resume")
        self.network.load_state_dict(files["network"])
        for name, value in files.get("ema", {}).items():
            self.ema[name].copy_(value)
        self._restore_moments(files["optimizer"])

    def _restore_moments(self, moments: dict[str, Tensor]) -> None:
        slots: dict[int, dict[str, Tensor]] = {i: {} for i in range(len(self.named))}
        index = {name: i for i, name in enumerate(self.named)}
        for key, tensor in moments.items():
            name, _, slot = key.rpartition(".")
            if name not in index:
                raise DataError(f"the checkpoint's optimizer has a state for {name!r}, which is not trained")
            slots[index[name]][slot] = tensor
        state = {i: slot for i, slot in slots.items() if slot}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
