"""The recipe: everything that decides a sample's bytes. Its hash is the shard set's address.

Every field of `params.yaml` is on one of two lists below; a test flips each and proves which.
See docs/design.md#the-recipe.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from rats.schemas.canonical import canonical_json, sha256
from rats.schemas.manifest import FORMAT_VERSION
from rats.schemas.params import Params, Positive, evaluations_per_step
from rats.schemas.record import Record

SOLVER_VERSION = 1
"""Increased when the golden-latents test (tests/stages/rollout) shows that the same recipe gives other latents."""

LATENT_DTYPE: Final = "float16"
"""How states and predictions are stored. At equal size its rounding is 8 times finer than bfloat16's."""

IN_RECIPE = (
    "model.family",
    "model.dtype",
    "teacher.steps",
    "teacher.nfe",
    "teacher.horizons",
    "teacher.guidance_scale",
    "teacher.true_cfg_scale",
    "teacher.negative_prompt",
    "teacher.max_sequence_length",
    "teacher.height",
    "teacher.width",
    "teacher.frames",
    "teacher.seed",
    "compute.device",
    "compute.threads",
    "compute.micro_batch",
    "compute.attention",
    "compute.compile",
)
"""Fields whose change gives a new address. `steps`, `nfe` and `horizons` enter as the snapped sigmas
and the sigmas that are kept. Those of `NEUTRAL` enter where they have an effect."""

NEUTRAL: Final[Mapping[str, Any]] = {"guidance_scale": 3.5, "negative_prompt": "", "max_sequence_length": 512}
"""What stands in a recipe for a setting of the teacher that has no effect, whatever its value is. They were the
schema's defaults when the first sets were addressed, and are written out here so that those keep their addresses."""

NOT_IN_RECIPE = (
    "model.path",
    "model.revision",
    "model.transformer",
    "model.loras",
    "prompts.train",
    "prompts.validation",
    "prompts.test",
    "teacher.noises_per_prompt",
    "teacher.scored_frames",
    "store.path",
    "store.shard_samples",
    "store.workers",
    "rewards",
    "train",
    "variants",
    "evaluate",
)
"""Fields that change no byte of a sample. A block's name stands for all its fields. The weights behind `model.path`,
`model.revision` and `model.transformer` enter by their hashes, and so do the files and weights of `model.loras`.
Columns of scores have addresses of their own, which depend on `teacher.scored_frames`."""

DECODER = "vae"
"""The one component on which no trajectory depends. Its hash is part of the scores' addresses instead."""


class ComputeRecipe(Record):
    """What changes the last bits of a sample. `device` is a kind ("cuda", not "cuda:1")."""

    device: str
    threads: int
    micro_batch: int
    attention: str
    compile: bool


class Recipe(Record):
    """`weights` by component name, `sigmas` the snapped teacher grid, `horizons` the rows that are kept.

    `latent_shape` is that of one state, (T, C). It depends on the decoder, whose weights are not in the recipe.
    """

    format_version: Literal[1] = FORMAT_VERSION
    solver_version: int = SOLVER_VERSION
    family: str
    weights: dict[str, str]
    scheduler: str
    sigmas: Annotated[tuple[float, ...], Field(min_length=2)]
    horizons: Annotated[tuple[float, ...], Field(min_length=2)]
    latent_shape: Annotated[tuple[Positive, ...], Field(min_length=1)]
    guidance_scale: float
    true_cfg_scale: float
    negative_prompt: str
    max_sequence_length: int
    height: int
    width: int
    frames: int = 1
    dtype: str
    latent_dtype: Literal["float16"] = LATENT_DTYPE
    seed: int
    compute: ComputeRecipe

    @property
    def evaluations(self) -> int:
        """Network evaluations of one sample."""
        return (len(self.sigmas) - 1) * evaluations_per_step(self.true_cfg_scale)

    def effective(self, ignored: Collection[str] = ()) -> Recipe:
        """The same recipe, in which settings that change no byte have the value of `NEUTRAL`.

        `ignored`: those that this model does not read. Without classifier-free guidance there is no negative prompt.
        """
        unread = ("negative_prompt",) if evaluations_per_step(self.true_cfg_scale) == 1 else ()
        return self.model_copy(update={name: NEUTRAL[name] for name in (*ignored, *unread)})

    @model_serializer(mode="wrap")
    def _without_one_frame(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out `frames` where it is 1: recipes of pictures had no such field, and must keep their addresses."""
        values: dict[str, Any] = handler(self)
        return {name: value for name, value in values.items() if name != "frames" or value != 1}


def fingerprint(recipe: Recipe) -> str:
    """sha256 of the recipe's canonical JSON, which is `recipe.json` byte for byte."""
    return sha256(canonical_json(recipe.model_dump(mode="json")))


def make_recipe(
    params: Params,
    weights: Mapping[str, str],
    scheduler: str,
    sigmas: Sequence[float],
    horizons: Sequence[float],
    latent_shape: Sequence[int],
    ignored: Collection[str] = (),
) -> Recipe:
    """The recipe of `params` for hashed weights and read sigmas.

    Args:
        params: The whole configuration.
        weights: Hash by component (transformer, text encoders, tokenizers); the VAE is left out.
        scheduler: Hash of the scheduler's configuration.
        sigmas: The teacher's grid, snapped to the students' (`schemas.horizons.snap`).
        horizons: The sigmas whose states are kept (`schemas.horizons.aligned` gives both).
        latent_shape: Of one state, by the family at this resolution.
        ignored: Settings of the teacher that this model does not read (`FamilyStudent.ignored`).
    """
    teacher = params.teacher.model_dump(exclude={"steps", "nfe", "horizons", "noises_per_prompt", "scored_frames"})
    compute = params.compute.model_dump() | {"device": params.compute.device.split(":")[0]}
    recipe = Recipe(
        **teacher,
        family=params.model.family,
        dtype=params.model.dtype,
        weights={name: value for name, value in weights.items() if name != DECODER},
        scheduler=scheduler,
        sigmas=tuple(sigmas),
        horizons=tuple(horizons),
        latent_shape=tuple(latent_shape),
        compute=ComputeRecipe(**compute),
    )
    return recipe.effective(ignored)
