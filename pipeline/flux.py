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
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from rats.pipeline.loading import quiet_imports, quiet_loading, quiet_notices, torch_device, torch_dtype
from rats.pipeline.protocols import Conditioning
from rats.pipeline.solver import guide
from rats.pipeline.weights import DECODER_PATTERNS, PIPELINE_PATTERNS, resolve
from rats.schemas.errors import ConfigError, DataError
from rats.schemas.params import ComputeParams, ModelParams, TeacherParams

with quiet_imports():  # the pipeline's module asks for torchvision, which we do without
    from diffusers import FluxPipeline
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

ATTENTION = {"sdpa": "native"}
"""`compute.attention` in diffusers' words."""


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
        self._pipeline = FluxPipeline(scheduler=scheduler, vae=vae, transformer=network, **encoders)
        self._pipeline.set_progress_bar_config(disable=True)
        self._negative: Conditioning | None = None

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """`prompt_embeds` (B, max_sequence_length, D) of T5 and `pooled_prompt_embeds` (B, P) of CLIP.

        One prompt at a time, so that a prompt's embedding has the same bits in any company.
        """
        pairs = [self._encode(prompt) for prompt in prompts]
        sequences, pooled = zip(*pairs, strict=True)
        return {"prompt_embeds": torch.cat(sequences), "pooled_prompt_embeds": torch.cat(pooled)}

    def _encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        length, device = self.settings.max_sequence_length, self._image_ids.device
        sequence, pooled, _ = self._pipeline.encode_prompt(prompt, max_sequence_length=length, device=device)
        return cast(Tensor, sequence), cast(Tensor, pooled)

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

    def _negatives(self, batch: int) -> Conditioning:
        """The negative prompt's embeddings, encoded once, for a batch."""
        if self._negative is None:
            self._negative = self.encode([self.settings.negative_prompt])
        return {name: value.expand(batch, *value.shape[1:]) for name, value in self._negative.items()}


def open_student(
    model: ModelParams, teacher: TeacherParams, compute: ComputeParams, transformer: Path | None = None
) -> FluxStudent:
    """Loads transformer, VAE and scheduler of the pipeline at `model.path`, and no text encoder.

    `transformer` names a folder to take the network from instead: a trained student's. The network can be trained.
    """
    folder = resolve(model.path, model.revision, PIPELINE_PATTERNS)
    return FluxStudent(*_load_parts(folder, model, compute, transformer), settings=teacher)


def open_teacher(model: ModelParams, teacher: TeacherParams, compute: ComputeParams) -> FluxTeacher:
    """Loads the whole pipeline at `model.path`, frozen."""
    folder = resolve(model.path, model.revision, PIPELINE_PATTERNS)
    network, vae, scheduler = _load_parts(folder, model, compute, None)
    classes = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
    encoders: dict[str, Any] = {name: _load(cls, folder / name, model, compute) for name, cls in classes.items()}
    encoders["tokenizer"] = CLIPTokenizer.from_pretrained(_existing(folder / "tokenizer"))
    encoders["tokenizer_2"] = T5TokenizerFast.from_pretrained(_existing(folder / "tokenizer_2"))
    return FluxTeacher(network, vae, scheduler, teacher, encoders)


def open_decoder(model: ModelParams, teacher: TeacherParams, compute: ComputeParams) -> FluxDecoder:
    """Loads the VAE; nothing else of the model has to be there."""
    folder = resolve(model.path, model.revision, DECODER_PATTERNS)
    return FluxDecoder(_load(AutoencoderKL, folder / "vae", model, compute), teacher)


def open_outline(model: ModelParams, teacher: TeacherParams) -> FluxStudent:
    """Loads no weights at all: enough for `latent_shape` and `stock_sigmas`."""
    folder = resolve(model.path, model.revision, PIPELINE_PATTERNS)
    network, vae = _outline(FluxTransformer2DModel, folder / "transformer"), _outline(AutoencoderKL, folder / "vae")
    return FluxStudent(network, vae, _scheduler(folder), teacher)


def _outline(cls: Any, folder: Path) -> Any:
    """A module of `cls` whose parameters have shapes and no values."""
    with torch.device("meta"):
        return cls.from_config(cls.load_config(_existing(folder)))


def _scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(_existing(folder / "scheduler"))
    return cast(FlowMatchEulerDiscreteScheduler, scheduler)


def _load_parts(
    folder: Path, model: ModelParams, compute: ComputeParams, transformer: Path | None
) -> tuple[FluxTransformer2DModel, AutoencoderKL, FlowMatchEulerDiscreteScheduler]:
    network = _load(FluxTransformer2DModel, transformer or folder / "transformer", model, compute)
    apply_kernels(network, compute)
    vae = _load(AutoencoderKL, folder / "vae", model, compute)
    return network, vae, _scheduler(folder)


def apply_kernels(network: FluxTransformer2DModel, compute: ComputeParams) -> None:
    """The recipe's attention and compilation, whatever the environment (DIFFUSERS_ATTN_BACKEND) asks for."""
    with quiet_notices():
        network.set_attention_backend(ATTENTION[compute.attention])
    if compute.compile:
        network.compile()


def _load(cls: Any, folder: Path, model: ModelParams, compute: ComputeParams) -> Any:
    """A module in eval mode of `cls` from a component's folder; DataError when it does not load."""
    settings = {"torch_dtype": torch_dtype(model.dtype), "output_loading_info": True}
    try:
        with quiet_loading():
            module, info = cls.from_pretrained(_existing(folder), **settings)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{folder} does not load as {cls.__name__} ({reason}): fetch or export it again") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise DataError(f"{folder} lacks {len(missing)} weights, {missing[0]} first: fetch or export it again")
    return module.to(torch_device(compute.device)).eval()


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}: model.path must name a whole FLUX pipeline in diffusers' format")
    return folder


def _check_resolution(settings: TeacherParams, multiple: int) -> None:
    for name, value in (("height", settings.height), ("width", settings.width)):
        if value % multiple:
            nearest = max(multiple, round(value / multiple) * multiple)
            raise ConfigError(f"teacher.{name} is {value}, no multiple of {multiple} (this VAE's patch): use {nearest}")
