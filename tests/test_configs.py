"""configs/: every file loads whole, names what is guessed, and says what `rats plan` says."""

from __future__ import annotations

from pathlib import Path

import pytest

from rats.schemas.params import PromptSource, load_params, with_variant
from tests.support.full_size import write_pipeline
from tests.support.project import ROOT, rats

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


def test_there_is_a_file_for_each_published_model() -> None:
    assert CONFIGS == ["flux-dev", "sd35-medium", "wan21-1.3b"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_loads_with_all_its_variants(name: str) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    params = load_params(path)
    assert {reward.name for reward in params.rewards} == {"hpsv2", "pickscore", "image-reward"}
    assert params.train.reward == "hpsv2" and params.train.lora is not None
    assert with_variant(params, "full").lora is None
    assert (params.train.steps, params.train.batch, params.train.micro_batch) == (400, 8, 1)
    assert [params.train.alpha_at(nfe, 0) for nfe in (3, 5, 8)] == [2.0, 1.0, 1.0]
    assert "guessed" in path.read_text()


@pytest.mark.parametrize("name", CONFIGS)
def test_train_and_validation_prompts_have_nothing_in_common(name: str) -> None:
    prompts = load_params(ROOT / "configs" / f"{name}.yaml").prompts
    assert isinstance(prompts.train, PromptSource) and isinstance(prompts.validation, PromptSource)
    assert prompts.validation.model_copy(update={"skip": 0, "count": prompts.train.count}) == prompts.train
    assert prompts.validation.skip == prompts.train.count


def said(path: Path) -> tuple[list[str], dict[str, str]]:
    """The command at the top of a config, without `rats`, and what its lines say by their first word."""
    lines = [line.removeprefix("#") for line in path.read_text().splitlines() if line.startswith("#")]
    start = next(i for i, line in enumerate(lines) if line.startswith(" rats plan"))
    block = lines[start + 1 : lines.index("", start)]
    return lines[start].split()[1:], dict(line.split(maxsplit=1) for line in block)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_command_at_the_top_is_of_this_file(name: str) -> None:
    command, lines = said(ROOT / "configs" / f"{name}.yaml")
    assert command[:3] == ["plan", "--params", f"configs/{name}.yaml"]
    assert set(lines) == {"time", "cost", "size", "rollout", "training"}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_the_figures_at_the_top_are_what_the_plan_prints(name: str, tmp_path: Path) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    command, lines = said(path)
    count = load_params(path).prompts.train.count  # type: ignore[union-attr]
    (tmp_path / "prompts.txt").write_text("\n".join(f"a picture of thing number {i}" for i in range(count or 0)))
    write_pipeline(tmp_path / name, name)
    here = [f"model.path={tmp_path / name}", f"prompts.train={tmp_path / 'prompts.txt'}", "store.path=store"]
    command[2] = str(path)
    printed = rats(tmp_path, *command, *(word for change in here for word in ("--set", change))).stdout
    rows = dict(line.split(maxsplit=1) for line in printed.splitlines())
    for word, text in lines.items():
        assert rows[word].startswith(text), f"{name}: {word} is {rows[word]}"
