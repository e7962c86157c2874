"""The base class of model families. A new family is one file with a subclass.

Opening, guidance, training, scoring and planning are the same for all and live in `models.py`, `open.py` and
`stages/plan/`. A subclass names the parts of its diffusers pipeline and repeats, in the pipeline's own
arithmetic, how it packs, conditions, evaluates and decodes. It is found by name, through the entry points of
`rats.families`.
Shapes: B samples, T latent tokens, C channels, K frames.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from rats.pipeline import solver
from rats.pipeline.families.fit import Fit, PartConfig
from rats.pipeline.lengths import Window
from rats.pipeline.protocols import Conditioning
from rats.schemas.errors import ConfigError, DataError, brief
from rats.schemas.params import TeacherParams

SAMPLING = ("transformer", "vae", "scheduler")
"""Components of a pipeline that are not needed to encode a prompt."""
EULER = FlowMatchEulerDiscreteScheduler.__name__


DYNAMIC_SHIFT = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
"""What decides a shift that grows with the resolution."""


class Family(ABC):
    """A model family at one resolution. It holds no weights."""

    pipeline_class: ClassVar[Any]
    """The diffusers pipeline. A student must give the same pictures in it as here."""
    network_class: ClassVar[Any]
    vae_class: ClassVar[Any]
    encoders: ClassVar[Mapping[str, Any]]
    """The classes of the text encoders, by component name."""
    tokenizers: ClassVar[Mapping[str, Any]]
    lora_targets: ClassVar[tuple[str, ...]]
    """The modules that `train.lora` adapts, by the ends of their names."""
    depth: ClassVar[tuple[str, ...]]
    """Fields of the network's configuration that hold numbers of blocks, one field for each kind of block."""
    scheduler_fields: ClassVar[tuple[str, ...]] = ("_class_name",)
    """Fields that the scheduler's configuration must have: a default in their place is another sampler."""
    dynamic_fields: ClassVar[tuple[str, ...]] = DYNAMIC_SHIFT
    """Those that it must have in place of `shift` where it has `use_dynamic_shifting`."""
    embeds_guidance: ClassVar[bool] = False
    """Whether networks of this family may take `teacher.guidance_scale` as an input."""
    is_video: ClassVar[bool] = False
    longest_text: ClassVar[int] = 512
    """The largest `max_sequence_length` that the pipeline's call takes."""
    ignored: ClassVar[tuple[str, ...]] = ()
    """Fields of `teacher` that the family does not read (keys of `schemas.recipe.NEUTRAL`): they are in no address."""
    published: ClassVar[tuple[str, ...]] = ()
    """Hub ids of its pipelines, whole. `rats init` finds the family by them without asking the hub."""
    suggested: ClassVar[Mapping[str, Any]] = {}
    """Fields of `teacher` that `rats init` writes into params.yaml, where they differ from the schema's defaults."""

    def __init__(self, settings: TeacherParams, vae: Any) -> None:
        """`vae`: the decoder, with or without weights; only its configuration is read.

        Raises:
            ConfigError: a resolution, a number of frames or a guidance that the family cannot have.
        """
        self.settings = settings
        self.vae_config: Any = vae.config
        _check_settings(self, settings)

    @property
    @abstractmethod
    def pixel_multiple(self) -> int:
        """Height and width must be multiples of this number of pixels."""

    @abstractmethod
    def latent_shape(self) -> tuple[int, int]:
        """(T, C) of one state, without the batch."""

    @abstractmethod
    def conditioning_shapes(self, network_config: Any) -> dict[str, tuple[int, ...]]:
        """Shapes of one prompt's embeddings, by the names that `encode` gives them, without the batch."""

    @abstractmethod
    def encode(self, pipeline: Any, prompt: str) -> Conditioning:
        """One prompt's embeddings (batch 1), padded to `max_sequence_length`, by the pipeline's own encoders."""

    def windows(self, tokenizers: Mapping[str, Any]) -> list[Window]:
        """How each text encoder reads a prompt, by tokenizers that are opened, so that what is cut can be told.

        By default all read `max_sequence_length` tokens of the bare prompt.
        """
        return [self.window(tokenizer) for tokenizer in tokenizers.values()]

    def window(self, tokenizer: Any, **template: Any) -> Window:
        """That of an encoder which reads `max_sequence_length` tokens; `template`: `written` and `before` of it."""
        tokens, most = self.settings.max_sequence_length, self.longest_text
        more = f" (teacher.max_sequence_length may be {most})" if tokens < most else ""
        return Window(tokenizer, tokens, rest=f"the rest is not read{more}", **template)

    @abstractmethod
    def evaluate(
        self, network: Any, x_BTC: Tensor, timestep_B: Tensor, conditioning: Conditioning, guidance_B: Tensor | None
    ) -> Tensor:
        """Velocity eps - x0 (B, T, C): one evaluation of the network, called as the pipeline calls it.

        Args:
            network: Of `network_class`.
            x_BTC: States, in the network's dtype.
            timestep_B: float32 in [0, 1000], before any rounding.
            conditioning: What `encode` gave, on the network's device, floating point in its dtype.
            guidance_B: float32, the embedded scale; None where the network has no such input.
        """

    @abstractmethod
    def to_vae(self, vae: Any, x_BTC: Tensor) -> Tensor:
        """The decoder's input, of clean latents in its dtype: unpacked, with scaling and shift undone."""

    def from_vae(self, decoded: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of the decoder's output; of a video its scored frames (B, K, 3, H, W)."""
        return decoded

    def schedule(self, scheduler_config: Any, steps: int) -> dict[str, Any]:
        """The arguments with which the pipeline calls `scheduler.set_timesteps` for `steps` steps."""
        return {"num_inference_steps": steps}

    def guide(self, cond_BTC: Tensor, uncond_BTC: Tensor) -> Tensor:
        """Classifier-free guidance at `true_cfg_scale`, in the pipeline's order of operations."""
        return solver.guide(cond_BTC, uncond_BTC, self.settings.true_cfg_scale)

    @classmethod  # noqa: B027  (most families have nothing to refuse)
    def check_index(cls, index: Mapping[str, Any]) -> None:
        """Raises ConfigError for a pipeline, by its model_index.json, that would be sampled as another model."""

    @classmethod
    def fits(cls, parts: Mapping[str, PartConfig]) -> Iterator[Fit]:
        """Numbers of the parts' configurations that must be equal, such as widths and channels.

        `parts`: by component name, `transformer`, `vae` and the `encoders`. They are compared before a weight is read.
        """
        yield from ()

    @classmethod  # noqa: B027  (most families have nothing to refuse)
    def check_tokenizers(cls, tokenizers: Mapping[str, Any]) -> None:
        """Raises DataError for what the family's own use of its tokenizers needs and one of them has not."""

    @classmethod
    def scheduler(cls, config: dict[str, Any]) -> FlowMatchEulerDiscreteScheduler:
        """The Euler scheduler of a scheduler_config.json. Raises ConfigError for another one, a different sampler."""
        if (name := config.get("_class_name", EULER)) != EULER:
            raise ConfigError(
                f"the pipeline's scheduler is {name}: rats samples by {EULER}; "
                "put such a scheduler_config.json into its scheduler folder"
            )
        shifted_by = cls.dynamic_fields if config.get("use_dynamic_shifting") else ("shift",)
        stated = (*cls.scheduler_fields, *shifted_by)
        if missing := [field for field in stated if field not in config]:
            raise DataError(
                f"the pipeline's scheduler_config.json lacks {missing[0]}, whose default may be another sampler: "
                "fetch or export it again"
            )
        defaults = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
        flags = [name for name, parameter in defaults.items() if isinstance(parameter.default, bool)]
        if bad := [name for name in flags if not isinstance(config.get(name, False), bool)]:
            raise DataError(
                f"the pipeline's scheduler_config.json says {bad[0]}: {brief(config[bad[0]])}, neither true nor false: "
                "fetch or export it again"
            )
        if config.get("stochastic_sampling"):
            raise ConfigError(f"the pipeline's {name} has stochastic_sampling, which adds noise: set it to false")
        scheduler: FlowMatchEulerDiscreteScheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        return scheduler

    @classmethod
    def comfyui_name(cls, module: str) -> str:
        """The name under which ComfyUI finds a module's adapters, of the module's name in diffusers' network."""
        return f"transformer.{module}"

    @classmethod
    def call(cls, settings: TeacherParams) -> dict[str, int | float]:
        """The arguments of the pipeline's call for a student, besides prompt and steps. They turn off true CFG."""
        sizes = {"height": settings.height, "width": settings.width}
        return {**sizes, "max_sequence_length": settings.max_sequence_length}


def _check_settings(family: Family, settings: TeacherParams) -> None:
    name, multiple = type(family).__name__, family.pixel_multiple
    for side in ("height", "width"):
        if (value := getattr(settings, side)) % multiple:
            near = max(multiple, round(value / multiple) * multiple)
            raise ConfigError(f"teacher.{side} is {value}, no multiple of {multiple} (this VAE's patch): use {near}")
    if (length := settings.max_sequence_length) > family.longest_text:
        raise ConfigError(f"teacher.max_sequence_length is {length}, {name} takes at most {family.longest_text}")
    if settings.frames > 1 and not family.is_video:
        raise ConfigError(f"teacher.frames is {settings.frames}, but {name} draws pictures: leave it out")
    if "guidance_scale" in settings.model_fields_set and not family.embeds_guidance:
        raise ConfigError(
            f"teacher.guidance_scale is guidance as a network's input, which {name} has not: leave it out, and set "
            "teacher.true_cfg_scale to what its pipeline calls guidance_scale"
        )


PATCH = 2
"""Side of a network's patch in latent positions, for every published network of these families."""


CLIP_FIELDS = ("hidden_act",)
"""Of a CLIP text encoder's configuration: CLIP-L and CLIP-G differ in it, and the default is CLIP-L's."""


def clip_window(tokenizer: Any) -> Window:
    """That of a CLIP encoder beside T5. Its positions are learned, so that none of them reads more."""
    length = int(tokenizer.model_max_length)
    return Window(tokenizer, length, "CLIP's", "by design, T5 reads on", is_lost=False)


class PatchFamily(Family):
    """Families whose tokens are patches of a picture. One with another autoencoder sets `vae_class` and `factor`."""

    vae_class = AutoencoderKL

    @property
    def factor(self) -> int:
        """Side of a latent position in pixels."""
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

        `max_shift`: the pipeline's default, for scheduler configurations without one.
        """
        defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": max_shift}
        low, high, at_low, at_high = (scheduler_config.get(name, default) for name, default in defaults.items())
        if low == high:
            raise DataError(
                f"the scheduler's base_image_seq_len and max_image_seq_len are both {brief(low)}, between which no "
                "shift can grow: fetch its scheduler_config.json again"
            )
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
