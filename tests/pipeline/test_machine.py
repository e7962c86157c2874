"""What decides bytes beside the recipe is known, compared and named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rats.pipeline.machine import OURS, VARIABLES, hash_sources, maker, on_its_threads, refuse_other, software
from rats.schemas.errors import ConfigError
from rats.schemas.params import Params
from tests.support.project import ROOT, environment, settings

NOT_BYTES = {"rats.stages", "rats.stages.progress", "rats.stages.workers", "rats.trainer"}
"""What a worker imports besides: progress bars, and how tasks reach it."""

IMPORTED = """
import sys
import rats.stages.rollout.worker
print("\\n".join(name for name in sys.modules if name.startswith("rats.")))
"""


@pytest.fixture(scope="module")
def params(models: Path) -> Params:
    return Params.model_validate(settings(models, models, compute={"threads": 3}))


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_that_chooses_kernels_is_refused_by_name_with_both_values(
    params: Params, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(name, raising=False)
    driver = software(params)
    refuse_other(driver, maker(params))
    monkeypatch.setenv(name, "avx2")
    with pytest.raises(ConfigError, match=f"{name} is avx2 there and unset at the driver; set it alike"):
        refuse_other(driver, maker(params))


def test_a_flag_of_torchs_is_refused_by_name_too(params: Params) -> None:
    driver = software(params)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ConfigError, match="deterministic is True there and False at the driver"):
            refuse_other(driver, software(params))
    finally:
        torch.use_deterministic_algorithms(False)


def test_other_versions_are_named_before_the_sources_that_they_have(params: Params) -> None:
    here = software(params)
    assert here.versions.keys() >= {"torch", "diffusers", "transformers", "numpy"}
    code = here.model_copy(update={"code": "5" * 64})
    with pytest.raises(ConfigError, match="sources is 5555.* install the same rats and plug-ins"):
        refuse_other(here, code)
    both = code.model_copy(update={"versions": here.versions | {"torch": "1.2.3"}})
    with pytest.raises(ConfigError, match=rf"torch is 1\.2\.3 there and {here.versions['torch']} at the driver"):
        refuse_other(here, both)


def test_all_that_a_worker_imports_of_rats_is_in_the_hash_of_its_sources() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], env=environment(), capture_output=True, text=True, check=True
    )
    folders = tuple("rats." + folder.replace("/", ".") for folder in OURS)
    assert all((ROOT / folder).is_dir() for folder in OURS)
    others = {name for name in done.stdout.split() if not name.startswith(folders)}
    assert {name for name in others if not name.startswith("rats.stages.workers.")} <= NOT_BYTES


def test_the_hash_of_sources_is_of_names_and_contents(tmp_path: Path) -> None:
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("step = 3")
    two.write_text("step = 3")
    before = hash_sources([one])
    assert before != hash_sources([two])
    one.write_text("step = 2")
    assert before != hash_sources([one])


def test_another_machine_is_no_other_software(params: Params) -> None:
    here = maker(params)
    other = here.model_copy(update={"machine": here.machine | {"cpu kernels": "AVX7"}})
    refuse_other(here, other)
    found = here.machine_differences(other)
    assert [(one.name, one.second) for one in found] == [("cpu kernels", "AVX7")]


def test_a_maker_from_elsewhere_prints_no_escape_sequence(params: Params) -> None:
    here = maker(params)
    hostile = here.model_copy(update={"machine": {"processor": "\x1b[2Jx", "\x1b]0;": "y\n"}})
    assert hostile.text.isprintable() and "processor" in hostile.text
    assert all(text.isprintable() for one in here.machine_differences(hostile) for text in one)


def test_a_stage_runs_on_its_threads_and_gives_them_back_when_it_fails(params: Params) -> None:
    before = torch.get_num_threads()

    @on_its_threads
    def stage(params: Params, factor: int) -> int:
        if not factor:
            raise ValueError("a stage that fails")
        return factor * torch.get_num_threads()

    assert stage(params, factor=5) == 15
    with pytest.raises(ValueError, match="fails"):
        stage(params, 0)
    assert torch.get_num_threads() == before != 3
