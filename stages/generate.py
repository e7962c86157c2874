"""Draws a prompt with a trained student: the stock pipeline, its network exchanged or adapted, no true guidance.

A video is its frames; all else is said of pictures.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from rats.pipeline.families.open import family_class, open_scheduler
from rats.pipeline.files.atomic import atomic_write
from rats.pipeline.weights.hashes import network_folder
from rats.pipeline.weights.hub import PIPELINE_PATTERNS, resolve
from rats.pipeline.weights.loading import quiet_imports, quiet_loading, torch_device, torch_dtype
from rats.pipeline.weights.lora import is_lora, load_lora
from rats.schemas.errors import ConfigError
from rats.schemas.horizons import evenly
from rats.schemas.params import Params
from rats.stages.measure.pictures import encode, grid
from rats.stages.train.record import pipeline_call, read_record, student_folder

with quiet_imports():  # they ask for torchvision, which we do without
    from diffusers import AutoModel, DiffusionPipeline

log = logging.getLogger(__name__)

FORMATS = (".png", ".webp", ".jpg", ".jpeg")
ANIMATED = (".webp", ".gif")
FRAME_MS = 62
"""How long a frame of an animated file is shown: 16 a second, as Wan's are."""


def generate(
    params: Params, prompt: str, nfe: int, run: Path | None, seed: int, out: Path, count: int = 1
) -> list[Image.Image]:
    """Draws `count` pictures into one file, in a grid, and returns them; of videos all frames, one after the other.

    They are what `DiffusionPipeline.from_pretrained(model, transformer=student)(prompt, num_inference_steps=nfe)`
    draws, for adapters what it draws after `load_lora_weights(student)`, with noise from
    `torch.Generator().manual_seed(seed)`; where the family samples by another scheduler than the model's, with that.

    Args:
        params: The whole configuration: the model, its resolution and its embedded guidance.
        prompt: What to draw.
        nfe: Steps, each of one network evaluation.
        run: The run whose student draws; None for the untrained base.
        seed: Of the noise.
        out: The picture file, by its suffix. Videos move in .webp and .gif; in others each is a strip of a few frames.
        count: How many pictures, from consecutive draws of the generator.

    Raises:
        ConfigError: an empty prompt, a run without a student, an unknown suffix.
    """
    if not prompt.strip():
        raise ConfigError("the prompt is empty: say what to draw")
    is_video, suffix = family_class(params.model).is_video, out.suffix.lower()
    if suffix not in (known := (*FORMATS, ".gif") if is_video else FORMATS):
        kind = "video" if is_video else "picture"
        raise ConfigError(f"cannot write a {kind} named '{out.name}': end it in one of {', '.join(known)}")
    if run is not None:
        _check_steps(run, nfe)
    drawn = draw(open_pipeline(params, run), params, prompt, nfe, seed, count)
    if is_video:
        atomic_write(out, encode_videos(drawn, suffix, params.teacher.scored_frames))
        return [frame for video in drawn for frame in video]
    pictures = [picture for (picture,) in drawn]
    atomic_write(out, encode(grid(pictures), suffix))
    return pictures


def open_pipeline(params: Params, run: Path | None) -> Any:
    """The whole pipeline of `model.path`, with the run's network or adapters where one is named, on the device."""
    pipeline = load_pipeline(params, None if run is None else student_folder(run))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(torch_device(params.compute.device))


def load_pipeline(params: Params, student: Path | None) -> Any:
    """The same on the CPU; `student` is a run's folder of a whole network or of adapters."""
    folder = resolve(params.model.path, params.model.revision, PIPELINE_PATTERNS)
    adapters = student is not None and is_lora(student)
    network = network_folder(folder, params.model.transformer) if student is None or adapters else student
    dtype = torch_dtype(params.model.dtype)
    with quiet_loading(), warnings.catch_warnings():
        # new releases of diffusers call it dtype and warn, older ones know torch_dtype only
        warnings.simplefilter("ignore", FutureWarning)
        own = AutoModel.from_pretrained(str(network), torch_dtype=dtype)
        scheduler = open_scheduler(family_class(params.model), folder)  # where the family samples by another one
        pipeline = DiffusionPipeline.from_pretrained(
            str(folder), torch_dtype=dtype, transformer=own, scheduler=scheduler
        )
    if student is not None and adapters:
        load_lora(pipeline.transformer, student)
    return pipeline


def draw(pipeline: Any, params: Params, prompt: str, nfe: int, seed: int, count: int) -> list[list[Image.Image]]:
    """The pipeline's own call, with the student's embedded guidance and the recipe's resolution: frames of each."""
    is_video = family_class(params.model).is_video
    drawn = pipeline(
        prompt=prompt,  # by name: the first argument of a pipeline that can edit pictures is the picture
        num_inference_steps=nfe,
        generator=torch.Generator().manual_seed(seed),
        output_type="pil",
        **{"num_videos_per_prompt" if is_video else "num_images_per_prompt": count},
        **pipeline_call(params),
    )
    return drawn.frames if is_video else [[picture] for picture in drawn.images]


def encode_videos(videos: Sequence[Sequence[Image.Image]], suffix: str, shown: int) -> bytes:
    """The file's bytes: all videos moving in a grid, or a strip of `shown` frames a video, one below the other."""
    if suffix not in ANIMATED:
        (width, height), rows = videos[0][0].size, evenly(len(videos[0]), shown)
        sheet = Image.new("RGB", (len(rows) * width, len(videos) * height))
        for i, video in enumerate(videos):
            for j, row in enumerate(rows):
                sheet.paste(video[row], (j * width, i * height))
        return encode(sheet, suffix)
    first, *others = [grid(at_once) for at_once in zip(*videos, strict=True)]
    buffer = io.BytesIO()
    first.save(buffer, suffix[1:].upper(), save_all=True, append_images=others, duration=FRAME_MS, loop=0)
    return buffer.getvalue()


def _check_steps(run: Path, nfe: int) -> None:
    """Says so when the student was not trained for this number of steps; it draws all the same."""
    trained = read_record(run).nfe
    if nfe not in trained:
        log.warning("%s was trained for %s steps, not for %d", run, ", ".join(map(str, trained)), nfe)
