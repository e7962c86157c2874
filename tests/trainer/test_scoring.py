"""One bad sample costs itself: its score is 0 and not good, and the others keep score and gradient."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from rats.schemas.errors import DataError, RetryLaterError
from rats.trainer.scoring import Scored, score

BATCH = 20
BAD = {3: "nan", 11: "inf"}
ERRORS = {
    "raise": ValueError("no word\nfor it"),
    "memory": MemoryError("full"),
    "device": torch.OutOfMemoryError("full"),
    "ours": DataError("damaged"),
    "later": RetryLaterError("the server is away"),
}


class Toy:
    """A small network whose NaN, where a prompt asks for one, is reached through weights and picture."""

    name, fingerprint = "toy", "f" * 64

    def __init__(self) -> None:
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.batches: list[int] = []

    def score(self, images_B3HW: Tensor, prompts: list[str]) -> Tensor:
        self.batches.append(len(prompts))
        for prompt in prompts:
            if prompt in ERRORS:
                raise ERRORS[prompt]
        factor = torch.tensor([{"nan": float("nan"), "inf": float("inf")}.get(prompt, 1.0) for prompt in prompts])
        return self.network(images_B3HW.double()).flatten() * factor


def pictures() -> Tensor:
    return torch.rand(BATCH, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def prompts_with(bad: dict[int, str]) -> list[str]:
    return [bad.get(i, "a fox") for i in range(BATCH)]


def gradient_of(scored: Scored, images: Tensor) -> Tensor:
    return torch.autograd.grad(scored.scores_B.sum(), images)[0]


@pytest.mark.parametrize("bad", [{3: "nan", 11: "nan"}, {3: "inf", 11: "inf"}, {3: "raise", 11: "raise"}])
def test_a_tenth_that_is_bad_leaves_the_score_and_the_gradient_of_the_others_as_if_it_were_not_there(bad: dict):
    torch.manual_seed(0)
    reward, images = Toy(), pictures().requires_grad_()
    kept = [i for i in range(BATCH) if i not in bad]
    scored = score(reward, images, prompts_with(bad))
    assert scored.good_B.tolist() == [i not in bad for i in range(BATCH)]
    assert scored.scores_B.dtype == torch.float32 and scored.scores_B[[*bad]].tolist() == [0.0, 0.0]
    alone = score(reward, images[kept], ["a fox"] * len(kept))
    torch.testing.assert_close(scored.scores_B[kept], alone.scores_B, rtol=1e-6, atol=0)
    found, wanted = gradient_of(scored, images), gradient_of(alone, images)
    assert found[[*bad]].abs().max() == 0.0 and wanted[kept].abs().max() > 0.0
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-12)


def test_scores_that_are_all_good_are_asked_for_once_and_are_the_rewards_own():
    reward, images = Toy(), pictures()
    scored = score(reward, images, prompts_with({}))
    assert torch.equal(scored.scores_B, reward.network(images).flatten().float()) and scored.good_B.all()
    assert reward.batches == [BATCH]


@pytest.mark.parametrize("word", ["nan", "raise"])
def test_a_batch_without_a_good_sample_is_zeros_without_a_gradient(word: str):
    scored = score(Toy(), pictures().requires_grad_(), prompts_with(dict.fromkeys(range(BATCH), word)))
    assert not scored.good_B.any() and not scored.scores_B.any() and not scored.scores_B.requires_grad


def test_nan_and_exception_in_one_batch_are_both_found():
    scored = score(Toy(), pictures(), prompts_with({0: "raise"} | BAD))
    assert (~scored.good_B).nonzero().flatten().tolist() == [0, *BAD]


@pytest.mark.parametrize("word", ["memory", "device", "ours", "later"])
def test_an_error_that_says_nothing_about_a_picture_is_raised(word: str):
    with pytest.raises(type(ERRORS[word])):
        score(Toy(), pictures(), prompts_with({5: word, 6: "raise"}))
    with pytest.raises(type(ERRORS[word])):
        score(Toy(), pictures()[:2], [word, "a fox"])


class Moody(Toy):
    """Turns the last of any batch bad: no answer is like the one before."""

    def score(self, images_B3HW: Tensor, prompts: list[str]) -> Tensor:
        scores_B = super().score(images_B3HW, prompts)
        return torch.cat([scores_B[:-1], scores_B[-1:] * torch.nan])


def test_a_reward_that_never_answers_twice_alike_ends_with_nothing():
    reward = Moody()
    assert not score(reward, pictures(), prompts_with({})).good_B.any()
    assert reward.batches == [*range(BATCH, 0, -1)]


def test_scores_of_another_shape_are_nobodys():
    class Mean(Toy):
        def score(self, images_B3HW: Tensor, prompts: list[str]) -> Tensor:
            return super().score(images_B3HW, prompts).mean()

    assert not score(Mean(), pictures(), prompts_with({})).good_B.any()


def test_the_log_says_once_why(caplog: pytest.LogCaptureFixture):
    reward = Toy()
    reward.name = "talkative"
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            score(reward, pictures(), prompts_with({2: "raise"}))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "'talkative'" in line and "ValueError: no word for it" in line
