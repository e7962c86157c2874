"""The Wan family: Wan2.1-T2V and anything in its format. Videos.

Every number follows `diffusers.WanPipeline`: latents, timesteps, guidance and decoding. Its published scheduler is
another solver: `Wan.scheduler` replaces it.
Shapes: B samples, T latent tokens, C channels, F latent frames of h x w positions, K scored frames.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, cast

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import T5TokenizerFast, UMT5EncoderModel

from rats.pipeline.families.base import EULER, Family
from rats.pipeline.families.fit import Fit, PartConfig
from rats.pipeline.lengths import Window
from rats.pipeline.protocols import Conditioning
from rats.pipeline.weights.loading import quiet_imports
from rats.schemas.errors import ConfigError
from rats.schemas.horizons import evenly
from rats.schemas.params import TeacherParams

try:
    import ftfy  # noqa: F401  (diffusers looks for it once, at import, and cleans prompts otherwise without it)
except ImportError:
    raise ImportError("WanPipeline cleans prompts with ftfy: pip install 'ftfy>=6.1'") from None

with quiet_imports():  # the pipeline's module asks for torchvision, which we do without
    from diffusers import WanPipeline
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

log = logging.getLogger(__name__)

UNIPC = "UniPCMultistepScheduler"
OTHER_GRIDS = (
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_dynamic_shifting", "shift_terminal"),
)
"""Settings of a UniPC scheduler that lead to sigmas which a shift alone does not describe."""
ORIGINAL_NAMES = (
    *((".attn1.to_out.0", ".self_attn.o"), (".attn2.to_out.0", ".cross_attn.o")),
    *((".attn1.to_", ".self_attn."), (".attn2.to_", ".cross_attn.")),
    *((".ffn.net.0.proj", ".ffn.0"), (".ffn.net.2", ".ffn.2")),
    ("condition_embedder.time_proj", "time_projection.1"),
    *((f"condition_embedder.{part}_embedder.linear_1", f"{part}_embedding.0") for part in ("time", "text")),
    *((f"condition_embedder.{part}_embedder.linear_2", f"{part}_embedding.2") for part in ("time", "text")),
    ("proj_out", "head.head"),
)
"""Parts of diffusers' module names, each with what the published Wan2.1 checkpoints have in its place."""


class FramewiseVAE(AutoencoderKLWan):
    """The published VAE, able to recompute activations: one latent frame at a time, keeping the caches between them.

    diffusers' own class cannot: its decoder passes the last activations of each frame to the next one in a list that it
    changes in place. Here each frame gets its own list. The gradient flows through it as before.
    """

    _supports_gradient_checkpointing = True

    def _decode(self, z: Tensor, return_dict: bool = True) -> Any:
        if not (self.decoder.gradient_checkpointing and torch.is_grad_enabled()):
            return super()._decode(z, return_dict)
        self.clear_cache()
        x, caches, parts = self.post_quant_conv(z), tuple(self._feat_map), []
        for i, frame in enumerate(x.split(1, dim=2)):
            part, caches = checkpoint(self._frame, frame, i == 0, caches, use_reentrant=False)
            parts.append(part)
        decoded = torch.cat(parts, dim=2).clamp(-1, 1)
        return DecoderOutput(sample=decoded) if return_dict else (decoded,)

    def _frame(self, frame: Tensor, is_first: bool, caches: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        """Pixels of one latent frame, and the caches for the next."""
        kept = list(caches)
        pixels = self.decoder(frame, feat_cache=kept, feat_idx=[0], first_chunk=is_first)
        return pixels, tuple(kept)


class Wan(Family):
    """Every position of every latent frame is a token; UMT5's embedding, zero beyond the prompt, conditions them."""

    pipeline_class = WanPipeline
    network_class = WanTransformer3DModel
    vae_class = FramewiseVAE
    encoders = {"text_encoder": UMT5EncoderModel}
    tokenizers = {"tokenizer": T5TokenizerFast}
    # the projections of both attentions, and the feed-forward layers
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    depth = ("num_layers",)
    is_video = True
    published = ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers")
    # WanPipeline's own defaults; of the published sizes the smaller one
    suggested = {"true_cfg_scale": 5.0, "height": 480, "width": 832, "frames": 81}

    @classmethod
    def fits(cls, parts: Mapping[str, PartConfig]) -> Iterator[Fit]:
        network, vae = parts["transformer"], parts["vae"]
        yield network["in_channels"], vae["z_dim"]
        yield network["out_channels"], vae["z_dim"]
        yield network["text_dim"], parts["text_encoder"]["hidden_size"]
        for field in ("latents_mean", "latents_std"):
            yield vae.count(field), vae["z_dim"]

    def __init__(self, settings: TeacherParams, vae: Any) -> None:
        super().__init__(settings, vae)
        if vae.config.is_residual or vae.config.patch_size is not None:
            raise ConfigError("this VAE is that of Wan2.2-TI2V, which is not supported: name a Wan2.1-T2V pipeline")
        if (settings.frames - 1) % (factor := int(vae.config.scale_factor_temporal)):
            near = factor * round((settings.frames - 1) / factor) + 1
            raise ConfigError(f"teacher.frames is {settings.frames}, not {factor}k + 1 as this VAE decodes: use {near}")

    @property
    def pixel_multiple(self) -> int:
        return 2 * int(self.vae_config.scale_factor_spatial)

    @property
    def _grid(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns."""
        config, settings = self.vae_config, self.settings
        rows, columns = (side // int(config.scale_factor_spatial) for side in (settings.height, settings.width))
        return (settings.frames - 1) // int(config.scale_factor_temporal) + 1, rows, columns

    def latent_shape(self) -> tuple[int, int]:
        frames, rows, columns = self._grid
        return frames * rows * columns, int(self.vae_config.z_dim)

    def conditioning_shapes(self, network_config: Any) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.settings.max_sequence_length, int(network_config.text_dim))}

    def encode(self, pipeline: Any, prompt: str) -> Conditioning:
        length, device = self.settings.max_sequence_length, pipeline.text_encoder.device
        embeds, _ = pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=length, device=device
        )
        return {"prompt_embeds": embeds}

    def windows(self, tokenizers: Mapping[str, Any]) -> list[Window]:
        return [self.window(tokenizers["tokenizer"], written=prompt_clean)]

    def evaluate(
        self, network: Any, x_BTC: Tensor, timestep_B: Tensor, conditioning: Conditioning, guidance_B: Tensor | None
    ) -> Tensor:
        output = network(
            hidden_states=self._video(x_BTC),
            timestep=timestep_B,
            encoder_hidden_states=conditioning["prompt_embeds"],
            return_dict=False,
        )
        return cast(Tensor, output[0].flatten(2).transpose(1, 2))

    def _video(self, x_BTC: Tensor) -> Tensor:
        """(B, C, F, h, w) of the tokens."""
        return x_BTC.transpose(1, 2).unflatten(2, self._grid)

    def to_vae(self, vae: Any, x_BTC: Tensor) -> Tensor:
        """(B, C, F, h, w), each channel with its own standard deviation and mean; rounded as the pipeline rounds."""
        mean, std = (torch.tensor(vae.config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        return self._video(x_BTC) / (1.0 / std).to(x_BTC) + mean.to(x_BTC)

    def from_vae(self, decoded: Tensor) -> Tensor:
        """Scored frames (B, K, 3, H, W) of all frames (B, 3, frames, H, W)."""
        return decoded.transpose(1, 2)[:, evenly(decoded.shape[2], self.settings.scored_frames)]

    @classmethod
    def check_index(cls, index: Mapping[str, Any]) -> None:
        """Raises ConfigError for Wan2.2, whose pipeline samples with two networks, or with a sigma for each token."""
        second = next((part for part in index.get("transformer_2") or () if part), None)
        if second or index.get("boundary_ratio") is not None or index.get("expand_timesteps"):
            raise ConfigError(
                "this is a Wan2.2 pipeline (two networks, or expand_timesteps), which would be sampled as another "
                "model: name a Wan2.1-T2V pipeline"
            )
        super().check_index(index)

    @classmethod
    def scheduler(cls, config: dict[str, Any]) -> FlowMatchEulerDiscreteScheduler:
        """The Euler scheduler of the configuration; of the published UniPC one, Euler with the same shift.

        The grid is then Euler's own as well, which `WanPipeline` takes once it holds this scheduler. Raises ConfigError
        for UniPC on another grid than the shifted linear one, and for all other schedulers.
        """
        if config.get("_class_name") != UNIPC:
            return super().scheduler(config)
        is_flow = config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
        if other := [name for name in OTHER_GRIDS if config.get(name)] or ([] if is_flow else ["no use_flow_sigmas"]):
            raise ConfigError(
                f"the pipeline's scheduler is {UNIPC} with {other[0]}, which no Euler scheduler follows; "
                "put the scheduler_config.json of a FlowMatchEulerDiscreteScheduler into its scheduler folder"
            )
        shift = float(config.get("flow_shift", 1.0))
        _say_once(shift)
        steps = config.get("num_train_timesteps", 1000)
        return super().scheduler({"_class_name": EULER, "shift": shift, "num_train_timesteps": steps})

    @classmethod
    def comfyui_name(cls, module: str) -> str:
        """ComfyUI's Wan has the names of the published checkpoints, and knows no others."""
        for here, there in ORIGINAL_NAMES:
            module = module.replace(here, there)
        return f"diffusion_model.{module}"

    @classmethod
    def call(cls, settings: TeacherParams) -> dict[str, int | float]:
        return {**super().call(settings), "num_frames": settings.frames, "guidance_scale": 1.0}


@cache
def _say_once(shift: float) -> None:
    log.info("the pipeline's scheduler is UniPC: sampling by Euler at its shift, %g; exports carry that one", shift)
