"""Seeded mutations of a shard set: spoiled bytes, and lies under valid seals and hashes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from rats.pipeline.files.reading import hash_bytes
from tests.support.damage import canonical_rows, cut, flipped, reseal, sealed, unsealed, vouch

DEEP = "@deep@"
"""Stands for 20,000 brackets, which no JSON writer would make."""
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, 1.5, 1e308, -0.0),
    *(
        float("nan"),
        float("inf"),
        "",
        "a",
        "0" * 64,
        "rollout-000000",
        "rollout-000001",
        "0001.parquet",
        "\0",
        "\ud800",
    ),
    *("../../x", "/etc/passwd", "pipe:touch x", "a.b", "é" * 1000, "x" * 1_000_000, DEEP, [], {}, [[]] * 3000),
    {str(number): number for number in range(1500)},
]
MORE = [b"\0", b"\xff" * 8, b"{", b"[" * 20_000, b'"seal":1,', b'"shard":"rollout-000001",', b"PAR1", b"9" * 5000]

Case = Callable[[Path, random.Random], None]


def spoiled(data: bytes, generator: random.Random) -> bytes:
    """A few bits turned, a piece cut out, repeated, overwritten or put in."""
    at, length = generator.randrange(len(data)), generator.choice([1, 4, 8, 64, 1000])
    kind = generator.randrange(6)
    if kind == 0:
        return cut(data, generator)
    if kind == 1:
        return data[:at] + data[at + length :]
    if kind == 2:
        return data[:at] + data[at : at + length] * generator.choice([2, 50]) + data[at:]
    if kind == 3:
        piece = generator.choice(MORE)
        return data[:at] + piece + data[at + generator.choice([0, len(piece)]) :]
    for _ in range(generator.choice([1, 1, 3, 20])):
        data = flipped(data, generator)
    return data


def changed(value: Any, generator: random.Random) -> Any:
    """A document with one hostile value, key or repetition somewhere in it."""
    if isinstance(value, dict) and value and generator.random() < 0.85:
        key = generator.choice(sorted(value, key=str))
        kind = generator.randrange(8)
        if kind == 0:
            return {name: item for name, item in value.items() if name != key}
        if kind == 1:
            return value | {str(generator.choice(VALUES))[:50]: generator.choice(VALUES)}
        return value | {key: changed(value[key], generator)}
    if isinstance(value, list) and value and generator.random() < 0.85:
        at = generator.randrange(len(value))
        if generator.randrange(4) == 0:
            return value * generator.choice([0, 2, 3000 // len(value) + 1])
        return [*value[:at], changed(value[at], generator), *value[at + 1 :]]
    return generator.choice(VALUES)


def text(content: Any) -> bytes:
    """Sealed, with the brackets in place of their sign; a lone surrogate is written as it is."""
    try:
        data = sealed(content)
    except UnicodeEncodeError:
        data = json.dumps(content).encode()
    return data.replace(f'"{DEEP}"'.encode(), b"[" * 20_000 + b"]" * 20_000)


def _pick(folder: Path, pattern: str, generator: random.Random) -> Path:
    return generator.choice(sorted(folder.glob(pattern)))


def any_bytes(folder: Path, generator: random.Random) -> None:
    """Any file, as damage leaves it."""
    path = _pick(folder, "**/*.*", generator)
    path.write_bytes(spoiled(path.read_bytes(), generator))


def any_bytes_vouched(folder: Path, generator: random.Random) -> None:
    """A binary file whose damage every document vouches for."""
    path = _pick(folder, generator.choice(["**/*.tar", "index/*", "scores/*/*.parquet"]), generator)
    path.write_bytes(spoiled(path.read_bytes(), generator))
    vouch(folder)


def document(folder: Path, generator: random.Random) -> None:
    """A document of any kind that lies under a seal of its own."""
    path = _pick(folder, generator.choice(["manifests/*", "shards/*.json", "scores/*/*.json"]), generator)
    content = unsealed(path)
    for _ in range(generator.choice([1, 1, 2])):
        content = changed(content, generator)
    path.write_bytes(text(content))


def recipe(folder: Path, generator: random.Random) -> None:
    """A recipe that lies, and a manifest that is of that recipe."""
    path = folder / "recipe.json"
    content = changed(json.loads(path.read_bytes()), generator)
    path.write_bytes(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
    vouch(folder)


def rewrite(path: Path, change: Callable[[list[Any]], list[Any]]) -> list[Any]:
    """A table's rows changed, in its own schema; returns them."""
    table = pq.read_table(path)
    rows = change(table.to_pylist())
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path, compression="zstd")
    return rows


def _fits(row: dict[str, Any], generator: random.Random) -> dict[str, Any]:
    """One cell with a hostile value of its own type."""
    name = generator.choice(sorted(row))
    kind = {"noise_index": int, "offset": int, "length": int, "score": float}.get(name, str)
    plain = [value for value in VALUES if type(value) is kind and value != "\ud800"]
    return row | {name: generator.choice([value for value in plain if kind is not int or abs(value) < 2**63])}


def _rows(rows: list[Any], generator: random.Random) -> list[Any]:
    at, kind = generator.randrange(len(rows)), generator.randrange(5)
    if kind == 0:
        return rows * 700  # thousands of rows that point at the same bytes
    if kind == 1:
        return rows[:at]
    return [*rows[:at], _fits(rows[at], generator), *rows[at + 1 :]]


def index(folder: Path, generator: random.Random) -> None:
    """An index that lies."""
    put_index(folder, lambda rows: _rows(rows, generator))


def put_index(folder: Path, change: Callable[[list[Any]], list[Any]]) -> None:
    """Other rows in the index, and a manifest that vouches for them."""
    rows = rewrite(folder / "index" / "0001.parquet", change)
    reseal(folder / "manifests" / "0001.json", samples=len(rows), hash=canonical_rows(rows))
    vouch(folder)


def bomb(folder: Path, rows: int, length: int) -> None:
    """An index of some kB that unfolds into `rows` rows, all the same: a prompt of `length` bytes, or no text if 0."""
    path = folder / "index" / "0001.parquet"
    table = pq.read_table(path)
    row = table.to_pylist()[0] | {"prompt": "x" * length}
    row = row if length else {name: "" if isinstance(value, str) else value for name, value in row.items()}
    zeros = pa.array([0] * rows, pa.int32())
    parts = [pa.DictionaryArray.from_arrays(zeros, pa.array([row[name]])) for name in table.schema.names]
    plain = [
        part if isinstance(row[name], str) else part.dictionary_decode() for name, part in zip(row, parts, strict=True)
    ]
    unfolded = pa.table(plain, names=table.schema.names)
    pq.write_table(unfolded, path, compression="zstd", store_schema=False, dictionary_pagesize_limit=2**30)
    reseal(folder / "manifests" / "0001.json", samples=rows)
    vouch(folder)


def scores(folder: Path, generator: random.Random) -> None:
    """Scores that lie, and a document that vouches for them."""
    path = _pick(folder, "scores/*/*.parquet", generator)
    rows = rewrite(path, lambda rows: _rows(rows, generator))
    reseal(path.with_suffix(".done.json"), rows=len(rows))
    vouch(folder)


def header(data: bytes, generator: random.Random) -> bytes:
    """A safetensors file with a header that lies: shapes, offsets, types, metadata, its own length."""
    size = int.from_bytes(data[:8], "little")
    content = json.loads(data[8 : 8 + size])
    name = generator.choice([name for name in content if name != "__metadata__"])
    entry, kind = content[name], generator.randrange(6)
    hostile = [0, -1, 1, 2**31, 2**62, 2**64 - 1, 1.5, "a", None]
    if kind == 0:
        entry["shape"] = generator.choice([[], [1, *entry["shape"]], [generator.choice(hostile)] * 3, hostile, [0]])
    elif kind == 1:
        entry["data_offsets"] = [generator.choice(hostile), generator.choice([*hostile, entry["data_offsets"][1]])]
    elif kind == 2:
        entry["dtype"] = generator.choice(["BF16", "F32", "I16", "U16", "BOOL", "F8_E4M3", "C64", "F4", "pickle", 1])
    elif kind == 3:
        content[generator.choice(["y", "__metadata__", "x" * 5000])] = generator.choice([entry, {"a": "b"}, {}, 1])
    elif kind == 4:
        content["__metadata__"] = {"seal": generator.choice(["", "0" * 64, "x" * 100_000])}
    plain = json.dumps(content).encode()
    length = generator.choice([0, 2**63, 2**64 - 1, size + 10**6, len(data)]) if kind == 5 else len(plain)
    return length.to_bytes(8, "little") + plain + data[8 + size :]


def latents(folder: Path, generator: random.Random) -> None:
    """A sample that is no such sample."""
    row = generator.choice(pq.read_table(folder / "index" / "0001.parquet").to_pylist())
    data = (folder / "shards" / f"{row['shard']}.tar").read_bytes()
    put_sample(folder, row, header(data[row["offset"] : row["offset"] + row["length"]], generator))


def put_sample(folder: Path, row: dict[str, Any], forged: bytes) -> None:
    """Other bytes for a sample, at the end of its shard, where all documents say that they are."""
    index_path, tar = folder / "index" / "0001.parquet", folder / "shards" / f"{row['shard']}.tar"
    data = tar.read_bytes()
    tar.write_bytes(data + forged)
    place = {"offset": len(data), "length": len(forged), "blake3": hash_bytes(forged)}
    rows = rewrite(index_path, lambda rows: [one | place if one["key"] == row["key"] else one for one in rows])
    done = tar.with_suffix(".done.json")
    reseal(done, rows=[one | place if one["key"] == row["key"] else one for one in unsealed(done)["rows"]])
    reseal(folder / "manifests" / "0001.json", hash=canonical_rows(rows))
    vouch(folder)


def embedding(folder: Path, generator: random.Random) -> None:
    """A prompt's embeddings with a header that lies."""
    path = _pick(folder, "embeddings/*", generator)
    path.write_bytes(header(path.read_bytes(), generator))


CASES: list[Case] = [any_bytes, any_bytes_vouched, document, recipe, index, scores, latents, embedding]

PARAMS = """
model: {path: m, family: flux, dtype: float32}
prompts: {train: a.txt}
teacher: {steps: 50, nfe: [3, 5, 8], guidance_scale: 3.5, height: 512, seed: 0}
compute: {device: cpu, threads: 1}
rewards: [{name: hps, adapter: hpsv2, path: r}]
train: {reward: hps, nfe: [3], lr: 1e-4, gate: {form: rats, tau: 1.0}}
variants: {rats: {}, off: {gate.form: off, lr: 2e-5}}
evaluate: {variants: [rats, off]}
"""
LAUGHS = "{a: &a [1, 1], " + ", ".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)
SCALARS = [
    *("!!timestamp x", "!!int ''", "!!float ''", "!!bool x", "!!binary '%'", "!!null x", "!!python/name:os.system"),
    *("!!python/object/apply:os.system ['touch x']", "!!set [a]", "!!omap {a: 1}", "!!pairs x", "!!map x", "!!seq x"),
    *("2001-99-99", "2001-01-01", "1:99:99", "0x", "0b2", "1_000", ".nan", ".inf", "1e999", "9" * 5000, "x" * 20_000),
    *("&a {<<: *a}", "&a [*a]", "{<<: [1]}", "{<<: x}", "{? [a] : b}", "{? {a: b} : c}", "? a", "*none", "@", "`", "%"),
    *(
        "[" * 1000,
        "{a: " * 1000,
        "[" * 900 + "]" * 900,
        LAUGHS + "}",
        "'",
        '"\\x"',
        "|",
        ">",
        "---\n- a",
        "\t",
        "\ufeff",
        "~",
        "=",
        "<<",
    ),
    "{" + ", ".join(f"k{number}: 1" for number in range(1000)) + "}",
]


def yaml_text(generator: random.Random, small: bool = False) -> bytes:
    """A parameter file with something in it that has no place there; `small`: one value."""
    if small:
        return generator.choice([item for item in SCALARS if len(item) < 1000]).encode()
    kind = generator.randrange(3)
    if kind == 0:
        return spoiled(PARAMS.encode(), generator)
    if kind == 1:
        content = changed(yaml.safe_load(PARAMS), generator)
        return json.dumps(content).replace("x" * 1_000_000, "x" * 20_000).encode()
    lines = PARAMS.splitlines()
    at = generator.randrange(1, len(lines))
    lines[at] = f"{lines[at].partition(':')[0]}: {generator.choice(SCALARS)}"
    return "\n".join(lines).encode()
