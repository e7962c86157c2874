"""A file that says it is large, or unfolds to much, is refused before a library allocates what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from rats.pipeline.bounds import MAX_HEADER
from rats.pipeline.store.embeddings import read_embedding, verify_embedding
from rats.pipeline.weights.loading import read_state
from rats.pipeline.weights.opening import check_headers
from rats.schemas.errors import DataError
from rats.stages.measure.kid import open_real
from rats.stages.measure.pictures import load_pictures
from tests.support.shards import embed, wanted, write_set

READERS: dict[str, Callable[[Path], object]] = {
    "weights": read_state,
    "component": lambda path: check_headers(torch.nn.Linear, [path]),
    "features": open_real,
    "pictures": load_pictures,
}


def large_header(more: int) -> bytes:
    """A sound file of one tensor, whose header has `more` bytes than are allowed."""
    text = save({"a": torch.full((3,), 2.5)}, {"text": ""})
    length = int.from_bytes(text[:8], "little")
    header = text[8 : 8 + length].rstrip().ljust(MAX_HEADER + more)
    return len(header).to_bytes(8, "little") + header + text[8 + length :]


@pytest.mark.parametrize("name", READERS)
def test_a_header_that_is_too_large_is_refused_before_it_is_parsed(tmp_path: Path, name: str):
    (tmp_path / "a.safetensors").write_bytes(large_header(8))
    with pytest.raises(DataError, match=f"a header of {MAX_HEADER + 8} bytes, at most {MAX_HEADER}"):
        READERS[name](tmp_path / "a.safetensors")


def test_a_header_of_just_the_size_is_read(tmp_path: Path):
    (tmp_path / "a.safetensors").write_bytes(large_header(0))
    assert read_state(tmp_path / "a.safetensors")["a"].tolist() == [2.5, 2.5, 2.5]


def test_an_embedding_is_refused_by_both_of_its_readers(tmp_path: Path):
    shards = write_set(tmp_path, wanted(2))
    embed(shards, wanted(2))
    prompt = wanted(2)[0].prompt_id
    path = shards.embedding_path(prompt)
    path.write(large_header(16))
    for read in (read_embedding, verify_embedding):
        with pytest.raises(DataError, match=f"a header of {MAX_HEADER + 16} bytes"):
            read(shards, prompt)
