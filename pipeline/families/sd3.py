"""The Stable Diffusion 3 family: SD3-medium, SD3.5-medium and -large and anything in their format.

Every number follows `diffusers.StableDiffusion3Pipeline`: sigmas, timesteps, guidance and decoding. Skip-layer
guidance, which that pipeline has as an option, is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from diffusers import SD3Transformer2DModel
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from rats.pipeline.families.base import CLIP_FIELDS, PATCH, PatchFamily, clip_window
from rats.pipeline.families.fit import Fit, PartConfig
from rats.pipeline.lengths import Window
from rats.pipeline.protocols import Conditioning
from rats.pipeline.weights.loading import quiet_imports
from rats.schemas.params import TeacherParams

with quiet_imports():  # the pipeline's module asks for torchvision, which we do without
    from diffusers import StableDiffusion3Pipeline

CLIP_TOKENS = 77
"""Tokens of both CLIP encoders. T5's `max_sequence_length` tokens follow them."""


class StableDiffusion3(PatchFamily):
    """The VAE's latent positions are the tokens; two CLIP encoders and T5 condition them.

    The scheduler makes the grid itself, down to its own smallest sigma and not to 1 / steps: with the published shift
    of 3 every grid ends in 0.0089, 0.0, at any number of steps, and 3 steps are 1, 0.751, 0.0089, 0. It stays as it
    is: a student has to draw in a plain `pipe(prompt, num_inference_steps=3)`.
    """

    pipeline_class = StableDiffusion3Pipeline
    network_class = SD3Transformer2DModel
    encoders = {
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
    }
    tokenizers = {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer, "tokenizer_3": T5TokenizerFast}
    # the list of diffusers' own SD3 LoRA training script
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    depth = ("num_layers",)
    published = tuple(
        f"stabilityai/stable-diffusion-{name}" for name in ("3-medium-diffusers", "3.5-medium", "3.5-large")
    )
    suggested = {"true_cfg_scale": 4.5, "max_sequence_length": 256, "height": 1024, "width": 1024}

    @classmethod
    def fits(cls, parts: Mapping[str, PartConfig]) -> Iterator[Fit]:
        network, vae = parts["transformer"], parts["vae"]
        clips = parts["text_encoder"], parts["text_encoder_2"]
        vae.must_state("scaling_factor", "shift_factor")
        for clip in clips:
            clip.must_state(*CLIP_FIELDS)
        yield network["in_channels"], vae["latent_channels"]
        yield network["out_channels"], vae["latent_channels"]
        yield network["joint_attention_dim"], parts["text_encoder_3"]["hidden_size"]
        yield network["pooled_projection_dim"], clips[0]["projection_dim"] + clips[1]["projection_dim"]

    def latent_shape(self) -> tuple[int, int]:
        rows, columns = self._positions
        return rows * columns, int(self.vae_config.latent_channels)

    def conditioning_shapes(self, network_config: Any) -> dict[str, tuple[int, ...]]:
        sequence = (CLIP_TOKENS + self.settings.max_sequence_length, int(network_config.joint_attention_dim))
        return {"prompt_embeds": sequence, "pooled_prompt_embeds": (int(network_config.pooled_projection_dim),)}

    def encode(self, pipeline: Any, prompt: str) -> Conditioning:
        length, device = self.settings.max_sequence_length, pipeline.text_encoder.device
        sequence, _, pooled, _ = pipeline.encode_prompt(
            prompt, None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return {"prompt_embeds": sequence, "pooled_prompt_embeds": pooled}

    def windows(self, tokenizers: Mapping[str, Any]) -> list[Window]:
        clips = [clip_window(tokenizers[name]) for name in ("tokenizer", "tokenizer_2")]
        return [*clips, self.window(tokenizers["tokenizer_3"])]

    def evaluate(
        self, network: Any, x_BTC: Tensor, timestep_B: Tensor, conditioning: Conditioning, guidance_B: Tensor | None
    ) -> Tensor:
        output = network(
            hidden_states=self._as_map(x_BTC),
            timestep=timestep_B,
            encoder_hidden_states=conditioning["prompt_embeds"],
            pooled_projections=conditioning["pooled_prompt_embeds"],
            return_dict=False,
        )
        return cast(Tensor, output[0]).flatten(2).transpose(1, 2)

    def to_vae(self, vae: Any, x_BTC: Tensor) -> Tensor:
        """A map again, then z / scaling + shift."""
        return self.unscaled(vae, self._as_map(x_BTC))

    def schedule(self, scheduler_config: Any, steps: int) -> dict[str, Any]:
        """The number of steps alone, with `mu` where the shift grows with the resolution."""
        if not scheduler_config.get("use_dynamic_shifting"):
            return {"num_inference_steps": steps}
        return {"num_inference_steps": steps, "mu": self.dynamic_mu(scheduler_config, max_shift=1.16)}

    @classmethod
    def call(cls, settings: TeacherParams) -> dict[str, int | float]:
        """`guidance_scale` is this pipeline's classifier-free guidance: off."""
        return {**super().call(settings), "guidance_scale": 1.0}

    @property
    def _positions(self) -> tuple[int, int]:
        """Rows and columns of the VAE's latent."""
        rows, columns = self.grid
        return PATCH * rows, PATCH * columns

    def _as_map(self, x_BTC: Tensor) -> Tensor:
        """(B, C, h, w), in the memory layout that the pipeline's latents have."""
        return x_BTC.transpose(1, 2).unflatten(2, self._positions).contiguous()
