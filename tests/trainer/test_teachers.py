"""Teachers that move: the average that follows a student, and the teacher that runs in the loop."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rats.pipeline.families.open import Model
from rats.pipeline.protocols import Conditioning
from rats.schemas.errors import DataError
from rats.schemas.params import ComputeParams, ModelParams, TeacherParams
from rats.schemas.train_params import LoraParams
from rats.trainer.data import Batch, collate
from rats.trainer.objective import Settings
from rats.trainer.optim import Learner
from rats.trainer.run import Run
from rats.trainer.teachers import LiveTeacher, WeightAverage
from tests.support import tiny, toy

FINE = sorted({*toy.HORIZONS, *toy.grid(60)}, reverse=True)
CPU = ComputeParams()


class ToyTeacher(toy.ToyStudent):
    """What `toy.stored` was sampled from, as a `Teacher`."""

    def guided_velocity(self, x_BTC: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        return self.velocity(x_BTC, sigma, conditioning)


def live_teacher(learner: Learner, decay: float, reward: toy.ToyReward | None = None, seed: int = 7) -> LiveTeacher:
    teacher = ToyTeacher(seed)
    return LiveTeacher(teacher, learner, decay, (FINE, toy.HORIZONS), teacher.decode, [reward or toy.ToyReward()])


def batch_of(count: int = 4) -> Batch:
    return collate([toy.stored(i) for i in range(count)], torch.device("cpu"))


def live_run(folder: Path, chosen: Settings, resume: bool = False, **how: object) -> Run:
    """A toy run with a live teacher, trained to its end."""
    given = toy.objective(chosen)
    follower = partial(live_teacher, **{"decay": 0.9, **how})  # type: ignore[arg-type]
    return toy.train_on(given, toy.run_of(given, folder, resume, follower))


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_live_teacher_that_never_moves_walks_the_stored_path() -> None:
    learner = Learner(toy.ToyStudent().network, toy.settings().train)
    live, stored = live_teacher(learner, decay=1.0), batch_of()
    live.follow(learner)
    made = live.trace(stored)
    # it starts from the noise as stored, in float16: a rollout starts before that rounding
    torch.testing.assert_close(made.x_HBTC, stored.x_HBTC, atol=4e-3, rtol=0)
    torch.testing.assert_close(made.x0_HBTC, stored.x0_HBTC, atol=4e-3, rtol=0)
    torch.testing.assert_close(made.r_teacher_RB, stored.r_teacher_RB, atol=1e-3, rtol=0)
    assert made.x_HBTC.dtype == stored.x_HBTC.dtype and made.keys == stored.keys


def test_the_average_moves_towards_the_student_by_its_decay_once_an_update() -> None:
    learner = Learner(toy.ToyStudent().network, toy.settings().train)
    average, start = WeightAverage(learner, 0.75), learner.named["w"].detach().clone()
    for _ in range(2):
        with torch.no_grad():
            learner.named["w"].add_(1.0)
        average.follow(learner)
    # start + 0.25 * 1, then a quarter of the way from there to start + 2
    torch.testing.assert_close(average.weights["w"], start + 0.25 + 0.25 * (2 - 0.25))


def test_a_run_with_a_live_teacher_goes_on_to_the_last_bit(tmp_path: Path) -> None:
    whole = live_run(tmp_path / "whole", toy.settings())
    live_run(tmp_path / "cut", toy.settings(steps=4))
    again = live_run(tmp_path / "cut", toy.settings(), resume=True)
    assert isinstance(whole.moving_teacher, LiveTeacher) and isinstance(again.moving_teacher, LiveTeacher)
    for ours, theirs in (
        (whole.learner.named, again.learner.named),
        (whole.moving_teacher.weights, again.moving_teacher.weights),
    ):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_live_teachers_trajectories_are_always_of_this_step(tmp_path: Path) -> None:
    live_run(tmp_path, toy.settings(steps=3))
    assert [row["teacher_age"] for row in rows(tmp_path)] == ["0", "0", "0"]


def test_an_average_that_is_only_kept_leaves_the_stored_batch_and_its_age(tmp_path: Path) -> None:
    given = toy.objective(toy.settings(steps=5))
    run = toy.run_of(given, tmp_path, follower=lambda learner: WeightAverage(learner, 0.9))
    assert run.moving_teacher.trace(batch := batch_of()) is batch
    with run.with_callbacks(lambda run, row: run.follow_generation(2) if row["step"] == 1 else None):
        toy.train_on(given, run)
    assert [row["teacher_age"] for row in rows(tmp_path)] == ["0", "1", "0", "1", "2"]
    plain = toy.train_in(tmp_path / "plain", toy.settings(steps=5))
    assert all(torch.equal(plain.learner.named[name], p) for name, p in run.learner.named.items())


def test_a_sample_that_a_live_teacher_gets_no_score_for_costs_itself_only(tmp_path: Path) -> None:
    run = live_run(tmp_path, toy.settings(steps=1, max_bad=1.0), reward=toy.ToyReward(bad={0: float("nan")}))
    assert run.state.bad == 1 and rows(tmp_path)[0]["bad"] == "1"
    assert all(torch.isfinite(p).all() for p in run.learner.parameters)


def test_another_networks_teacher_is_refused() -> None:
    learner = Learner(toy.ToyStudent().network, toy.settings().train)
    with pytest.raises(DataError, match="belongs to another network"):
        WeightAverage(learner, 0.9).restore({})


def settings_of(true_cfg_scale: float) -> TeacherParams:
    size = {"height": tiny.SIZE, "width": tiny.SIZE, "max_sequence_length": tiny.LENGTH}
    return TeacherParams(steps=6, nfe=(2, 3), true_cfg_scale=true_cfg_scale, negative_prompt="a red fox", **size)


@pytest.mark.parametrize("true_cfg_scale", [1.0, 3.0])
def test_a_flux_in_the_loop_is_guided_as_the_teacher_is_and_holds_no_text_encoder(
    models: Path, true_cfg_scale: float
) -> None:
    model, settings = ModelParams(path=str(models / "flux")), settings_of(true_cfg_scale)
    student, teacher = Model(model, settings, CPU).open_student(), Model(model, settings, CPU).open_teacher()
    live = Model(model, settings, CPU).open_live_teacher(student)
    x_BTC, conditioning = torch.randn(2, *teacher.latent_shape()), teacher.encode(list(tiny.PROMPTS[:2]))
    wanted = teacher.guided_velocity(x_BTC, 0.7, conditioning)
    assert torch.equal(live.guided_velocity(x_BTC, 0.7, conditioning), wanted)
    assert live.vae is student.vae and live.network is not student.network
    assert live._text is None
    assert all(p.requires_grad for p in student.network.parameters()) and not any(
        p.requires_grad for p in live.network.parameters()
    )


def test_beside_a_lora_student_only_the_adapters_are_averaged(models: Path) -> None:
    model, settings = ModelParams(path=str(models / "flux")), settings_of(1.0)
    student = Model(model, settings, CPU).open_student(lora=LoraParams(rank=2))
    learner = Learner(student.network, toy.settings().train)
    teacher = Model(model, settings, CPU).open_live_teacher(student)
    live = LiveTeacher(teacher, learner, 0.5, ([1.0, 0.5, 0.0], [1.0, 0.0]), student.decode, [])
    assert live.weights and all("lora" in name for name in live.weights)
    with torch.no_grad():
        for p in learner.parameters:
            p.add_(1.0)
    before = {name: tensor.clone() for name, tensor in live.tensors().items()}
    live.follow(learner)
    assert all(torch.equal(live.tensors()[name], before[name].lerp(p, 0.5)) for name, p in learner.named.items())
