"""The FLUX family: FLUX.1-dev, -schnell and anything in their format.

Every number follows `diffusers.FluxPipeline`: packing, sigmas, timestep rounding, guidance and decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from rats.pipeline.families.base import CLIP_FIELDS, PATCH, PatchFamily, clip_window
from rats.pipeline.families.fit import Fit, PartConfig
from rats.pipeline.lengths import Window
from rats.pipeline.protocols import Conditioning
from rats.pipeline.weights.loading import quiet_imports
from rats.schemas.params import TeacherParams

with quiet_imports():  # the pipeline's module asks for torchvision, which we do without
    from diffusers import FluxPipeline


class Flux(PatchFamily):
    """2 x 2 patches of the VAE's latent are the tokens; CLIP's pooled and T5's sequence embedding condition them."""

    pipeline_class = FluxPipeline
    network_class = FluxTransformer2DModel
    encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
    tokenizers = {"tokenizer": CLIPTokenizer, "tokenizer_2": T5TokenizerFast}
    # the list of diffusers' own FLUX LoRA training script
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    depth = ("num_layers", "num_single_layers")
    embeds_guidance = True
    scheduler_fields = (*PatchFamily.scheduler_fields, "use_dynamic_shifting")
    published = tuple(f"black-forest-labs/FLUX.1-{name}" for name in ("dev", "schnell", "Krea-dev"))

    @classmethod
    def fits(cls, parts: Mapping[str, PartConfig]) -> Iterator[Fit]:
        network, vae = parts["transformer"], parts["vae"]
        vae.must_state("scaling_factor", "shift_factor")
        parts["text_encoder"].must_state(*CLIP_FIELDS)
        yield network["in_channels"], PATCH**2 * vae["latent_channels"]
        yield network["joint_attention_dim"], parts["text_encoder_2"]["hidden_size"]
        yield network["pooled_projection_dim"], parts["text_encoder"]["hidden_size"]
        yield network.total("axes_dims_rope"), network["attention_head_dim"]

    def latent_shape(self) -> tuple[int, int]:
        rows, columns = self.grid
        return rows * columns, PATCH**2 * int(self.vae_config.latent_channels)

    def conditioning_shapes(self, network_config: Any) -> dict[str, tuple[int, ...]]:
        sequence = (self.settings.max_sequence_length, int(network_config.joint_attention_dim))
        return {"prompt_embeds": sequence, "pooled_prompt_embeds": (int(network_config.pooled_projection_dim),)}

    def encode(self, pipeline: Any, prompt: str) -> Conditioning:
        length, device = self.settings.max_sequence_length, pipeline.text_encoder.device
        sequence, pooled, _ = pipeline.encode_prompt(prompt, max_sequence_length=length, device=device)
        return {"prompt_embeds": sequence, "pooled_prompt_embeds": pooled}

    def windows(self, tokenizers: Mapping[str, Any]) -> list[Window]:
        return [clip_window(tokenizers["tokenizer"]), self.window(tokenizers["tokenizer_2"])]

    def evaluate(
        self, network: Any, x_BTC: Tensor, timestep_B: Tensor, conditioning: Conditioning, guidance_B: Tensor | None
    ) -> Tensor:
        prompt, device, dtype = conditioning["prompt_embeds"], x_BTC.device, x_BTC.dtype
        output = network(
            hidden_states=x_BTC,
            # FluxPipeline rounds the timestep (0 to 1000) to the network's dtype before it divides: so do we
            timestep=timestep_B.to(dtype) / 1000,
            guidance=guidance_B,
            pooled_projections=conditioning["pooled_prompt_embeds"],
            encoder_hidden_states=prompt,
            txt_ids=torch.zeros(prompt.shape[1], 3, device=device, dtype=dtype),
            img_ids=FluxPipeline._prepare_latent_image_ids(1, *self.grid, device, dtype),
            return_dict=False,
        )
        return cast(Tensor, output[0])

    def to_vae(self, vae: Any, x_BTC: Tensor) -> Tensor:
        """Unpacked, then z / scaling + shift."""
        z = FluxPipeline._unpack_latents(x_BTC, self.settings.height, self.settings.width, self.factor)
        return self.unscaled(vae, z)

    def schedule(self, scheduler_config: Any, steps: int) -> dict[str, Any]:
        """1 to 1 / steps, unless the scheduler makes a grid of its own; shifted by the number of image tokens."""
        return self.even_grid(scheduler_config, steps, self.dynamic_mu(scheduler_config, max_shift=1.15))

    @classmethod
    def call(cls, settings: TeacherParams) -> dict[str, int | float]:
        return {**super().call(settings), "guidance_scale": settings.guidance_scale}
