"""Every family through the whole command line: prompts, shards, a second reward, adapters, cells, a plain pipeline.

A new family adds a row to `FAMILIES`; that its solver is its pipeline's is shown in a file of its own.
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from rats.pipeline.families.open import Model
from rats.pipeline.weights.lora import WEIGHTS
from rats.schemas.horizons import evenly
from rats.schemas.params import Params, load_params
from rats.stages.generate import open_pipeline
from tests.support import tiny, tiny_flux2, tiny_qwen
from tests.support.project import rats, write_project
from tests.support.tiny_sd3 import write_sd3
from tests.support.tiny_wan import FRAMES, write_wan

FAMILIES: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "flux": (tiny.write_flux, {}),
    "sd3": (write_sd3, {}),
    "qwen-image": (tiny_qwen.write_qwen_image, {"max_sequence_length": tiny_qwen.LENGTH}),
    "flux2": (tiny_flux2.write_flux2, {"max_sequence_length": tiny_flux2.LENGTH}),
    "wan": (partial(write_wan, scheduler="unipc"), {"frames": FRAMES, "scored_frames": 2}),
}
"""By name: writes a tiny pipeline's folder, and what `teacher` needs besides `project.settings`."""

QUICK = "sd3"
PROMPT, SEED, NFE = tiny.PROMPTS[0], 4, 3
ROWS = [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize("name", ROWS)
def test_a_family_goes_from_prompts_to_a_student_in_plain_diffusers(name: str, models: Path, tmp_path: Path) -> None:
    write_family(name, models, tmp_path)
    rolled = said(
        tmp_path, "stage", "rollout", "--set", "rewards=" + json.dumps([reward(models, "hpsv2")]), "--out", "d"
    )
    assert (rolled["samples"], rolled["teacher_forwards"]) == (2, 6 * 2)
    assert set(said(tmp_path, "stage", "score", "--reward", "pickscore", "--out", "d")["rewards"]) >= {"pickscore"}
    trained = said(tmp_path, "stage", "train", "--shards", "d")
    assert (trained["steps"], trained["teacher_forwards"], trained["teacher_reward_calls"]) == (2, 0, 0)
    check_cells(said(tmp_path, "stage", "evaluate", "--shards", "d")["cells"])
    exported = said(tmp_path, "export", "runs/rats", "--out", "out")
    assert exported["parts"] == ["lora", "pipeline", "README.md", "call.json"]
    check_export(tmp_path / "out", load_params(tmp_path / "params.yaml"), name)


def write_family(name: str, models: Path, folder: Path) -> None:
    """A project of two prompts and two rewards that trains adapters."""
    write, teacher = FAMILIES[name]
    write(folder / "models" / name)
    model = {"path": str(folder / "models" / name), "family": name}
    train = {"steps": 2, "lr": 0.02, "warmup": 0, "lora": {"rank": 2, "alpha": 5.0}}
    rewards, evaluate = [reward(models, one) for one in ("hpsv2", "pickscore")], {"judges": []}
    write_project(models, folder, model=model, teacher=teacher, train=train, rewards=rewards, evaluate=evaluate)
    (folder / "prompts.txt").write_text("\n".join(tiny.PROMPTS[:2]))


def reward(models: Path, name: str) -> dict[str, str]:
    return {"name": name, "adapter": name, "path": str(models / name)}


def said(folder: Path, *command: str) -> dict[str, Any]:
    return json.loads(rats(folder, *command, "--json").stdout)


def check_cells(cells: list[dict[str, Any]]) -> None:
    """Both rewards have measured the teacher, the base with and without guidance, and the student."""
    measured = {(cell["system"], cell["nfe"], cell["evaluations"]) for cell in cells if cell["metric"] == "pickscore"}
    few = {(system, nfe, nfe * cost) for nfe in (2, 3) for system, cost in COSTS.items()}
    assert measured == few | {("teacher", 6, 12)}
    assert {cell["role"] for cell in cells} >= {"trained", "held_out"}


COSTS = {"base_guided": 2, "base_unguided": 1, "student": 1}
"""Evaluations a step."""


def check_export(out: Path, params: Params, name: str) -> None:
    """What the card's own code opens draws what `rats generate` draws, with every adapter in its place."""
    (out / name).symlink_to(params.model.path)  # the base's name on the card, where there is no hub
    merged, adapted = (
        run_card(out, code) for code in re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)
    )
    with contextlib.chdir(out.parent):
        model = Model.of(params)
        ours, base = (draw(open_pipeline(model, run), model.call()) for run in (Path("runs/rats"), None))
    assert np.abs(draw(merged["pipe"], merged["call"]) - ours).max() <= 1e-4 < 1e-3 < np.abs(base - ours).max()
    assert np.abs(draw(adapted["pipe"], adapted["call"]) - ours).max() <= 1e-5
    state = adapted["pipe"].transformer.state_dict().items()
    found = {"transformer." + key.replace(".default_0.", "."): value for key, value in state if ".lora_" in key}
    file = load_file(out / "lora" / WEIGHTS)
    assert file.keys() == found.keys() and all(torch.equal(file[key], value) for key, value in found.items())
    rats(out.parent, "generate", PROMPT, "--nfe", str(NFE), "--seed", str(SEED), "--out", "a.png", "--no-enlarge")
    shown = np.concatenate(ours[evenly(len(ours), params.teacher.scored_frames)], axis=1)
    assert np.array_equal(np.asarray(Image.open(out.parent / "a.png")), (shown * 255).round().astype("uint8"))


def run_card(out: Path, code: str) -> dict[str, Any]:
    """The names that a block of the card leaves."""
    names: dict[str, Any] = {}
    with contextlib.chdir(out), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # new releases of diffusers call torch_dtype dtype
        exec(code, names)
    return names


def draw(pipeline: Any, call: dict[str, Any]) -> np.ndarray:
    """Frames (K, H, W, 3) in [0, 1] of a video, of a picture the one that it is; in one evaluation a step."""
    pipeline.set_progress_bar_config(disable=True)
    noise, evaluations = torch.Generator().manual_seed(SEED), []
    hook = pipeline.transformer.register_forward_hook(lambda *given: evaluations.append(len(given[-1][0])))
    drawn = pipeline(prompt=PROMPT, num_inference_steps=NFE, generator=noise, output_type="np", **call)
    hook.remove()
    assert sum(evaluations) == NFE
    return drawn.frames[0] if "frames" in drawn else drawn.images
