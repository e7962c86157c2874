"""Whatever texts a program writes into a prompt file come back, each once and in order, however the file is named."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rats.pipeline.prompts import read_prompts
from rats.pipeline.prompts.columns import texts
from rats.pipeline.prompts.tables import open_table
from rats.schemas.identity import normalise, prompt_id
from rats.schemas.params import PromptSource

SEED = 7


def delimited(delimiter: str) -> Callable[[Sequence[str]], bytes]:
    def write(rows: Sequence[str]) -> bytes:
        text = io.StringIO(newline="")
        csv.writer(text, delimiter=delimiter).writerows([("likes", "prompt"), *((3, row) for row in rows)])
        return text.getvalue().encode()

    return write


def lines(rows: Sequence[str]) -> bytes:
    return "\n".join(json.dumps({"prompt": row}, ensure_ascii=False) for row in rows).encode()


def parquet(rows: Sequence[str]) -> bytes:
    data = pa.BufferOutputStream()
    pq.write_table(pa.table({"likes": [3] * len(rows), "prompt": pa.array(rows, pa.string())}), data)
    return data.getvalue().to_pybytes()


WRITERS: dict[str, Callable[[Sequence[str]], bytes]] = {
    ".csv": delimited(","),
    ".tsv": delimited("\t"),
    ".json": lambda rows: json.dumps([{"prompt": row} for row in rows]).encode(),
    ".JSON": lambda rows: json.dumps(list(rows), ensure_ascii=False).encode(),
    ".jsonl": lines,
    ".ndjson": lambda rows: "\r\n".join(json.dumps(row) for row in rows).encode(),
    ".parquet": parquet,
}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}

# NUL makes a .csv no text; a text ends a line nowhere else than Python's csv, json and pyarrow say
ANY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
AWKWARD = st.text(st.sampled_from("a,\"\t\n\r; \u2028\x85\x0c\x1e'{[\\é\U0001f98a"))
TEXTS = st.lists(ANY | AWKWARD, min_size=1, max_size=6, unique_by=normalise).filter(
    lambda rows: any(map(normalise, rows))
)


def wanted(rows: Sequence[str]) -> list[str]:
    return [text for row in rows if (text := normalise(row))]


def routes(folder: Path, name: str, data: bytes) -> Iterator[tuple[Path, str | Path | PromptSource]]:
    """The file by every way to name it: as it is, as a table, in a folder."""
    inside = folder / "folder"
    inside.mkdir()
    for path in (folder / name, inside / name):
        path.write_bytes(data)
    yield folder / name, folder / name
    yield folder / name, PromptSource(path=str(folder / name), seed=SEED)
    yield inside / name, PromptSource(path=str(inside), seed=SEED)


@pytest.mark.parametrize("ending", WRITERS)
@given(rows=TEXTS, packer=st.sampled_from(list(PACKERS)))
@settings(max_examples=25, deadline=None)
def test_what_a_program_writes_comes_back_through_every_route(ending: str, rows: list[str], packer: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        data = PACKERS[packer](WRITERS[ending](rows))
        for file, source in routes(Path(name), f"p{ending}{packer}", data):
            in_file = [cells[0] for _, cells in texts(open_table(file), ["prompt"])]
            assert list(filter(None, in_file)) == wanted(rows)
            seed = SEED if isinstance(source, PromptSource) else 0
            plain = not isinstance(source, PromptSource) and ending in (".csv", ".tsv")
            expected = wanted(rows) if plain else sorted(wanted(rows), key=lambda text: lot(seed, text))
            assert [prompt.text for prompt in read_prompts(source)] == expected


def lot(seed: int, text: str) -> bytes:
    """The place of a text in the draw of a seed."""
    return hashlib.sha256(f"{seed} {prompt_id(text)}".encode()).digest()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@given(rows=TEXTS, packer=st.sampled_from(list(PACKERS)), end=st.sampled_from(["\n", "\r\n", "\r"]))
@settings(max_examples=25, deadline=None)
def test_lines_of_a_text_come_back_in_their_order(encoding: str, rows: list[str], packer: str, end: str) -> None:
    flat = [row.replace("\n", " ").replace("\r", " ").replace("\ufeff", "") for row in rows]
    flat = list({normalise(row): row for row in flat}.values())
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / f"p.txt{packer}"
        path.write_bytes(PACKERS[packer](end.join([*flat, "a last one"]).encode(encoding)))
        assert [prompt.text for prompt in read_prompts(path)] == [*wanted(flat), "a last one"]
        drawn = [prompt.text for prompt in read_prompts(PromptSource(path=str(path)))]
        assert sorted(drawn) == sorted([*wanted(flat), "a last one"])
