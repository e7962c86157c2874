"""Generates pictures with a trained student: the stock pipeline with the student's network or adapters, without CFG.

A video is a list of frames. Everything else is described for pictures.
"""

from __future__ import annotations

import io
import logging
import math
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from rats.pipeline.families.models import checked_decoding
from rats.pipeline.families.open import Model
from rats.pipeline.files.atomic import atomic_write
from rats.pipeline.machine import on_its_threads
from rats.pipeline.weights.loading import quiet_imports, quiet_notices, torch_device
from rats.schemas.errors import ConfigError
from rats.schemas.horizons import evenly
from rats.schemas.params import Params, TeacherParams
from rats.stages.measure.pictures import encode_image, make_image_grid
from rats.stages.progress import progress
from rats.stages.train.origin import changed_call, check_base, check_grid
from rats.stages.train.record import checked_student, read_record, student_folder

log = logging.getLogger(__name__)

FORMATS = (".png", ".webp", ".jpg", ".jpeg")
ANIMATED = (".webp", ".gif")
LONGEST_SIDE = {".webp": 16383, ".jpg": 65535, ".jpeg": 65535, ".gif": 65535}
"""Pixels, of formats that have a limit."""

SHOWN = 256
"""Pixels that the longer side of a written picture has at least."""
FRAME_MS = 62
"""Duration of a frame in an animated file, in ms: 16 frames a second, as in Wan's videos."""


class Drawn(NamedTuple):
    """Pictures as they were drawn (of videos all frames, one after the other), and how.

    `seconds` are those of drawing, without opening the model. In the file, each pixel is a square of `factor` x
    `factor`.
    """

    pictures: list[Image.Image]
    seconds: float
    factor: int

    @property
    def pixels(self) -> str:
        """The pictures' size, and how they were enlarged: "32 x 32, written 8 times as large (nearest)"."""
        size = "{} x {}".format(*self.pictures[0].size)
        return size if self.factor == 1 else f"{size}, written {self.factor} times as large (nearest)"


@on_its_threads
def generate(
    params: Params,
    prompt: str,
    nfe: int,
    run: Path | None,
    seed: int,
    out: Path,
    count: int = 1,
    enlarge: bool = True,
) -> Drawn:
    """Draws `count` pictures into one file, in a grid.

    They equal what `DiffusionPipeline.from_pretrained(model, transformer=student)(prompt, num_inference_steps=nfe)`
    draws, for adapters what it draws after `load_lora_weights(student)`, with noise from
    `torch.Generator().manual_seed(seed)`; where the family samples by another scheduler than the model's, with that.

    Args:
        params: The whole configuration: the model, its resolution and its embedded guidance.
        prompt: What to draw.
        nfe: Steps, each of one network evaluation.
        run: The run whose student draws; None for the untrained base.
        seed: Of the noise.
        out: The picture file; its suffix decides the format. Videos are animated in .webp and .gif; other formats get a
            strip of frames.
        count: Number of pictures. Their noises are consecutive draws of one generator, `compute.micro_batch` at a time.
        enlarge: Write pictures whose longer side is below 256 px a whole number of times as large.

    Raises:
        ConfigError: an empty prompt, a run without a student, an unknown suffix; more pictures than the format or
            this machine's memory holds.
        DataError: the student is damaged, of another model, or was trained on other sigmas than the scheduler gives; a
            picture is not finite.
    """
    if not prompt.strip():
        raise ConfigError("the prompt is empty: say what to draw")
    model = Model.of(params)
    is_video, suffix = model.family.is_video, out.suffix.lower()
    if suffix not in (known := (*FORMATS, ".gif") if is_video else FORMATS):
        kind = "video" if is_video else "picture"
        raise ConfigError(f"cannot write a {kind} named '{out.name}': end it in one of {', '.join(known)}")
    factor = enlargement(params.teacher) if enlarge else 1
    _refuse_too_many(params, count, suffix, factor)
    if run is not None:
        _check_run(model, run, nfe)
    model.lengths([prompt], guided=False).tell(log)
    pipeline = open_pipeline(model, run)
    started = time.perf_counter()
    drawn = draw(pipeline, model, prompt, nfe, seed, count)
    seconds = time.perf_counter() - started
    larger = [[_enlarged(frame, factor) for frame in frames] for frames in drawn]
    if is_video:
        atomic_write(out, encode_videos(larger, suffix, params.teacher.scored_frames))
    else:
        atomic_write(out, encode_image(make_image_grid([picture for (picture,) in larger]), suffix))
    return Drawn([frame for frames in drawn for frame in frames], seconds, factor)


def enlargement(size: TeacherParams) -> int:
    """The smallest whole number by which the longer side has SHOWN pixels or more."""
    return max(1, math.ceil(SHOWN / max(size.width, size.height)))


def _enlarged(picture: Image.Image, factor: int) -> Image.Image:
    return picture if factor == 1 else picture.resize([factor * n for n in picture.size], Image.Resampling.NEAREST)


def open_pipeline(model: Model, run: Path | None) -> Any:
    """The whole pipeline, with the run's network or adapters where one is named, on the device."""
    pipeline = model.open_pipeline(None if run is None else student_folder(run))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(torch_device(model.compute.device))


def draw(pipeline: Any, model: Model, prompt: str, nfe: int, seed: int, count: int) -> list[list[Image.Image]]:
    """The pipeline's own call, with the student's embedded guidance and the recipe's resolution: frames of each.

    A call draws `compute.micro_batch` at most. One generator serves them all, so the noise is that of one large call.
    """
    noise, size = torch.Generator().manual_seed(seed), model.compute.micro_batch
    drawn: list[list[Image.Image]] = []
    shown = progress("drawing", count, "pictures") if count > size else nullcontext(lambda _: None)
    with shown as advance, checked_decoding(pipeline.vae), quiet_notices(), quiet_imports():
        for start in range(0, count, size):
            batch = _draw_batch(pipeline, model, prompt, nfe, noise, min(size, count - start))
            drawn += batch
            advance(len(batch))
    return drawn


def _draw_batch(
    pipeline: Any, model: Model, prompt: str, nfe: int, noise: torch.Generator, count: int
) -> list[list[Image.Image]]:
    is_video = model.family.is_video
    drawn = pipeline(
        prompt=prompt,  # by name: the first argument of a pipeline that can edit pictures is the picture
        num_inference_steps=nfe,
        generator=noise,
        output_type="pil",
        **{"num_videos_per_prompt" if is_video else "num_images_per_prompt": count},
        **model.call(),
    )
    return drawn.frames if is_video else [[picture] for picture in drawn.images]


def _refuse_too_many(params: Params, count: int, suffix: str, factor: int) -> None:
    """Before the first is drawn, not after the last."""
    teacher, longest = params.teacher, LONGEST_SIDE.get(suffix)
    columns = math.ceil(math.sqrt(count))
    side = factor * max(columns * teacher.width, math.ceil(count / columns) * teacher.height)
    if longest is not None and side > longest:
        raise ConfigError(
            f"a {suffix} holds {longest:,} pixels a side, {count:,} pictures in a grid {side:,}: use .png"
        )
    pixels = factor**2 * teacher.width * teacher.height * teacher.frames * count
    needed = 2 * 3 * pixels  # the pictures, and the grid of them
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ConfigError(
            f"{count:,} pictures in one grid take {needed / 2**30:,.0f} GiB of memory, this machine has "
            f"{memory / 2**30:,.0f}: draw fewer at a time, each with another --seed and --out"
        )


def encode_videos(videos: Sequence[Sequence[Image.Image]], suffix: str, shown: int) -> bytes:
    """The file's bytes: all videos moving in a grid, or a strip of `shown` frames a video, one below the other."""
    if suffix not in ANIMATED:
        (width, height), rows = videos[0][0].size, evenly(len(videos[0]), shown)
        sheet = Image.new("RGB", (len(rows) * width, len(videos) * height))
        for i, video in enumerate(videos):
            for j, row in enumerate(rows):
                sheet.paste(video[row], (j * width, i * height))
        return encode_image(sheet, suffix)
    first, *others = [make_image_grid(at_once) for at_once in zip(*videos, strict=True)]
    buffer = io.BytesIO()
    first.save(buffer, suffix[1:].upper(), save_all=True, append_images=others, duration=FRAME_MS, loop=0)
    return buffer.getvalue()


def _check_run(model: Model, run: Path, nfe: int) -> None:
    """The student must be the run's, on the run's model and sigmas. What is drawn unlike in training is said."""
    record = read_record(run)
    check_base(model, run, record, checked_student(run, record))
    for name, (there, here) in changed_call(model, record).items():
        log.warning("%s was trained with %s = %s, it draws with %s", run, name, there, here)
    check_grid(model, run, record)
    if nfe not in record.nfe:
        log.warning("%s was trained for %s steps, not for %d", run, ", ".join(map(str, record.nfe)), nfe)
