"""A picture that is not finite is refused before anybody scores it, and the VAE or the network is blamed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rats.pipeline.families.models import FamilyDecoder, checked_decoding
from rats.schemas.errors import DataError
from tests.support.model_fuzz import WRITERS, opened, write_all


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny folder of every family."""
    return write_all(tmp_path_factory.mktemp("folders"))


def decoder(family: str, folders: Path, dtype: str) -> FamilyDecoder:
    """One whose activations pass float16's range; a norm brings them back where the range is that of float32."""
    model = opened(family, folders / family)
    model.params = model.params.model_copy(update={"dtype": dtype})
    found = model.open_decoder()
    with torch.no_grad():
        found.vae.decoder.conv_in.weight.mul_(2e4)
        found.vae.decoder.conv_in.bias.fill_(6e4)
    return found


def latents(of: FamilyDecoder) -> torch.Tensor:
    return 9 * torch.randn(3, *of.latent_shape(), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", WRITERS)
def test_a_vae_that_overflows_is_named_with_its_dtype_and_the_way_out(family: str, folders: Path) -> None:
    half = decoder(family, folders, "float16")
    said = f"{folders / family / 'vae'}, .* in float16, decodes finite latents .*set model.dtype to bfloat16 or float32"
    with torch.no_grad(), pytest.raises(DataError, match=said):
        half.decode(latents(half))
    for dtype in ("bfloat16", "float32"):
        whole = decoder(family, folders, dtype)
        with torch.no_grad():
            assert torch.isfinite(whole.decode(latents(whole))).all()


def test_an_infinity_is_no_white_picture(folders: Path) -> None:
    half = decoder("flux", folders, "float32")
    with torch.no_grad():
        half.vae.decoder.conv_out.bias[1] = torch.inf
        with pytest.raises(DataError, match="its weights are damaged, fetch or export it again"):
            half.decode(latents(half))


def test_latents_that_are_not_finite_are_not_the_vaes_fault(folders: Path) -> None:
    whole = decoder("flux", folders, "float32")
    x_BTC = latents(whole)
    x_BTC[1, 2, 3] = torch.nan
    with (
        torch.no_grad(),
        pytest.raises(DataError, match="1 of 3 final latents are not finite.* the network has diverged"),
    ):
        whole.decode(x_BTC)


def test_a_pipelines_own_decoding_is_checked_as_long_as_it_is_asked_for(folders: Path) -> None:
    half = decoder("flux", folders, "float16")
    z = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(5)).half()
    with torch.no_grad():
        with checked_decoding(half.vae), pytest.raises(DataError, match="in float16, decodes finite latents"):
            half.vae.decode(z)
        assert not torch.isfinite(half.vae.decode(z).sample).all()
