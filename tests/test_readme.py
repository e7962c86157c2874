"""The README's commands for one's own model, prompts and reward, run as they stand there."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

from tests.stages.test_dvc import shrink
from tests.support.project import rats
from tests.support.tiny import PROMPTS

README = Path(__file__).parents[1] / "README.md"


def commands() -> list[list[str]]:
    """The `rats` lines of the section "My model, my prompts, my reward", without comments."""
    section = README.read_text().partition("## My model, my prompts, my reward")[2].partition("\n## ")[0]
    lines = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert lines is not None
    words = [shlex.split(line, comments=True) for line in lines[1].splitlines()]
    return [line[1:] for line in words if line and line[0] == "rats"]


def test_the_readmes_ten_lines_lead_from_a_model_prompts_and_a_reward_to_a_picture(models: Path, tmp_path: Path):
    # A fifth of the prompts is for the test, and an interval needs two of them.
    prompts = [*PROMPTS, "a red whale", "a green house", "a blue star", "two yellow apples"]
    shutil.copytree(models / "flux", tmp_path / "my-model")
    shutil.copytree(models / "pickscore", tmp_path / "my-reward")
    (tmp_path / "my-prompts.txt").write_text("\n".join(prompts) + "\n")
    folder = tmp_path
    for line in commands():
        rats(folder, *line)
        if line[0] == "init":
            folder = tmp_path / line[1]
            shrink(folder / "params.yaml")
    assert (folder / "reports" / "report.html").stat().st_size > 10_000
    assert (folder / "out.png").is_file()
