"""A build that is not finished, handed over to the next machine: `python -m mini.handover --work DIR`.

Training the teacher on two cores takes longer than a machine lasts. This writes what is there into `mini/handover/`:
the autoencoder in fp16, the teacher's average in 8 bits with a scale a row. `python -m mini.build` goes on from it in
an empty work folder. Moments of the optimizer and random states are not kept: the run goes on, not bit for bit.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "handover"
SCALE = ".scale"
LEVELS = 127


def quantized(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices as int8 with the largest value of each row as its scale; everything else in fp16."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if tensor.ndim != 2 or not tensor.is_floating_point():
            found[name] = tensor.half() if tensor.is_floating_point() else tensor
            continue
        largest = tensor.abs().amax(1).clamp_min(1e-12).float()
        found[name] = (tensor / largest[:, None] * LEVELS).round().to(torch.int8)
        found[name + SCALE] = largest
    return {name: tensor.contiguous() for name, tensor in found.items()}


def restored(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `quantized` stored, in fp32: off by at most half of a row's largest value / 127."""
    scales = {name.removesuffix(SCALE): value for name, value in stored.items() if name.endswith(SCALE)}
    weights = {}
    for name, tensor in stored.items():
        if name in scales:
            weights[name] = tensor.float() * scales[name][:, None] / LEVELS
        elif not name.endswith(SCALE):
            weights[name] = tensor.float() if tensor.is_floating_point() else tensor
    return weights


def average_of(model: nn.Module, path: Path) -> int:
    """Puts the moving average of a checkpoint into the model; returns its step."""
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    average = EMAModel(model.parameters())
    average.load_state_dict(saved["state"]["ema"])
    average.copy_to(model.parameters())
    return int(saved["state"]["step"])


def hand_over(model: nn.Module, path: Path, to: Path) -> None:
    """Writes the average of the checkpoint at `path` in 8 bits."""
    step = average_of(model, path)
    to.parent.mkdir(parents=True, exist_ok=True)
    save_file(quantized(model.state_dict()), to, metadata={"step": str(step)})


def hand_over_vae(path: Path, to: Path) -> None:
    """Writes the autoencoder's weights in fp16."""
    saved = torch.load(path, weights_only=True)
    to.parent.mkdir(parents=True, exist_ok=True)
    half = {name: tensor.half().contiguous() for name, tensor in saved["model"].items()}
    save_file(half, to, metadata={"step": str(saved["state"]["step"])})


def take_up(work: Path, handed: Path = FOLDER) -> None:
    """Makes checkpoints in `work` of what was handed over, where there are none."""
    work.mkdir(parents=True, exist_ok=True)
    for file in handed.glob("*.safetensors"):
        path = work / f"{file.stem}.pt"
        if not path.exists():
            with safe_open(file, framework="pt") as stored:
                weights = restored({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
                step = int(stored.metadata()["step"])
            torch.save({"model": weights, "state": {"step": step}}, path)


def main() -> None:
    """Hands over what a work folder has."""
    from mini import teacher
    from mini.workplace import Workplace

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    hand_over_vae(work / "vae.pt", FOLDER / "vae.safetensors")
    hand_over(teacher.Miniature(*Workplace(work).tokenizers), work / "teacher.pt", FOLDER / "teacher.safetensors")


if __name__ == "__main__":
    main()
