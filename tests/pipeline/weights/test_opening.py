"""Whatever a library raises while a file is opened becomes one line with the way out that fits the cause."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from rats.pipeline.rewards.open import open_reward
from rats.pipeline.weights.loading import load_component, read_state
from rats.pipeline.weights.opening import opening
from rats.schemas.errors import ConfigError, DataError, RatsError, StorageError
from rats.schemas.params import ComputeParams, ModelParams, RewardParams
from tests.support import tiny

ANEW = "fetch or export it again"


class Runs:
    """Runs something when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return exit, (7,)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_no_refusal_of_a_pickle_says_how_to_run_what_is_in_it(tmp_path: Path, save: Callable[..., object]) -> None:
    save({"a": Runs()}, tmp_path / "a.pt")
    with pytest.raises(DataError, match="it holds more than tensors, which could run code") as raised:
        read_state(tmp_path / "a.pt")
    with pytest.raises(DataError, match="more than tensors") as opened, opening(tmp_path, "a model"):
        torch.load(tmp_path / "a.pt", weights_only=True)
    for error in (raised.value, opened.value):
        assert "weights_only" not in str(error) and "False" not in str(error)


@pytest.mark.parametrize(
    ("error", "kind", "way_out"),
    [
        (ImportError("needs `gguf`"), ConfigError, "a package is missing"),
        (PackageNotFoundError("bitsandbytes"), ConfigError, "a package is missing"),
        (RuntimeError("No GPU found. A GPU is needed for FP8"), ConfigError, "use a machine with a GPU"),
        (PermissionError(13, "Permission denied"), StorageError, "the right to read it"),
        (RuntimeError("size mismatch for a.weight"), DataError, "take both from one source"),
        (pickle.UnpicklingError("invalid load key"), DataError, ANEW),
        (json.JSONDecodeError("Expecting value", "x", 0), DataError, ANEW),
        (TypeError("unhashable"), DataError, ANEW),
        (ZeroDivisionError("integer modulo by zero"), DataError, ANEW),
        (KeyError("added_tokens"), DataError, "KeyError: 'added_tokens'"),
    ],
)
def test_an_error_of_a_library_gets_the_file_the_reason_and_the_way_out(
    error: Exception, kind: type[RatsError], way_out: str
) -> None:
    with (
        pytest.raises(kind, match="parts/vae does not load as AutoencoderKL") as refusal,
        opening("parts/vae", "AutoencoderKL"),
    ):
        raise error
    assert way_out in str(refusal.value) and "\n" not in str(refusal.value)
    assert (ANEW in str(refusal.value)) == (kind is DataError and "one source" not in way_out)


def test_a_full_memory_and_our_own_errors_pass_as_they_are() -> None:
    for error in (torch.OutOfMemoryError("40 GiB"), MemoryError(), ConfigError("teacher.width is 20")):
        with pytest.raises(type(error)) as raised, opening("parts/vae", "AutoencoderKL"):
            raise error
        assert raised.value is error


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_left_over_are_refused(device: str, tmp_path: Path) -> None:
    model, compute = ModelParams(path="x"), ComputeParams().model_copy(update={"device": device})
    tiny.vae().save_pretrained(tmp_path)
    opened = load_component(AutoencoderKL, tmp_path, model, compute)
    assert (opened.device.type, opened.training) == (device, False)
    add(tmp_path, "decoder.more.weight")
    with pytest.raises(DataError, match=r"1 weights that a AutoencoderKL .* no place for, decoder.more.weight first"):
        load_component(AutoencoderKL, tmp_path, model, compute)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_text_encoder_may_be_cut_out_of_a_larger_model(device: str, models: Path, tmp_path: Path) -> None:
    model, compute = ModelParams(path="x"), ComputeParams().model_copy(update={"device": device})
    folder = Path(shutil.copytree(models / "flux/text_encoder", tmp_path / "clip"))
    for harmless in ("text_model.embeddings.position_ids", "vision_model.post_layernorm.weight", "logit_scale"):
        add(folder, harmless)
    load_component(CLIPTextModel, folder, model, compute)
    add(folder, "text_model.encoder.layers.5.layer_norm1.weight")
    with pytest.raises(DataError, match=r"1 weights that a CLIPTextModel .* no place for"):
        load_component(CLIPTextModel, folder, model, compute)


def add(folder: Path, name: str) -> None:
    """One more tensor in the folder's file."""
    (path,) = folder.glob("*.safetensors")
    save_file(load_file(path) | {name: torch.arange(7.0)}, path, {"format": "pt"})


def test_a_reward_s_damaged_settings_are_one_line_too(models: Path, tmp_path: Path) -> None:
    tiny.write_pickscore(tmp_path / "reward")
    path = tmp_path / "reward" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"text_config": [3]}))
    with pytest.raises(DataError, match=r"reward does not load as reward 'mine' \(pickscore\)"):
        open_reward(RewardParams(name="mine", adapter="pickscore", path=str(tmp_path / "reward")))
