"""`model.loras`: the bits that diffusers' own fusing gives, in every family, and nothing dropped without a word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rats.pipeline.families.open import Model
from rats.pipeline.weights.folder import LORA_FILE
from rats.schemas.errors import ConfigError, DataError
from rats.schemas.fused_lora import FusedLora
from rats.schemas.params import ModelParams
from rats.stages.doctor.params import check_model
from tests.support import tiny
from tests.support.model_fuzz import WRITERS, opened
from tests.support.styles import write_lora


def with_loras(model: Model, *loras: tuple[Path, float]) -> Model:
    fused = tuple(FusedLora(path=str(path), weight=weight) for path, weight in loras)
    return Model(model.params.model_copy(update={"loras": fused}), model.teacher, model.compute)


@pytest.mark.parametrize("family", WRITERS)
def test_teacher_student_and_pipeline_have_the_bits_that_diffusers_fuses(family: str, tmp_path: Path) -> None:
    plain = opened(family, WRITERS[family][0](tmp_path / "model"))
    files = [(write_lora(plain, tmp_path / f"lora-{seed}", seed), weight) for seed, weight in ((3, 0.8), (4, -0.3))]
    stock = plain.open_pipeline()
    for path, weight in files:
        stock.load_lora_weights(path.parent, weight_name=path.name)
        stock.fuse_lora(lora_scale=weight)
        stock.unload_lora_weights()
    before, wanted = plain.base_network().state_dict(), stock.transformer.state_dict()
    assert any(float((wanted[name] - before[name]).abs().max()) > 0.02 for name in wanted)
    model = with_loras(plain, *files)
    networks = [model.open_teacher().network, model.open_student().network, model.base_network()]
    for network in (*networks, model.open_pipeline().transformer):
        state = network.state_dict()
        assert state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert all(weight.requires_grad for weight in networks[1].parameters()), "the student's can be trained"
    assert f"{files[0][0]} at 0.8, {files[1][0]} at -0.3" in check_model(model)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return opened("flux", tiny.write_flux(tmp_path_factory.mktemp("fused") / "flux"))


@pytest.fixture(scope="module")
def style(flux: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(flux, tmp_path_factory.mktemp("style"))


def test_the_networks_hash_follows_the_files_content_their_weights_and_order(
    flux: Model, style: Path, tmp_path: Path
) -> None:
    other = write_lora(flux, tmp_path / "other", seed=6)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(style.read_bytes())

    def hashes(*loras: tuple[Path, float]) -> dict[str, str]:
        return with_loras(flux, *loras).hashes()

    first, plain = hashes((style, 0.8)), flux.hashes()
    assert {name for name in plain if plain[name] != first[name]} == {"transformer"}
    assert hashes((copy, 0.8)) == first == hashes((style.parent, 0.8))
    both = [hashes((style, 0.8), (other, 0.7)), hashes((other, 0.7), (style, 0.8))]
    several = [plain, first, hashes((style, 0.7)), hashes((other, 0.8)), *both]
    assert len({one["transformer"] for one in several}) == len(several)
    with pytest.raises(ConfigError, match="transformer holds other weights"):
        with_loras(flux, (style, 0.7)).folder.check(first)


def test_a_pinned_model_finds_its_loras_from_another_folder(
    flux: Model, style: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(style.parent)
    model = with_loras(flux, (Path(LORA_FILE), 0.8))
    pinned = model.pinned()
    monkeypatch.chdir(tmp_path)
    assert pinned.params.loras == (FusedLora(path=str(style), weight=0.8),)
    assert Model(pinned.params, pinned.teacher, pinned.compute).hashes() == model.hashes()


def test_loras_of_a_hub_are_of_the_commit_that_was_fetched(
    flux: Model, style: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "fedcba9876" * 4
    snapshot = tmp_path / "models--somebody--styles" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "oil.safetensors").write_bytes(style.read_bytes())
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = with_loras(flux, (Path("somebody/styles/oil.safetensors"), 0.8))
    (pinned,) = model.pinned().params.loras
    assert (pinned.path, pinned.revision) == ("somebody/styles/oil.safetensors", commit)
    assert model.hashes() == with_loras(flux, (style, 0.8)).hashes()


def changed(style: Path, to: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """The LoRA's tensors as `change` makes them, in a file without metadata."""
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(style)).items()}, to)
    return to


def named(old: str, new: str) -> Any:
    return lambda state: {name.replace(old, new): tensor for name, tensor in state.items()}


def cut(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[:, :-3] if ".lora_A." in name else tensor for name, tensor in state.items()}


def more(name: str) -> Any:
    return lambda state: state | {name: torch.full((2, 16), 0.5)}


REFUSED = {
    "a block too many": (named("transformer_blocks.0.", "transformer_blocks.7."), r"blocks\.7\.attn\.to_q.*no linear"),
    "another width": (cut, r"of shape \(2, 29\) for a layer of 32 to 32: name a LoRA of this model"),
    "another model's names": (named("transformer.", "unet."), "adapts unet.*no linear layer of a FluxTransformer2D"),
    "a text encoder's too": (more("text_encoder.a.lora_A.weight"), r"text_encoder\.a.*pipe\.save_pretrained\(DIR\)"),
    "a DoRA": (more("transformer.transformer_blocks.0.attn.to_q.dora_scale"), "is a DoRA .*dora_scale"),
    "a LoKr": (named("lora_A", "lokr_w1"), "lokr_w1"),
    "no LoRA": (lambda state: {"decoder.weight": torch.full((2, 2), 0.5)}, r"adapts decoder\.weight"),
    "nothing": (lambda state: {}, "holds no LoRA"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_lora_of_another_model_is_refused_before_a_weight_is_read(
    name: str, flux: Model, style: Path, tmp_path: Path
) -> None:
    change, said = REFUSED[name]
    model = with_loras(flux, (changed(style, tmp_path / "other.safetensors", change), 0.8))
    for look in (check_model, lambda model: model.outline, Model.open_student):
        with pytest.raises(DataError, match=said) as refused:
            look(model)
        assert "\n" not in str(refused.value)


def test_a_lora_by_the_names_of_kohyas_scripts_is_fused_at_its_alpha(flux: Model, tmp_path: Path) -> None:
    down, up = torch.linspace(-0.5, 0.7, 64).reshape(2, 32), torch.linspace(0.9, -0.4, 64).reshape(32, 2)
    name, path = "lora_unet_double_blocks_0_img_attn_proj", tmp_path / "kohya.safetensors"
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(3.0)}
    save_file({f"{name}.{part}": tensor for part, tensor in tensors.items()}, path)
    module = "transformer_blocks.0.attn.to_out.0.weight"
    before = flux.base_network().state_dict()[module]
    after = with_loras(flux, (path, 0.8)).base_network().state_dict()[module]
    assert torch.allclose(after - before, 0.8 * 3 / 2 * up @ down, atol=1e-6)


def test_what_a_converter_passes_over_with_a_warning_is_refused(tmp_path: Path) -> None:
    model, path = opened("flux2", WRITERS["flux2"][0](tmp_path / "model")), tmp_path / "kohya.safetensors"
    layer = model.outline.network.transformer_blocks[0].attn.to_out[0]
    sizes = {"lora_down": (2, layer.in_features), "lora_up": (layer.out_features, 2)}
    named = {
        f"lora_unet_double_blocks_0_img_attn_proj.{side}.weight": torch.ones(*size) for side, size in sizes.items()
    }
    save_file(named, path)
    assert "kohya.safetensors at 0.8" in check_model(with_loras(model, (path, 0.8)))
    save_file(named | {"lora_unet_nowhere.lora_up.weight": torch.full((3, 2), 0.5)}, path)
    with pytest.raises(DataError, match="does not load whole as a LoRA of a Flux2KleinPipeline .*lora_unet_nowhere"):
        check_model(with_loras(model, (path, 0.8)))


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [(None, ConfigError, "no model at|pytorch_lora"), (b"<html>404</html>", DataError, "does not load as a LoRA")],
)
def test_a_missing_or_damaged_file_is_said(
    data: bytes | None, error: type[Exception], said: str, flux: Model, tmp_path: Path
) -> None:
    path = tmp_path / "style.safetensors"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(error, match=said):
        check_model(with_loras(flux, (path, 0.8)))


def test_the_seed_of_nobody_is_touched(flux: Model, style: Path) -> None:
    torch.manual_seed(9)
    wanted = torch.rand(3)
    torch.manual_seed(9)
    with_loras(flux, (style, 0.8)).open_student()
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("weight", [0, float("nan"), float("inf"), "strong"])
def test_a_weight_is_a_number_that_changes_something(weight: Any) -> None:
    with pytest.raises(ValueError, match="weight"):
        ModelParams.model_validate({"path": "flux", "loras": [{"path": "a.safetensors", "weight": weight}]})
