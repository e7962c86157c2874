"""What the families of pictures share: networks that see 2 x 2 patches of a latent, most often an AutoencoderKL's."""

from __future__ import annotations

from typing import Any

import numpy as np
from diffusers import AutoencoderKL
from torch import Tensor

from rats.pipeline.family import Family

PATCH = 2
"""Latent positions of a network's patch a side, in every published network of these families."""


class PatchedFamily(Family):
    """Pictures in patches. A family with another autoencoder says so in `vae_class` and `factor`."""

    vae_class = AutoencoderKL

    @property
    def factor(self) -> int:
        """Pixels a latent position has a side."""
        return 2 ** (len(self.vae_config.block_out_channels) - 1)

    @property
    def pixel_multiple(self) -> int:
        return PATCH * self.factor

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.settings.height // self.pixel_multiple, self.settings.width // self.pixel_multiple

    def dynamic_mu(self, scheduler_config: Any, max_shift: float) -> float:
        """`mu` of a shift that grows with the resolution: linear in the number of patches.

        `max_shift`: what the pipeline takes where the scheduler's configuration does not say.
        """
        defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": max_shift}
        low, high, at_low, at_high = (scheduler_config.get(name, default) for name, default in defaults.items())
        slope = (at_high - at_low) / (high - low)
        rows, columns = self.grid
        return float(rows * columns * slope + (at_low - slope * low))

    @staticmethod
    def even_grid(scheduler_config: Any, steps: int, mu: float) -> dict[str, Any]:
        """1 to 1 / steps in even steps for the scheduler to shift by `mu`, unless it makes a grid of its own."""
        if scheduler_config.get("use_flow_sigmas"):
            return {"num_inference_steps": steps, "mu": mu}
        return {"sigmas": list(np.linspace(1.0, 1 / steps, steps)), "mu": mu}

    @staticmethod
    def unscaled(vae: Any, z: Tensor) -> Tensor:
        """What an AutoencoderKL's decoder takes: z / scaling + shift."""
        return z / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
