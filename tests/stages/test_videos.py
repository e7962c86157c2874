"""Videos where pictures go: asked about, augmented, judged, shown, scored, trained on and drawn, frame by frame."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rats.pipeline.rewards.base import call_reward
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import read_sample
from rats.stages.generate import encode_videos
from rats.stages.measure.networks import EfficientNetLite0
from rats.stages.measure.pictures import to_picture
from rats.stages.rollout.scorer import reward_hashes, score_images
from rats.trainer.augment import RandomDraws, augment
from rats.trainer.scoring import score
from tests.support.project import rats, write_project
from tests.support.tiny_wan import FRAMES, write_wan

VIDEO = {"height": 16, "width": 16, "frames": FRAMES, "scored_frames": 2, "steps": 3, "nfe": [2], "true_cfg_scale": 1.0}


class Bright:
    """Scores a picture by its mean, less its prompt's length; a red first pixel of 1 makes it raise."""

    name = fingerprint = "bright"

    def score(self, images_B3HW: Tensor, prompts: list[str]) -> Tensor:
        assert images_B3HW.ndim == 4 and len(images_B3HW) == len(prompts)
        if (images_B3HW[:, 0, 0, 0] == 1).any():
            raise ValueError("red")
        return images_B3HW.mean((1, 2, 3)) - images_B3HW.new_tensor([len(prompt) for prompt in prompts])


def videos(count: int = 3, frames: int = 4) -> Tensor:
    return torch.rand(count, frames, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.9


def test_the_score_of_a_video_is_its_frames_mean_each_against_its_own_prompt() -> None:
    shown, prompts = videos().requires_grad_(), ["a", "bb", "ccc"]
    scores = call_reward(Bright(), shown, prompts)
    torch.testing.assert_close(scores, shown.mean((1, 2, 3, 4)) - torch.tensor([1.0, 2.0, 3.0]))
    (gradient,) = torch.autograd.grad(scores.sum(), shown)
    torch.testing.assert_close(gradient, torch.full_like(shown, 1 / shown[0].numel()))


def test_a_video_with_one_frame_that_a_reward_cannot_score_costs_itself_and_no_other() -> None:
    shown, prompts = videos(), ["a", "bb", "ccc"]
    expected = call_reward(Bright(), shown, prompts)
    shown[1, 2, 0, 0, 0] = 1
    verdicts = score_images(Bright(), shown, prompts, 3)
    assert [verdict.error for verdict in verdicts] == [None, "ValueError: red", None]
    assert [verdicts[i].score for i in (0, 2)] == [float(expected[i]) for i in (0, 2)]
    trained = score(Bright(), shown, prompts)
    assert trained.good_B.tolist() == [True, False, True]


def test_all_frames_of_a_video_are_moved_and_recoloured_as_one() -> None:
    still = videos(count=2, frames=1).expand(-1, 3, -1, -1, -1)
    draws = RandomDraws(torch.Generator().manual_seed(0))
    seen = augment(still, draws, 1.0)
    assert seen.shape == still.shape and float((seen - still).std()) > 0.15
    assert float((seen[:, 0] - seen[:, 2]).std()) < 0.05  # what is left is the noise, of 0.03 a pixel
    assert torch.equal(augment(still, draws, 0.0), still)
    one = [augment(still[:, frame], RandomDraws(torch.Generator().manual_seed(0)), 1.0) for frame in (0, 2)]
    assert torch.equal(*one)  # pictures: as ever


def test_the_judge_sees_the_mean_of_a_videos_frames() -> None:
    eye, shown = EfficientNetLite0(), videos(count=2, frames=2)
    each = torch.stack([eye.features(shown[:, frame]) for frame in range(2)])
    torch.testing.assert_close(eye.features(shown), each.mean(0), atol=1e-4, rtol=1e-4)


def test_a_video_is_shown_as_a_strip_of_its_frames() -> None:
    shown = videos(count=1)[0].numpy()
    strip = to_picture(shown)
    assert strip.shape == (8, 32, 3) and np.array_equal(strip[:, 8:16], to_picture(shown[1]))


@pytest.mark.parametrize(
    ("suffix", "frames", "size"),
    [(".gif", 4, (16, 8)), (".webp", 4, (16, 8)), (".png", 1, (16, 16)), (".jpg", 1, (16, 16))],
)
def test_a_file_of_videos_moves_or_holds_a_strip_of_each(suffix: str, frames: int, size: tuple[int, int]) -> None:
    drawn = [[Image.fromarray(to_picture(frame)) for frame in video] for video in videos(count=2).numpy()]
    with Image.open(io.BytesIO(encode_videos(drawn, suffix, shown=2))) as file:
        assert (getattr(file, "n_frames", 1), file.size) == (frames, size)
        if suffix == ".png":  # the first and the last frame of the second video
            assert np.array_equal(np.asarray(file)[8:, 8:], np.asarray(drawn[1][-1]))


def test_the_frames_that_a_reward_sees_are_in_a_columns_address_and_not_in_the_sets() -> None:
    assert reward_hashes("r", "v", 1) == {"reward": "r", "vae": "v", "scoring": "1"}  # pictures: as ever
    assert reward_hashes("r", "v", 2) == reward_hashes("r", "v", 1) | {"scored_frames": "2"}


@pytest.fixture(scope="module")
def project(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 6 videos of 5 frames, scored by two of them."""
    folder = tmp_path_factory.mktemp("videos")
    model = {"path": str(write_wan(folder / "wan")), "family": "wan"}
    train = {"nfe": [2], "steps": 1, "lora": {"rank": 2}, "augment": 1.0, "gradient_checkpointing": True}
    write_project(models, folder, model=model, teacher=VIDEO, train=train)
    rats(folder, "stage", "rollout", "--out", "shards")
    return folder


def test_videos_are_rolled_out_and_scored_again(project: Path) -> None:
    shards = ShardSet.open(project / "shards")
    rows = shards.index(shards.snapshot())
    assert len(rows) == 6 and read_sample(shards, rows[0])["x"].shape == (3, 8, 16)
    assert shards.recipe.frames == FRAMES and shards.recipe.family == "wan"
    planned = json.loads(rats(project, "stage", "score", "--dry-run", "--json").stdout)
    assert planned["shards_to_score"] == 0
    other = json.loads(
        rats(project, "stage", "score", "--dry-run", "--json", "--set", "teacher.scored_frames=3").stdout
    )
    assert other["fingerprint"] == planned["fingerprint"] and other["shards_to_score"] == 3
    again = json.loads(rats(project, "stage", "score", "--json", "--set", "teacher.scored_frames=3").stdout)
    assert again["scored"] == 6 and again["teacher_forwards"] == 0


def test_a_step_is_trained_on_videos_and_the_student_draws_one(project: Path) -> None:
    said = json.loads(rats(project, "stage", "train", "--shards", "shards", "--out", "runs/rats", "--json").stdout)
    assert said["steps"] == 1 and said["teacher_forwards"] == 0
    other = ["--set", "teacher.scored_frames=4", "--out", "runs/other"]
    assert "another scored_frames" in rats(project, "stage", "train", "--shards", "shards", *other, code=65).stderr
    rats(project, "generate", "a red fox", "--nfe", "2", "--count", "2", "--out", "a.webp")
    with Image.open(project / "a.webp") as drawn:
        assert (drawn.n_frames, drawn.size) == (FRAMES, (512, 256))  # type: ignore[attr-defined]
    assert (
        "end it in one of .png, .webp, .jpg, .jpeg, .gif"
        in rats(project, "generate", "a red fox", "--out", "a.mp4", code=2).stderr
    )


@pytest.mark.slow
def test_videos_are_compared_reported_previewed_and_watched_in_training(project: Path, models: Path) -> None:
    sets = ["--set", f"prompts.validation={project / 'prompts.txt'}", "--set", "train.samples_every=1"]
    guard = ["--set", "train.guard.every=1", "--set", "train.guard.prompts=3"]
    rats(project, "stage", "train", "--shards", "shards", "--out", "runs/rats", "--force", *sets, *guard)
    with Image.open(next((project / "runs" / "rats").rglob("*.png"))) as sheet:
        assert sheet.size[0] == 2 * 16  # a strip of two frames, one number of steps
    rats(project, "stage", "evaluate", "--shards", "shards")
    rats(project, "stage", "report")
    page = (project / "reports" / "report.html").read_text()
    assert "Of each video 2 frames" in page and "--frames: 2;" in page
    rats(project, "shards", "preview", "shards", "--out", "preview.html", "--count", "2")
    page = (project / "preview.html").read_text()
    assert "2 of 5 frames shown" in page and "aspect-ratio: 32 / 16" in page and "width: 112px" in page


@pytest.mark.slow
def test_what_videos_take_is_known_before_anything_runs(project: Path) -> None:
    plan = json.loads(rats(project, "plan", "--rate", "1", "--json").stdout)
    assert plan["evaluation_flops"] > 0 and plan["decode_flops"] > plan["evaluation_flops"]
    assert plan["bytes_per_sample"] > 2 * (3 + 2) * 8 * 16
