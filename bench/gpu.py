"""FLUX.1-dev at full size on one GPU, random weights, no network: `python -m bench.gpu --out gpu.json`.

Rollout (samples/s by resolution, batch and kernel recipe, share of the card's own matrix rate, peak memory, how far
compiled latents drift from eager ones) and LoRA steps of stage two with a random-weight HPS v2 through the real
decoder, all by the code that the stages run. Text encoders and storage are in no figure.

A cell for which the memory does not last says so, and one for which `--minutes` do not; the others go on. Without a
GPU the same runs on a tiny model, so that it does not rot: those figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from bench.gpu_models import FULL, TINY, Size, open_random, open_random_hpsv2, random_conditioning
from bench.gpu_step import measure_step
from bench.harness import timed
from rats.pipeline.solver import euler
from rats.pipeline.weights.loading import torch_dtype
from rats.schemas.params import ComputeParams
from rats.stages.doctor.devices import devices, driver

Cell = dict[str, Any]
ROLLOUT_HEADING = (
    f"rollout\n{'px':>6} {'batch':>5} {'recipe':<9} {'steps':>7} {'s/step':>8} {'samples/s':>10} {'share':>7} "
    f"{'peak GB':>7} {'first s':>8} drift of the latents"
)
HEADINGS = {"rollout": ROLLOUT_HEADING, "compiled": ROLLOUT_HEADING} | {
    "step": f"LoRA step of one sample\n{'px':>6} {'NFE':>5} {'s':>8} {'peak GB':>7} {'first s':>8}  parts, seconds"
}
VERDICTS = {None: "not measured", True: "met", False: "NOT MET"}

PARTS = ("rate", "rollout", "step", "compiled")
"""In the order of measuring: what compiles comes last, and takes as many cells as there is time for."""
SHORT = 10
"""Steps that are timed of a batch of several; of one sample the whole trajectory is."""
COMPILING = 120.0
"""Seconds that a compiled cell is taken to need before one has been measured."""
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")
ROLLOUT_BAR, MEMORY_BAR = 0.13, 60e9
"""On an H100: samples/s at 1024 px and 50 steps, compiled; bytes of a LoRA step at 512 px."""


@dataclass
class Meter:
    """A measurement under way. `reference`: the eager latents by (pixels, batch), on the CPU."""

    size: Size
    device: str
    repeats: int
    until: float
    rate: float | None = None
    reference: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def cell(self, about: Cell, needed: float, measure: Callable[[], Cell]) -> Cell:
        """`about` with what `measure` finds and the peak memory, or with what kept it from being measured."""
        if time.monotonic() + needed > self.until:
            return about | {"said": "no time left"}
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        try:
            return about | measure() | self._peak()
        except Exception as error:
            if not (should_reduce_batch_size(error.__cause__ or error) or isinstance(error, MemoryError)):
                raise
        finally:
            # only now, with the error and its frames gone, is the memory anybody's
            clear_device_cache(garbage_collection=True)
        return about | {"said": "OOM"}

    def _peak(self) -> Cell:
        """Bytes that torch has allocated at most in this cell, and reserved; nothing on a CPU."""
        if self.device == "cpu":
            return {}
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}


def matrix_rate(size: Size, device: str, products: int = 10, repeats: int = 5) -> float:
    """FLOP/s of products of two square random matrices, in the model's dtype: the median of some rounds of several."""
    a, b = (torch.randn(2, size.matrix, size.matrix, device=device) / size.matrix**0.5).to(torch_dtype(size.dtype))

    def multiply() -> None:
        for _ in range(products):
            a @ b

    multiply()
    return 2 * size.matrix**3 * products / median(timed(multiply).wall for _ in range(repeats))


def measure_rollout(meter: Meter, pixels: int, batch: int, compiled: bool) -> Cell:
    """Median seconds a step over the first steps of the teacher's grid: all for one sample, `SHORT` for several."""
    torch.compiler.reset()  # else a second shape is compiled for any shape
    compute = ComputeParams(device=meter.device, compile=compiled, micro_batch=batch)
    teacher, flops = open_random(meter.size, pixels, compute)
    steps = meter.size.steps if batch == 1 else min(SHORT, meter.size.steps)
    sigmas, conditioning = teacher.stock_sigmas(meter.size.steps), random_conditioning(teacher, batch)
    draw = torch.Generator().manual_seed(3)
    noise_BTC = torch.randn(batch, *teacher.latent_shape(), generator=draw).to(meter.device)

    finals: list[Tensor] = []

    @torch.no_grad()
    def walk(count: int) -> None:
        velocity = partial(_velocity, teacher, conditioning)
        finals[:] = [euler(velocity, noise_BTC, sigmas[: count + 1])[0][-1]]

    first = timed(lambda: walk(1)).wall
    seconds = median(timed(lambda: walk(steps)).wall for _ in range(meter.repeats)) / steps
    found = {"timed_steps": steps, "step_seconds": seconds, "first_seconds": first, "flops": flops}
    found["samples_per_second"] = batch / seconds / meter.size.steps
    found["share"] = flops * batch / seconds / meter.rate if meter.rate else None
    return found | _drift(meter, (pixels, batch), finals[0].cpu(), compiled)


def _velocity(teacher: Any, conditioning: Any, x_BTC: Tensor, sigma: float) -> Tensor:
    return teacher.guided_velocity(x_BTC, sigma, conditioning)


def _drift(meter: Meter, key: tuple[int, int], final: Tensor, compiled: bool) -> Cell:
    """Keeps eager latents, and compares compiled ones with them."""
    if not compiled:
        meter.reference[key] = final
    if not compiled or key not in meter.reference:
        return {}
    return drift(meter.reference[key], final)


def drift(reference: Tensor, other: Tensor) -> Cell:
    """Distance over norm, and PSNR in dB with the reference's range as the peak."""
    error, span = (other - reference).double(), float(reference.max() - reference.min())
    rmse = float(error.square().mean().sqrt())
    psnr = 20 * float(torch.tensor(span / rmse, dtype=torch.float64).log10()) if rmse else None
    return {"drift_psnr_db": psnr, "drift_relative": float(error.norm() / reference.double().norm())}


def rollouts(meter: Meter, batches: Sequence[int], compiled: bool) -> list[Cell]:
    """Each resolution and batch, single samples and large pictures first: what the bar is about must have its time."""
    cells: list[Cell] = []
    needed = COMPILING if compiled else 0.0
    for batch in sorted(batches, key=lambda batch: (batch != 1, -batch)):
        for pixels in sorted(meter.size.pixels, reverse=True):
            about = {"pixels": pixels, "batch": batch, "recipe": "compiled" if compiled else "eager"}
            start = time.monotonic()
            measure = partial(measure_rollout, meter, pixels, batch, compiled)
            cells.append(meter.cell(about, needed if cells else 0.0, measure))
            if compiled and "said" not in cells[-1]:
                needed = time.monotonic() - start
            print(rollout_line(cells[-1], meter.size.steps), flush=True)
    return cells


def steps(meter: Meter, grid: Sequence[int]) -> list[Cell]:
    """A LoRA step at each number of evaluations, all with one reward."""
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        reward = open_random_hpsv2(meter.size, Path(folder), meter.device)
        for nfe in grid:
            about = {"pixels": meter.size.pixels[0], "nfe": nfe, "batch": 1, "lora_rank": 32}
            measure = partial(measure_step, meter.size, nfe, meter.device, reward, meter.repeats)
            cells.append(meter.cell(about, 0.0, measure))
            print(step_line(cells[-1]), flush=True)
    return cells


def rollout_line(cell: Cell, steps: int) -> str:
    """One cell of the rollout's table."""
    head = f"{cell['pixels']:>6} {cell['batch']:>5} {cell['recipe']:<9}"
    if "said" in cell:
        return f"{head} {cell['said']}"
    timed_steps = f"{cell['timed_steps']}/{steps}"
    rates = f"{timed_steps:>7} {cell['step_seconds']:>8.4f} {cell['samples_per_second']:>10.4f} {_share(cell):>7}"
    line = f"{head} {rates} {_gigabytes(cell):>7} {cell['first_seconds']:>8.1f}"
    if "drift_relative" not in cell:
        return line
    psnr = "same" if cell["drift_psnr_db"] is None else f"{cell['drift_psnr_db']:.1f} dB"
    return f"{line} {psnr:>8} {cell['drift_relative']:.2e}"


def step_line(cell: Cell) -> str:
    """One cell of the table of steps."""
    head = f"{cell['pixels']:>6} {cell['nfe']:>5}"
    if "said" in cell:
        return f"{head} {cell['said']}"
    parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in cell["parts"].items())
    return f"{head} {cell['seconds']:>8.3f} {_gigabytes(cell):>7} {cell['first_seconds']:>8.1f}  {parts}"


def _share(cell: Cell) -> str:
    return "" if cell["share"] is None else f"{cell['share']:.1%}"


def _gigabytes(cell: Cell) -> str:
    return f"{cell['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in cell else "-"


def bars(found: Cell) -> list[Cell]:
    """What is aimed at on an H100 and what was measured; None where it was not."""
    compiled = [c for c in found["rollout"] if c["pixels"] == 1024 and c["recipe"] == "compiled" and "said" not in c]
    fastest = max((cell["samples_per_second"] for cell in compiled), default=None)
    largest = max((cell["peak_bytes"] for cell in found["step"] if "peak_bytes" in cell), default=None)
    return [
        {"bar": f"at least {ROLLOUT_BAR} samples/s at 1024 px, 50 steps, compiled", "measured": fastest}
        | {"met": None if fastest is None else fastest >= ROLLOUT_BAR},
        {"bar": f"a LoRA step at 512 px under {MEMORY_BAR / 1e9:.0f} GB", "measured": largest}
        | {"met": None if largest is None else largest < MEMORY_BAR},
    ]


def measure(arguments: argparse.Namespace, size: Size, device: str) -> Cell:
    """All parts that were asked for, printed as they come."""
    start = time.monotonic()
    meter = Meter(size, device, arguments.repeats, start + 60 * arguments.minutes)
    found: Cell = {"rate": None, "rollout": [], "step": []}
    if "rate" in arguments.only:
        found["rate"] = meter.rate = matrix_rate(size, device)
        print(f"product of {size.matrix} x {size.matrix} matrices, {size.dtype}: {meter.rate / 1e12:.4g} TFLOP/s\n")
    for part in (part for part in PARTS if part in arguments.only and part != "rate"):
        print(HEADINGS[part], flush=True)
        if part == "step":
            found["step"] = steps(meter, arguments.nfe)
        else:
            found["rollout"] += rollouts(meter, arguments.batches, part == "compiled")
        print()
    return found | {"bars": bars(found), "seconds": time.monotonic() - start}


def main(argv: Sequence[str] | None = None) -> Cell:
    """Measure, print tables and a line of JSON."""
    parser = argparse.ArgumentParser(description="FLUX.1-dev at full size, random weights, on one GPU")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="samples side by side")
    parser.add_argument("--nfe", type=int, nargs="+", default=[3, 8], metavar="N", help="of the training steps")
    parser.add_argument("--repeats", type=int, default=2, metavar="N", help="the median of so many is taken")
    parser.add_argument("--minutes", type=float, default=8.0, help="no cell is begun that would end later")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, as where there is no GPU")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the JSON there too")
    arguments = parser.parse_args(argv)
    tiny = arguments.tiny or not torch.cuda.is_available()
    model = "a tiny FLUX on the CPU: no figure means anything" if tiny else "FLUX.1-dev, 19 + 38 blocks"
    about = {"model": f"{model}, random weights", **machine()}
    print(json.dumps(about, indent=1) + "\n")
    found = about | measure(arguments, TINY if tiny else FULL, "cpu" if tiny else "cuda")
    for bar in found["bars"]:
        print(f"{bar['bar']}: {VERDICTS[bar['met']]}")
    text = json.dumps(found)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    return found


def machine() -> Cell:
    """Devices, driver and versions."""
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    return {"devices": devices(), "driver": driver(), "cuda": torch.version.cuda, "versions": versions}


if __name__ == "__main__":
    main()
