"""Two small finished runs, what `rats export` says of them, and what a pipeline draws."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rats.pipeline.families.open import Model
from rats.schemas.params import Params, load_params
from rats.stages.generate import open_pipeline
from rats.stages.rollout.rollout import rollout_stage
from rats.stages.train.train import train_stage
from tests.support import tiny
from tests.support.project import rats, write_project

PROMPT = "a red fox"
LORA = {"rank": 2, "alpha": 5.0}
SHORT = {"steps": 3, "lr": 0.02, "warmup": 0, "checkpoint_every": 3, "ema": 0.5}


def params(home: Path, *overrides: str) -> Params:
    return load_params(home / "params.yaml", overrides)


def export(home: Path, run: str, out: Path, *flags: str, code: int = 0) -> Any:
    said = rats(home, "export", f"runs/{run}", "--out", str(out), "--json", *flags, code=code)
    return said.stderr if code else json.loads(said.stdout)


def drawn(pipeline: Any, call: dict[str, Any]) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(4)
    return pipeline(PROMPT, num_inference_steps=3, generator=noise, output_type="np", **call).images[0]


@cache
def ours(home: Path, run: str | None) -> np.ndarray:
    """What `rats generate` draws, before it is rounded to a picture."""
    model = Model.of(params(home))
    return drawn(open_pipeline(model, home / "runs" / run if run else None), model.call())


def write_home(folder: Path) -> Path:
    """A project with a trained run of adapters, runs/lora, and one of the whole network, runs/full."""
    tiny.write_flux(folder / "models/flux", guidance_embeds=True)
    tiny.write_hpsv2(folder / "models/hpsv2")
    variants = {"lora": {"lora": LORA}, "full": {}}
    changes = {"train": SHORT, "variants": variants, "teacher": {"guidance_scale": 2.5}}
    write_project(folder / "models", folder, evaluate={"variants": ["lora"]}, **changes)
    (folder / "prompts.txt").write_text("\n".join(tiny.PROMPTS[:2]))
    rollout_stage(params(folder), "train", folder / "shards")
    for name in variants:
        train_stage(params(folder), name, folder / "shards", folder / "runs" / name)
    return folder
