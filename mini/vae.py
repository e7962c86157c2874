"""The miniature's autoencoder: a 64 px `AutoencoderKL`, f8 as FLUX's, 32 latent channels as FLUX.2's (32 x 8 x 8).

Packed by 2 x 2 as FLUX does it, a picture of 64 px is 16 tokens: four times the pixels of the 32 px build at the cost
of one of its steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from mini.resume import Saver, load_state

BATCH = 32
WIDTHS = (16, 32, 64, 96)
"""Channels at 64, 32, 16 and 8 px."""

CHANNELS, SIDE = 32, 8
"""Of a latent."""

PEAK = 2e-3
KL_WEIGHT = 1e-5
"""A nat of the latent costs this much of the loss: details that a drawing does without carry no bits, and the
decoder learns to bear small errors of the latent, which every sample has."""


def build() -> AutoencoderKL:
    """A FLUX-style VAE (no quant convs, shift and scale factors), 0.7 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(WIDTHS),
        up_block_types=("UpDecoderBlock2D",) * len(WIDTHS),
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def to_tensor(pictures: np.ndarray, device: str = "cpu") -> Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def edges(x: Tensor) -> Tensor:
    """Horizontal and vertical differences, flattened: what blur loses first."""
    return torch.cat([x.diff(dim=-1).flatten(1), x.diff(dim=-2).flatten(1)], 1)


def loss_of(vae: AutoencoderKL, x_B3HW: Tensor) -> Tensor:
    """L1 + squared error + L1 of edges + a weak KL."""
    with torch.autocast(x_B3HW.device.type, torch.bfloat16):
        posterior = vae.encode(x_B3HW).latent_dist
        y = vae.decode(posterior.sample()).sample.float()
    rebuilt = F.l1_loss(y, x_B3HW) + 4 * F.mse_loss(y, x_B3HW) + 0.5 * F.l1_loss(edges(y), edges(x_B3HW))
    return rebuilt + KL_WEIGHT * posterior.kl().float().mean()


def learning_rate(step: int, steps: int) -> float:
    """Warm-up over 100 steps, then linear to 1 %."""
    return PEAK * min(1, (step + 1) / 100) * max(0.01, 1 - step / steps)


def train(pictures_N: np.ndarray, path: Path, steps: int, device: str = "cpu") -> AutoencoderKL:
    """Trains for `steps` steps in all, over restarts; `pictures_N` is uint8 (N, 64, 64, 3)."""
    torch.manual_seed(0)
    vae = build().to(device)
    return fit(vae, vae.parameters(), pictures_N, path, steps)


def polish(vae: AutoencoderKL, pictures_N: np.ndarray, path: Path, steps: int) -> AutoencoderKL:
    """Trains the decoder alone, from where it is: latents that were made with this encoder stay what they are."""
    torch.manual_seed(3)
    vae.encoder.requires_grad_(False)
    return fit(vae, vae.decoder.parameters(), pictures_N, path, steps)


def fit(
    vae: AutoencoderKL, parameters: Iterable[nn.Parameter], pictures_N: np.ndarray, path: Path, steps: int
) -> AutoencoderKL:
    """`steps` updates of these parameters, over restarts."""
    optimizer = torch.optim.AdamW(parameters, PEAK, weight_decay=1e-4)
    state = load_state(path, vae, optimizer)
    rng, saver = np.random.default_rng(1 + state["step"]), Saver(path, every=120)
    running, start = 0.2, time.time()
    while state["step"] < steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state["step"], steps)
        rows = np.sort(rng.integers(len(pictures_N), size=BATCH))
        loss = loss_of(vae, to_tensor(pictures_N[rows], str(vae.device)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        state["step"] += 1
        if state["step"] % 50 == 0:
            running += 0.2 * (loss.item() - running)
            print(
                f"{path.stem} step {state['step']} of {steps}, loss {running:.4f}, {time.time() - start:.0f} s",
                flush=True,
            )
        saver.offer(vae, optimizer, state)
    saver.save(vae, optimizer, state)
    return vae.eval()


@torch.no_grad()
def rebuilt(vae: AutoencoderKL, pictures_N: np.ndarray, batch: int = 64) -> np.ndarray:
    """The pictures through encoder (posterior mean) and decoder, uint8 (N, 64, 64, 3)."""
    parts = []
    for i in range(0, len(pictures_N), batch):
        x = to_tensor(pictures_N[i : i + batch], str(vae.device))
        parts.append(to_pictures(vae.decode(vae.encode(x).latent_dist.mean).sample))
    return np.concatenate(parts)


def to_pictures(y_B3HW: Tensor) -> np.ndarray:
    """[-1, 1] to uint8 (B, H, W, 3)."""
    return ((y_B3HW.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def psnr(vae: AutoencoderKL, pictures_N: np.ndarray) -> float:
    """Mean PSNR in dB of the reconstructions, for pictures in [0, 1]."""
    error = (rebuilt(vae, pictures_N).astype(np.float32) - pictures_N) / 255
    return float(np.mean(-10 * np.log10(np.square(error).mean((1, 2, 3)))))


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures_N: np.ndarray, batch: int = 64) -> Tensor:
    """Posterior means, (N, 32, 8, 8) in fp16 on the CPU, not yet shifted or scaled."""
    parts = []
    for i in range(0, len(pictures_N), batch):
        x = to_tensor(pictures_N[i : i + batch], str(vae.device))
        parts.append(vae.encode(x).latent_dist.mean.half().cpu())
    return torch.cat(parts)
