"""What the CLIP-shaped rewards share: tokens, embeddings and their cosine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from rats.pipeline.loading import quiet_loading
from rats.pipeline.weights import resolve
from rats.schemas.errors import ConfigError

VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")


def open_tokenizer(cls: Any, folder: Path, fallback: str) -> Any:
    """The tokenizer of `folder`, or the hub's `fallback` where the folder has no vocabulary of its own."""
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        folder = resolve(fallback, patterns=("*.json", "*.txt"))
    try:
        return cls.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"no {cls.__name__} can be read from {folder} ({reason}): fetch it again") from error


def import_clip() -> tuple[Any, Any, Any]:
    """Transformers' CLIPModel, CLIPConfig and CLIPTokenizer."""
    with quiet_loading():
        from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    return CLIPModel, CLIPConfig, CLIPTokenizer


def token_ids(tokenizer: Any, prompts: list[str], length: int, device: Any) -> Tensor:
    """Token ids (B, length), cut and padded. CLIP's text tower looks left only, so no mask is needed."""
    tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return tokens.input_ids.to(device)


def cosine(model: Any, tokenizer: Any, pixels_B3SS: Tensor, prompts: list[str]) -> Tensor:
    """Cosine (B,), float32, of each image's embedding with its own prompt's; differentiable in the pixels."""
    ids = token_ids(tokenizer, prompts, model.config.text_config.max_position_embeddings, pixels_B3SS.device)
    output = model(input_ids=ids, pixel_values=pixels_B3SS)
    return (output.image_embeds * output.text_embeds).sum(-1).float()
