"""The preview: one offline page with real pictures, deterministic, of sets with and without scores."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rats.pipeline.prompts import Prompt, planned_samples
from rats.pipeline.store.scores import record_reward, write_scores
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import write_shard
from rats.schemas.manifest import PlannedSample, ScoreRow, ShardPlan
from rats.schemas.params import load_params
from rats.schemas.recipe import Recipe, make_recipe
from rats.stages.shards.preview import ends, kept_rows, preview
from tests.support.project import rats, tree, write_project
from tests.support.shards import wanted

HORIZONS = (1.0, 0.75, 0.5, 0.0)
TOKENS, CHANNELS = 4, 16
"""Of the tiny VAE at 16 px."""


@pytest.fixture(scope="module")
def project(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parameter file for the tiny model, and a set that fits it, without scores."""
    folder = tmp_path_factory.mktemp("preview")
    write_project(models, folder)
    shards = ShardSet.open_or_create(folder / "store", recipe(folder))
    (plan,) = shards.plan([*wanted(5), *named("<b>bold</b> & 'quoted'")], 20)
    write_shard(shards, plan, [(sample, arrays(sample)) for sample in plan.samples])
    shards.write_snapshot(sample.key for sample in plan.samples)
    return folder


def recipe(folder: Path) -> Recipe:
    """Of the project's parameters, with a few horizons."""
    params = load_params(folder / "params.yaml")
    return make_recipe(params, {"transformer": "a" * 64}, "c" * 64, HORIZONS, HORIZONS, (4, 16))


def named(prompt: str) -> list[PlannedSample]:
    """One sample of a prompt."""
    return planned_samples([Prompt(prompt, prompt)], 1)


def arrays(sample: PlannedSample) -> dict[str, np.ndarray]:
    """Other latents for each sample."""
    random = np.random.default_rng(int(sample.key[:8], 16) + sample.noise_index)
    x = random.standard_normal((len(HORIZONS), TOKENS, CHANNELS)).astype(np.float16)
    return {"x": x, "x0": x[1:] / 2}


def score(shards: ShardSet, plan: ShardPlan) -> None:
    """A column in which two samples failed."""
    column = record_reward(shards, "hps", {"reward": "d" * 64})
    rows = [ScoreRow(key=sample.key, score=float(i)) for i, sample in enumerate(plan.samples)]
    failed = [ScoreRow(key=row.key, score=None, status="failed", error="nan") for row in rows[:2]]
    write_scores(shards, column, plan.shard, [*failed, *rows[2:]])


def show(project: Path, out: Path, count: int = 4, seed: int = 0, store: Path | None = None) -> str:
    """The page's text."""
    (root,) = (store or project / "store").iterdir()
    preview(root, out, load_params(project / "params.yaml"), count, seed)
    return out.read_text()


def words(page: str) -> str:
    """The page without its pictures: what a failing test has to print."""
    return re.sub(r'src="data:[^"]*"', "", page)


def digest(page: str) -> str:
    """Of a page that is too long to be compared in an error's text."""
    return hashlib.sha256(page.encode()).hexdigest()


def pictures(page: str) -> list[np.ndarray]:
    """Every PNG in the page."""
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def test_a_page_of_a_set_without_scores_says_so_and_needs_no_network(project: Path, tmp_path: Path):
    page = show(project, tmp_path / "a.html")
    text = words(page)
    assert "This set has no scores" in text and "http" not in text
    assert "11 samples of 6 prompts" in text and "0.75" in text
    shown = pictures(page)
    assert len(shown) == 4 + 4 * 2 * len(HORIZONS) and {picture.shape for picture in shown} == {(16, 16, 3)}
    assert len({picture.tobytes() for picture in shown}) > 20  # pictures, not one grey field


def test_samples_are_spread_over_the_prompts_by_the_seed_alone(project: Path, tmp_path: Path):
    page = show(project, tmp_path / "a.html", count=6)
    samples = words(page).partition("<h2>Horizons")[0]
    assert all(f"thing {i}" in samples for i in range(5))
    assert digest(show(project, tmp_path / "b.html", count=6)) == digest(page)
    other = show(project, tmp_path / "c.html", count=6, seed=1)
    assert any(not np.array_equal(a, b) for a, b in zip(pictures(page)[:6], pictures(other)[:6], strict=True))


def test_prompts_are_shown_as_text(project: Path, tmp_path: Path):
    text = words(show(project, tmp_path / "a.html", count=6))
    assert "<b>bold" not in text and "&lt;b&gt;bold&lt;/b&gt; &amp;" in text


def test_a_strip_ends_in_the_final_and_starts_in_noise(project: Path, tmp_path: Path):
    shown = pictures(show(project, tmp_path / "a.html", count=1))
    final, clean, states = shown[0], shown[1:5], shown[5:9]
    assert np.array_equal(final, clean[-1]) and np.array_equal(final, states[-1])
    assert not np.array_equal(clean[0], states[0])


def test_scores_are_drawn_counted_and_ranked(project: Path, tmp_path: Path):
    (root,) = shutil.copytree(project / "store", tmp_path / "store").iterdir()
    shards = ShardSet.open(root)
    score(shards, shards.plans()[0])
    page = show(project, tmp_path / "a.html", count=11, store=tmp_path / "store")
    assert page.count("data:image/svg+xml") == 1 and page.count("failed</span>") == 2
    row = re.search(r"<td>hps</td>(.*?)</tr>", page, re.S)
    assert row and re.findall(r"<td[^>]*>([^<]*)</td>", row[1])[:7] == ["6", "2.582", "2", "10", "9", "2", "0"]
    best, worst = page.partition("hps: best")[2].split("hps: worst")
    assert [re.findall(r"<span>hps</span> (\S+)</span>", part) for part in (best, worst)] == [
        ["10", "9", "8", "7"],
        ["2", "3", "4", "5"],
    ]


def test_on_the_command_line_another_model_is_refused_and_nothing_written(project: Path, tmp_path: Path):
    (root,) = (project / "store").iterdir()
    report = json.loads(rats(project, "shards", "preview", str(root), "-o", str(tmp_path / "a.html"), "--json").stdout)
    assert report["out"].endswith("a.html") and report["samples"] == 11
    before = tree(tmp_path)
    other = ["--set", "model.path=nowhere/at-all"]
    rats(project, "shards", "preview", str(root), "-o", str(tmp_path / "b.html"), *other, code=2)
    rats(project, "shards", "preview", str(tmp_path), "-o", str(tmp_path / "b.html"), code=65)
    assert tree(tmp_path) == before


def test_latents_of_another_vae_are_refused(project: Path, tmp_path: Path):
    shards = ShardSet.open_or_create(tmp_path, recipe(project).model_copy(update={"height": 32}))
    (plan,) = shards.plan(wanted(1), 2)
    write_shard(shards, plan, [(sample, arrays(sample)) for sample in plan.samples])
    shards.write_snapshot(sample.key for sample in plan.samples)
    said = rats(project, "shards", "preview", str(shards.root), "-o", str(tmp_path / "a.html"), code=2)
    assert "takes (8, 16)" in said.stderr and not (tmp_path / "a.html").exists()


def test_long_strips_are_thinned_and_the_extremes_never_meet():
    assert kept_rows(4) == [0, 1, 2, 3]
    rows = kept_rows(51)
    assert (rows[0], rows[-1], len(rows), len(set(rows))) == (0, 50, 16, 16)
    assert ends({"a": 1.0, "b": 3.0, "c": 2.0}, 6) == (["b"], ["a"])
    assert ends({}, 6) == ([], [])
