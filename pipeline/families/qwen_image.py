"""The Qwen-Image family: Qwen-Image and anything in its format.

Every number follows `diffusers.QwenImagePipeline`: packing, sigmas, timestep rounding, guidance and decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from rats.pipeline.families.base import PATCH, SAMPLING, PatchFamily
from rats.pipeline.families.fit import Fit, PartConfig
from rats.pipeline.lengths import Window
from rats.pipeline.protocols import Conditioning
from rats.pipeline.weights.loading import quiet_imports
from rats.schemas.errors import ConfigError
from rats.schemas.params import TeacherParams

with quiet_imports():  # the pipeline's module asks for torchvision, which we do without
    from diffusers import QwenImagePipeline


class OneFrameVAE(AutoencoderKLQwenImage):
    """The published VAE, able to recompute activations of single frames.

    diffusers' own class cannot: it is made for videos, where each frame uses cached activations of the one before. A
    single frame uses none, so its decoder's blocks can be run again.
    """

    _supports_gradient_checkpointing = True

    def _decode(self, z: Tensor, return_dict: bool = True) -> Any:
        decoder: Any = self.decoder
        if z.shape[2] > 1 or not (decoder.gradient_checkpointing and torch.is_grad_enabled()):
            return super()._decode(z, return_dict)
        x = decoder.mid_block(decoder.conv_in(self.post_quant_conv(z)))
        for block in decoder.up_blocks:
            x = checkpoint(block, x, use_reentrant=False)
        decoded = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x))).clamp(-1, 1)
        return DecoderOutput(sample=decoded) if return_dict else (decoded,)


class QwenImage(PatchFamily):
    """2 x 2 patches of a video VAE's latent of one frame are the tokens; Qwen2.5-VL's last states condition them.

    Prompts differ in length and the pipeline leaves them so. They are stored padded, with a mask, which comes to the
    same: text positions follow the picture's in the rotary embedding, and attention leaves masked ones out.
    """

    pipeline_class = QwenImagePipeline
    network_class = QwenImageTransformer2DModel
    vae_class = OneFrameVAE
    encoders = {"text_encoder": Qwen2_5_VLForConditionalGeneration}
    tokenizers = {"tokenizer": Qwen2Tokenizer}
    # what FLUX's list adapts, by this network's names: attention and MLPs of both streams
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )
    depth = ("num_layers",)
    longest_text = 1024
    scheduler_fields = (*PatchFamily.scheduler_fields, "use_dynamic_shifting", "shift_terminal")
    published = ("Qwen/Qwen-Image",)
    suggested = {"true_cfg_scale": 4.0, "negative_prompt": " ", "height": 1024, "width": 1024}

    @classmethod
    def fits(cls, parts: Mapping[str, PartConfig]) -> Iterator[Fit]:
        network, vae = parts["transformer"], parts["vae"]
        yield network["in_channels"], PATCH**2 * vae["z_dim"]
        yield network["out_channels"], vae["z_dim"]
        yield network["joint_attention_dim"], parts["text_encoder"]["hidden_size"]
        yield network.total("axes_dims_rope"), network["attention_head_dim"]
        for field in ("latents_mean", "latents_std"):
            yield vae.count(field), vae["z_dim"]

    @property
    def factor(self) -> int:
        return int(2 ** len(self.vae_config.temperal_downsample))

    def latent_shape(self) -> tuple[int, int]:
        rows, columns = self.grid
        return rows * columns, PATCH**2 * int(self.vae_config.z_dim)

    def conditioning_shapes(self, network_config: Any) -> dict[str, tuple[int, ...]]:
        length = self.settings.max_sequence_length
        return {"prompt_embeds": (length, int(network_config.joint_attention_dim)), "prompt_embeds_mask": (length,)}

    def encode(self, pipeline: Any, prompt: str) -> Conditioning:
        """The embeddings, then zeros; the mask, int64, is 1 where a token is."""
        length, device = self.settings.max_sequence_length, pipeline.text_encoder.device
        embeds, _ = pipeline.encode_prompt(prompt, max_sequence_length=length, device=device)
        missing = length - embeds.shape[1]
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=device)
        return {"prompt_embeds": pad(embeds, (0, 0, 0, missing)), "prompt_embeds_mask": pad(mask, (0, missing))}

    def windows(self, tokenizers: Mapping[str, Any]) -> list[Window]:
        """The pipeline takes the states of its template's first tokens off again."""
        pipeline = QwenImagePipeline(**dict.fromkeys(SAMPLING), text_encoder=None, **tokenizers)
        template = {
            "written": pipeline.prompt_template_encode.format,
            "before": pipeline.prompt_template_encode_start_idx,
        }
        return [self.window(tokenizers["tokenizer"], **template)]

    def evaluate(
        self, network: Any, x_BTC: Tensor, timestep_B: Tensor, conditioning: Conditioning, guidance_B: Tensor | None
    ) -> Tensor:
        """Raises ConfigError for a network with embedded guidance, which diffusers' own class cannot evaluate."""
        if guidance_B is not None:
            raise ConfigError(
                "the network's guidance_embeds is true, and diffusers' QwenImageTransformer2DModel has no input for "
                "guidance: set it to false in transformer/config.json if the network was not distilled"
            )
        output = network(
            hidden_states=x_BTC,
            timestep=timestep_B.to(x_BTC.dtype) / 1000,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_hidden_states_mask=conditioning["prompt_embeds_mask"],
            img_shapes=[[(1, *self.grid)]] * len(x_BTC),
            return_dict=False,
        )
        return cast(Tensor, output[0])

    def guide(self, cond_BTC: Tensor, uncond_BTC: Tensor) -> Tensor:
        """Each token's guided velocity is scaled back to the length of the conditional one."""
        guided_BTC = super().guide(cond_BTC, uncond_BTC)
        wanted_BT1, found_BT1 = (torch.norm(v, dim=-1, keepdim=True) for v in (cond_BTC, guided_BTC))
        return guided_BTC * (wanted_BT1 / found_BT1)

    def to_vae(self, vae: Any, x_BTC: Tensor) -> Tensor:
        """Unpacked to one frame (B, C, 1, h, w), then the mean and deviation of each channel."""
        z = QwenImagePipeline._unpack_latents(x_BTC, self.settings.height, self.settings.width, self.factor)
        mean, deviation = (
            torch.tensor(values, device=z.device, dtype=z.dtype).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return cast(Tensor, z / (1.0 / deviation) + mean)

    def from_vae(self, decoded: Tensor) -> Tensor:
        """The only frame."""
        return decoded[:, :, 0]

    def schedule(self, scheduler_config: Any, steps: int) -> dict[str, Any]:
        """1 to 1 / steps, for the scheduler to shift by the number of tokens and stretch to `shift_terminal`."""
        return self.even_grid(scheduler_config, steps, self.dynamic_mu(scheduler_config, max_shift=1.15))

    @classmethod
    def call(cls, settings: TeacherParams) -> dict[str, int | float]:
        return {**super().call(settings), "true_cfg_scale": 1.0}
