"""The miniature's build: what is split stays apart, and a schedule can be made longer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel

from mini import flow, handover, prompts, rewards
from mini.budget import Budget
from mini.build_rewards import PLANS, sees
from mini.concepts import CONCEPTS, STYLES
from mini.data import place
from mini.vae import edges


def test_every_concept_is_on_one_side_and_there_are_enough():
    splits = Counter(c.split for c in CONCEPTS)
    assert splits["test"] >= 60
    assert splits["validation"] >= 14
    assert sum(splits.values()) >= 160
    assert len({c.name for c in CONCEPTS}) == len({c.label for c in CONCEPTS}) == len(CONCEPTS)


def test_no_drawing_is_two_rewards_and_every_reward_knows_every_concept():
    shares = [plan.share for plan in PLANS.values()]
    for concept in range(len(CONCEPTS)):
        known = [[style for style in range(len(STYLES)) if sees(share, concept, style)] for share in shares]
        assert sorted(style for styles in known for style in styles) == list(range(len(STYLES)))
        assert all(len(styles) == 1 for styles in known)


def test_the_rewards_losers_are_of_different_kinds():
    assert len({plan.kind for plan in PLANS.values()}) == len(PLANS)


def test_phases_follow_each_other_and_the_rate_falls_in_the_last():
    schedule = flow.Schedule(plain=1000, guided=300, decay=200)
    assert [schedule.phase(step) for step in (999, 1000, 1299, 1300, 1499, 1500)] == [
        "plain",
        "guided",
        "guided",
        "decay",
        "decay",
        "done",
    ]
    assert schedule.rate(1299) == flow.PEAK
    assert schedule.rate(1400) == pytest.approx(flow.PEAK / 2)
    assert schedule.rate(1499) == pytest.approx(flow.PEAK / 100)


def test_a_longer_first_phase_changes_no_step_that_was_made():
    short, long = flow.Schedule(1000, 300, 200), flow.Schedule(5000, 300, 200)
    assert [short.rate(step) for step in range(1000)] == [long.rate(step) for step in range(1000)]


def test_noise_levels_come_one_from_each_stratum():
    levels = flow.sigmas(64, torch.Generator().manual_seed(3))
    normal = (torch.logit(levels) - flow.SIGMA_MEAN) / flow.SIGMA_SPREAD
    strata = (torch.special.ndtr(normal) * 64).floor().long()
    assert sorted(strata.tolist()) == list(range(64))


def test_a_budget_of_minutes_is_measured_once(tmp_path: Path):
    trials = []
    budget = Budget(tmp_path, flow.TEACHER, minutes=0.5)
    first = budget.steps("vae", lambda path, steps: trials.append(steps))
    assert budget.steps("vae", lambda path, steps: trials.append(steps)) == first
    assert len(trials) == 2


def test_a_variant_is_a_function_of_drawing_and_index():
    drawing = np.random.default_rng(2).random((128, 128, 4), np.float32)
    once, again, other = (place(drawing, np.random.default_rng([7, index])) for index in (5, 5, 6))
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)
    assert once.shape == (64, 64, 3)


def test_pictures_without_losers_are_no_pairs():
    pictures = np.random.default_rng(4).integers(255, size=(3, 64, 64, 3), dtype=np.uint8)
    drawings = [rewards.Drawing(i, pictures, [i], pictures if i == 1 else None) for i in range(3)]
    lesson = rewards.Lesson(drawings, drawings, torch.arange(24).reshape(3, 8), "rivals")
    pairs = rewards.draw(lesson, drawings, "rivals", np.random.default_rng(6), "cpu")
    assert pairs.valid.tolist() == [False, True, False]
    assert pairs.same.tolist() == torch.eye(3, dtype=torch.bool).tolist()


def test_captions_of_a_thing_take_an_article_where_one_belongs():
    assert prompts.plain_captions("axe")[0] == "an axe"
    assert prompts.plain_captions("scissors")[0] == "scissors"
    assert prompts.plain_captions("compass")[0] == "a compass"


def test_edges_are_differences_both_ways():
    picture = torch.zeros(2, 3, 4, 5)
    assert edges(picture).shape == (2, 3 * (4 * 4 + 3 * 5))


def test_what_is_handed_over_is_taken_up_to_half_a_level_of_each_row(tmp_path: Path):
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7))
    model[0].weight.data[3] *= 40.0
    torch.save({"model": model.state_dict(), "state": {"step": 11, "ema": average(model)}}, tmp_path / "toy.pt")
    handover.hand_over(model, tmp_path / "toy.pt", tmp_path / "handed/toy.safetensors")
    handover.take_up(tmp_path / "new", tmp_path / "handed")
    found = torch.load(tmp_path / "new/toy.pt", weights_only=True)
    assert found["state"] == {"step": 11}
    rows = model[0].weight.detach()
    off = (found["model"]["0.weight"] - rows).abs() / rows.abs().amax(1, keepdim=True)
    assert 0 < off.max() <= 0.5 / 127 + 1e-6
    torch.testing.assert_close(found["model"]["0.bias"], model[0].bias.detach(), atol=1e-3, rtol=1e-3)


def test_a_checkpoint_that_is_there_is_not_replaced_by_what_was_handed_over(tmp_path: Path):
    (tmp_path / "vae.pt").write_bytes(b"mine")
    handover.take_up(tmp_path)
    assert (tmp_path / "vae.pt").read_bytes() == b"mine"


def average(model: torch.nn.Module) -> dict:
    return EMAModel(model.parameters()).state_dict()
