"""A FLUX that is neither tiny nor published: its memory is weights and activations, not the process around them."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from rats.schemas.params import Params
from rats.stages.rollout.rollout import rollout_stage
from tests.support import tiny
from tests.support.project import write_project


def write_medium(folder: Path) -> Path:
    """97 million weights of width 768, and a VAE of a quarter of the published width, in FLUX's own shape."""
    torch.manual_seed(0)
    network = FluxTransformer2DModel(
        in_channels=64,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=128,
        num_attention_heads=6,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(), "vae": vae, "transformer": network}
    FluxPipeline(**parts, **tiny.text_encoders()).save_pretrained(folder)
    return folder


def medium_project(models: Path, folder: Path) -> Path:
    """A project around it with one sample of 512 px rolled out; returns its shards."""
    write_medium(folder / "medium")
    values = write_project(
        models,
        folder,
        model={"path": str(folder / "medium")},
        teacher={"steps": 3, "nfe": [3], "height": 512, "width": 512, "true_cfg_scale": 1.0},
        compute={"micro_batch": 1},
        train={"nfe": [3], "batch": 1, "micro_batch": 1},
        store={"shard_samples": 1},
    )
    (folder / "prompts.txt").write_text(tiny.PROMPTS[0])
    report = rollout_stage(Params.model_validate(values), "train")
    return folder / "store" / report.fingerprint
