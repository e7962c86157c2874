"""The miniature's autoencoder: a 32 px `AutoencoderKL`, f4, 16 latent channels (8 x 8 x 16)."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from mini.resume import load_state, save_state


def build() -> AutoencoderKL:
    """A FLUX-style VAE (no quant convs, shift and scale factors), 0.7 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (..., H, W, 3) to float (..., 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.moveaxis(pictures, -1, -3).astype(np.float32)) / 127.5 - 1


def edges(x: torch.Tensor) -> torch.Tensor:
    """Horizontal and vertical differences, flattened: what blur loses first."""
    return torch.cat([x.diff(dim=-1).flatten(1), x.diff(dim=-2).flatten(1)], 1)


def loss_of(vae: AutoencoderKL, x_B3HW: torch.Tensor) -> torch.Tensor:
    """L1 + edge L1 + squared error + a weak KL (1e-5 a latent element)."""
    posterior = vae.encode(x_B3HW).latent_dist
    y = vae.decode(posterior.sample()).sample
    rebuilt = F.l1_loss(y, x_B3HW) + 4 * F.mse_loss(y, x_B3HW) + 0.5 * F.l1_loss(edges(y), edges(x_B3HW))
    return rebuilt + 1e-6 * posterior.kl().mean()


def train(pictures_N: np.ndarray, folder: Path, steps: int, batch: int = 32) -> AutoencoderKL:
    """Trains for `steps` steps in all, over restarts; `pictures_N` is uint8 (N, 32, 32, 3)."""
    torch.manual_seed(0)
    vae = build()
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3, weight_decay=1e-4)
    state = load_state(folder / "vae.pt", vae, optimizer)
    generator = torch.Generator().manual_seed(1 + state["step"])
    while state["step"] < steps:
        start = time.time()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * max(0.02, 1 - state["step"] / steps) * min(1, (state["step"] + 1) / 100)
        rows = torch.randint(len(pictures_N), (batch,), generator=generator).numpy()
        loss = loss_of(vae, to_tensor(pictures_N[rows]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        state["step"] += 1
        state["seconds"] += time.time() - start
        if state["step"] % 100 == 0:
            print(f"vae step {state['step']} loss {loss.item():.4f} of {steps}, {state['seconds']:.0f} s", flush=True)
            save_state(folder / "vae.pt", vae, optimizer, state)
    save_state(folder / "vae.pt", vae, optimizer, state)
    return vae.eval()


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures_N: np.ndarray) -> float:
    """Mean PSNR in dB of the posterior mean's decoding, for pictures in [0, 1]."""
    x = to_tensor(pictures_N)
    y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    mse = ((x - y) / 2).square().mean((1, 2, 3))
    return float((-10 * mse.log10()).mean())


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures_N: np.ndarray, batch: int = 256) -> torch.Tensor:
    """Posterior means, (N, 16, 8, 8), not yet shifted or scaled."""
    parts = [
        vae.encode(to_tensor(pictures_N[i : i + batch])).latent_dist.mean for i in range(0, len(pictures_N), batch)
    ]
    return torch.cat(parts)
