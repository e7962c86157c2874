"""A FLUX teacher for the training loop: the student's decoder, a second network, and no text encoder."""

from __future__ import annotations

import copy
from typing import Any, cast

from diffusers import FluxTransformer2DModel

from rats.pipeline.flux import FluxStudent, FluxTeacher, apply_kernels
from rats.pipeline.flux_text import MODELS, TOKENIZERS, load_encoders
from rats.pipeline.weights import PIPELINE_PATTERNS, resolve
from rats.schemas.params import ComputeParams, ModelParams, TeacherParams


def open_live_teacher(
    student: FluxStudent, model: ModelParams, teacher: TeacherParams, compute: ComputeParams
) -> FluxTeacher:
    """A teacher of the student's decoder and a copy of its network as it is now, guided as `teacher` says.

    The text encoders are loaded for the negative prompt alone, where there is guidance against one, and let go.
    """
    encoders: dict[str, Any] = dict.fromkeys([*MODELS, *TOKENIZERS])
    if teacher.true_cfg_scale > 1:
        encoders = load_encoders(resolve(model.path, model.revision, PIPELINE_PATTERNS), model, compute)
    network = cast(FluxTransformer2DModel, copy.deepcopy(student.network))
    apply_kernels(network, compute)
    live = FluxTeacher(network, student.vae, student.scheduler, teacher, encoders)
    live.forget_encoders()
    return live
