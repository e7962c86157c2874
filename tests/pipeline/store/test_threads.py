"""No thread of pyarrow's holds memory of Python's: one that lets go of it while Python ends aborts the process.

A file that is read in place is not in question: what its threads hold is their own.
"""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rats.pipeline.files.reading import hash_bytes
from rats.pipeline.store.parquet import encode_rows
from rats.schemas.manifest import ScoreRow

COUNT = """
import os, sys
def name(thread): return open(f"/proc/self/task/{{thread}}/comm").read().strip()
def threads(): return sum(name(thread) != "jemalloc_bg_thd" for thread in os.listdir("/proc/self/task"))
{imports}
before = threads()
rows = {read}
assert len(rows) == 3000, len(rows)
print(threads() - before)
"""
SCORES = (
    "from rats.pipeline.files.local import LocalPlace; from rats.pipeline.store.parquet import read_rows\n"
    "from pathlib import Path; from rats.schemas.manifest import ScoreRow",
    "read_rows(LocalPlace(Path(sys.argv[1])), ScoreRow, sys.argv[2])",
)
PROMPTS = ("from rats.pipeline.prompts import read_prompts", "read_prompts(sys.argv[1])")
BY_POOL = ("import pyarrow.parquet as pq", "pq.ParquetFile(sys.argv[1]).read()")


def threads_started(parts: tuple[str, str], *arguments: str) -> int:
    """By reading in a process of its own: how many threads more there are afterwards, without the allocator's."""
    script = COUNT.format(imports=parts[0], read=parts[1])
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    rows = [ScoreRow(key=f"{i:032x}", score=i / 7, status="ok") for i in range(3000)]
    data = encode_rows(ScoreRow, rows)
    path = tmp_path_factory.mktemp("scores") / "a.parquet"
    path.write_bytes(data)
    return path, hash_bytes(data)


def test_rows_are_read_without_a_thread_of_pyarrows_pool(table: tuple[Path, str]) -> None:
    assert threads_started(SCORES, str(table[0]), table[1]) == 0


def test_packed_prompts_are_read_without_a_thread_of_pyarrows_pool(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet.gz"
    names = [f"a fox number {i}" for i in range(3000)]
    with gzip.open(path, "wb") as file:
        pq.write_table(pa.table({"prompt": names, "concept": names}), file)
    assert threads_started(PROMPTS, str(path)) == 0


def test_the_pool_would_have_started_threads(table: tuple[Path, str]) -> None:
    assert threads_started(BY_POOL, str(table[0])) > 0
