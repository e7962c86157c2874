"""What is hashed of a model is what is opened of it: the same of a local folder, a hub's snapshot and a worker's."""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import BertTokenizerFast

from rats.pipeline.weights.files import opened_files
from rats.pipeline.weights.hashes import hash_path
from rats.pipeline.weights.vocabulary import check_files
from rats.schemas.errors import ConfigError
from tests.support.model_fuzz import WRITERS, copied, drawn, opened

NETWORK = "diffusion_pytorch_model"


@pytest.fixture(scope="module", params=WRITERS)
def intact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A family and its tiny folder."""
    return request.param, WRITERS[request.param][0](tmp_path_factory.mktemp("intact") / "model")


def listed(family: str, folder: Path) -> Iterator[Path]:
    for name in opened(family, folder).hashes():
        yield from opened_files(folder / name, name)


def test_a_folder_as_diffusers_writes_it_keeps_the_hashes_of_all_its_files(intact: tuple[str, Path]) -> None:
    family, folder = intact
    assert opened(family, folder).hashes() == {
        path.name: hash_path(path) for path in folder.iterdir() if path.is_dir() and path.name != "scheduler"
    }


def test_no_file_is_opened_that_is_not_hashed(intact: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    family, folder = intact
    seen, real = set(), builtins.open

    def watched(file: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(file, str | Path):
            seen.add(Path(file))
        return real(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", watched)
    opened(family, folder).open_teacher()
    monkeypatch.undo()
    mine = {path for path in seen if path.is_relative_to(folder) and path.parent.name not in ("scheduler", "model")}
    assert mine <= set(listed(family, folder)) and {path.name for path in mine} >= {"config.json"}


def test_what_lies_beside_changes_neither_the_hashes_nor_what_is_drawn(
    intact: tuple[str, Path], tmp_path: Path
) -> None:
    family, folder = intact
    copy = copied(folder, tmp_path / "model")
    for name in opened(family, folder).hashes():
        part = copy / name
        for beside in ("README.md", ".gitattributes", "picture.png", "LICENSE.txt", "notes.json", "onnx/model.onnx"):
            (part / beside).parent.mkdir(exist_ok=True)
            (part / beside).write_text("{}")
        if not name.startswith("tokenizer"):
            for other in (f"{NETWORK}.fp16.safetensors", "pytorch_model.bin", "flax_model.msgpack"):
                (part / other).write_bytes(b"of another library")
    shutil.copytree(copy / "transformer", copy / "transformer_old")
    assert opened(family, copy).hashes() == opened(family, folder).hashes()
    assert drawn(family, copy) == drawn(family, folder)


def test_another_machine_s_folder_may_hold_more_and_not_less(intact: tuple[str, Path], tmp_path: Path) -> None:
    family, folder = intact
    copy = copied(folder, tmp_path / "model")
    (copy / "transformer" / "README.md").write_text("from a clone")
    opened(family, copy).folder.check(opened(family, folder).hashes())
    (copy / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match="tokenizer holds other"):
        opened(family, copy).folder.check(opened(family, folder).hashes())


def test_of_weights_in_shards_the_index_and_its_shards_are_hashed(tmp_path: Path) -> None:
    folder = WRITERS["flux"][0](tmp_path / "flux") / "transformer"
    state = load_file(folder / f"{NETWORK}.safetensors")
    (folder / f"{NETWORK}.safetensors").unlink()
    halves = sorted(state)[::2], sorted(state)[1::2]
    names = [f"{NETWORK}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, keys in zip(names, halves, strict=True):
        save_file({key: state[key] for key in keys}, folder / name)
    index = {"weight_map": {key: name for name, keys in zip(names, halves, strict=True) for key in keys}}
    (folder / f"{NETWORK}.safetensors.index.json").write_text(json.dumps(index))
    (folder / f"{NETWORK}-00003-of-00002.safetensors").write_bytes(b"of another split")
    found = sorted(path.name for path in opened_files(folder, "transformer"))
    assert found == ["config.json", *names, f"{NETWORK}.safetensors.index.json"]


def test_a_tokenizer_of_files_that_no_address_knows_is_refused(tmp_path: Path) -> None:
    class Exotic(BertTokenizerFast):
        vocab_files_names = {"vocab_file": "bpe.codes", "tokenizer_file": "tokenizer.json"}

    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"a Exotic reads bpe\.codes"):
        check_files(Exotic, tmp_path)
