"""Who a sample is, which noise it has, and in which order it is read."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rats.pipeline.noise import noise
from rats.schemas.identity import KEY_PATTERN, normalise, prompt_id, sample_key
from rats.trainer.data import row_at

ID = prompt_id("a red apple")


@given(st.text(), st.integers(0, 20_000))
def test_a_key_has_no_dot_and_survives_webdatasets_splitting(text: str, noise_index: int) -> None:
    key = sample_key(prompt_id(text.encode("utf-8", "replace").decode()), noise_index)
    assert re.fullmatch(KEY_PATTERN, key)
    assert len(key) <= 80


def test_spacing_and_unicode_form_do_not_change_who_a_prompt_is() -> None:
    assert (
        prompt_id(" a  cafe\u0301\n") == prompt_id("a caf\u00e9") == prompt_id(unicodedata.normalize("NFD", "a café"))
    )
    assert prompt_id("a cafe") != prompt_id("a café")
    assert normalise("\ta \u00a0 b ") == "a b"


def test_noise_depends_on_seed_prompt_and_index_alone() -> None:
    first = noise(0, ID, 0, (4, 8))
    torch.manual_seed(1)
    assert torch.equal(first, noise(0, ID, 0, (4, 8)))
    others = [noise(1, ID, 0, (4, 8)), noise(0, prompt_id("b"), 0, (4, 8)), noise(0, ID, 1, (4, 8))]
    assert not any(torch.equal(first, other) for other in others)


def test_noise_is_the_same_on_every_machine() -> None:
    expected = np.array([-1.6538745, 2.0925393, 0.6390826, -0.0760288, 0.6240308, 0.2454905])
    np.testing.assert_allclose(noise(0, ID, 0, (2, 3)).flatten().numpy(), expected, rtol=0, atol=1e-6)


def test_noise_is_standard_normal_and_uncorrelated_between_indexes() -> None:
    values = torch.stack([noise(3, ID, i, (64, 64)).flatten() for i in range(16)]).double()
    assert values.dtype == torch.float64 and noise(3, ID, 0, (3,)).dtype == torch.float32
    assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02
    assert abs((values**4).mean() - 3) < 0.15
    assert (torch.corrcoef(values) - torch.eye(16)).abs().max() < 0.1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5), st.integers(1, 60), st.integers(0, 4))
def test_an_epoch_reads_every_row_once(seed: int, n: int, epoch: int) -> None:
    assert sorted(row_at(seed, n, epoch * n + i) for i in range(n)) == list(range(n))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(row_at(seed, 50, epoch * 50 + i) for i in range(50)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_a_position_in_a_million_rows_is_found_without_walking() -> None:
    assert 0 <= row_at(0, 1_000_000, 123_456_789) < 1_000_000


def test_the_order_of_a_fixed_seed_never_changes() -> None:
    assert [row_at(0, 8, i) for i in range(16)] == [4, 0, 2, 6, 3, 1, 7, 5, 0, 2, 6, 7, 1, 4, 5, 3]


@pytest.mark.parametrize("shape", [(), (1,), (3, 5)])
def test_noise_has_the_asked_shape(shape: tuple[int, ...]) -> None:
    assert noise(0, ID, 0, shape).shape == shape
    assert np.isfinite(noise(0, ID, 0, shape).numpy()).all()
