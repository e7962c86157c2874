"""The processes that train one student together, started by accelerate or torchrun.

Every rank computes its share of the global batch. Gradients are summed once in each step, after accumulation, and not
by hooks in the backward pass: a step may have one backward pass for each loss, and many forward calls of the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rats.pipeline.weights.loading import torch_device
from rats.schemas.errors import DataError


class Ranks:
    """A single process, as in a test or a notebook. `Accelerated` has the same methods for several."""

    rank = 0
    world = 1
    is_sharded = False
    device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that the student's network is evaluated in."""
        return nullcontext()

    def shard(self, network: nn.Module) -> None:
        """Shards the network's parameters in place, if the settings ask for it."""

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add up `.grad` over the ranks; a rank that has none counts as zero."""

    def gather(self, x_B: Tensor) -> Tensor:
        """The ranks' shares side by side along the first axis, in the global order."""
        return x_B

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank, for decisions that all ranks must take together."""
        return flag

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all ranks, in order."""
        return [value]

    def wait(self) -> None:
        """Waits until all ranks are here."""


class Accelerated(Ranks):
    """The processes that `accelerate launch` or `torchrun` has started; else one process."""

    def __init__(self, device: str, autocast_dtype: torch.dtype | None = None, fsdp: bool = False) -> None:
        """Joins the process group, if there is one. With `autocast_dtype` None the network keeps its own precision.

        Raises ConfigError for a device that is not there.
        """
        own = torch_device(device)
        self.accelerator = Accelerator(cpu=own.type == "cpu")
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device if self.world > 1 else own
        self.autocast_dtype = autocast_dtype
        self.is_sharded = self.world > 1 and (fsdp or self.accelerator.distributed_type == DistributedType.FSDP)

    def autocast(self) -> AbstractContextManager[Any]:
        """Torch's own autocast, since accelerate fixes the precision for the whole process."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def shard(self, network: nn.Module) -> None:
        """FSDP2, each of the family's blocks (`_no_split_modules`) by itself.

        By torch's own call, since accelerate refuses FSDP on CPUs, where everyone can test it.
        """
        if not self.is_sharded:
            return
        names = getattr(network, "_no_split_modules", None) or ()
        blocks = [module for module in network.modules() if type(module).__name__ in names]
        for block in blocks:
            fully_shard(block)
        fully_shard(network)  # last: it takes what no block has taken

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """One all-reduce for each parameter. FSDP2 has already reduced its shards in the backward pass."""
        if self.world == 1 or self.is_sharded:
            return
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)

    def gather(self, x_B: Tensor) -> Tensor:
        """Accelerate's gather, which keeps the order of ranks."""
        return self.accelerator.gather(x_B.contiguous())

    def any(self, flag: bool) -> bool:
        """A maximum over the ranks."""
        if self.world == 1:
            return flag
        found = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found.item())

    def gather_objects(self, value: Any) -> list[Any]:
        """For small plain values only: they are pickled."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """A barrier."""
        self.accelerator.wait_for_everyone()


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, on the CPU and contiguous. For a sharded one, all ranks must call this together."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.cpu().contiguous()


def sharded_like(tensor: Tensor, place: Tensor) -> Tensor:
    """A full tensor with the sharding, device and dtype of `place`."""
    tensor = tensor.to(place.device, place.dtype)
    if isinstance(place, DTensor):
        return distribute_tensor(tensor, place.device_mesh, place.placements)
    return tensor


def full_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of them `whole`."""
    return {name: full_tensor(tensor) for name, tensor in tensors.items()}


@torch.no_grad()
def copy_into(found: Mapping[str, Tensor], places: Mapping[str, Tensor], what: str) -> None:
    """Copies what `full_tensors` gave into `places`, which may be sharded.

    Raises DataError if names or shapes are those of another network.
    """
    same_names = found.keys() == places.keys()
    if not same_names or any(found[name].shape != place.shape for name, place in places.items()):
        raise DataError(f"the checkpoint's {what} belongs to another network: train again with --force")
    for name, place in places.items():
        place.copy_(sharded_like(found[name], place))
