"""LoRAs as people bring them: files that diffusers' training scripts save."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict

from rats.pipeline.families.open import Model
from rats.pipeline.weights.folder import LORA_FILE

TARGETS = ("attn.to_q", "attn.to_v", "attn1.to_q", "attn1.to_v")
"""Of every family's network, some."""


def write_lora(model: Model, folder: Path, seed: int = 3, alpha: float = 5.0) -> Path:
    """A LoRA of rank 2 for the network, as diffusers' training scripts save it; alpha in its metadata."""
    network = model.open_pipeline().transformer
    torch.manual_seed(seed)
    network.add_adapter(LoraConfig(r=2, lora_alpha=alpha, target_modules=[*TARGETS], init_lora_weights=False), "a")
    layers, config = get_peft_model_state_dict(network, adapter_name="a"), network.peft_config["a"].to_dict()
    about = {name: config[name] for name in ("r", "lora_alpha")} | {"target_modules": sorted(config["target_modules"])}
    model.family.pipeline_class.save_lora_weights(
        folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=about
    )
    return folder / LORA_FILE
