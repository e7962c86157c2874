"""Decoder, student, teacher and text encoders of a family. B samples, T latent tokens, C channels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from rats.pipeline.families.base import SAMPLING, Family
from rats.pipeline.protocols import Conditioning
from rats.pipeline.weights.loading import quiet_imports, quiet_notices
from rats.pipeline.weights.opening import opening, unless_values_are_read
from rats.schemas.errors import ConfigError, DataError
from rats.schemas.horizons import aligned
from rats.schemas.params import evaluations_per_step

MISFIT = "take its config.json, its weights and the other parts from one pipeline"
OTHER = {
    "float16": "it overflows, set model.dtype to bfloat16 or float32",
    "bfloat16": "set model.dtype to float32, or fetch or export the VAE again",
    "float32": "its weights are damaged, fetch or export it again",
}
"""The way out where a VAE of this dtype decodes to what is not finite."""


def check_decoded(vae: Any, x_B: Tensor, pixels_B: Tensor) -> None:
    """Raises DataError where decoded values are not finite, and says whether latents or VAE are to blame.

    `x_B`: the latents, batch first, before they are cast to the VAE's dtype. `pixels_B`: the VAE's own, not clamped: an
    infinity would be white.
    """
    if pixels_B.is_meta or torch.isfinite(pixels_B).all():
        return
    whole_B = torch.isfinite(x_B.detach().flatten(1)).all(1)
    if count := int((~whole_B).sum()):
        raise DataError(
            f"{count} of {len(x_B)} final latents are not finite, so there is no picture of them: the network has "
            "diverged, or overflows its dtype (model.dtype float32 or bfloat16 does not)"
        )
    dtype = str(vae.dtype).removeprefix("torch.")
    where = vae.config.get("_name_or_path") or "the VAE"
    raise DataError(
        f"{where}, {type(vae).__name__} in {dtype}, decodes finite latents to NaN or infinity: {OTHER[dtype]}"
    )


@contextmanager
def checked_decoding(vae: Any) -> Iterator[None]:
    """Within, `vae.decode` raises what `check_decoded` raises, also where a pipeline of diffusers calls it."""
    decode = vae.decode

    def checked(z: Tensor, *args: Any, **options: Any) -> Any:
        found = decode(z, *args, **options)
        check_decoded(vae, z, found[0])
        return found

    vae.decode = checked
    try:
        yield
    finally:
        del vae.decode  # the class's own again


class FamilyDecoder:
    """The VAE alone, which turns stored final latents into pictures."""

    def __init__(self, family: Family, vae: nn.Module) -> None:
        """Takes a loaded VAE, and freezes it."""
        self.family, self.settings = family, family.settings
        self.vae: Any = vae.requires_grad_(False).eval()

    def latent_shape(self) -> tuple[int, ...]:
        """(T, C) of one state."""
        return self.family.latent_shape()

    def decode(self, x_BTC: Tensor) -> Tensor:
        """Images (B, 3, H, W), float32 in [0, 1], or frames (B, K, 3, H, W) of videos; differentiable.

        Raises DataError for pictures that are not finite: no reward is asked about them.
        """
        z = self.family.to_vae(self.vae, x_BTC.to(self.vae.device, self.vae.dtype))
        pixels = self.vae.decode(z, return_dict=False)[0]
        check_decoded(self.vae, x_BTC, pixels)
        return (self.family.from_vae(pixels).float() / 2 + 0.5).clamp(0, 1)


class FamilyStudent(FamilyDecoder):
    """Network, VAE and scheduler: all that sampling from stored embeddings needs."""

    def __init__(
        self, family: Family, network: nn.Module, vae: nn.Module, scheduler: FlowMatchEulerDiscreteScheduler
    ) -> None:
        """Takes loaded parts. Evaluations stay in the network's present dtype, even if its weights are cast later."""
        super().__init__(family, vae)
        self.network = cast(Any, network)
        self.scheduler = scheduler
        self._dtype: torch.dtype = self.network.dtype
        self._embeds_guidance = bool(self.network.config.get("guidance_embeds"))

    @property
    def ignored(self) -> tuple[str, ...]:
        """Settings of the teacher that this model does not read, so that they change no sample."""
        return (*self.family.ignored, *(() if self._embeds_guidance else ("guidance_scale",)))

    def checkpoint_activations(self) -> None:
        """Recompute the activations of network and decoder in the backward pass: less memory, about a third slower."""
        self.network.enable_gradient_checkpointing()
        self.vae.enable_gradient_checkpointing()

    def velocity(self, x_BTC: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        """Velocity eps - x0 (B, T, C), in the dtype of `x_BTC`: one evaluation, at the embedded guidance scale."""
        return self._evaluate(x_BTC, sigma, conditioning, self.settings.guidance_scale)

    def _evaluate(self, x_BTC: Tensor, sigma: float, conditioning: Conditioning, guidance_scale: float) -> Tensor:
        count, device, dtype = len(x_BTC), x_BTC.device, self._dtype
        timestep_B = torch.full((count,), sigma, device=device) * self.scheduler.config["num_train_timesteps"]
        guidance_B = torch.full((count,), guidance_scale, device=device) if self._embeds_guidance else None
        given = {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in conditioning.items()}
        return self.family.evaluate(self.network, x_BTC.to(dtype), timestep_B, given, guidance_B).to(x_BTC.dtype)

    def stock_sigmas(self, steps: int) -> list[float]:
        """The pipeline's own grid for `steps` steps, shifted once (statically or by resolution), then 0.

        `steps` + 1 values. Raises ConfigError when the scheduler's grid does not fall from 1.0 to 0.0.
        """
        with opening("the model's scheduler_config.json", f"a grid of {steps} steps", "fetch the scheduler again"):
            self.scheduler.set_timesteps(**self.family.schedule(self.scheduler.config, steps))
            sigmas = [float(sigma) for sigma in self.scheduler.sigmas]
        if len(sigmas) != steps + 1 or sigmas[0] != 1.0 or sigmas[-1] != 0.0 or sorted(set(sigmas))[::-1] != sigmas:
            raise ConfigError(
                f"the scheduler's grid for {steps} steps is {sigmas}, which does not fall from 1.0 to 0.0: "
                "use a FlowMatchEulerDiscreteScheduler without karras or inverted sigmas"
            )
        return sigmas

    def rehearse_decoding(self, folder: Path) -> None:
        """Decodes a state of a student on the meta device. Raises DataError, naming `folder`, when that fails.

        A decoder that reads a tensor's values cannot be tried so, and passes.
        """
        opened = opening(folder, f"the decoder of a {type(self.family).__name__}", MISFIT)
        with opened, unless_values_are_read(), torch.no_grad():
            pixels = self.decode(torch.empty(1, *self.latent_shape(), device="meta"))
            height, width = self.settings.height, self.settings.width
            if pixels.shape[-3:] != (3, height, width):
                raise ValueError(f"pixels of shape {tuple(pixels.shape[-3:])} in place of {(3, height, width)}")

    def rehearse(self, folder: Path) -> None:
        """One evaluation on the meta device, by which a configuration shows that it leads nowhere.

        Raises DataError, naming `folder`, when the network cannot be evaluated on its own latents and embeddings. One
        that reads a tensor's values cannot be tried so, and passes.
        """
        shapes = self.family.conditioning_shapes(self.network.config)
        opened = opening(folder, f"the network of a {type(self.family).__name__}", MISFIT)
        with opened, unless_values_are_read(), torch.device("meta"):
            conditioning = {name: torch.empty(1, *shape) for name, shape in shapes.items()}
            x_BTC = torch.empty(1, *self.latent_shape())
            v_BTC = self.velocity(x_BTC, 0.5, conditioning)
            if v_BTC.shape != x_BTC.shape:
                raise ValueError(f"a velocity of shape {tuple(v_BTC.shape)} of a state of {tuple(x_BTC.shape)}")

    def grids(self) -> tuple[list[float], list[float]]:
        """The teacher's sigmas, snapped to the students', and those whose states are kept."""
        settings = self.settings
        return aligned(self.stock_sigmas, settings.steps, settings.nfe, settings.horizons)


class FamilyText:
    """The text encoders and tokenizers alone, used as the family's pipeline uses them."""

    def __init__(self, family: Family, parts: dict[str, Any]) -> None:
        """`parts`: the components of `family.encoders` and `family.tokenizers`, loaded."""
        self.family = family
        self._pipeline = family.pipeline_class(**dict.fromkeys(SAMPLING), **parts)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """The prompts' embeddings, batch first. Each is encoded alone, so that its bits do not depend on the others."""
        # the pipelines' lines on each long prompt are `pipeline.lengths`' one line
        with opening("the model's text encoders", "one pipeline", MISFIT), quiet_notices(), quiet_imports():
            each = [self.family.encode(self._pipeline, prompt) for prompt in prompts]
        return {name: torch.cat([one[name] for one in each]) for name in each[0]}


class FamilyTeacher(FamilyStudent):
    """The student's parts, the text encoders and classifier-free guidance. All parts are frozen."""

    def __init__(
        self,
        family: Family,
        network: nn.Module,
        vae: nn.Module,
        scheduler: FlowMatchEulerDiscreteScheduler,
        text: FamilyText | None,
    ) -> None:
        """Takes loaded parts. Without `text` it can neither encode prompts nor guide against a negative prompt."""
        super().__init__(family, network, vae, scheduler)
        self.network.requires_grad_(False).eval()
        scale = self.settings.true_cfg_scale
        self.evaluations_per_step = evaluations_per_step(scale)
        self.is_guided = scale > 1 or (self._embeds_guidance and self.settings.guidance_scale != 1)
        self._text = text
        self._negative: Conditioning | None = None

    def encode(self, prompts: list[str]) -> Conditioning:
        """`FamilyText.encode`."""
        assert self._text is not None, "its encoders were not loaded, or let go"
        return self._text.encode(prompts)

    @torch.no_grad()
    def guided_velocity(self, x_BTC: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        """Velocity (B, T, C) with true CFG against the negative prompt: two evaluations, one where the scale is 1."""
        conditional = self.velocity(x_BTC, sigma, conditioning)
        if self.evaluations_per_step == 1:
            return conditional
        return self.family.guide(conditional, self.velocity(x_BTC, sigma, self._negatives(len(x_BTC))))

    @torch.no_grad()
    def unguided_velocity(self, x_BTC: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        """Velocity (B, T, C) without CFG. If the only guidance is the embedded scale, it is 1 here."""
        embedded = self.settings.guidance_scale if self.evaluations_per_step > 1 else 1.0
        return self._evaluate(x_BTC, sigma, conditioning, embedded)

    def forget_encoders(self) -> None:
        """Free the text encoders, after encoding the negative prompt if sampling needs it."""
        if self.evaluations_per_step > 1:
            self._negatives(1)
        self._text = None

    def _negatives(self, batch: int) -> Conditioning:
        """The negative prompt's embeddings, encoded once, for a batch."""
        if self._negative is None:
            self._negative = self.encode([self.settings.negative_prompt])
        return {name: value.expand(batch, *value.shape[1:]) for name, value in self._negative.items()}
