"""The commands of docs/flux-dev.md: each is one that exists, and all together lead to a student."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from rats.schemas.params import load_params
from rats.stages.cli.main import app
from tests.support.project import PROMPTS, ROOT, rats
from tests.support.tiny import write_flux

PAGE = ROOT / "docs" / "flux-dev.md"
CONFIG = ROOT / "configs" / "flux-dev.yaml"


def commands() -> list[list[str]]:
    """The page's lines of shell, as words."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line[:4] != "git "]
    return [line for line in lines if line]


def of_rats() -> list[list[str]]:
    """The arguments of `rats` in them, however it is launched."""
    return [line[line.index("rats") + 1 :] for line in commands() if "rats" in line and line[0] in ("rats", "torchrun")]


def parsed(words: list[str]) -> dict[str, Any]:
    """What the command line makes of the words, without running anything."""
    command, context, name = get_command(app), None, "rats"
    while True:
        context = command.make_context(name, words, parent=context)
        if not hasattr(command, "commands"):
            return context.params
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])


@pytest.mark.parametrize("words", of_rats(), ids=" ".join)
def test_a_command_of_the_page_exists_and_its_values_fit_the_file(words: list[str]):
    values = parsed(words)
    load_params(CONFIG, values.get("set_") or [])


def test_the_page_leads_through_every_stage_and_names_nothing_else():
    named = [" ".join(word for word in words[:2] if word[0] != "-") for words in of_rats()]
    for step in ("doctor", "plan", "stage rollout", "stage train", "stage evaluate", "stage report"):
        assert step in named
    others = {line[0] for line in commands()} - {"rats", "torchrun"}
    assert others == {"cd", "python3", ".", "pip", "python", "hf", "mkdir", "cp"}
    assert ["cp", "configs/flux-dev.yaml", "flux/params.yaml"] in commands()


def standing_in(models: Path, folder: Path) -> None:
    """The page's params.yaml for a tiny FLUX with embedded guidance, tiny rewards and a file of prompts."""
    values = yaml.safe_load(CONFIG.read_text())
    write_flux(folder / "base", guidance_embeds=True, dynamic=True)
    values["model"] |= {"path": "base", "dtype": "float32"}
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS, "a red whale", "a blue star"]))
    for split, skip, count in (("train", 0, 3), ("validation", 3, 2), ("test", 5, 3)):
        values["prompts"][split] = {"path": "prompts.txt", "column": "text", "skip": skip, "count": count}
    values["teacher"] |= {"steps": 16, "max_sequence_length": 8, "height": 16, "width": 16}
    values["compute"]["device"] = "cpu"
    values["store"]["workers"] = 0
    for reward in values["rewards"]:
        reward["path"] = str(models / reward["adapter"])
    values["train"] |= {"steps": 2, "batch": 2, "lora": {"rank": 2}}
    values["evaluate"] |= {"pictures": 2}
    (folder / "params.yaml").write_text(yaml.safe_dump(values))


@pytest.mark.slow
def test_the_pages_commands_lead_from_a_model_to_a_picture_of_plain_diffusers(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    standing_in(models, tmp_path)
    for words in of_rats():
        if "cuda" not in words:  # as many workers as there are GPUs
            rats(tmp_path, *(word.replace("count=400", "count=3") for word in words))
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert code is not None
    (tmp_path / "out.png").unlink()
    changes = {"black-forest-labs/FLUX.1-dev": "base", '.to("cuda")': "", "bfloat16": "float32"}
    text = code[1]
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    monkeypatch.chdir(tmp_path)
    exec(text, {})
    assert (tmp_path / "out.png").is_file() and (tmp_path / "reports" / "report.html").is_file()
