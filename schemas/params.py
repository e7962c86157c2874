"""`params.yaml`, field by field. Unknown keys are errors that name the nearest known one.

Which fields enter a shard set's fingerprint is said in `schemas.recipe`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator

from rats.schemas.blocks import Block, NonNegative, PathText, Positive, Seed
from rats.schemas.errors import ConfigError, brief, nearest
from rats.schemas.evaluate_params import EvaluateParams
from rats.schemas.fused_lora import FusedLora
from rats.schemas.plugins import FAMILIES, REWARDS, check_name
from rats.schemas.train_params import TrainParams
from rats.schemas.validation import validate
from rats.schemas.yaml_values import override, parse, set_at

_VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""What a folder, the shell, `--set` and DVC's templates all take as it is."""

Split = Literal["train", "validation", "test"]


class ModelParams(Block):
    """The teacher: a diffusers folder or hub id; `transformer`: a folder whose network replaces the pipeline's.

    `loras` are fused into that network, one after the other: teacher and untrained student both have them.
    """

    path: PathText
    revision: str | None = None
    transformer: PathText | None = None
    loras: tuple[FusedLora, ...] = ()
    family: str = "flux"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @field_validator("family")
    @classmethod
    def _is_installed(cls, name: str) -> str:
        return check_name(FAMILIES, name)


class PromptSource(Block):
    """A table of prompts: a .parquet, .jsonl, .json, .csv, .tsv or .txt file, a folder of them, or a hub id.

    `files` is a pattern for the files of a folder or hub repository, `split` takes those whose names hold it, `field`
    says where rows lie in a JSON document. The column `column` holds the prompts (a plain list of texts needs none;
    "caption.text" leads into a cell). The column `concept` says what a prompt is about; without it, each prompt is its
    own concept. The distinct prompts are shuffled by `seed`; the first `skip` are left out and the next `count` taken
    (null: all).
    """

    path: PathText
    revision: str | None = None
    files: str | None = None
    split: str | None = None
    field: str | None = None
    column: str = "prompt"
    concept: str | None = None
    count: Positive | None = None
    skip: Annotated[int, Field(ge=0)] = 0
    seed: Seed = 0

    def __str__(self) -> str:
        """Where it is."""
        return self.path


def _kind_of_prompts(value: Any) -> str:
    return "str" if isinstance(value, str) else "PromptSource"


Prompts = Annotated[
    Annotated[PathText, Tag("str")] | Annotated[PromptSource, Tag("PromptSource")], Discriminator(_kind_of_prompts)
]


class PromptParams(Block):
    """The prompts of each split: a .txt file (one prompt a line), a .csv (prompt, concept, kind), or a larger table."""

    train: Prompts
    validation: Prompts | None = None
    test: Prompts | None = None

    @field_validator("train", "validation", "test", mode="before")
    @classmethod
    def _is_a_file(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str | Mapping | PromptSource) or (value is None and info.field_name != "train"):
            return value
        raise ValueError("name a file with a prompt a line, such as prompts/train.txt, or {path: TABLE, column: NAME}")


def evaluations_per_step(true_cfg_scale: float) -> int:
    """Classifier-free guidance evaluates the network twice a step: with the prompt and against the negative one."""
    return 2 if true_cfg_scale > 1 else 1


class TeacherParams(Block):
    """How the teacher samples. `nfe`: numbers of steps of the students, whose sigmas are snapped into its grid.

    `horizons` says which states are kept: those at the students' sigmas, or all. `guidance_scale` is an input of the
    network; `true_cfg_scale` is classifier-free guidance, whatever a pipeline calls the two. A video has `frames`;
    rewards score `scored_frames` of them, evenly spaced, and the mean is the video's score.
    """

    steps: Positive = 50
    nfe: tuple[Positive, ...] = (3, 5, 8)
    horizons: Literal["nfe", "all"] = "nfe"
    guidance_scale: NonNegative = 3.5
    true_cfg_scale: Annotated[float, Field(ge=1)] = 1.0
    negative_prompt: str = ""
    max_sequence_length: Positive = 512
    height: Positive = 512
    width: Positive = 512
    frames: Positive = 1
    scored_frames: Positive = 4
    noises_per_prompt: Positive = 1
    seed: Seed = 0

    @property
    def evaluations(self) -> int:
        """Network evaluations of one teacher sample."""
        return self.steps * evaluations_per_step(self.true_cfg_scale)

    @property
    def seen_frames(self) -> int:
        """How many frames of a sample are scored, judged and shown in reports: 1 for a picture."""
        return min(self.frames, self.scored_frames)


class ComputeParams(Block):
    """Settings that change the last bits of a sample. They are part of the recipe."""

    device: str = "cpu"
    threads: Positive = 1
    micro_batch: Positive = 8
    attention: Literal["sdpa"] = "sdpa"
    compile: bool = False

    @field_validator("device")
    @classmethod
    def _holds_values(cls, device: str) -> str:
        if device.partition(":")[0] == "meta":
            raise ValueError("torch's meta device holds no values: use cpu, or a device that `rats doctor` lists")
        return device


class StoreParams(Block):
    """Where shard sets live, and how many samples a shard holds."""

    path: PathText = "store"
    shard_samples: Positive = 32
    workers: Annotated[int, Field(ge=0)] = 1


class RewardParams(Block):
    """A reward model: `adapter` reads the checkpoint at `path` (a folder, a file or a hub id).

    `backend`: official runs the reward's own package, for comparisons; it must be installed.
    `token_file`: the file that holds the token of the server behind adapter url, where it asks for one.
    """

    name: str
    adapter: str
    path: PathText
    revision: str | None = None
    backend: Literal["transformers", "official"] = "transformers"
    token_file: PathText | None = None

    @field_validator("adapter")
    @classmethod
    def _is_installed(cls, name: str) -> str:
        return check_name(REWARDS, name)

    @field_validator("token_file")
    @classmethod
    def _is_of_a_server(cls, file: str | None, info: ValidationInfo) -> str | None:
        if file is not None and info.data.get("adapter") != "url":
            raise ValueError("only a reward of adapter url has a token: leave token_file out")
        return file


class Params(Block):
    """The whole file. `variants` holds, by name, what a run changes in `train`."""

    model: ModelParams
    prompts: PromptParams
    teacher: TeacherParams = TeacherParams()
    compute: ComputeParams = ComputeParams()
    store: StoreParams = StoreParams()
    rewards: tuple[RewardParams, ...] = ()
    train: TrainParams
    variants: dict[str, dict[str, Any]] = {"rats": {}}
    evaluate: EvaluateParams = EvaluateParams()

    @field_validator("variants", mode="before")
    @classmethod
    def _have_plain_names(cls, variants: Any) -> Any:
        for name in variants if isinstance(variants, Mapping) else ():
            if not isinstance(name, str):
                raise ValueError(f"the name {brief(name)} is no text: quote it")
            if not _VARIANT.fullmatch(name):
                raise ValueError(
                    f"the name {brief(name)} must be letters from a to z, digits, - and _, for it is a folder, a word "
                    "of the shell and a key for --set and DVC"
                )
        return variants


def load_params(path: Path, overrides: Sequence[str] = ()) -> Params:
    """Read and check `params.yaml`; each override is "train.alpha=2", its value in YAML.

    Relative paths in the file stay relative to the current folder.

    Raises:
        ConfigError: a missing or unreadable file, an unknown key (with the nearest), a value out of range.
    """
    return read_params(_read_text(path), str(path), overrides)


def read_params(text: str, where: str, overrides: Sequence[str] = ()) -> Params:
    """The same, of the file's text; `where` begins every error."""
    values = parse(text, where)
    if not isinstance(values, dict):
        raise ConfigError(
            f"{where}: expected keys such as 'model:', got {brief(values)}; `rats init` writes a file to start"
        )
    for change in overrides:
        _refuse_capitals(change)
        override(values, change)
    params = validate(Params, values, where)
    _check_names(params, where)
    return params


def _refuse_capitals(change: str) -> None:
    """Made a block of its own, such a key would be unknown without its place."""
    dotted = change.partition("=")[0].strip()
    block = dotted.partition(".")[0]
    if block not in Params.model_fields and block.lower() in Params.model_fields:
        raise ConfigError(f"--set {dotted}: unknown key, did you mean {dotted.lower()}?")


def with_variant(params: Params, name: str) -> TrainParams:
    """`params.train` with what `params.variants[name]` changes; its keys are dotted ("gate.form").

    Raises:
        ConfigError: an unknown variant, key or value, with the nearest known name.
    """
    if name not in params.variants:
        raise ConfigError(f"unknown variant {brief(name)}{nearest(name, params.variants)}; add it under variants:")
    # without defaults: one that follows another field (lora.alpha) has to follow what the variant changes
    values = params.train.model_dump(exclude_unset=True)
    for dotted, value in params.variants[name].items():
        set_at(values, dotted.split("."), value, f"variants.{name}.{dotted}")
    return validate(TrainParams, values, f"variants.{name}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}; name a file with --params, `rats init` writes one") from None


def _check_names(params: Params, where: str) -> None:
    """Checks names in one block that refer to another block."""
    names = [reward.name for reward in params.rewards]
    if len(set(names)) < len(names):
        raise ConfigError(f"{where}: two rewards have one name in {names}; give each its own")
    if len(set(params.evaluate.variants)) < len(params.evaluate.variants):
        raise ConfigError(f"{where}: evaluate.variants names one twice: {', '.join(params.evaluate.variants)}")
    for name in params.evaluate.variants:
        if name not in params.variants:
            raise ConfigError(f"{where}: evaluate.variants has unknown {brief(name)}{nearest(name, params.variants)}")
    for name in params.variants:
        train = with_variant(params, name)
        for trained in train.reward_weights:
            if names and trained not in names:
                raise ConfigError(f"{where}: train.reward = {brief(trained)} is no reward{nearest(trained, names)}")
        if isinstance(train.alpha, dict) and (without := sorted(set(train.nfe) - set(train.alpha))):
            raise ConfigError(f"{where}: train.alpha has no value for {without[0]} steps; train.nfe visits them")
        if missing := sorted(set(train.nfe) - set(params.teacher.nfe)):
            raise ConfigError(f"{where}: train.nfe has {missing[0]}, teacher.nfe has not; add it there")
