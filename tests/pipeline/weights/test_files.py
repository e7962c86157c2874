"""What people have in place of plain safetensors: copies in fp16, pickles, one file, something quantized."""

from __future__ import annotations

import json
import pickle
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rats.pipeline.families.open import Model
from rats.pipeline.weights.files import find_weights
from rats.pipeline.weights.hub import only_cached
from rats.schemas.errors import ConfigError, DataError, RatsError
from rats.stages.doctor.params import check_model
from tests.support.hub import Hub
from tests.support.model_fuzz import drawn, opened, replace

NETWORK, TEXT = "diffusion_pytorch_model.safetensors", "model.safetensors"
WEIGHED = {"transformer": NETWORK, "vae": NETWORK, "text_encoder": TEXT, "text_encoder_2": TEXT}


@pytest.fixture
def flux(models: Path, tmp_path: Path) -> Path:
    return shutil.copytree(models / "flux", tmp_path / "flux")


def as_fp16(folder: Path) -> None:
    """A component in one file of halves."""
    for name in (NETWORK, TEXT):
        if (folder / name).is_file():
            state = {key: tensor.half() for key, tensor in load_file(folder / name).items()}
            (folder / name).unlink()
            save_file(state, folder / name.replace(".safe", ".fp16.safe"), {"format": "pt"})


def as_fp16_shards(folder: Path) -> None:
    """Halves in two files, as transformers 4 and diffusers name them."""
    as_fp16(folder)
    (whole,) = folder.glob("*.fp16.safetensors")
    stem, state = whole.name.split(".")[0], load_file(whole)
    whole.unlink()
    keys, names = sorted(state), [f"{stem}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {key: names[i % 2] for i, key in enumerate(keys)}
    for name in names:
        save_file({key: state[key] for key in keys if where[key] == name}, folder / name, {"format": "pt"})
    index = {"metadata": {"total_size": 7}, "weight_map": where}
    (folder / f"{stem}.safetensors.index.fp16.json").write_text(json.dumps(index))


def as_pickle(folder: Path) -> None:
    """A component's weights as torch saves them."""
    for name, to in ((NETWORK, "diffusion_pytorch_model.bin"), (TEXT, "pytorch_model.bin")):
        if (folder / name).is_file():
            torch.save(load_file(folder / name), folder / to)
            (folder / name).unlink()


LAYOUTS = {"fp16": as_fp16, "fp16 shards": as_fp16_shards, "pickles": as_pickle}


def weights_of(model: Model) -> dict[str, torch.Tensor]:
    """Of all parts of the stock pipeline, whose network and decoder are the teacher's."""
    pipeline, teacher = model.open_pipeline(), model.open_teacher()
    for ours, stock in ((teacher.network, pipeline.transformer), (teacher.vae, pipeline.vae)):
        assert all(torch.equal(tensor, stock.state_dict()[name]) for name, tensor in ours.state_dict().items())
    parts = {name: getattr(pipeline, name).state_dict() for name in WEIGHED}
    return {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_another_layout_are_read_by_the_doctor_and_by_all_that_open_them(layout: str, flux: Path) -> None:
    wanted = weights_of(opened("flux", flux))
    is_half = layout != "pickles"
    for name in WEIGHED:
        LAYOUTS[layout](flux / name)
    assert ("(fp16 variants)" in check_model(opened("flux", flux))) == is_half
    assert opened("flux", flux).open_teacher().encode(["a red fox"])
    for name, tensor in weights_of(opened("flux", flux)).items():
        assert torch.equal(tensor, wanted[name].half().float() if is_half else wanted[name])
    assert {find_weights(flux / name).variant for name in WEIGHED} == {"fp16" if is_half else None}


def test_of_two_copies_the_plain_one_is_read(flux: Path) -> None:
    wanted = drawn("flux", flux)
    for name, file in WEIGHED.items():
        state = {key: 3 * tensor.half() for key, tensor in load_file(flux / name / file).items()}
        save_file(state, flux / name / file.replace(".safe", ".fp16.safe"), {"format": "pt"})
    assert drawn("flux", flux) == wanted
    size = sum((flux / name / file).stat().st_size for name, file in WEIGHED.items())
    assert sum(find_weights(flux / name).bytes for name in WEIGHED) == size


@pytest.fixture
def hub(flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(flux, tmp_path / "cache", monkeypatch)


def on_hub() -> Model:
    model = opened("flux", Path("somebody/small"))
    assert model.params.path == "somebody/small"
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_a_hub_without_plain_weights_the_others_are_fetched(layout: str, hub: Hub) -> None:
    LAYOUTS[layout](hub.repository / "text_encoder_2")
    LAYOUTS[layout](hub.repository / "vae")
    copies = hub.repository / "transformer" / "diffusion_pytorch_model.fp16.safetensors"
    copies.write_bytes(b"a copy that nobody needs")
    on_hub().pinned(decoder_alone=True).open_decoder()
    assert {Path(name).parts[0] for name in hub.fetched()} == {"model_index.json", "vae"}
    with only_cached(), pytest.raises(ConfigError, match="no folder .*`hf download somebody/small` fetches"):
        check_model(on_hub())
    pinned = pickle.loads(pickle.dumps(on_hub().pinned()))  # as a worker gets it
    assert pinned.open_text().encode(["a red fox"]) and "4 horizons" in check_model(on_hub())
    assert f"transformer/{copies.name}" not in hub.fetched()
    assert drawn("flux", hub.snapshot) == drawn("flux", hub.repository)


def test_a_hubs_index_is_looked_at_before_its_weights_are_fetched(hub: Hub) -> None:
    index = hub.repository / "model_index.json"
    replace(index, index.read_text().replace("FluxPipeline", "ZImagePipeline").encode())
    with pytest.raises(ConfigError, match="no installed family draws as a ZImagePipeline: docs/families.md"):
        on_hub().open_teacher()
    assert hub.fetched() == {"model_index.json"}
    index.unlink()
    (hub.snapshot / "model_index.json").unlink()
    with pytest.raises(ConfigError, match=r"somebody/small' has no model_index\.json: it is no diffusers pipeline"):
        on_hub().open_teacher()
    with only_cached(), pytest.raises(ConfigError, match=r"has no model_index\.json"):
        check_model(on_hub())
    assert hub.fetched() == set()


def one_file(name: str, network: Path, folder: Path) -> Path:
    return Path(shutil.copy(network / NETWORK, folder / name))


def test_one_file_of_weights_is_refused_with_the_command_that_converts_it(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = drawn("flux", flux)
    network = Path(shutil.move(flux / "transformer", tmp_path / "apart"))
    file = one_file("flux1 dev.safetensors", network, tmp_path)
    with pytest.raises(ConfigError) as refused:
        check_model(opened("flux", file))
    with pytest.raises(ConfigError, match="is one file of weights"):
        opened("flux", file).open_decoder()
    shutil.copytree(network, flux / "transformer")  # the PIPELINE that the command asks for
    (flux / "transformer" / NETWORK).unlink()
    said = re.search("`(.*)`", str(refused.value))[1].replace("'PIPELINE'", f"'{flux}'").replace("bfloat16", "float32")
    python, c, code = shlex.split(said)
    monkeypatch.chdir(tmp_path)
    exec(code, {})  # offline, as all tests are
    assert (python, c) == ("python", "-c")
    model = opened("flux", flux)
    model.params = model.params.model_copy(update={"transformer": str(tmp_path / "NETWORK")})
    assert "4 horizons" in check_model(model)
    shutil.copy(tmp_path / "NETWORK" / NETWORK, flux / "transformer")
    assert drawn("flux", flux) == wanted


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("unet.gguf", r"GGUFQuantizationConfig.*\)\.dequantize\(\)\.save_pretrained\('NETWORK'\)"),
        ("sd.ckpt", r"d\.FluxTransformer2DModel\.from_single_file\('.*sd\.ckpt', config='PIPELINE'"),
        ("flora.safetensors", r"flora\.safetensors is one file of weights"),
    ],
)
def test_a_folder_that_holds_one_file_alone_says_what_it_is(name: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"weights")
    for model in (opened("flux", tmp_path), opened("flux", tmp_path / name)):
        with pytest.raises(ConfigError, match=hint) as refused:
            check_model(model)
        assert "\n" not in str(refused.value)


def test_a_lora_in_the_models_place_is_called_one(tmp_path: Path) -> None:
    save_file({"transformer.a.lora_A.weight": torch.full((2, 3), 0.5)}, tmp_path / "style.safetensors")
    for place in (tmp_path, tmp_path / "style.safetensors"):
        with pytest.raises(ConfigError, match=r"style\.safetensors is a LoRA: .* under model\.loras"):
            check_model(opened("flux", place))


def test_one_file_in_a_components_folder_or_for_a_network_is_refused_alike(flux: Path, tmp_path: Path) -> None:
    file = one_file("other.safetensors", flux / "transformer", tmp_path)
    model = opened("flux", flux)
    model.params = model.params.model_copy(update={"transformer": str(file)})
    with pytest.raises(ConfigError, match=r"other\.safetensors is one file of weights"):
        check_model(model)
    (flux / "vae" / NETWORK).rename(flux / "vae" / "ae.safetensors")
    with pytest.raises(ConfigError, match=r"no weights in .*vae under a name of diffusers.*take ae\.safetensors away"):
        opened("flux", flux).open_decoder()


def test_a_folder_without_an_index_draws_in_a_stock_pipeline_too(flux: Path) -> None:
    def picture() -> Any:
        model = opened("flux", flux)
        pipeline = model.open_pipeline()
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(5)
        return pipeline(
            "a red fox", num_inference_steps=3, generator=generator, output_type="pt", **model.call()
        ).images

    with_index = picture()
    (flux / "model_index.json").unlink()
    assert torch.equal(picture(), with_index) and "4 horizons" in check_model(opened("flux", flux))


def custom_index(flux: Path) -> None:
    path = flux / "model_index.json"
    values = json.loads(path.read_text()) | {"transformer": ["my_modeling", "FluxTransformer2DModel"]}
    path.write_text(json.dumps(values))
    (flux / "transformer" / "my_modeling.py").write_text("raise SystemExit('nobody runs me')")


def custom_class(flux: Path) -> None:
    path = flux / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "MyTransformer"}))


def not_unloaded(flux: Path) -> None:
    """What `save_pretrained` writes after `fuse_lora` alone."""
    path = flux / "transformer" / NETWORK
    state = load_file(path)
    name = next(name for name in state if name.endswith("attn.to_q.weight"))
    state[name.replace(".weight", ".base_layer.weight")] = state.pop(name)
    state[name.replace(".weight", ".lora_A.default_0.weight")] = torch.full((3, 32), 0.5)
    save_file(state, path, {"format": "pt"})


def quantized(method: str) -> Callable[[Path], None]:
    def quantize(flux: Path) -> None:
        for part in ("transformer", "text_encoder_2"):
            path = flux / part / "config.json"
            values = json.loads(path.read_text()) | {"quantization_config": {"quant_method": method}}
            path.write_text(json.dumps(values))

    return quantize


@pytest.mark.parametrize(
    ("breaks", "hint"),
    [
        (custom_index, r"its transformer from my_modeling.*\[\"diffusers\", \"FluxTransformer2DModel\"\]"),
        (custom_class, "holds a 'MyTransformer', not a FluxTransformer2DModel"),
        (not_unloaded, r"holds a LoRA that was not unloaded .*pipe\.unload_lora_weights\(\)"),
        (quantized("bitsandbytes"), r"'bitsandbytes'.*m\.(Flux|T5)\w+\.from_pretrained\('.*'.*\.dequantize\(\)"),
        (quantized("torchao"), r"'torchao'.*\.dequantize\(\)\.save_pretrained\('PLAIN'\)"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(breaks: Callable[[Path], None], hint: str, flux: Path) -> None:
    breaks(flux)
    for look in (check_model, Model.open_teacher, Model.open_pipeline):
        with pytest.raises(RatsError, match=hint) as refused:
            look(opened("flux", flux))
        assert "\n" not in str(refused.value) and isinstance(refused.value, ConfigError | DataError)
