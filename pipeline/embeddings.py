"""Prompt embeddings, stored once a prompt: `embeddings/<prompt id>.safetensors`, sealed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from blake3 import blake3
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from rats.pipeline.atomic import atomic_write
from rats.pipeline.sealed import read_regular
from rats.schemas.errors import DataError

if TYPE_CHECKING:
    from rats.pipeline.store import ShardSet

_REMEDY = "delete it and run `rats stage rollout`, which encodes the prompt again"


def has_embedding(shards: ShardSet, prompt_id: str) -> bool:
    """Whether the prompt is encoded already."""
    return shards.embedding_path(prompt_id).exists()


def write_embedding(shards: ShardSet, prompt_id: str, tensors: dict[str, Tensor]) -> None:
    """Store one prompt's conditioning: by name, without the batch axis, in its own dtype."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    atomic_write(shards.embedding_path(prompt_id), save(plain, {"seal": _seal(prompt_id, plain)}))


def read_embedding(shards: ShardSet, prompt_id: str) -> dict[str, Tensor]:
    """One prompt's conditioning, without the batch axis.

    Raises:
        DataError: missing, damaged, or another prompt's.
    """
    path = shards.embedding_path(prompt_id)
    data = read_regular(path, _REMEDY)
    try:
        tensors = load(data)
        seal = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["seal"]
        if seal != _seal(prompt_id, tensors) or save(tensors, {"seal": seal}) != data:
            raise ValueError("its content does not match its seal")
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({str(error)[:120]}); {_REMEDY}") from None
    return tensors


def _seal(prompt_id: str, tensors: dict[str, Tensor]) -> str:
    return blake3(prompt_id.encode() + save(tensors)).hexdigest()
