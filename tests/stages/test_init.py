"""`rats init` knows a model's family, and a model is held against the family that opens it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from rats.pipeline.families.index import family_of
from rats.pipeline.families.open import Model
from rats.schemas.errors import ConfigError
from rats.schemas.params import ComputeParams, ModelParams, TeacherParams, load_params
from rats.schemas.plugins import FAMILIES, load_plugin, plugins_in
from tests.support.hub import Hub
from tests.support.project import rats

TEACHER = TeacherParams(height=16, width=16)


def relabelled(models: Path, folder: Path, name: str | None) -> Path:
    """The tiny FLUX, its model_index.json of another pipeline, or away."""
    shutil.copytree(models / "flux", folder)
    path = folder / "model_index.json"
    values = json.loads(path.read_text()) | {"_class_name": name}
    path.unlink() if name is None else path.write_text(json.dumps(values))
    return folder


def test_the_family_is_read_from_the_models_own_index(models: Path, tmp_path: Path):
    rats(tmp_path, "init", "mine", "--model", str(models / "flux"))
    assert load_params(tmp_path / "mine" / "params.yaml").model.family == "flux"
    video = relabelled(models, tmp_path / "video", "WanPipeline")
    rats(tmp_path, "init", "film", "--model", str(video))
    params = load_params(tmp_path / "film" / "params.yaml")
    assert (params.model.family, params.teacher.frames, params.compute.micro_batch) == ("wan", 81, 1)


@pytest.mark.parametrize(
    ("hub_id", "family", "scale"),
    [
        ("black-forest-labs/FLUX.1-dev", "flux", 1.0),
        ("stabilityai/stable-diffusion-3.5-medium", "sd3", 4.5),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "wan", 5.0),
        ("Qwen/Qwen-Image", "qwen-image", 4.0),
        ("black-forest-labs/FLUX.2-klein-base-4B", "flux2", 4.0),
    ],
)
def test_a_published_model_is_known_by_its_name(tmp_path: Path, hub_id: str, family: str, scale: float):
    rats(tmp_path, "init", "mine", "--model", hub_id)
    params = load_params(tmp_path / "mine" / "params.yaml")
    assert (params.model.path, params.model.family, params.teacher.true_cfg_scale) == (hub_id, family, scale)
    # a set guidance_scale is refused by families that have no such input
    assert ("guidance_scale" in params.teacher.model_fields_set) == (family == "flux")


def test_every_familys_suggestions_can_be_written(tmp_path: Path):
    for name in plugins_in(FAMILIES):
        rats(tmp_path, "init", name, "--model", "somebody/something", "--family", name)
        teacher = load_params(tmp_path / name / "params.yaml").teacher
        wanted = load_plugin(FAMILIES, name).suggested
        assert {field: getattr(teacher, field) for field in wanted} == wanted


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--model", "somebody/something"], "--family"),
        (["--family", "fluks"], "did you mean 'flux'?"),
        (["--model", "unknown"], "no installed family draws as a SomePipeline: docs/families.md"),
        (["--model", "bare"], "model_index.json"),
    ],
)
def test_a_model_of_no_known_family_is_asked_about(models: Path, tmp_path: Path, arguments: list[str], hint: str):
    relabelled(models, tmp_path / "unknown", "SomePipeline")
    relabelled(models, tmp_path / "bare", None)
    said = rats(tmp_path, "init", "mine", *arguments, code=2).stderr
    assert hint in said and said.count("\n") == 1 and not (tmp_path / "mine").exists()


FOREIGN = {
    "Tongyi-MAI/Z-Image-Turbo": ({"_class_name": "ZImagePipeline"}, "no installed family draws as a ZImagePipeline"),
    "Efficient-Large-Model/Sana_1600M": (
        {"_class_name": "SanaPipeline"},
        "no installed family draws as a SanaPipeline",
    ),
    "black-forest-labs/FLUX.1-Fill-dev": ({"_class_name": "FluxFillPipeline"}, "family draws as a FluxFillPipeline"),
    "black-forest-labs/FLUX.1-Kontext-dev": ({"_class_name": "FluxKontextPipeline"}, "draws as a FluxKontextPipeline"),
    "black-forest-labs/FLUX.2-klein-4B": ({"_class_name": "Flux2KleinPipeline", "is_distilled": True}, "is_distilled"),
    "Qwen/Qwen-Image-Edit": ({"_class_name": "QwenImageEditPipeline"}, "family draws as a QwenImageEditPipeline"),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": ({"_class_name": "WanPipeline", "expand_timesteps": True}, "a Wan2.2 pipeline"),
    "Wan-AI/Wan2.1-T2V-1.3B": (None, "has no model_index.json: it is no diffusers pipeline .*-Diffusers"),
    "stabilityai/stable-diffusion-3-medium": (None, "has no model_index.json"),
}
"""By hub id: what its model_index.json says, and what is said of it."""


@pytest.mark.parametrize("family", [None, "flux"])
@pytest.mark.parametrize("hub_id", FOREIGN)
def test_a_pipeline_that_no_family_draws_is_refused_before_its_weights_are_fetched(
    hub_id: str, family: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    index, hint = FOREIGN[hub_id]
    repository = tmp_path / "repository"
    (repository / "transformer").mkdir(parents=True)
    (repository / "transformer" / "config.json").write_text("{}")
    if index is not None:
        (repository / "model_index.json").write_text(json.dumps(index))
    hub = Hub(repository, tmp_path / "cache", monkeypatch)
    asked = ["--family", family] if family else []
    said = rats(tmp_path, "init", "mine", "--model", hub_id, *asked, code=2).stderr
    assert re.search(hint if family is None else f"{hint}|set model.family: ", said) and said.count("\n") == 1
    assert hub.fetched() <= {"model_index.json"} and not (tmp_path / "mine").exists()


def test_a_model_of_the_hub_is_known_by_its_index_alone(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub = Hub(models / "flux", tmp_path / "cache", monkeypatch)
    rats(tmp_path, "init", "mine", "--model", "somebody/fine-tuned")
    assert load_params(tmp_path / "mine" / "params.yaml").model.family == "flux"
    assert hub.fetched() == {"model_index.json"}


def test_a_published_model_is_known_by_its_whole_name_without_a_request(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hub = Hub(models / "flux", tmp_path / "cache", monkeypatch)
    names = {name: load_plugin(FAMILIES, name).published for name in plugins_in(FAMILIES)}
    assert all(hub_id.count("/") == 1 and family_of(hub_id) == name for name, ids in names.items() for hub_id in ids)
    assert hub.asked == []


def test_a_file_or_a_pipeline_of_another_family_is_not_written_down(models: Path, tmp_path: Path):
    (tmp_path / "flux1-dev.safetensors").write_bytes(b"weights")
    arguments = ("init", "mine", "--model", "flux1-dev.safetensors")
    assert "is one file of weights" in rats(tmp_path, *arguments, code=2).stderr
    assert "from_single_file('flux1-dev.safetensors'" in rats(tmp_path, *arguments, "--family", "flux", code=2).stderr
    arguments = ("init", "mine", "--model", str(models / "flux"), "--family", "sd3")
    assert "set model.family: flux" in rats(tmp_path, *arguments, code=2).stderr


def opened(model: ModelParams) -> Model:
    return Model(model, TEACHER, ComputeParams())


def test_a_model_is_opened_by_the_family_that_its_index_names(models: Path, tmp_path: Path):
    other = ModelParams(path=str(relabelled(models, tmp_path / "other", "StableDiffusion3Pipeline")))
    for attribute in ("outline", "folder", "decoder_folder"):
        with pytest.raises(ConfigError, match="set model.family: sd3"):
            getattr(opened(other), attribute)
    unknown = ModelParams(path=str(relabelled(models, tmp_path / "unknown", "SomePipeline")))
    with pytest.raises(ConfigError, match="no installed family draws as a SomePipeline: docs/families.md"):
        opened(unknown).open_decoder()
    with pytest.raises(ConfigError, match="set model.family: flux"):
        opened(ModelParams(path=str(models / "flux"), family="sd3")).open_student()


def test_a_folder_without_an_index_is_opened_as_what_it_is_said_to_be(models: Path, tmp_path: Path):
    bare = ModelParams(path=str(relabelled(models, tmp_path / "bare", None)))
    assert opened(bare).outline.latent_shape() == (4, 16)
    (Path(bare.path) / "model_index.json").write_text("{}")
    assert opened(bare).outline.latent_shape() == (4, 16)
