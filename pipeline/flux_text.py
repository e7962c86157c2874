"""FLUX's two text encoders, alone: prompts become embeddings without the transformer or the VAE in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from rats.pipeline.loading import existing_component, load_component, quiet_imports
from rats.pipeline.protocols import Conditioning
from rats.pipeline.weights import PIPELINE_PATTERNS, resolve
from rats.schemas.params import ComputeParams, ModelParams, TeacherParams

with quiet_imports():  # the pipeline's module asks for torchvision, which we do without
    from diffusers import FluxPipeline

MODELS = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
TOKENIZERS = {"tokenizer": CLIPTokenizer, "tokenizer_2": T5TokenizerFast}


class FluxText:
    """CLIP and T5 with their tokenizers, used as `FluxPipeline` uses them."""

    def __init__(self, parts: dict[str, Any], settings: TeacherParams) -> None:
        """`parts`: text_encoder, text_encoder_2, tokenizer and tokenizer_2, loaded."""
        self.settings = settings
        self._pipeline = FluxPipeline(scheduler=None, vae=None, transformer=None, **parts)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """`prompt_embeds` (B, max_sequence_length, D) of T5 and `pooled_prompt_embeds` (B, P) of CLIP.

        One prompt at a time, so that a prompt's embedding has the same bits in any company.
        """
        pairs = [self._encode(prompt) for prompt in prompts]
        sequences, pooled = zip(*pairs, strict=True)
        return {"prompt_embeds": torch.cat(sequences), "pooled_prompt_embeds": torch.cat(pooled)}

    def _encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        length, device = self.settings.max_sequence_length, self._pipeline.text_encoder.device
        sequence, pooled, _ = self._pipeline.encode_prompt(prompt, max_sequence_length=length, device=device)
        return cast(Tensor, sequence), cast(Tensor, pooled)

    def forget(self) -> None:
        """Let the encoders go; `encode` cannot be called any more."""
        self._pipeline.register_modules(**dict.fromkeys([*MODELS, *TOKENIZERS]))


def load_encoders(folder: Path, model: ModelParams, compute: ComputeParams) -> dict[str, Any]:
    """Both text encoders and their tokenizers, from a pipeline's folder: the parts of `FluxText`."""
    parts = {name: load_component(cls, folder / name, model, compute) for name, cls in MODELS.items()}
    return parts | {name: cls.from_pretrained(existing_component(folder / name)) for name, cls in TOKENIZERS.items()}


def open_text(model: ModelParams, teacher: TeacherParams, compute: ComputeParams) -> FluxText:
    """Loads the text encoders of the pipeline at `model.path`, and nothing else."""
    folder = resolve(model.path, model.revision, PIPELINE_PATTERNS)
    return FluxText(load_encoders(folder, model, compute), teacher)
