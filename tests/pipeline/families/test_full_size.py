"""The published models at full size, without their weights: what they weigh, what they take, what their grids are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from rats.pipeline.families.models import FamilyStudent
from rats.pipeline.families.open import Model
from rats.schemas.horizons import aligned
from rats.schemas.params import ComputeParams, ModelParams, TeacherParams
from rats.stages.plan.flops import conditioning_shapes, evaluation_flops
from rats.stages.plan.meta import encoder_bytes
from rats.stages.plan.sizes import embedding_bytes, latents_bytes
from tests.support.full_size import write_pipeline
from tests.support.shards import params as params_of
from tests.support.shards import recipe_of

MIB = 2**20
slow = pytest.mark.slow
PUBLISHED = {
    "flux-dev": ("flux", 11_901_408_320, 83_819_683, 123_060_480 + 4_762_310_656),
    "flux-schnell": ("flux", 11_891_178_560, 83_819_683, 123_060_480 + 4_762_310_656),
    "sd35-medium": ("sd3", 2_243_171_520, 83_819_683, 123_650_304 + 694_659_840 + 4_762_310_656),
    "wan21-1.3b": ("wan", 1_418_996_800, 126_892_531, 5_680_910_336),
}
"""Family, and parameters of network, VAE and text encoders, as the weights on the hub are counted."""


def outline(folder: Path, name: str, size: int | tuple[int, int, int] = 512, length: int = 512) -> FamilyStudent:
    """One of `PUBLISHED` at so many pixels a side, or as a video of (height, width, frames)."""
    height, width, frames = (size, size, 1) if isinstance(size, int) else size
    settings = TeacherParams(height=height, width=width, frames=frames, max_sequence_length=length)
    path = write_pipeline(folder / name, name)
    model = ModelParams(path=str(path), family=PUBLISHED[name][0], dtype="bfloat16")
    return Model(model, settings, ComputeParams()).outline


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


VIDEO = (480, 832, 81)
SIZES = {"flux-dev": 512, "flux-schnell": 512, "sd35-medium": 512, "wan21-1.3b": VIDEO}


@pytest.mark.parametrize(
    "name", ["flux-dev", "wan21-1.3b", *(pytest.param(n, marks=slow) for n in ("flux-schnell", "sd35-medium"))]
)
def test_a_published_model_has_its_published_parameters(name: str, tmp_path: Path) -> None:
    _, network, vae, encoders = PUBLISHED[name]
    found = outline(tmp_path, name, SIZES[name])
    assert (count(found.network), count(found.vae)) == (network, vae)
    # beside parameters CLIP holds 77 position numbers of 8 bytes
    assert encoder_bytes(found, tmp_path / name, torch.bfloat16) == pytest.approx(2 * encoders, abs=2000)


@pytest.mark.parametrize(
    ("name", "size", "shape"),
    [
        pytest.param("flux-dev", 512, (1024, 64), marks=slow),
        ("flux-dev", 1024, (4096, 64)),
        pytest.param("sd35-medium", 512, (64 * 64, 16), marks=slow),
        ("sd35-medium", 1024, (128 * 128, 16)),
        ("wan21-1.3b", VIDEO, (21 * 60 * 104, 16)),
    ],
)
def test_latents_have_the_shape_of_the_pipelines_own(
    name: str, size: int | tuple[int, int, int], shape: tuple[int, int], tmp_path: Path
) -> None:
    assert outline(tmp_path, name, size).latent_shape() == shape


@pytest.mark.parametrize(("side", "mib"), [(512, 0.75), pytest.param(1024, 3.0, marks=slow)])
def test_the_states_of_a_five_step_student_are_six_horizons_of_the_known_size(
    side: int, mib: float, tmp_path: Path
) -> None:
    """Those figures count `x`, the six states in float16; the five predictions `x0` beside them are stored as well."""
    student = outline(tmp_path, "flux-dev", side)
    _, horizons = aligned(student.stock_sigmas, 50, (5,), "nfe")
    state = 2 * student.latent_shape()[0] * student.latent_shape()[1]
    assert len(horizons) == 6 and len(horizons) * state == mib * MIB
    update = {"horizons": tuple(horizons), "latent_shape": student.latent_shape()}
    stored = latents_bytes(recipe_of(params_of()).model_copy(update=update))
    assert 0 < stored - 11 * state < 1000


def test_all_fifty_states_at_1024_px_are_the_known_25_mib(tmp_path: Path) -> None:
    student = outline(tmp_path, "flux-dev", 1024)
    _, horizons = aligned(student.stock_sigmas, 50, (5,), "all")
    tokens, channels = student.latent_shape()
    assert len(horizons) * 2 * tokens * channels == pytest.approx(25 * MIB, rel=0.03)


@pytest.mark.parametrize(
    ("name", "length", "mib"),
    [("sd35-medium", 256, 2.6), *(pytest.param(n, 512, 4.0, marks=slow) for n in ("flux-dev", "wan21-1.3b"))],
)
def test_a_prompts_embeddings_have_the_size_of_their_tokens(name: str, length: int, mib: float, tmp_path: Path) -> None:
    found = conditioning_shapes(outline(tmp_path, name, SIZES[name], length))
    assert embedding_bytes(found, torch.bfloat16) / MIB == pytest.approx(mib, rel=0.01)


@pytest.mark.parametrize(
    ("name", "size", "second"),
    [
        # dynamic shift: exp(mu) of 1024 tokens, mu = 0.5 + 0.65 (1024 - 256) / 3840 = 0.63
        ("flux-dev", 512, 1.8776106),
        pytest.param("flux-dev", 1024, 3.1581929, marks=slow),
        pytest.param("flux-schnell", 512, 1.0, marks=slow),
    ],
)
def test_flux_grids_are_evenly_spaced_sigmas_shifted_once(name: str, size: int, second: float, tmp_path: Path) -> None:
    sigmas = outline(tmp_path, name, size).stock_sigmas(4)
    expected = [second * t / (1 + (second - 1) * t) for t in (1.0, 0.75, 0.5, 0.25, 0.0)]
    assert sigmas == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["sd35-medium", pytest.param("wan21-1.3b", marks=slow)])
def test_the_static_shift_of_sd35_and_wan_is_three(name: str, tmp_path: Path) -> None:
    """Their timesteps run from 1000 down to the last training step, shifted once before the grid and once in it."""
    sigmas = outline(tmp_path, name, SIZES[name]).stock_sigmas(50)
    assert len(sigmas) == 51 and sigmas[25] == pytest.approx(3 * 0.4915 / (1 + 2 * 0.4915), abs=0.01)


def joint_block(tokens: int, text: int, width: int, dual: bool, last: bool) -> int:
    """FLOPs of a block of SD3: both streams' linears, joint attention, and a second one of the image's alone."""
    linear = 2 * width * width
    image = tokens * linear * (4 + 8 + (4 if dual else 0))
    prompt = text * linear * (3 if last else 4 + 8)
    attention = 4 * (tokens + text) ** 2 * width + (4 * tokens**2 * width if dual else 0)
    # six modulations a stream, nine with the second attention; the last block's prompt has two
    return image + prompt + attention + linear * ((9 if dual else 6) + (2 if last else 6))


def sd35_flops(side: int, text: int) -> int:
    """Of one evaluation, by hand: 24 blocks of width 1536, the first 13 with a second attention."""
    tokens, width = (side // 16) ** 2, 1536
    blocks = sum(joint_block(tokens, text, width, i < 13, i == 23) for i in range(24))
    ends = 2 * tokens * width * 64 * 2 + 2 * text * 4096 * width
    return blocks + ends + 2 * width * (2048 + 256 + 2 * width + 2 * width)


def wan_flops(frames: int, rows: int, columns: int, text: int) -> int:
    """Of one evaluation, by hand: 30 blocks of width 1536 with self-attention, cross-attention and a feed-forward."""
    tokens, width, hidden = frames * rows * columns // 4, 1536, 8960
    linear = 2 * width * width
    own = tokens * linear * 4 + 4 * tokens**2 * width
    cross = tokens * linear * 2 + text * linear * 2 + 4 * tokens * text * width
    blocks = 30 * (own + cross + 4 * tokens * width * hidden)
    ends = 2 * tokens * width * 64 * 2
    return blocks + ends + text * (2 * 4096 * width + linear) + 2 * 256 * width + linear * 7


def flux_flops(side: int, text: int) -> int:
    """Of one evaluation, by hand: 19 blocks of two streams, 38 of one, width 3072."""
    image, width = (side // 16) ** 2, 3072
    tokens, linear = image + text, 2 * width * width
    attention = 4 * tokens**2 * width
    double = tokens * linear * 12 + attention + linear * 12
    single = tokens * linear * 12 + attention + linear * 3
    ends = 2 * image * width * 64 * 2 + 2 * text * 4096 * width
    return 19 * double + 38 * single + ends + 2 * width * (2 * (256 + width) + 768 + width + 2 * width)


FLOPS: list[tuple[str, int | tuple[int, int, int], int, Callable[[], int]]] = [
    ("flux-dev", 512, 512, partial(flux_flops, 512, 512)),
    ("flux-dev", 1024, 512, partial(flux_flops, 1024, 512)),
    ("sd35-medium", 512, 256, partial(sd35_flops, 512, 333)),
    ("sd35-medium", 1024, 256, partial(sd35_flops, 1024, 333)),
    ("wan21-1.3b", VIDEO, 512, partial(wan_flops, 21, 60, 104, 512)),
]
"""Model, size, text tokens, and the count by hand of one evaluation."""


def test_the_counts_by_hand_of_flux_are_the_published_ones() -> None:
    assert flux_flops(512, 512) / 1e12 == pytest.approx(21.5, rel=0.005)
    assert flux_flops(1024, 512) / 1e12 == pytest.approx(74.4, rel=0.005)


@pytest.mark.parametrize(
    ("name", "size", "length", "by_hand"),
    [FLOPS[0], *(pytest.param(*case, marks=slow) for case in FLOPS[1:])],
)
def test_the_counter_finds_what_the_count_by_hand_finds(
    name: str, size: int | tuple[int, int, int], length: int, by_hand: Callable[[], int], tmp_path: Path
) -> None:
    assert evaluation_flops(outline(tmp_path, name, size, length)) == pytest.approx(by_hand(), rel=0.001)
