"""Memory before anything is allocated: real code runs on tensors of torch's meta device, whose bytes are counted.

Such tensors have no values, so a full-size network takes seconds and no memory. Only tensors are counted: not a GPU's
context (about 0.5 GiB), the allocator's fragmentation, or the workspaces of cuDNN and cuBLAS.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from rats.pipeline.families.models import FamilyStudent
from rats.pipeline.rewards.open import open_reward
from rats.pipeline.rewards.preprocess import CLIP_MEAN, CLIP_STD, resize_normalise
from rats.pipeline.weights.opening import unless_values_are_read
from rats.schemas.params import RewardParams

META = torch.device("meta")

LOWER = frozenset(("linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "prelu"))
LOWER |= {"conv1d", "conv2d", "conv3d", "scaled_dot_product_attention"}
FLOAT = frozenset(("layer_norm", "group_norm", "rms_norm", "softmax", "log_softmax", "norm", "sum", "prod", "cumsum"))
FLOAT |= {"pow", "__pow__", "exp", "log", "rsqrt", "reciprocal", "softplus", "mse_loss", "cosine_similarity"}
"""What CUDA's autocast runs in the lower precision, and what in float32, of the functions that networks use."""


Counted = TypeVar("Counted")


def if_countable(count: Callable[[], Counted]) -> Counted | None:
    """What `count` finds on the meta device; None where a network reads a tensor's values, which are not there."""
    with unless_values_are_read():
        return count()
    return None


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live storages, whether a graph, a module or a variable keeps them.

    `now`: of those alive; `peak`: the most since the last `reset`.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        """`tensors` exist already. Others count from the operation that makes them."""
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()
        for tensor in tensors:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and counts the storages of its results."""
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, Tensor):
                self._see(value)
        return made

    def reset(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := id(storage)) in self._alive:
            return
        size = storage.nbytes()
        self._alive.add(key)
        weakref.finalize(storage, self._forget, key, size).atexit = False
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


class AsOnGpu(TorchFunctionMode):
    """Makes a module on the meta device use memory as on a GPU: with fused attention, and autocast if wanted.

    The meta device would build attention's whole score matrix, and has no autocast. This mode is active while any part
    of the module runs, also when a checkpointed part runs again in the backward pass.
    """

    def __init__(self, module: nn.Module, autocast: torch.dtype | None = None) -> None:
        """Hooks all parts of the module, for good."""
        super().__init__()
        self.autocast, self._depth, self._keeps = autocast, 0, True
        self._cast_weights: dict[int, tuple[Tensor, Tensor]] = {}
        for part in module.modules():
            part.register_forward_pre_hook(self._begin)
            part.register_forward_hook(self._end, always_call=True)

    def _begin(self, *_: Any) -> None:
        self._depth += 1
        if self._depth == 1:
            self.__enter__()

    def _end(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.__exit__(None, None, None)
            if not self._keeps:
                self._cast_weights.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The call as a GPU makes it."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if self.autocast is not None and name in LOWER | FLOAT:
            dtype = self.autocast if name in LOWER else torch.float32
            args, kwargs = tree_map_only(Tensor, lambda tensor: self._cast(tensor, dtype), (args, kwargs))
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if not tensor.is_floating_point() or tensor.dtype == dtype:
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad and dtype == self.autocast):
            return tensor.to(dtype)
        if id(tensor) not in self._cast_weights:  # weights under training are cast once, as in autocast's own cache
            self._cast_weights[id(tensor)] = (tensor, tensor.to(dtype))
        return self._cast_weights[id(tensor)][1]

    def forget(self) -> int:
        """Drops the cast weights, as the end of an autocast block does; later, each part that runs drops its own.

        Returns their bytes. The graph may still keep them.
        """
        size = sum(cast.nbytes for _, cast in self._cast_weights.values())
        self._cast_weights.clear()
        self._keeps = False
        return size


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """Fused attention keeps queries, keys, values, the output and one number for each row. Masks are left out."""
    output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
    return output


def tensors_of(*modules: nn.Module) -> Iterable[Tensor]:
    """Parameters and buffers."""
    return chain.from_iterable(chain(module.parameters(), module.buffers()) for module in modules)


def module_bytes(*modules: nn.Module) -> int:
    """Bytes of their parameters and buffers, a shared one once."""
    return LiveBytes(tensors_of(*modules)).now


def transient_bytes(run: Callable[[], Any], *modules: nn.Module) -> int:
    """Peak bytes that a call of `run` needs in addition to the modules' weights, without gradients."""
    with torch.no_grad(), LiveBytes(tensors_of(*modules)) as live:
        before = live.now
        run()
        return live.peak - before


def in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module as `from_pretrained` gives it: in `dtype`, except for what its class keeps in float32."""
    strict = dtype == torch.float16 or isinstance(module, ModelMixin)  # transformers keeps them for float16 only
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ()) if strict else set()
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if kept & set(name.split(".")) else dtype)
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)
    return module


def encoder_bytes(student: FamilyStudent, folder: Path, dtype: torch.dtype) -> int:
    """Weights of the text encoders of the pipeline in `folder`."""
    total = 0
    for name, cls in student.family.encoders.items():
        with META:
            total += module_bytes(in_dtype(cls(cls.config_class.from_pretrained(folder / name)), dtype))
    return total


class RewardOutline:
    """A reward on the meta device. `known`: it is the reward itself, and not a substitute of a published size."""

    name, fingerprint = "outline", ""

    def __init__(self, modules: Sequence[nn.Module], score: Callable[[Tensor, list[str]], Tensor], known: bool) -> None:
        """`modules`: its networks, on the meta device, which `score` calls."""
        self.modules, self.score, self.known = nn.ModuleList(modules), score, known
        for module in modules:
            AsOnGpu(module)


def outline_reward(reward: RewardParams) -> RewardOutline:
    """The reward on the meta device. If its files are not on this disk: a CLIP of ViT-H-14, as HPSv2 and PickScore are.

    A reward on a server takes no memory here.
    """
    if not (Path(reward.path).exists() or "://" in reward.path):
        return _vit_h_14()
    opened = open_reward(reward)
    modules = [value.to(META) for value in vars(opened).values() if isinstance(value, nn.Module)]
    return RewardOutline(modules, opened.score, True)


def _vit_h_14() -> RewardOutline:
    from transformers import CLIPConfig, CLIPModel

    from rats.pipeline.rewards.hpsv2 import VIT_H_14, clip_config

    with META:
        model = CLIPModel(CLIPConfig.from_dict(clip_config(VIT_H_14))).requires_grad_(False).eval()
    ids = torch.zeros(1, VIT_H_14["text_cfg"]["context_length"], dtype=torch.long, device=META)

    def score(images_B3HW: Tensor, prompts: list[str]) -> Tensor:
        pixels = resize_normalise(
            images_B3HW, VIT_H_14["vision_cfg"]["image_size"], CLIP_MEAN, CLIP_STD, overshoot="kept"
        )
        output = model(input_ids=ids.expand(len(prompts), -1), pixel_values=pixels)
        scores_B: Tensor = (output.image_embeds * output.text_embeds).sum(-1)
        return scores_B

    return RewardOutline([model], score, False)
