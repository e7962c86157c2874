"""The miniature FLUX: its transformer and text encoders, and the folder that `FluxPipeline` loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from mini.tokenizers import save_clip
from mini.vae import CHANNELS, SIDE

MAX_LENGTH = 8
"""Text tokens, for both encoders: our longest caption. Each costs as much as an image token."""

SHIFT = 1.0
"""Of the sampling grid; chosen on validation."""

LARGEST_FILE = "15MB"
"""Of a folder's weights: larger ones are split."""


@dataclass(frozen=True)
class Shape:
    """Size of a transformer: heads of 64, double and single blocks."""

    heads: int
    double: int
    single: int


TEACHER = Shape(heads=4, double=1, single=5)
"""7.9 M parameters. At these sizes the time is in many small kernels and not in the products: on one CPU core in bf16,
with 64 tokens, 11.2 M trained at 59 samples a second and 7.5 M at 57. Single blocks cost fewest parameters a token."""

RIVAL = Shape(heads=2, double=1, single=3)
"""A smaller generator, whose samples are the losers of one reward."""


def build_transformer(shape: Shape) -> FluxTransformer2DModel:
    """A network over 16 image tokens of 128 channels, on which guidance has no influence yet."""
    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * CHANNELS,
        num_layers=shape.double,
        num_single_layers=shape.single,
        attention_head_dim=64,
        num_attention_heads=shape.heads,
        joint_attention_dim=96,
        pooled_projection_dim=96,
        guidance_embeds=True,
        axes_dims_rope=(8, 28, 28),
    )
    last = network.time_text_embed.guidance_embedder.linear_2
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return network


def build_clip(tokenizer) -> CLIPTextModel:
    """Pooled prompt embedding, 96 wide, two layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            projection_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_t5(tokenizer) -> T5EncoderModel:
    """Prompt tokens, 96 wide, two layers."""
    config = T5Config(
        vocab_size=len(tokenizer), d_model=96, d_kv=24, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    return T5EncoderModel(config)


class Miniature(nn.Module):
    """Transformer and both text encoders, as one module to train."""

    def __init__(self, clip_tokenizer, t5_tokenizer, shape: Shape = TEACHER):
        super().__init__()
        self.transformer = build_transformer(shape)
        self.clip = build_clip(clip_tokenizer)
        self.t5 = build_t5(t5_tokenizer)
        image_ids = FluxPipeline._prepare_latent_image_ids(1, SIDE // 2, SIDE // 2, "cpu", torch.float32)
        self.register_buffer("image_ids", image_ids, persistent=False)
        self.register_buffer("text_ids", torch.zeros(MAX_LENGTH, 3), persistent=False)

    def forward(self, x_BTC: Tensor, sigma_B: Tensor, scale_B: Tensor, clip_BL: Tensor, t5_BL: Tensor) -> Tensor:
        """Velocity (B, 16, 128) at the embedded guidance `scale_B`."""
        return self.transformer(
            hidden_states=x_BTC,
            timestep=sigma_B,
            guidance=scale_B,
            pooled_projections=self.clip(clip_BL).pooler_output,
            encoder_hidden_states=self.t5(t5_BL)[0],
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]


def save_pipeline(folder: Path, model: Miniature, vae, clip_tokenizer, t5_tokenizer) -> FluxPipeline:
    """The folder that `FluxPipeline.from_pretrained` loads; weights in fp16, to stay small."""
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=model.clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=model.t5,
        tokenizer_2=t5_tokenizer,
        transformer=model.transformer,
    )
    pipe.to(torch.float16).save_pretrained(folder, max_shard_size=LARGEST_FILE)
    save_clip(clip_tokenizer, folder / "tokenizer")
    # transformers 5 writes its own name of the class; this one is read by 4 and 5.
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"T5Tokenizer"', '"T5TokenizerFast"'))
    return pipe
