"""Stage score: the same bytes as a rollout's, without the teacher, and what a failing reward costs."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from rats.pipeline.store.scores import read_scores, reward_column
from rats.pipeline.store.shard_set import ShardSet
from rats.schemas import plugins
from rats.schemas.errors import ConfigError, DataError
from rats.schemas.manifest import ScoreRow
from rats.schemas.params import Params
from rats.stages.rollout.columns import check_share
from rats.stages.rollout.rollout import rollout_stage
from rats.stages.rollout.score import plan_score, score_stage
from rats.stages.rollout.scorer import Scorer, score_images
from rats.stages.workers.target import WorkerTarget
from tests.support import tiny
from tests.support.project import PROMPTS, rats, settings, tree, write_project

SAMPLES, SHARDS = 6, 3
PICKY = EntryPoint("pickscore", "tests.support.picky:Picky", plugins.REWARDS)
WHALE = PROMPTS.index("a blue whale")


@pytest.fixture(scope="module")
def both(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose rollout has scored with two rewards, published in `data`."""
    folder = tmp_path_factory.mktemp("both")
    rollout_stage(Params.model_validate(write_project(models, folder, rewards=two(models))), "train", folder / "data")
    return folder


def two(models: Path) -> list[dict[str, str]]:
    return [{"name": name, "adapter": name, "path": str(models / name)} for name in ("hpsv2", "pickscore")]


def project(both: Path, folder: Path, models: Path, **changes: Any) -> Params:
    """A copy of the project with the samples and no scores."""
    shutil.copytree(both, folder, dirs_exist_ok=True)
    for scores in [*folder.glob("store/*/scores"), folder / "data"]:
        shutil.rmtree(scores)
    return Params.model_validate(write_project(models, folder, **({"rewards": two(models)} | changes)))


def scores(folder: Path) -> dict[str, str]:
    """Hashes of everything that is scored below a folder."""
    (found,) = folder.glob("**/scores")
    return tree(found)


def test_a_back_fill_is_what_the_rollout_would_have_written_and_runs_and_loads_no_teacher(
    both: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    params = project(both, tmp_path, models)
    monkeypatch.setattr(FluxTransformer2DModel, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
    report = score_stage(params, "train", rewards=["pickscore"])
    assert (report.samples, report.scored, report.failed, report.teacher_forwards) == (SAMPLES, SAMPLES, 0, 0)
    assert (report.shards_total, report.shards_reused, list(report.rewards)) == (SHARDS, 0, ["pickscore"])
    report = score_stage(params, "train", out=tmp_path / "data")
    assert (report.scored, list(report.rewards)) == (SAMPLES, ["hpsv2", "pickscore"])
    assert tree(tmp_path / "data") == tree(both / "data")
    assert scores(tmp_path / "store") == scores(both / "store")


def test_a_published_set_is_scored_with_nothing_but_the_decoder_as_it_was_made(
    both: Path, models: Path, tmp_path: Path
):
    shutil.copytree(models / "flux" / "vae", tmp_path / "decoder" / "vae")
    shutil.copytree(both / "data", tmp_path / "imported")
    shutil.rmtree(tmp_path / "imported" / "scores")
    # what decides the bits is the set's own, whatever this file says
    other = {"teacher": {"height": 32, "width": 32}, "compute": {"micro_batch": 5, "threads": 2}}
    here = {"model": {"path": str(tmp_path / "decoder")}, "rewards": two(models)}
    params = Params.model_validate(settings(models, tmp_path, **other, **here))
    report = score_stage(params, shards=str(tmp_path / "imported"))
    assert (report.scored, report.teacher_forwards) == (2 * SAMPLES, 0)
    assert scores(tmp_path / "imported") == scores(both / "data")


def test_what_is_scored_is_not_scored_again_and_a_lost_shard_is(
    both: Path, models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    params = project(both, tmp_path, models)
    with caplog.at_level("INFO", "rats"):
        score_stage(params, "train")
        (lost, _) = sorted(tmp_path.glob("store/*/scores/*/rollout-000001.done.json"))
        lost.unlink()
        report = score_stage(params, "train")
    assert (report.scored, report.shards_reused) == (2, 2)
    assert "2 of 3 shards are scored, 1 to do" in caplog.text
    assert score_stage(params, "train").scored == 0
    assert scores(tmp_path / "store") == scores(both / "store")


def test_a_worker_that_has_another_reward_in_the_same_place_scores_nothing(both: Path, models: Path, tmp_path: Path):
    shutil.copytree(models / "pickscore", tmp_path / "pickscore")
    rewards = [two(models)[1] | {"path": str(tmp_path / "pickscore")}]
    params = project(both, tmp_path, models, rewards=rewards)
    column = score_stage(params, "train").rewards["pickscore"]
    (root,) = (tmp_path / "store").iterdir()
    shards = ShardSet.open(root)
    tiny.write_pickscore(tmp_path / "pickscore", seed=9)
    with pytest.raises(ConfigError, match="another 'pickscore' than the driver's"):
        Scorer(params, shards).score(next(iter(shards.finished())), {"pickscore": column})


def test_only_the_shards_of_the_snapshot_are_scored(both: Path, models: Path, tmp_path: Path):
    params = project(both, tmp_path, models, rewards=two(models)[:1], teacher={"noises_per_prompt": 2})
    rollout_stage(params, "train")
    more = params.model_copy(
        update={"rewards": Params.model_validate(settings(models, tmp_path, rewards=two(models))).rewards}
    )
    report = score_stage(more, "train", rewards=["pickscore"], snapshot=1)
    assert (report.samples, report.shards_total, report.scored) == (SAMPLES, SHARDS, SAMPLES)
    (column,) = tmp_path.glob(f"store/*/scores/{report.rewards['pickscore']}")
    assert len(list(column.glob("*.done.json"))) == SHARDS
    assert score_stage(more, "train").scored == SAMPLES


def test_samples_that_are_not_rolled_out_are_an_error_that_says_so(both: Path, models: Path, tmp_path: Path):
    params = project(both, tmp_path, models, teacher={"noises_per_prompt": 2})
    with pytest.raises(DataError, match="6 samples are not rolled out yet"):
        score_stage(params, "train")
    new = Params.model_validate(settings(models, tmp_path, teacher={"seed": 3}))
    with pytest.raises(DataError, match="nothing is rolled out with these parameters"):
        score_stage(new, "train")


class Toy:
    """Scores a picture by its mean and, as a network does in its last bits, by the size of its batch; may raise."""

    name = fingerprint = "toy"

    def score(self, images_B3HW: Tensor, prompts: list[str]) -> Tensor:
        for prompt in prompts:
            if prompt in ERRORS:
                raise ERRORS[prompt]
        means = images_B3HW.mean((1, 2, 3)) + 1e-6 * len(prompts)
        return torch.where(torch.tensor([prompt == "nan" for prompt in prompts]), torch.nan, means)


ERRORS = {
    "raise": ValueError("first line\nsecond"),
    "memory": MemoryError("full"),
    "device": torch.OutOfMemoryError("full"),
    "ours": DataError("damaged"),
}


def test_an_exception_costs_only_the_sample_that_raises_it():
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = score_images(Toy(), images, ["a", "b", "c", "d"], 4)
    verdicts = score_images(Toy(), images, ["a", "raise", "nan", "d"], 3)
    assert [verdict.score for verdict in verdicts] == [whole[0].score, None, None]
    assert [verdict.error for verdict in verdicts] == [
        None,
        "ValueError: first line second",
        "the score is not finite (nan)",
    ]


@pytest.mark.parametrize("word", ["memory", "device", "ours"])
def test_an_error_that_is_not_the_samples_fault_goes_through(word: str):
    with pytest.raises(type(ERRORS[word])):
        score_images(Toy(), torch.rand(2, 3, 8, 8), ["a", word], 2)


def test_scores_of_another_shape_are_failures_and_not_somebody_elses_scores():
    class Mean(Toy):
        def score(self, images_B3HW: Tensor, prompts: list[str]) -> Tensor:
            return super().score(images_B3HW, prompts).mean()[None]

    assert {verdict.score for verdict in score_images(Mean(), torch.rand(3, 3, 8, 8), ["a", "b", "c"], 3)} == {None}


@pytest.mark.parametrize(("bad", "most", "ok"), [(1, 0.1, True), (2, 0.1, False), (1, 0.0, False), (10, 1.0, True)])
def test_the_cap_is_a_share_of_the_samples(bad: int, most: float, ok: bool):
    rows = [ScoreRow(key=f"k{i}", score=None, status="failed", error="why") for i in range(bad)]
    if ok:
        check_share("toy", rows, 10, most)
        return
    with pytest.raises(DataError, match=rf"failed on {bad} of 10 samples .* first, k0: why; .*--retry-failed"):
        check_share("toy", rows, 10, most)


def test_a_failing_reward_is_rows_with_an_error_capped_and_scored_again_when_it_is_mended(
    both: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # the project's second reward, as a user's own class that refuses one of the six prompts
    monkeypatch.setitem(plugins.plugins_in(plugins.REWARDS), "pickscore", (PICKY,))
    shutil.copytree(models / "pickscore", tmp_path / "picky")
    (tmp_path / "picky" / "broken").touch()
    rewards = [two(models)[0], two(models)[1] | {"path": str(tmp_path / "picky")}]
    params = Params.model_validate(write_project(models, tmp_path, rewards=rewards))
    for _ in range(2):  # the share is of what is stored: a second run, which scores nothing, says the same
        with pytest.raises(DataError, match=r"'pickscore' failed on 1 of 6 samples \(16.7 %\).*no word for it: whale"):
            rollout_stage(params, "train", tmp_path / "data")
    assert not (tmp_path / "data").exists()
    report = rollout_stage(params, "train", tmp_path / "data", max_bad=0.2)
    assert (report.samples_failed, report.teacher_forwards) == (1, 0)
    assert scores(both / "data").keys() == scores(tmp_path / "data").keys()
    shards = ShardSet.open(tmp_path / "data")
    keys = [row.key for row in shards.index(shards.snapshot())]
    column, _ = reward_column(shards, "pickscore")
    undisturbed = read_scores(ShardSet.open(both / "data"), column, keys)
    assert len(left := read_scores(shards, column, keys)) == SAMPLES - 1 and left.items() < undisturbed.items()
    (tmp_path / "picky" / "broken").unlink()
    assert score_stage(params, "train", max_bad=0.2).scored == 0
    report = score_stage(params, "train", retry_failed=True, out=tmp_path / "data")
    assert (report.scored, report.failed, report.shards_reused) == (2, 0, SHARDS - 1)
    assert tree(tmp_path / "data") == tree(both / "data")


def test_the_command_scores_says_what_it_did_and_refuses_what_it_does_not_know(
    both: Path, models: Path, tmp_path: Path
):
    project(both, tmp_path, models)
    before = tree(tmp_path)
    plan = json.loads(rats(tmp_path, "stage", "score", "--dry-run", "--json").stdout)
    assert (plan["samples"], plan["shards_total"], plan["shards_to_score"]) == (SAMPLES, SHARDS, SHARDS)
    assert tree(tmp_path) == before
    done = rats(tmp_path, "stage", "score", "--reward", "hpsv2", "--out", "data", "--json", "--report", "score.json")
    report = json.loads(done.stdout)
    assert (report["scored"], report["teacher_forwards"]) == (SAMPLES, 0)
    assert json.loads((tmp_path / "score.json").read_text()) == report
    assert "6/6 samples" in done.stderr
    assert rats(tmp_path, "stage", "score", "--shards", "data", "--reward", "hpsv2").stdout.count("scored: 0") == 1
    assert "did you mean 'hpsv2'" in rats(tmp_path, "stage", "score", "--reward", "hpsv", code=2).stderr
    assert "--shards" in rats(tmp_path, "stage", "score", "--shards", "data", "--split", "train", code=2).stderr
    assert "0007.json is missing" in rats(tmp_path, "stage", "score", "--snapshot", "7", code=65).stderr


def test_a_model_without_a_decoder_is_refused(both: Path, models: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    params = Params.model_validate(settings(models, tmp_path, model={"path": str(tmp_path / "empty")}))
    with pytest.raises(ConfigError, match="decoder"):
        plan_score(params, shards=both / "data")


@pytest.mark.slow
def test_workers_score_to_the_same_bytes(both: Path, models: Path, tmp_path: Path):
    params = project(both, tmp_path, models)
    report = score_stage(params, "train", where=WorkerTarget(workers=2), out=tmp_path / "data")
    assert (report.scored, report.teacher_forwards) == (2 * SAMPLES, 0)
    assert tree(tmp_path / "data") == tree(both / "data")
