"""The protocol of reward servers: safetensors with one JSON document in the header.

Nothing is ever unpickled. docs/rewards.md describes the protocol for other servers. B samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from rats.schemas.errors import ConfigError, plain

ABOUT = "rats"
"""The only metadata key of the header."""
MAX_HEADER = 1 << 23
"""The most bytes of a safetensors header: a hundred of the longest prompts, parsed in a fraction of a second."""
_MOST_ENTRIES = 10
"""Of a header: the document, a few tensors."""
SLOWEST = 1 << 20
"""Bytes a second on the slowest link that is still useful. Waiting times for bodies follow from it."""
SHORTEST_TOKEN, LONGEST_TOKEN = 16, 1024
NEW_TOKEN = 'python -c "import secrets; print(secrets.token_urlsafe(32))" > FILE'


class ServedReward(BaseModel):
    """The reply to GET /identity: the server's reward."""

    model_config = ConfigDict(frozen=True)

    protocol: Literal[1] = 1
    name: str
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Equal to the reward's own fingerprint, so that a column of scores has the same address."""
    differentiable: bool
    pixels: Literal["float32", "uint8"] = "float32"
    """The dtype to send. uint8 has a quarter of the bytes, for rewards that round to 8 bits anyway."""
    max_batch: Annotated[int, Field(gt=0)]


@dataclass(frozen=True)
class ScoreRequest:
    """Pictures (B, 3, H, W), float32 in [0, 1] or uint8, their prompts, and whether a gradient is wanted."""

    images_B3HW: Tensor
    prompts: list[str]
    gradient: bool = False


@dataclass(frozen=True)
class ScoreReply:
    """Scores (B,), NaN where there is none, and d score / d image (B, 3, H, W) if it was wanted."""

    fingerprint: str
    scores_B: Tensor
    gradient_B3HW: Tensor | None = None


def read_token(path: Path) -> str:
    """The token for `Authorization: Bearer`: the only line of the file.

    Raises ConfigError, without the token, where the file cannot be read or holds no token.
    """
    try:
        with path.open("rb") as file:
            token = file.read(LONGEST_TOKEN + 1).decode("ascii").strip()
    except OSError as error:
        raise ConfigError(f"cannot read the token file {path}: {error.strerror}; write one: {NEW_TOKEN}") from None
    except UnicodeDecodeError:
        token = ""
    fits = SHORTEST_TOKEN <= len(token) <= LONGEST_TOKEN
    if not (fits and token.isprintable() and " " not in token):
        raise ConfigError(
            f"the token file {path} must hold one line of {SHORTEST_TOKEN} to {LONGEST_TOKEN} ASCII characters without "
            f"spaces; write one: {NEW_TOKEN}"
        )
    return token


def pack_request(question: ScoreRequest) -> bytes:
    """The body of POST /score."""
    images = question.images_B3HW.detach().cpu().contiguous()
    return _pack({"images": images}, {"prompts": question.prompts, "gradient": question.gradient})


def unpack_request(body: bytes) -> ScoreRequest:
    """Raises ValueError with what is wrong."""
    tensors, about = _unpack(body)
    images = _tensor(tensors, "images")
    known = images.dtype in (torch.float32, torch.uint8)
    if not known or images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise ValueError(f"images must be (B, 3, H, W), float32 or uint8, not {tuple(images.shape)} {images.dtype}")
    gradient = about.get("gradient", False)
    if not isinstance(gradient, bool):
        raise ValueError("gradient must be true or false")
    return ScoreRequest(images, _texts(about.get("prompts"), len(images)), gradient)


def pack_reply(answer: ScoreReply) -> bytes:
    """The reply to POST /score."""
    tensors = {"scores": answer.scores_B, "gradient": answer.gradient_B3HW}
    there = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items() if tensor is not None}
    return _pack(there, {"fingerprint": answer.fingerprint})


def unpack_reply(body: bytes, question: ScoreRequest) -> ScoreReply:
    """Raises ValueError when it is no answer to the question."""
    tensors, about = _unpack(body)
    scores, shape = _tensor(tensors, "scores"), question.images_B3HW.shape
    if scores.shape != shape[:1] or scores.dtype != torch.float32:
        raise ValueError(f"scores must be {len(question.prompts)} float32, not {tuple(scores.shape)} {scores.dtype}")
    gradient = _tensor(tensors, "gradient") if question.gradient else None
    if gradient is not None and (gradient.shape != shape or gradient.dtype != torch.float32):
        raise ValueError(f"gradient must be {tuple(shape)} float32, not {tuple(gradient.shape)} {gradient.dtype}")
    return ScoreReply(str(about.get("fingerprint")), scores, gradient)


def _pack(tensors: dict[str, Tensor], about: Mapping[str, Any]) -> bytes:
    return save(tensors, metadata={ABOUT: json.dumps(about)})


def _unpack(body: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    length = int.from_bytes(body[:8], "little")
    if length > MAX_HEADER:  # before anything parses it
        raise ValueError(f"no safetensors: a header of {length} bytes, at most {MAX_HEADER}; send fewer prompts")
    try:
        header = json.loads(body[8 : 8 + length])
        # the library takes 4 s for a quarter of a million, and nothing else runs then
        if (entries := max(len(header), len(header.get("__metadata__", ())))) > _MOST_ENTRIES:
            raise ValueError(f"{entries} entries in its header")
        tensors = load(body)
        about = json.loads(header["__metadata__"][ABOUT])
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = plain(f"{type(error).__name__}: {error}")
        raise ValueError(f"no safetensors with a JSON document {ABOUT!r} ({reason})") from error
    if not isinstance(about, dict):
        raise ValueError(f"{ABOUT!r} in the header must be a JSON object")
    return tensors, about


def _tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"there is no tensor {name!r}")
    return tensors[name]


def _texts(value: Any, count: int) -> list[str]:
    if not isinstance(value, list) or len(value) != count or not all(isinstance(one, str) for one in value):
        raise ValueError(f"prompts must be {count} strings, one a picture")
    return value
