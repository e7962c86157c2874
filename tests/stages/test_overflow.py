"""float16 is refused where nothing could be trained of it, and a VAE that overflows is never a reward's fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from tests.support.project import rats, write_project

RUN = {"nfe": [2, 3], "steps": 2, "batch": 2, "micro_batch": 2, "lora": {"rank": 2}}
HALF = "model.dtype=float16"
STAGES = {
    "rollout": ["stage", "rollout", "--set", "teacher.seed=7"],
    "score": ["stage", "score", "--reward", "pickscore"],
    "train": ["stage", "train", "--shards", "d", "--out", "runs/other"],
    "evaluate": ["stage", "evaluate", "--shards", "d"],
    "generate": ["generate", "a red fox", "--nfe", "3"],
}


@pytest.fixture(scope="module")
def trained(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with shards and a run."""
    folder = tmp_path_factory.mktemp("trained")
    rewards = [{"name": name, "adapter": name, "path": str(models / name)} for name in ("hpsv2", "pickscore")]
    write_project(models, folder, rewards=rewards, train=RUN, evaluate={"judges": []})
    first = ["--set", "rewards=" + json.dumps(rewards[:1])]
    rats(folder, "stage", "rollout", "--out", "d", *first)
    rats(folder, "stage", "train", "--shards", "d", *first)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_a_vae_that_overflows_stops_every_stage_before_a_reward_is_asked(
    trained: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    decode = AutoencoderKL.decode

    def overflowing(self: Any, z: Any, **options: Any) -> Any:
        """The library's own, as where its activations pass the largest number of its dtype."""
        return (decode(self, z, **options)[0] * torch.inf,)

    if stage == "evaluate":
        rats(trained, "stage", "score", "--reward", "pickscore", "--out", "d")
    monkeypatch.setattr(AutoencoderKL, "decode", overflowing)
    said = rats(trained, *STAGES[stage], code=65).stderr.splitlines()[-1]
    assert said.startswith("error: ") and "AutoencoderKL in float32, decodes finite latents to NaN or infinity" in said
    assert "reward" not in said


def test_float16_is_refused_in_the_same_words_wherever_train_refuses_it(trained: Path) -> None:
    said = "model.dtype is float16, in which gradients underflow: use bfloat16 or float32"
    commands = (STAGES["train"], STAGES["rollout"], [*STAGES["rollout"], "--dry-run"], ["plan", "--rate", "3"])
    for command in commands:
        assert rats(trained, *command, "--set", HALF, code=2).stderr.splitlines()[-1] == f"error: {said}"
    rows = rats(trained, "doctor", "--set", HALF, code=2).stdout.splitlines()
    assert [row.split("  no   ")[1] for row in rows if "  no   " in row and row.startswith("model ")] == [said]


def test_a_student_may_draw_in_float16(trained: Path) -> None:
    rats(trained, "generate", "a red fox", "--out", "half.png", "--set", HALF)
    assert (trained / "half.png").is_file()
