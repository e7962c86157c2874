"""`rats stage train` as torchrun starts it: a FLUX-format student on two ranks, whole and sharded, full and LoRA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rats.schemas.params import Params
from tests.stages.train.test_train import home, params_of, rows  # noqa: F401
from tests.trainer.test_ranks import TORCHRUN, environment

ROOT = Path(__file__).parents[3]


def train(params: Params, out: Path, ranks: int, *flags: str) -> Path:
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(params.model_dump(mode="json")))
    shards = ["--shards", str(Path(params.prompts.train).parent / "shards")]
    arguments = [*TORCHRUN, str(ranks), "-m", "rats.stages.cli.main", "stage", "train", "--params", str(file), *shards]
    done = subprocess.run(
        [sys.executable, *arguments, "--out", str(out), *flags],
        env=environment() | {"PYTHONWARNINGS": "default"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def assert_same_student(one: Path, other: Path) -> None:
    for file in one.glob("student/*.safetensors"):
        a, b = load_file(file), load_file(other / "student" / file.name)
        assert a.keys() == b.keys()
        for name, tensor in a.items():
            torch.testing.assert_close(b[name], tensor, rtol=2e-3, atol=2e-5)
    for a, b in zip(rows(one), rows(other), strict=True):
        for name in ("loss_total", "reward_student", "gate_mean", "grad_total", "grad_shape"):
            assert float(a[name] or 0) == pytest.approx(float(b[name] or 0), rel=1e-3, abs=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4.0}], ids=["full", "lora"])
def test_two_ranks_and_two_shards_train_the_student_of_one_process(home, tmp_path, lora):  # noqa: F811
    plain = params_of(home, lora=lora, ema=0.9)
    one = train(plain, tmp_path / "one", 1)
    assert_same_student(one, train(plain, tmp_path / "two", 2))
    sharded = params_of(home, lora=lora, ema=0.9, fsdp=True, gradient_checkpointing=True)
    assert_same_student(one, train(sharded, tmp_path / "sharded", 2))
    assert os.listdir(one) and sorted(p.name for p in one.iterdir()) == sorted(
        p.name for p in (tmp_path / "sharded").iterdir()
    )
