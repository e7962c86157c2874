"""The FLUX family (FLUX.1-dev, -schnell and anything in their format) as `Student` and `Teacher`.

Every number follows `diffusers.FluxPipeline`: packing, sigmas, timestep rounding, guidance and decoding, so that
`solver.euler` over `stock_sigmas(n)` gives the latents of `pipe(prompt, num_inference_steps=n)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor, nn

from rats.pipeline.flux_text import FluxText, load_encoders
from rats.pipeline.loading import existing_component, load_component, outline_component, quiet_imports, quiet_notices
from rats.pipeline.lora import add_lora, is_lora, load_lora
from rats.pipeline.protocols import Conditioning
from rats.pipeline.solver import guide
from rats.pipeline.weights import DECODER_PATTERNS, PIPELINE_PATTERNS, network_folder, resolve
from rats.schemas.errors import ConfigError
from rats.schemas.params import ComputeParams, ModelParams, TeacherParams
from rats.schemas.train_params import LoraParams

with quiet_imports():  # the pipeline's module asks for torchvision, which we do without
    from diffusers import FluxPipeline
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

ATTENTION = {"sdpa": "native"}
"""`compute.attention` in diffusers' words."""

LORA_TARGETS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
)
"""What `train.lora` adapts: the list of diffusers' own FLUX LoRA training script."""


class FluxDecoder:
    """The VAE alone: all that a stored final needs to become a picture."""

    network_class = FluxTransformer2DModel
    """What this family's teachers and students run."""

    def __init__(self, vae: AutoencoderKL, settings: TeacherParams) -> None:
        """Takes a loaded VAE. `settings` gives the resolution."""
        self.vae = vae.requires_grad_(False).eval()
        self.settings = settings
        self._vae_config: Any = vae.config
        self._factor = 2 ** (len(self._vae_config.block_out_channels) - 1)
        _check_resolution(settings, 2 * self._factor)

    def latent_shape(self) -> tuple[int, ...]:
        """(T, C): 2 x 2 patches of the VAE's latent, packed as FluxPipeline packs them."""
        patch = 2 * self._factor
        return self.settings.height // patch * (self.settings.width // patch), 4 * int(self._vae_config.latent_channels)

    def decode(self, x_BTC: Tensor) -> Tensor:
        """Images (B, 3, H, W), float32 in [0, 1]; z / scaling + shift before the VAE, v / 2 + 0.5 after it."""
        packed = x_BTC.to(self.vae.device, self.vae.dtype)
        z = FluxPipeline._unpack_latents(packed, self.settings.height, self.settings.width, self._factor)
        z = z / self._vae_config.scaling_factor + (self._vae_config.shift_factor or 0.0)
        image = self.vae.decode(z, return_dict=False)[0]
        return (image.float() / 2 + 0.5).clamp(0, 1)


class FluxStudent(FluxDecoder):
    """Transformer, VAE and scheduler: all that sampling from stored embeddings needs."""

    def __init__(
        self,
        network: FluxTransformer2DModel,
        vae: AutoencoderKL,
        scheduler: FlowMatchEulerDiscreteScheduler,
        settings: TeacherParams,
    ) -> None:
        """Takes loaded parts. `settings` gives the resolution and the embedded guidance scale."""
        super().__init__(vae, settings)
        self.network: nn.Module = network
        self.scheduler = scheduler
        self._config: Any = network.config
        self._rows = settings.height // (2 * self._factor)
        self._columns = settings.width // (2 * self._factor)
        position = FluxPipeline._prepare_latent_image_ids
        self._image_ids = position(1, self._rows, self._columns, network.device, network.dtype)

    def checkpoint_activations(self) -> None:
        """Recompute activations of the network and of the decoder in the backward pass: less memory, a third slower."""
        cast(Any, self.network).enable_gradient_checkpointing()
        self.vae.enable_gradient_checkpointing()

    def latent_shape(self) -> tuple[int, ...]:
        """(T, C): 2 x 2 patches of the VAE's latent, packed as FluxPipeline packs them."""
        return self._rows * self._columns, int(self._config.in_channels)

    def velocity(self, x_BTC: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        """Velocity eps - x0 (B, T, C), in the dtype of `x_BTC`: one evaluation, at the embedded guidance scale."""
        return self._evaluate(x_BTC, sigma, conditioning, self.settings.guidance_scale)

    def _evaluate(self, x_BTC: Tensor, sigma: float, conditioning: Conditioning, guidance_scale: float) -> Tensor:
        dtype = self._image_ids.dtype
        prompt = conditioning["prompt_embeds"].to(x_BTC.device, dtype)
        # FluxPipeline rounds the timestep (0 to 1000) to the network's dtype before it divides: so do we.
        timestep = torch.full((len(x_BTC),), sigma, device=x_BTC.device) * self.scheduler.config["num_train_timesteps"]
        output = self.network(
            hidden_states=x_BTC.to(dtype),
            timestep=timestep.to(dtype) / 1000,
            guidance=self._guidance(x_BTC, guidance_scale),
            pooled_projections=conditioning["pooled_prompt_embeds"].to(x_BTC.device, dtype),
            encoder_hidden_states=prompt,
            txt_ids=torch.zeros(prompt.shape[1], 3, device=x_BTC.device, dtype=dtype),
            img_ids=self._image_ids,
            return_dict=False,
        )[0]
        return output.to(x_BTC.dtype)

    def _guidance(self, x_BTC: Tensor, scale: float) -> Tensor | None:
        """The embedded guidance scale (B,), float32, for networks that were distilled with it."""
        if not self._config.guidance_embeds:
            return None
        return torch.full((len(x_BTC),), scale, device=x_BTC.device)

    def stock_sigmas(self, steps: int) -> list[float]:
        """The pipeline's own grid: 1 to 1 / steps, shifted once (statically or by resolution), then 0.

        `steps` + 1 values. Raises ConfigError when the scheduler's grid does not fall from 1.0 to 0.0.
        """
        config = self.scheduler.config
        # A grid of the caller's, unless the scheduler is set to make its own: FluxPipeline's rule.
        grid = None if config.get("use_flow_sigmas") else list(np.linspace(1.0, 1 / steps, steps))
        retrieve_timesteps(self.scheduler, steps, "cpu", sigmas=grid, mu=self._shift())
        sigmas = [float(sigma) for sigma in self.scheduler.sigmas]
        if len(sigmas) != steps + 1 or sigmas[0] != 1.0 or sigmas[-1] != 0.0 or sorted(set(sigmas))[::-1] != sigmas:
            raise ConfigError(
                f"the scheduler's grid for {steps} steps is {sigmas}, which does not fall from 1.0 to 0.0: "
                "use a FlowMatchEulerDiscreteScheduler without shift_terminal, karras or inverted sigmas"
            )
        return sigmas

    def _shift(self) -> float:
        """Resolution-dependent shift `mu`, by the number of image tokens."""
        get = self.scheduler.config.get
        names = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        return calculate_shift(self.latent_shape()[0], *(get(name, default) for name, default in names.items()))


class FluxTeacher(FluxStudent):
    """The student's parts, both text encoders and true classifier-free guidance."""

    def __init__(
        self,
        network: FluxTransformer2DModel,
        vae: AutoencoderKL,
        scheduler: FlowMatchEulerDiscreteScheduler,
        settings: TeacherParams,
        encoders: dict[str, Any],
    ) -> None:
        """`encoders`: text_encoder, text_encoder_2, tokenizer and tokenizer_2, loaded. All parts are frozen."""
        super().__init__(network, vae, scheduler, settings)
        network.requires_grad_(False).eval()
        self.evaluations_per_step = 2 if settings.true_cfg_scale > 1 else 1
        embedded = bool(self._config.guidance_embeds) and settings.guidance_scale != 1
        self.is_guided = settings.true_cfg_scale > 1 or embedded
        self._text = FluxText(encoders, settings)
        self._negative: Conditioning | None = None

    def encode(self, prompts: list[str]) -> Conditioning:
        """`FluxText.encode`."""
        return self._text.encode(prompts)

    @torch.no_grad()
    def guided_velocity(self, x_BTC: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        """Velocity (B, T, C) with true CFG against the negative prompt: two evaluations, one where the scale is 1."""
        conditional = self.velocity(x_BTC, sigma, conditioning)
        if self.evaluations_per_step == 1:
            return conditional
        unconditional = self.velocity(x_BTC, sigma, self._negatives(len(x_BTC)))
        return guide(conditional, unconditional, self.settings.true_cfg_scale)

    @torch.no_grad()
    def unguided_velocity(self, x_BTC: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        """Velocity (B, T, C) without true CFG, which is the untrained student; at embedded scale 1 if that is all."""
        embedded = self.settings.guidance_scale if self.evaluations_per_step > 1 else 1.0
        return self._evaluate(x_BTC, sigma, conditioning, embedded)

    def forget_encoders(self) -> None:
        """Encode the negative prompt, if it is asked for in sampling, and let the text encoders go."""
        if self.evaluations_per_step > 1:
            self._negatives(1)
        self._text.forget()

    def _negatives(self, batch: int) -> Conditioning:
        """The negative prompt's embeddings, encoded once, for a batch."""
        if self._negative is None:
            self._negative = self.encode([self.settings.negative_prompt])
        return {name: value.expand(batch, *value.shape[1:]) for name, value in self._negative.items()}


def open_student(
    model: ModelParams,
    teacher: TeacherParams,
    compute: ComputeParams,
    transformer: Path | None = None,
    lora: LoraParams | None = None,
    seed: int = 0,
) -> FluxStudent:
    """Loads transformer, VAE and scheduler of the pipeline at `model.path`, and no text encoder.

    `transformer` names a trained student's folder: its whole network in place of the pipeline's, or adapters for that
    one. The network can be trained; with `lora` only new adapters can, whose first weights follow from `seed`.
    """
    folder = resolve(model.path, model.revision, PIPELINE_PATTERNS)
    student = FluxStudent(*_load_parts(folder, model, compute, transformer), settings=teacher)
    if lora is not None:
        add_lora(student.network, lora, LORA_TARGETS, seed)
    return student


def open_teacher(model: ModelParams, teacher: TeacherParams, compute: ComputeParams) -> FluxTeacher:
    """Loads the whole pipeline at `model.path`, frozen."""
    folder = resolve(model.path, model.revision, PIPELINE_PATTERNS)
    return FluxTeacher(*_load_parts(folder, model, compute, None), teacher, load_encoders(folder, model, compute))


def open_decoder(model: ModelParams, teacher: TeacherParams, compute: ComputeParams) -> FluxDecoder:
    """Loads the VAE; nothing else of the model has to be there."""
    folder = resolve(model.path, model.revision, DECODER_PATTERNS)
    return FluxDecoder(load_component(AutoencoderKL, folder / "vae", model, compute), teacher)


def rebuilt_network(
    model: ModelParams, teacher: TeacherParams, weights: dict[str, Tensor], lora: LoraParams | None
) -> nn.Module:
    """A network with these trained weights (CPU tensors by name), to be saved; `lora`: they are its adapters.

    What trains cannot be saved as it is: it may be sharded, and in float32 where `model.dtype` is not. On the CPU, for
    the device is full.
    """
    network = open_student(model, teacher, ComputeParams(device="cpu"), lora=lora).network
    network.load_state_dict(weights, strict=lora is None)
    return network


def open_outline(model: ModelParams, teacher: TeacherParams) -> FluxStudent:
    """Loads no weights at all: enough for `latent_shape` and `stock_sigmas`."""
    folder = resolve(model.path, model.revision, PIPELINE_PATTERNS)
    network = outline_component(FluxTransformer2DModel, network_folder(folder, model.transformer))
    vae = outline_component(AutoencoderKL, folder / "vae")
    return FluxStudent(network, vae, _scheduler(folder), teacher)


def _scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(existing_component(folder / "scheduler"))
    return cast(FlowMatchEulerDiscreteScheduler, scheduler)


def _load_parts(
    folder: Path, model: ModelParams, compute: ComputeParams, transformer: Path | None
) -> tuple[FluxTransformer2DModel, AutoencoderKL, FlowMatchEulerDiscreteScheduler]:
    network = _load_network(network_folder(folder, model.transformer), model, compute, transformer)
    apply_kernels(network, compute)
    vae = load_component(AutoencoderKL, folder / "vae", model, compute)
    return network, vae, _scheduler(folder)


def _load_network(
    base: Path, model: ModelParams, compute: ComputeParams, student: Path | None
) -> FluxTransformer2DModel:
    """The base, a student's whole network in its place, or the base with a student's adapters."""
    if student is None or not is_lora(student):
        return cast(FluxTransformer2DModel, load_component(FluxTransformer2DModel, student or base, model, compute))
    network = load_component(FluxTransformer2DModel, base, model, compute)
    load_lora(network, student)
    return cast(FluxTransformer2DModel, network)


def apply_kernels(network: FluxTransformer2DModel, compute: ComputeParams) -> None:
    """The recipe's attention and compilation, whatever the environment (DIFFUSERS_ATTN_BACKEND) asks for."""
    with quiet_notices():
        network.set_attention_backend(ATTENTION[compute.attention])
    if compute.compile:
        network.compile()


def _check_resolution(settings: TeacherParams, multiple: int) -> None:
    for name, value in (("height", settings.height), ("width", settings.width)):
        if value % multiple:
            nearest = max(multiple, round(value / multiple) * multiple)
            raise ConfigError(f"teacher.{name} is {value}, no multiple of {multiple} (this VAE's patch): use {nearest}")
