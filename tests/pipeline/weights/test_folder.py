"""A model's folder: fetched, read and hashed once, and found out anew elsewhere."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from rats.pipeline.families.open import Model
from rats.pipeline.weights.folder import INDEX, ModelFolder
from rats.pipeline.weights.hub import DECODER_PATTERNS, PIPELINE_PATTERNS
from rats.schemas.errors import ConfigError
from rats.schemas.params import ComputeParams, ModelParams, TeacherParams
from tests.support import tiny
from tests.support.hub import COMMIT, Hub

TEACHER = TeacherParams(height=tiny.SIZE, width=tiny.SIZE, max_sequence_length=tiny.LENGTH)


@pytest.fixture
def flux(models: Path, tmp_path: Path) -> Path:
    return shutil.copytree(models / "flux", tmp_path / "flux")


def model(path: object, **changes: Any) -> Model:
    return Model(ModelParams(path=str(path), **changes), TEACHER, ComputeParams())


def change(component: Path) -> None:
    config = component / "config.json"
    config.write_text(config.read_text().replace("{", '{"rats_test": 3, ', 1))


def test_what_was_hashed_stays_for_all_that_share_the_folder_and_not_for_a_pickled_one(flux: Path) -> None:
    first = model(flux)
    before = first.hashes()
    other_ways = first.using(compute=ComputeParams(threads=3)), first.using(teacher=TEACHER)
    change(flux / "vae")
    assert {way.folder.hash_of("vae") for way in (first, *other_ways)} == {before["vae"]}
    sent = pickle.loads(pickle.dumps(first))
    assert sent.params == first.params and sent.folder.hash_of("vae") != before["vae"]
    assert sent.folder.hash_of("transformer") == before["transformer"]


def test_a_worker_that_was_sent_the_model_sees_its_own_weights(flux: Path) -> None:
    first = model(flux)
    recipe = first.hashes()
    change(flux / "text_encoder_2")
    first.folder.check(recipe)
    with pytest.raises(ConfigError, match="text_encoder_2 holds other weights"):
        pickle.loads(pickle.dumps(first.folder)).check(recipe)


def test_another_network_is_looked_up_and_hashed_where_it_lies(flux: Path, tmp_path: Path) -> None:
    other = shutil.copytree(flux / "transformer", tmp_path / "other")
    change(other)
    own, replaced = model(flux), model(flux, transformer=str(other))
    assert replaced.folder.parts("transformer", "vae") == {"transformer": other, "vae": flux / "vae"}
    assert {name for name, value in own.hashes().items() if replaced.hashes()[name] != value} == {"transformer"}


def test_a_pinned_model_is_found_from_another_folder(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pinned = model("flux", transformer="flux/transformer").pinned()
    monkeypatch.chdir(flux)
    assert (pinned.params.path, pinned.params.transformer) == (str(flux), str(flux / "transformer"))
    assert pinned.hashes() == model(flux).hashes()


def test_all_parts_are_looked_for_before_one_is_loaded(flux: Path) -> None:
    shutil.rmtree(flux / "tokenizer_2")
    (flux / "text_encoder" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"no folder .*tokenizer_2: model\.path must name a whole pipeline"):
        model(flux).open_text()


@pytest.fixture
def hub(flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(flux, tmp_path / "cache", monkeypatch)


def test_of_a_hub_a_decoder_alone_is_fetched_where_no_more_is_needed(hub: Hub) -> None:
    pinned = model("someone/small").pinned(decoder_alone=True)
    assert pinned.params.revision == COMMIT
    assert pinned.open_decoder().latent_shape() == (4, 16)
    assert pinned.decoder_folder.hash_of("vae") == ModelFolder(ModelParams(path=str(hub.repository))).hash_of("vae")
    assert hub.asked == [(INDEX,), DECODER_PATTERNS]


def test_a_hub_is_asked_for_the_index_and_once_for_all_that_a_stage_opens(hub: Hub) -> None:
    pinned = model("someone/small").pinned()
    pinned.hashes(), pinned.folder.scheduler_hash(), pinned.outline.grids()
    pinned.using(compute=ComputeParams(threads=3)).open_student()
    pinned.open_decoder()
    assert hub.asked == [(INDEX,), PIPELINE_PATTERNS]
