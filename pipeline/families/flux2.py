"""The FLUX.2 [klein] family: the undistilled bases of FLUX.2 [klein] and anything in their format.

Every number follows `diffusers.Flux2KleinPipeline`: packing, sigmas, timestep rounding, guidance and decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch import Tensor
from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM

from rats.pipeline.families.base import PATCH, PatchFamily
from rats.pipeline.families.fit import Fit, PartConfig
from rats.pipeline.lengths import Window
from rats.pipeline.protocols import Conditioning
from rats.pipeline.weights.loading import quiet_imports
from rats.schemas.errors import ConfigError, DataError
from rats.schemas.params import TeacherParams

with quiet_imports():  # the pipeline's module asks for torchvision, which we do without
    from diffusers import Flux2KleinPipeline
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu


EXAMPLE = "a fox"
TURN = f"<|im_start|>user\n{EXAMPLE}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
"""What Qwen3's template makes of the example."""
LAYERS, DEEPEST = 3, 27
"""How many of Qwen3's layers have their states side by side in an embedding, and the last of them."""


class Flux2Klein(PatchFamily):
    """2 x 2 patches of the VAE's latent are the tokens; three of Qwen3's layers, side by side, condition them."""

    pipeline_class = Flux2KleinPipeline
    network_class = Flux2Transformer2DModel
    vae_class = AutoencoderKLFlux2
    encoders = {"text_encoder": Qwen3ForCausalLM}
    tokenizers = {"tokenizer": Qwen2TokenizerFast}
    # what FLUX's list adapts, and the joint projection of the single blocks; "attn.to_out", their other one, would
    # also name what holds "attn.to_out.0" in the double blocks, which peft cannot adapt
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out", "attn.to_qkv_mlp_proj"),
    )
    depth = ("num_layers", "num_single_layers")
    scheduler_fields = (*PatchFamily.scheduler_fields, "use_dynamic_shifting")
    dynamic_fields = ()  # the pipeline has a shift of its own
    published = ("black-forest-labs/FLUX.2-klein-base-4B", "black-forest-labs/FLUX.2-klein-base-9B")
    suggested = {"true_cfg_scale": 4.0, "height": 1024, "width": 1024}

    @classmethod
    def check_index(cls, index: Mapping[str, Any]) -> None:
        """Raises ConfigError for a network distilled to a few steps, whose pipeline passes over any guidance."""
        if index.get("is_distilled"):
            raise ConfigError(
                "this pipeline says is_distilled: it is a few-step student already, and takes no guidance; "
                "name its undistilled base (FLUX.2-klein-base-...)"
            )
        super().check_index(index)

    @classmethod
    def fits(cls, parts: Mapping[str, PartConfig]) -> Iterator[Fit]:
        network, vae = parts["transformer"], parts["vae"]
        if (layers := parts["text_encoder"]["num_hidden_layers"].value) < DEEPEST:
            raise ConfigError(f"the text encoder has {layers} layers, and the pipeline takes layer {DEEPEST}'s states")
        yield network["in_channels"], PATCH**2 * vae["latent_channels"]
        yield network["joint_attention_dim"], LAYERS * parts["text_encoder"]["hidden_size"]
        yield network.total("axes_dims_rope"), network["attention_head_dim"]

    @classmethod
    def check_tokenizers(cls, tokenizers: Mapping[str, Any]) -> None:
        """The pipeline puts prompts into Qwen3's chat template, which is a file of the tokenizer's."""
        turn = [{"role": "user", "content": EXAMPLE}]
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        if tokenizers["tokenizer"].apply_chat_template(turn, **options) != TURN:
            raise DataError("the tokenizer's chat template is not Qwen3's: fetch or export the tokenizer again")

    def latent_shape(self) -> tuple[int, int]:
        rows, columns = self.grid
        return rows * columns, PATCH**2 * int(self.vae_config.latent_channels)

    def conditioning_shapes(self, network_config: Any) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.settings.max_sequence_length, int(network_config.joint_attention_dim))}

    def encode(self, pipeline: Any, prompt: str) -> Conditioning:
        length, device = self.settings.max_sequence_length, pipeline.text_encoder.device
        embeds, _ = pipeline.encode_prompt(prompt, max_sequence_length=length, device=device)
        return {"prompt_embeds": embeds}

    def windows(self, tokenizers: Mapping[str, Any]) -> list[Window]:
        """`check_tokenizers` has held the template against `TURN`; rendering it anew for each prompt is slow."""
        start, end = TURN.split(EXAMPLE)
        return [self.window(tokenizers["tokenizer"], written=lambda prompt: f"{start}{prompt}{end}")]

    def evaluate(
        self, network: Any, x_BTC: Tensor, timestep_B: Tensor, conditioning: Conditioning, guidance_B: Tensor | None
    ) -> Tensor:
        """Raises ConfigError for a network with embedded guidance, FLUX.2 [dev]'s, which this pipeline leaves unset."""
        if guidance_B is not None:
            raise ConfigError("the network's guidance_embeds is true, as in FLUX.2 [dev]: this family is [klein] alone")
        prompt, device = conditioning["prompt_embeds"], x_BTC.device
        output = network(
            hidden_states=x_BTC,
            timestep=timestep_B.to(x_BTC.dtype) / 1000,
            encoder_hidden_states=prompt,
            txt_ids=Flux2KleinPipeline._prepare_text_ids(prompt[:1]).to(device),
            img_ids=Flux2KleinPipeline._prepare_latent_ids(x_BTC.new_empty(1, 1, *self.grid)).to(device),
            return_dict=False,
        )
        return cast(Tensor, output[0])

    def to_vae(self, vae: Any, x_BTC: Tensor) -> Tensor:
        """Unpacked, with the VAE's batch-norm statistics undone, which count channels by patches."""
        z = x_BTC.transpose(1, 2).unflatten(2, self.grid)
        deviation = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
        mean, deviation = (values.view(1, -1, 1, 1).to(z) for values in (vae.bn.running_mean, deviation))
        return cast(Tensor, Flux2KleinPipeline._unpatchify_latents(z * deviation + mean))

    def schedule(self, scheduler_config: Any, steps: int) -> dict[str, Any]:
        """1 to 1 / steps, shifted by the number of tokens and of steps: few steps stay at more noise."""
        return self.even_grid(scheduler_config, steps, compute_empirical_mu(self.latent_shape()[0], steps))

    @classmethod
    def call(cls, settings: TeacherParams) -> dict[str, int | float]:
        """`guidance_scale` is this pipeline's classifier-free guidance: off."""
        return {**super().call(settings), "guidance_scale": 1.0}
