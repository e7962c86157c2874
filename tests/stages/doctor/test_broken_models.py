"""Model folders as people bring them: the doctor refuses what a stage would refuse, first and in one line."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import pytest

from rats.schemas.errors import RatsError
from rats.stages.doctor.params import check_model
from tests.support.broken import BROKEN, fields
from tests.support.model_fuzz import WRITERS, copied, damage, drawn, opened, write_all
from tests.support.project import rats, write_project

QUICK_TRIALS, SLOW_TRIALS = 5, 100
"""Of each family: 25 and 500 in all."""


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny folder of every family."""
    return write_all(tmp_path_factory.mktemp("intact"))


@pytest.fixture(scope="module")
def hashes(intact: Path) -> dict[str, str]:
    """What is drawn from the intact folders, by family."""
    return {family: drawn(family, intact / family) for family in WRITERS}


@pytest.mark.parametrize("family", WRITERS)
def test_an_intact_model_is_well(family: str, intact: Path) -> None:
    assert "4 horizons" in check_model(opened(family, intact / family))


@pytest.mark.parametrize("name", BROKEN)
def test_the_doctor_and_the_stages_refuse_a_broken_model(name: str, intact: Path, tmp_path: Path) -> None:
    family, breaks, said = BROKEN[name]
    folder = copied(intact / family, tmp_path / "model")
    breaks(folder)
    with pytest.raises(RatsError) as by_doctor:
        check_model(opened(family, folder))
    assert re.search(said, str(by_doctor.value)) and "\n" not in str(by_doctor.value)
    with pytest.raises(RatsError):
        drawn(family, folder)
        opened(family, folder).open_pipeline()


def test_the_command_line_says_it_in_the_row_of_the_model(intact: Path, models: Path, tmp_path: Path) -> None:
    folder = copied(intact / "flux", tmp_path / "model")
    fields("transformer/config.json", num_single_layers=2)(folder)
    write_project(models, tmp_path, model={"path": str(folder)}, evaluate={"judges": []})
    said = rats(tmp_path, "doctor", code=2).stdout.splitlines()
    rows = [line for line in said if line.startswith("model ")]
    assert len(rows) == 1 and "lacks" in rows[0] and "weights" in rows[0]


def trials(family: str, seeds: range, intact: Path, hashes: dict[str, str], tmp_path: Path) -> None:
    """Damages a copy once a seed: it is refused, or draws the intact one's bytes."""
    for seed in seeds:
        folder = copied(intact / family, tmp_path / str(seed))
        done = damage(folder, random.Random(seed))
        try:
            same = drawn(family, folder) == hashes[family]
        except RatsError:
            same = True
        except Exception as error:
            raise AssertionError(f"{family}, seed {seed}, {done}") from error
        assert same, f"{family}, seed {seed}, {done}: other bytes without a word"
        shutil.rmtree(folder)


@pytest.mark.parametrize("family", WRITERS)
def test_a_damaged_folder_is_refused_or_draws_the_same_bytes(
    family: str, intact: Path, hashes: dict[str, str], tmp_path: Path
) -> None:
    trials(family, range(QUICK_TRIALS), intact, hashes, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", WRITERS)
def test_a_hundred_damaged_folders_of_each_family(
    family: str, intact: Path, hashes: dict[str, str], tmp_path: Path
) -> None:
    trials(family, range(QUICK_TRIALS, QUICK_TRIALS + SLOW_TRIALS), intact, hashes, tmp_path)
