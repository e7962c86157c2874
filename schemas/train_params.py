"""The fields of `params.train`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from rats.schemas.blocks import Block, NonNegative, PathText, Positive, Seed
from rats.schemas.errors import ConfigError


def check_dtype(dtype: str) -> None:
    """Raises ConfigError for a `model.dtype` in which no student can be trained: a rollout for one is lost."""
    if dtype == "float16":
        raise ConfigError("model.dtype is float16, in which gradients underflow: use bfloat16 or float32")


class GateParams(Block):
    """The gate (docs/design.md#gate).

    `tau` is a number in the reward's units. With null it is the standard deviation of R_T in the shards, with "gap"
    that of R_T - R_S of the untrained student. `teacher_reward` says what R_T is: the score of the sample itself, or
    the mean over the noises of its prompt. With `each`, every reward has its own gate and their weighted mean is used;
    without it there is one gate for the weighted sum of the rewards.
    """

    form: Literal["rats", "figure", "constant", "off"] = "rats"
    tau: Annotated[float, Field(gt=0)] | Literal["gap"] | None = None
    value: Annotated[float, Field(ge=0, le=1)] | None = None
    value_from: PathText | None = None
    teacher_reward: Literal["sample", "prompt"] = "sample"
    each: bool = False


class ShapeParams(Block):
    """The shaping loss: the space that it compares in, and the weights of its two terms."""

    space: Literal["state", "velocity", "x0"] = "velocity"
    l2: NonNegative = 1.0
    cos: NonNegative = 1.0


class Ramp(Block):
    """A weight that moves in a straight line from `start` to `end` over the first `over` steps, and stays there."""

    start: NonNegative
    end: NonNegative
    over: Positive

    def at(self, step: int) -> float:
        """The weight of a step, counted from 0."""
        return self.start + (self.end - self.start) * min(1.0, step / self.over)


class LoraParams(Block):
    """Low-rank adapters in place of full fine-tuning (peft).

    `alpha`: their strength is alpha / rank; null is the rank, a strength of 1. `targets: null` takes the family's own
    list.
    """

    rank: Positive = 32
    alpha: float = Field(default=None, gt=0, validate_default=True)
    targets: tuple[str, ...] | None = None

    @field_validator("alpha", mode="before")
    @classmethod
    def _follows_rank(cls, value: Any, info: ValidationInfo) -> Any:
        """The rank where nothing is set. If the rank is no number, that is the error to report."""
        return info.data.get("rank", 1) if value is None else value


class TeacherModeParams(Block):
    """Which teacher the student follows.

    "frozen": the stored one. "refresh": a new generation of shards every `every` steps, rolled out by a moving average
    of the student. "live-ema": that average itself, run in every step. `ema` is the average's decay per step.
    """

    mode: Literal["frozen", "refresh", "live-ema"] = "frozen"
    every: Positive = 100
    ema: Annotated[float, Field(ge=0, le=1)] = 0.99


class BlackBoxParams(Block):
    """For rewards without a gradient, which is estimated at the final latent from antithetic pairs.

    Each of the `pairs` decodes and scores two pictures a sample. `spread` is the perturbation's standard deviation in
    units of the latents.
    """

    pairs: Positive = 4
    spread: Annotated[float, Field(gt=0)] = 0.1


class GuardParams(Block):
    """The validation every `every` steps (null: never), by held-out rewards and the judge.

    With `stop: true`, `patience` alarms in a row end the run. With `keep: best`, the run leaves the student of the step
    at which the panel was best.
    """

    every: Positive | None = None
    prompts: Positive = 32
    stop: bool = False
    patience: Positive = 2
    keep: Literal["last", "best"] = "last"


class TrainParams(Block):
    """The training. `reward`: one name, or names with weights; each is then divided by its spread in the shards.

    After the warm-up the rate stays, or falls to 0 at step `lr_steps` (null: `steps`). `clip_norm`: the largest norm of
    a step's gradient; null clips none. `update_length`: the saved student has moved this share of the way from the base
    to what was trained; `rats stage evaluate --split validation --update-lengths` finds one. `log_gradients_every`:
    about how many steps lie between two whose terms' gradients are logged apart; each number of steps in `nfe` has its
    turn. `save_dtype`: the student's weights are saved as they were trained, in float32, or rounded to `model.dtype`.
    """

    nfe: tuple[Positive, ...] = (3, 5, 8)
    steps: Positive = 400
    batch: Positive = 32
    micro_batch: Positive = 32
    lr: Annotated[float, Field(gt=0)] = 1e-5
    warmup: Annotated[int, Field(ge=0)] = 10
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    lr_steps: Positive | None = Field(default=None, validate_default=True)
    alpha: NonNegative | dict[int, NonNegative] | Ramp = 1.0
    reward: str | dict[str, Annotated[float, Field(gt=0)]]
    reward_weight: NonNegative = 1.0
    margin: float | None = None
    last_k: Positive | None = None
    augment: Annotated[float, Field(ge=0, le=1)] = 1.0
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    update_length: Annotated[float, Field(gt=0, le=1)] = 1.0
    save_dtype: Literal["float32", "model"] = "float32"
    seed: Seed = 0
    checkpoint_every: Positive = 50
    checkpoints_total_limit: Positive = 2
    log_gradients_every: Positive = 10
    gate: GateParams = GateParams()
    shape: ShapeParams = ShapeParams()
    teacher: TeacherModeParams = TeacherModeParams()
    lora: LoraParams | None = None
    black_box: BlackBoxParams = BlackBoxParams()
    mixed_precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    fsdp: bool = False
    loader_workers: Annotated[int, Field(ge=0)] = 0
    max_bad: Annotated[float, Field(ge=0, le=1)] = 0.25
    guard: GuardParams = GuardParams()
    samples_every: Positive | None = None
    trackers: tuple[Literal["tensorboard", "trackio", "wandb", "dvclive"], ...] = ()

    @field_validator("lr_steps", mode="before")
    @classmethod
    def _follows_steps(cls, value: Any, info: ValidationInfo) -> Any:
        """`steps` for a rate that falls and says nothing else. If that is no number, that is the error to report."""
        falls = info.data.get("lr_schedule", "constant") != "constant"
        return info.data.get("steps", 1) if falls and value is None else value

    @field_validator("lr_steps")
    @classmethod
    def _is_long_enough(cls, value: int | None, info: ValidationInfo) -> int | None:
        """A rate of 0 trains nothing."""
        steps, warmup = info.data.get("steps", 1), info.data.get("warmup", 0)
        if value is not None and value < steps:
            raise ValueError(f"the rate is 0 from there on, and train.steps is {steps}: at least that many are meant")
        if value is not None and value <= warmup:
            raise ValueError(f"the warm-up alone takes train.warmup = {warmup} steps: more are meant")
        return value

    @property
    def reward_weights(self) -> dict[str, float]:
        """The weight of each reward that trains, by name."""
        return {self.reward: 1.0} if isinstance(self.reward, str) else self.reward

    @property
    def reward_names(self) -> str:
        """What trains, for a reader: "hpsv2 + pickscore"."""
        return " + ".join(self.reward_weights)

    def alpha_at(self, nfe: int, step: int) -> float:
        """The weight of the shaping loss at a step, counted from 0, of `nfe` evaluations."""
        if isinstance(self.alpha, Ramp):
            return self.alpha.at(step)
        return self.alpha[nfe] if isinstance(self.alpha, dict) else self.alpha

    @property
    def grid(self) -> tuple[int, ...]:
        """The student's numbers of steps, each once. `nfe` may name one several times, to train it more often."""
        return tuple(sorted(set(self.nfe)))
