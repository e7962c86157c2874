"""Prompt embeddings, stored once for each prompt in `embeddings/<prompt id>.safetensors`, with a seal."""

from __future__ import annotations

import json
from typing import Any

from blake3 import blake3
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from rats.pipeline.bounds import bounded
from rats.pipeline.files.reading import hash_bytes
from rats.pipeline.store.shard_set import ShardSet
from rats.schemas.errors import DataError, reason, remedy

_DAMAGE = (SafetensorError, ValueError, KeyError, TypeError, RecursionError)
_REMEDY = "delete it and run `rats stage rollout`, which encodes the prompt again"


def has_embedding(shards: ShardSet, prompt_id: str) -> bool:
    """Whether the prompt is encoded already."""
    return shards.embedding_path(prompt_id).exists()


def write_embedding(shards: ShardSet, prompt_id: str, tensors: dict[str, Tensor]) -> None:
    """Store one prompt's conditioning: by name, without the batch axis, in its own dtype."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    shards.embedding_path(prompt_id).write(save(plain, {"seal": _seal(prompt_id, plain)}))


@remedy(_REMEDY)
def read_embedding(shards: ShardSet, prompt_id: str) -> dict[str, Tensor]:
    """One prompt's conditioning, without the batch axis; from a remote place through the local cache.

    Raises:
        DataError: missing, damaged, or another prompt's.
    """
    path = shards.embedding_path(prompt_id)
    name = hash_bytes(str(path).encode())
    data = path.cached(name, path.read, lambda found: _is_whole(found, prompt_id))
    try:
        return _parse(data, prompt_id)
    except _DAMAGE as error:
        raise DataError(f"{path} is damaged ({reason(error)})") from None


def _is_whole(data: bytes, prompt_id: str) -> bool:
    try:
        _parse(data, prompt_id)
    except _DAMAGE:
        return False
    return True


def _parse(data: bytes, prompt_id: str) -> dict[str, Tensor]:
    _check_seal(data, prompt_id)
    return load(data)


@remedy(_REMEDY)
def verify_embedding(shards: ShardSet, prompt_id: str) -> int:
    """Checks an embedding as `read_embedding` does, without cache and tensors; returns the bytes read."""
    path = shards.embedding_path(prompt_id)
    data = path.read()
    try:
        _check_seal(data, prompt_id)
    except _DAMAGE as error:
        raise DataError(f"{path} is damaged ({reason(error)})") from None
    return len(data)


def _check_seal(data: bytes, prompt_id: str) -> None:
    """Raises ValueError or another of `_DAMAGE` unless the bytes match their seal and this prompt.

    The seal is the hash of the prompt id and of the file without its seal. The file without it is made here by editing
    the header: to serialise the tensors again would take several times as long as hashing.
    """
    start = 8 + int.from_bytes(bounded(data)[:8], "little")
    header = json.loads(data[8:start])
    seal = header["__metadata__"]["seal"]
    if _header(header) != data[:start] or list(header["__metadata__"]) != ["seal"]:
        raise ValueError("its header was changed by hand")
    del header["__metadata__"]
    digest = blake3(prompt_id.encode()).update(_header(header)).update(memoryview(data)[start:])
    if digest.hexdigest() != seal:
        raise ValueError("its content does not match its seal")


def _header(content: dict[str, Any]) -> bytes:
    """A safetensors header as the library writes it: its length, then JSON, padded with spaces to 8 bytes."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _seal(prompt_id: str, tensors: dict[str, Tensor]) -> str:
    return blake3(prompt_id.encode() + save(tensors)).hexdigest()
