"""The seam for few-step methods: a second one and a third one, of the same signature, in the same loop."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rats.schemas.errors import DataError
from rats.trainer.checkpoint import read_checkpoint
from rats.trainer.data import Batch
from rats.trainer.methods import METHODS
from rats.trainer.objective import Losses, Moment, Objective
from rats.trainer.optim import Learner
from rats.trainer.randomness import generator
from rats.trainer.run import Run
from tests.support import toy


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def train_by(method, folder: Path, resume: bool = False, student=None, follower=None, **changes) -> Run:
    """A toy run by this method; `follower` is what moves beside the student, such as the method itself."""
    given = toy.objective(toy.settings(**changes), student, method=method)
    return toy.train_on(given, toy.run_of(given, folder, resume, lambda learner: follower))


def same_weights(one: Run, other: Run) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.learner.parameters, other.learner.parameters, strict=True))


def chords(objective: Objective, batch: Batch, moment: Moment) -> Losses:
    """Window regression (PeRFlow): the velocity of a stored chord, asked for at a point on it; no path is sampled."""
    draw = generator(0, moment.step, "window")  # a function of the step, so that micro-batches share it
    row = int(torch.randint(len(batch.x_HBTC) - 1, (), generator=draw))
    share = float(torch.rand((), generator=draw))
    sigma, after = objective.settings.horizons[row : row + 2]
    start_BTC, end_BTC = batch.x_HBTC[row].float(), batch.x_HBTC[row + 1].float()
    target_BTC = (end_BTC - start_BTC) / (after - sigma)
    at = sigma + share * (after - sigma)
    with objective.ranks.autocast():
        v_BTC = objective.student.velocity(start_BTC + (at - sigma) * target_BTC, at, batch.conditioning)
    shape_B = (v_BTC - target_BTC).square().flatten(1).mean(1)
    ones_B = torch.ones_like(shape_B)
    return Losses(0 * ones_B, shape_B, 2.5, ones_B, ones_B.bool(), {"loss_shape": shape_B})


class Counted(toy.ToyStudent):
    """Counts its network's evaluations."""

    asked = 0

    def velocity(self, x_BTC, sigma, conditioning):
        self.asked += 1
        return super().velocity(x_BTC, sigma, conditioning)


def test_a_method_of_another_file_trains_in_the_same_loop_and_pays_for_what_it_samples(tmp_path):
    student = Counted()
    run = train_by(chords, tmp_path, student=student, steps=80, micro_batch=4, checkpoint_every=80)
    losses = [float(row["loss_shape"]) for row in rows(tmp_path)]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20]) and student.asked == 80
    row = rows(tmp_path)[3]
    assert float(row["loss_total"]) == pytest.approx(2.5 * float(row["loss_shape"]), rel=1e-6)
    assert (row["alpha"], row["gate_mean"], row["grad_reward"], row["reward_student"]) == ("2.5", "1.0", "0.0", "")
    assert run.state.gate_mean == 1.0 and run.state.position == 320


def test_its_micro_batches_and_its_resume_change_nothing_either(tmp_path):
    whole = train_by(chords, tmp_path / "whole", micro_batch=4)
    parts = train_by(chords, tmp_path / "parts", micro_batch=3)
    for p, q in zip(whole.learner.parameters, parts.learner.parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    train_by(chords, tmp_path / "cut", steps=4)
    assert same_weights(whole, train_by(chords, tmp_path / "cut", resume=True))
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")


def test_a_methods_loss_that_is_not_finite_is_refused_with_the_samples_before_a_weight_changes(tmp_path):
    def broken(objective: Objective, batch: Batch, moment: Moment) -> Losses:
        found = chords(objective, batch, moment)
        bad_B = torch.tensor([key == "key-0002" for key in batch.keys])
        shape_B = torch.where(bad_B, torch.nan, found.shape_B)
        return Losses(found.reward_B, shape_B, 2.5, found.gate_B, found.good_B, {})

    with pytest.raises(DataError, match="step 0: the shaping loss is not finite for key-0002;.*no weight was changed"):
        train_by(broken, tmp_path, micro_batch=2)


class Critic:
    """Climbs a linear judge of finals that is taught, beside the student, to tell the teacher's from the student's.

    So it has weights, gradients and an optimizer of its own, and is what moves beside the student
    (`run.MovingTeacher`) as well.
    """

    in_loop = False

    def __init__(self) -> None:
        self.network = nn.Linear(toy.TOKENS * toy.CHANNELS, 1)
        nn.init.zeros_(self.network.weight)
        nn.init.zeros_(self.network.bias)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.3, momentum=0.7)

    def __call__(self, objective: Objective, batch: Batch, moment: Moment) -> Losses:
        trajectory = objective.sample(batch, moment.nfe)
        ours_BD, theirs_BD = trajectory.final.flatten(1), batch.x_HBTC[-1].float().flatten(1)
        own = F.relu(1 - self.network(theirs_BD)) + F.relu(1 + self.network(ours_BD.detach()))
        (own.sum() / objective.settings.train.batch).backward()
        # detached: the student's loss shall leave no gradient in the critic
        climbed_B = F.linear(ours_BD, self.network.weight.detach(), self.network.bias.detach()).squeeze(1)
        ones_B = torch.ones_like(climbed_B)
        return Losses(-climbed_B, 0 * ones_B, 0.0, ones_B, ones_B.bool(), {"reward_student": climbed_B})

    def trace(self, batch: Batch) -> Batch:
        return batch

    def follow(self, learner: Learner) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        named = dict(self.network.named_parameters())
        moved = {f"{name}.momentum": self.optimizer.state[p]["momentum_buffer"] for name, p in named.items()}
        return {name: value.detach().clone() for name, value in {**named, **moved}.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.network.load_state_dict({name: tensors[name] for name in self.network.state_dict()})
        for name, p in self.network.named_parameters():
            self.optimizer.state[p]["momentum_buffer"] = tensors[f"{name}.momentum"]


def by_critic(folder: Path, resume: bool = False, **changes) -> tuple[Run, Critic]:
    critic = Critic()
    return train_by(critic, folder, resume, follower=critic, **changes), critic


def test_a_method_with_a_network_and_an_optimizer_of_its_own_goes_on_to_the_last_bit(tmp_path):
    whole, critic = by_critic(tmp_path / "whole")
    by_critic(tmp_path / "cut", steps=4)
    again, resumed = by_critic(tmp_path / "cut", resume=True)
    assert same_weights(whole, again) and rows(tmp_path / "whole") == rows(tmp_path / "cut")
    assert critic.network.weight.any() and all(
        torch.equal(value, resumed.tensors()[name]) for name, value in critic.tensors().items()
    )
    saved = read_checkpoint(tmp_path / "cut" / "checkpoints" / "000006").tensors()["teacher"]
    assert torch.equal(saved["weight.momentum"], critic.tensors()["weight.momentum"])
    assert float(rows(tmp_path / "whole")[3]["grad_reward"]) > 0


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_of_the_registry_trains_and_goes_on_to_the_last_bit(tmp_path, name):
    whole = train_by(METHODS[name], tmp_path / "whole", augment=0.5)
    train_by(METHODS[name], tmp_path / "cut", augment=0.5, steps=4)
    again = train_by(METHODS[name], tmp_path / "cut", resume=True, augment=0.5)
    assert same_weights(whole, again) and rows(tmp_path / "whole") == rows(tmp_path / "cut")
