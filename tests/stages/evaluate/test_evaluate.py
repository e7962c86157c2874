"""Evaluate on a tiny real teacher, its stored rollout and its stock pipeline: who is compared, with what, how."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import CLIPModel

from rats.pipeline.families.open import Model
from rats.pipeline.store.embeddings import read_embedding
from rats.pipeline.store.scores import read_scores, reward_column
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import read_sample
from rats.pipeline.weights.hashes import hash_path
from rats.schemas.errors import ConfigError, DataError, RatsError
from rats.schemas.params import Params
from rats.schemas.reports import Cell, EvaluateReport, LengthsReport
from rats.stages.evaluate import evaluate as evaluate_module
from rats.stages.evaluate.before import plan_evaluate
from rats.stages.evaluate.evaluate import evaluate_stage
from rats.stages.evaluate.lengths import chosen_length, lengths_stage
from rats.stages.evaluate.systems import open_samples, systems
from rats.stages.generate import generate
from rats.stages.measure.intervals import paired_estimate
from rats.stages.measure.kid import open_real, write_real
from rats.stages.measure.pictures import load_pictures
from rats.stages.measure.values import read_values
from rats.stages.report.report import report_stage
from rats.stages.report.verdict import length_lines
from rats.stages.rollout.rollout import rollout_stage
from tests.stages.report.test_report import write_record, write_run
from tests.support import tiny

CONCEPTS = ("fox", "frog", "whale", "apple", "house", "star")
NFE, STEPS = (2, 3), 8
SYSTEMS = ("teacher", *(f"{name}-{n}" for n in NFE for name in ("base_guided", "base_unguided")), "rats-2", "rats-3")

DIMENSIONS = {"efficientnet-lite0": 1280, "open-nsfw": 1024}
"""Features of a picture, by judge."""

JUDGED = [f"{metric}{judge}" for judge in ("", " open-nsfw") for metric in ("kid", "recognition", "diversity")]


def settings(folder: Path, **changes: dict[str, object]) -> Params:
    rewards = [("hpsv2", "hpsv2"), ("pickscore", "pickscore")]
    judges = [{"name": name, "real_features": str(folder / f"{name}.safetensors")} for name in DIMENSIONS]
    values: dict[str, dict] = {
        "model": {"path": str(folder / "teacher")},
        "prompts": {"train": str(folder / "train.txt"), "test": str(folder / "test.csv")},
        "teacher": {"steps": STEPS, "nfe": NFE, "true_cfg_scale": 2.0, "max_sequence_length": tiny.LENGTH},
        "compute": {"micro_batch": 6},
        "store": {"path": str(folder / "store"), "shard_samples": 8, "workers": 0},
        "train": {"reward": "hpsv2", "nfe": NFE},
        "evaluate": {"pictures": 3, "judges": judges},
    }
    values["teacher"] |= {"height": tiny.SIZE, "width": tiny.SIZE, "noises_per_prompt": 2}
    for block, change in changes.items():
        values[block] |= change
    listed = [{"name": name, "adapter": adapter, "path": str(folder / name)} for name, adapter in rewards]
    return Params.model_validate(values | {"rewards": listed})


def write_student(folder: Path, network: torch.nn.Module) -> None:
    run = folder / "runs/rats"
    network.save_pretrained(run / "student")
    recipe = ShardSet.open(folder / "shards").fingerprint
    record = {"recipe": recipe, "student": hash_path(run / "student"), "vae": hash_path(folder / "teacher/vae")}
    write_run(run, 1.0, nfe=NFE, **record)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, two rewards, six prompts of six concepts, their rollout, a student and an evaluation."""
    folder = tmp_path_factory.mktemp("world")
    tiny.write_flux(folder / "teacher")
    tiny.write_pickscore(folder / "pickscore")
    tiny.write_hpsv2(folder / "hpsv2")
    lines = [f"{prompt},{concept},open" for prompt, concept in zip(tiny.PROMPTS, CONCEPTS, strict=True)]
    (folder / "test.csv").write_text("\n".join(["prompt,concept,kind", *lines]) + "\n")
    (folder / "train.txt").write_text("something else\n")
    rng = np.random.default_rng(0)
    for name, dimension in DIMENSIONS.items():
        write_real(folder / f"{name}.safetensors", rng.random((18, dimension)), list(CONCEPTS) * 3)
    rollout_stage(settings(folder), "test", folder / "shards")
    write_student(folder, tiny.transformer(seed=7))
    (folder / "counts.json").write_text(json.dumps(counted_evaluation(folder)))
    return folder


def counted_evaluation(folder: Path) -> dict[str, int]:
    """Evaluates under a forward hook: batches that a reward scored, evaluations of a transformer, its threads."""
    counts = {"scored": 0, "drawn": 0}

    def hook(module: torch.nn.Module, args: tuple) -> None:
        counts["scored"] += isinstance(module, CLIPModel)
        counts["drawn"] += isinstance(module, FluxTransformer2DModel) and not module.proj_out.weight.is_meta

    record = folder / "reports/evaluate.json", "rats stage evaluate --mine"
    handle = register_module_forward_pre_hook(hook)
    try:
        with tiny.threads_seen(given=5) as seen:
            evaluate_stage(settings(folder), folder / "shards", folder / "runs", *record)
    finally:
        handle.remove()
    (counts["threads"],) = seen
    return counts


def cells(folder: Path) -> list[Cell]:
    return list(EvaluateReport.model_validate_json((folder / "reports/evaluate.json").read_bytes()).cells)


def copy(world: Path, folder: Path) -> Path:
    """A world of one's own to break."""
    shutil.copytree(world, folder / "world")
    return folder / "world"


def evaluate(folder: Path, **changes: dict[str, object]) -> EvaluateReport:
    return evaluate_stage(settings(folder, **changes), folder / "shards", folder / "runs", folder / "new/evaluate.json")


def test_every_system_has_every_metric_with_the_cost_it_had(world: Path):
    found = {(c.variant or c.system, c.nfe, c.evaluations, c.metric) for c in cells(world)}
    systems = [("teacher", 8, 16), ("base_guided", 2, 4), ("base_guided", 3, 6), ("base_unguided", 2, 2)]
    systems += [("base_unguided", 3, 3), ("rats", 2, 2), ("rats", 3, 3)]
    metrics = ("hpsv2", "pickscore", *JUDGED)
    assert found == {(*system, metric) for system in systems for metric in metrics}


def test_a_cell_has_the_fields_of_the_design(world: Path):
    fields = {"system", "variant", "nfe", "evaluations", "metric", "role", "split", "mean", "ci_low", "ci_high"}
    fields |= {"delta_vs_teacher", "delta_ci_low", "delta_ci_high", "num_prompts", "num_concepts"}
    raw = json.loads((world / "reports/evaluate.json").read_bytes())["cells"]
    assert all(fields <= set(cell) for cell in raw)
    assert {(c.split, c.num_prompts, c.num_concepts) for c in cells(world)} == {("test", 6, 6)}
    assert {(c.metric, c.role) for c in cells(world)} == {
        ("hpsv2", "trained"),
        ("pickscore", "held_out"),
        *((metric, "judge") for metric in JUDGED),
    }


def test_intervals_hold_their_means_and_only_the_teacher_has_no_difference(world: Path):
    for cell in cells(world):
        assert cell.ci_low is not None and cell.ci_high is not None and cell.ci_low <= cell.mean <= cell.ci_high
        assert (cell.delta_vs_teacher is None) == (cell.system == "teacher")


def test_the_evaluation_says_when_where_and_by_what_it_was_made(world: Path):
    made = EvaluateReport.model_validate_json((world / "reports/evaluate.json").read_bytes()).made
    assert made is not None and made.command == "rats stage evaluate --mine"
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC", made.date) and re.match(r"rats \d", made.code)
    assert f"torch {torch.__version__}" in made.machine and socket.gethostname() not in made.machine


def test_no_teacher_sample_is_drawn_or_scored_again(world: Path):
    batches, evaluations = 2, sum(2 * n + n + n for n in NFE)
    assert json.loads((world / "counts.json").read_text()) == {
        "drawn": batches * evaluations,
        "scored": batches * (len(SYSTEMS) - 1) * 2,
        "threads": 1,
    }


def test_the_teachers_values_are_the_stored_scores(world: Path):
    samples = open_samples(settings(world), world / "shards")
    address, _ = reward_column(samples.shards, "hpsv2")
    stored = read_scores(samples.shards, address, [row.key for row in samples.rows])
    assert read_values(world / "reports/values.csv").scores["teacher", "hpsv2"] == stored


def test_the_cells_follow_from_the_values(world: Path):
    values = read_values(world / "reports/values.csv")
    own, teacher = values.scores["rats-3", "pickscore"], values.scores["teacher", "pickscore"]
    expected = paired_estimate(list(own.values()), [teacher[k] for k in own], [values.concepts[k] for k in own])
    cell = next(c for c in cells(world) if (c.variant, c.nfe, c.metric) == ("rats", 3, "pickscore"))
    assert (cell.mean, cell.delta_vs_teacher) == pytest.approx((expected.mean, expected.delta))
    assert (cell.delta_ci_low, cell.delta_ci_high) == pytest.approx(expected.delta_ci)


def test_the_students_pictures_are_those_of_the_plain_pipeline_from_the_same_noise(world: Path):
    shown = load_pictures(world / "reports/pictures.safetensors")
    samples = open_samples(settings(world), world / "shards")
    network = FluxTransformer2DModel.from_pretrained(world / "runs/rats/student")
    pipeline = FluxPipeline.from_pretrained(world / "teacher", transformer=network)
    pipeline.set_progress_bar_config(disable=True)
    row = next(r for r in samples.rows if r.prompt == shown.prompts[0])
    noises = [r for r in samples.rows if r.prompt_id == row.prompt_id]
    drawn = []
    for one in noises:
        latents = torch.from_numpy(read_sample(samples.shards, one)["x"][:1].astype(np.float32))
        options = {"num_inference_steps": 3, "max_sequence_length": tiny.LENGTH, "output_type": "np"}
        image = pipeline(one.prompt, latents=latents, height=tiny.SIZE, width=tiny.SIZE, **options).images[0]
        drawn.append((image * 255).round())
    assert min(np.abs(shown.side["rats-3"][0] - image).max() for image in drawn) <= 1


def test_an_untrained_student_is_the_unguided_base_to_the_last_bit(world: Path, tmp_path: Path):
    folder = copy(world, tmp_path)
    shutil.rmtree(folder / "runs/rats")
    write_student(folder, tiny.transformer(seed=0))
    found = {(c.variant or c.system, c.nfe, c.metric): c for c in evaluate(folder).cells}
    for nfe in NFE:
        for metric in ("hpsv2", "pickscore", *JUDGED):
            assert found["rats", nfe, metric].mean == found["base_unguided", nfe, metric].mean


def test_a_number_of_steps_that_training_visits_twice_is_evaluated_once(world: Path):
    twice = settings(world, train={"nfe": [3, 2, 3]})
    drawn = [s.column.id for s in systems(twice, Model.of(twice), world / "runs") if s.column.system == "student"]
    assert drawn == ["rats-2", "rats-3"]


def test_a_second_evaluation_gives_the_same_files(world: Path, tmp_path: Path):
    folder = copy(world, tmp_path)
    evaluate(folder, evaluate={"judges": []})
    for name in ("values.csv", "pictures.safetensors"):
        assert (folder / "new" / name).read_bytes() == (folder / "reports" / name).read_bytes()


def test_without_guidance_there_is_one_base_and_without_a_judge_no_judged_metric(world: Path, tmp_path: Path):
    folder = copy(world, tmp_path)
    plain = settings(folder, teacher={"true_cfg_scale": 1.0}, evaluate={"judges": []})
    shutil.rmtree(folder / "shards")
    rollout_stage(plain, "test", folder / "shards")
    shutil.rmtree(folder / "runs/rats")
    write_student(folder, tiny.transformer(seed=7))
    report = evaluate_stage(plain, folder / "shards", folder / "runs", folder / "new/evaluate.json")
    assert {c.system for c in report.cells} == {"teacher", "base_guided", "student"}
    assert {c.metric for c in report.cells} == {"hpsv2", "pickscore"}
    assert {c.evaluations for c in report.cells if c.system == "base_guided"} == set(NFE)


def test_the_report_of_a_real_evaluation_is_written(world: Path):
    out = report_stage(settings(world), world / "reports/evaluate.json", world / "runs", world / "reports/report.html")
    assert out.read_text().count("data:image/png") > 20


def test_a_run_without_a_student_is_refused(world: Path, tmp_path: Path):
    folder = copy(world, tmp_path)
    shutil.rmtree(folder / "runs/rats/student")
    with pytest.raises(ConfigError, match="no student in .*rats: run `rats stage train --variant rats`"):
        evaluate(folder)


def test_shards_of_another_recipe_are_refused(world: Path, tmp_path: Path):
    with pytest.raises(DataError, match="made with another true_cfg_scale: 2.0 there, 3.0 by"):
        evaluate(copy(world, tmp_path), teacher={"true_cfg_scale": 3.0})


def test_a_student_of_other_shards_is_refused(world: Path, tmp_path: Path):
    folder = copy(world, tmp_path)
    write_record(folder / "runs/rats", recipe="f" * 64)
    with pytest.raises(DataError, match="rats was trained on shards of recipe ffffffffffff"):
        evaluate(folder)


def test_a_student_that_was_exchanged_is_refused(world: Path, tmp_path: Path):
    folder = copy(world, tmp_path)
    tiny.transformer(seed=8).save_pretrained(folder / "runs/rats/student")
    with pytest.raises(DataError, match="is not the network that the run has left"):
        evaluate(folder)


def test_another_text_encoder_is_refused(world: Path, tmp_path: Path):
    folder = copy(world, tmp_path)
    tiny.write_flux(folder / "other", seed=3)
    shutil.rmtree(folder / "teacher/text_encoder_2")
    shutil.copytree(folder / "other/text_encoder_2", folder / "teacher/text_encoder_2")
    with pytest.raises(DataError, match="was made with another text_encoder_2: "):
        evaluate(folder)


def test_scores_by_another_reward_of_that_name_are_refused(world: Path, tmp_path: Path):
    folder = copy(world, tmp_path)
    tiny.write_hpsv2(folder / "hpsv2", seed=9)
    with pytest.raises(DataError, match="scored with another reward: .*rats stage rollout"):
        evaluate(folder)


def test_a_changed_byte_in_a_shard_is_refused_and_nothing_is_written(world: Path, tmp_path: Path):
    folder = copy(world, tmp_path)
    samples = open_samples(settings(folder), folder / "shards")
    row = samples.rows[3]
    data = bytearray(samples.shards.shard_path(row.shard).read_bytes())
    data[row.offset + row.length // 2] ^= 1
    samples.shards.shard_path(row.shard).write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        evaluate(folder)
    assert not (folder / "new").exists()


def test_a_student_that_draws_nan_is_named(world: Path, tmp_path: Path):
    folder = copy(world, tmp_path)
    network = tiny.transformer(seed=7)
    with torch.no_grad():
        network.proj_out.bias.fill_(float("nan"))
    shutil.rmtree(folder / "runs/rats")
    write_student(folder, network)
    with pytest.raises(DataError, match="rats-2: 6 of 6 final latents are not finite"):
        evaluate(folder, evaluate={"judges": []})


def test_shards_whose_prompts_no_file_has_are_refused(world: Path, tmp_path: Path):
    folder = copy(world, tmp_path)
    (folder / "test.csv").write_text("prompt,concept,kind\na fox,fox,open\n")
    with pytest.raises(DataError, match="prompts that are in none of .*test.csv"):
        evaluate(folder)


def test_real_features_that_are_missing_or_cut_are_refused(tmp_path: Path):
    path = tmp_path / "real.safetensors"
    with pytest.raises(ConfigError, match="not there: set it to null"):
        open_real(path)
    write_real(path, np.ones((4, 3)), ["a", "b", "a", "b"])
    assert open_real(path)[1] == ["a", "b", "a", "b"]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match="holds no real features"):
        open_real(path)


def test_embeddings_are_read_and_not_made(world: Path):
    samples = open_samples(settings(world), world / "shards")
    batch = next(samples.batches(3, torch.device("cpu")))
    stored = read_embedding(samples.shards, samples.rows[2].prompt_id)
    assert all(torch.equal(batch.conditioning[name][2], value) for name, value in stored.items())


def as_validation(folder: Path, **changes: dict[str, object]) -> Params:
    """The same prompts by the name of the validation split."""
    return settings(folder, prompts={"validation": str(folder / "test.csv"), "test": None}, **changes)


@pytest.mark.parametrize("saved_at", [1.0, 0.8])
def test_a_student_at_half_its_length_is_measured_as_that_student_would_be(
    world: Path, tmp_path: Path, saved_at: float
):
    folder = copy(world, tmp_path)
    write_record(folder / "runs/rats", update_length=saved_at, **kept_of(folder))
    params, out = as_validation(folder), folder / "lengths.json"
    report = lengths_stage(params, folder / "shards", folder / "runs", out, [saved_at, saved_at / 2], "rats")
    found = {(cell.length, cell.nfe, cell.metric): cell for cell in report.cells}
    for cell in (c for c in cells(folder) if c.variant == "rats"):
        assert found[saved_at, cell.nfe, cell.metric].mean == pytest.approx(cell.mean, rel=1e-5)
    base, trained = tiny.transformer(seed=0).state_dict(), tiny.transformer(seed=7)
    trained.load_state_dict({name: (base[name] + value) / 2 for name, value in trained.state_dict().items()})
    shutil.rmtree(folder / "runs/rats")
    write_student(folder, trained)
    for cell in (c for c in evaluate(folder).cells if c.variant == "rats"):
        other = found[saved_at / 2, cell.nfe, cell.metric]
        assert other.mean == pytest.approx(cell.mean, rel=1e-4)
        assert other.delta_vs_teacher == pytest.approx(cell.delta_vs_teacher, rel=2e-2)  # tiny models, tiny differences
    assert LengthsReport.model_validate_json(out.read_bytes()) == report
    said = "\n".join(length_lines(report))
    assert said.isascii() and f"train.update_length: {report.chosen['rats']:g}" in said and "hpsv2, 3 steps" in said


def kept_of(folder: Path) -> dict[str, object]:
    record = json.loads((folder / "runs/rats/run.json").read_text())
    return {name: record[name] for name in ("nfe", "recipe", "student", "vae")}


def test_the_shortest_length_within_one_standard_error_of_the_best_is_chosen():
    concepts, best = ["fox", "owl", "hen", "elk"], np.array([3.0, 5.0, 4.0, 6.0])
    near = best + [-0.3, 0.2, -0.1, -0.1]  # 0.075 below, with an error of 0.103
    far = best + [-0.6, 0.2, -0.1, -0.7]  # 0.3 below, with an error of 0.212: its 95 % interval holds zero
    assert chosen_length({1.0: best - 0.2, 0.75: best, 0.5: near, 0.4: far, 0.25: best - 0.4}, concepts) == 0.5
    assert chosen_length({1.0: best, 0.5: far}, concepts) == 1.0


@pytest.mark.parametrize(("lengths", "words"), [([0.5], "two or more"), ([0.5, 1.5], "at most 1"), ([0.5, 0.5], "two")])
def test_lengths_that_leave_nothing_to_choose_are_refused(world: Path, lengths: list[float], words: str):
    with pytest.raises(ConfigError, match=words):
        lengths_stage(as_validation(world), world / "shards", world / "runs", world / "no.json", lengths)


def test_no_length_is_chosen_by_the_test_prompts(world: Path):
    with pytest.raises(ConfigError, match="test prompts, by which nothing may be chosen.*--split validation"):
        lengths_stage(settings(world), world / "shards", world / "runs", world / "no.json", [0.5, 1.0])


def test_generate_draws_what_the_plain_pipeline_draws(world: Path, tmp_path: Path):
    ours = generate(settings(world), "a red fox", 3, world / "runs/rats", seed=5, out=tmp_path / "a.png", count=2)
    network = FluxTransformer2DModel.from_pretrained(world / "runs/rats/student")
    pipeline = FluxPipeline.from_pretrained(world / "teacher", transformer=network)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "max_sequence_length": tiny.LENGTH, "num_images_per_prompt": 2}
    noise = torch.Generator().manual_seed(5)
    theirs = pipeline("a red fox", height=tiny.SIZE, width=tiny.SIZE, generator=noise, **options).images
    assert [image.tobytes() for image in ours.pictures] == [image.tobytes() for image in theirs]
    base = generate(settings(world), "a red fox", 3, None, seed=5, out=tmp_path / "b.png", count=2)
    assert [image.tobytes() for image in base.pictures] != [image.tobytes() for image in ours.pictures]


@pytest.mark.parametrize(
    ("prompt", "run", "out", "words"),
    [
        (" ", "runs/rats", "a.png", "the prompt is empty"),
        ("a fox", "runs/rats", "a.txt", "end it in one of .png"),
        ("a fox", "runs/other", "a.png", "no finished run in .*other"),
    ],
)
def test_generate_refuses_what_it_cannot_draw(world: Path, tmp_path: Path, prompt: str, run: str, out: str, words: str):
    with pytest.raises(ConfigError, match=words):
        generate(settings(world), prompt, 3, world / run, 0, tmp_path / out)
    assert not (tmp_path / out).exists()


def blocked(folder: Path) -> None:
    (folder / "new").write_text("no folder")


def one_concept(folder: Path) -> None:
    text = (folder / "test.csv").read_text()
    for concept in CONCEPTS:
        text = text.replace(f",{concept},", ",thing,")
    (folder / "test.csv").write_text(text)


def no_real_pictures(folder: Path) -> None:
    (folder / "efficientnet-lite0.safetensors").unlink()


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        (blocked, "cannot create"),
        (one_concept, "is about 'thing' alone"),
        (no_real_pictures, r"efficientnet-lite0\.safetensors"),
    ],
)
def test_what_would_stop_it_at_its_end_stops_it_before_a_network_is_loaded(
    breaks: Callable[[Path], None], said: str, world: Path, tmp_path: Path
):
    folder = copy(world, tmp_path)
    breaks(folder)
    where = folder / "shards", folder / "runs", folder / "new/evaluate.json"
    with pytest.raises(RatsError, match=said):
        plan_evaluate(settings(folder), *where)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RatsError, match=said):
        patch.delattr(evaluate_module, "open_evaluator")
        evaluate_stage(settings(folder), *where)


def test_a_dry_run_says_what_is_compared_and_writes_nothing(world: Path):
    plan = plan_evaluate(settings(world), world / "shards", world / "runs", world / "elsewhere/evaluate.json")
    assert (plan["split"], plan["samples"], plan["concepts"]) == ("test", 12, 6)
    assert plan["students"] == {"rats": str(world / "runs/rats/student")}
    assert not (world / "elsewhere").exists()


def test_prompts_that_the_student_was_trained_on_are_named(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = copy(world, tmp_path)
    (folder / "train.txt").write_text("something else\n" + "\n".join(tiny.PROMPTS[:2]))
    plan_evaluate(settings(folder), folder / "shards", folder / "runs", folder / "new/evaluate.json")
    assert "2 of 6 prompts of prompts.test are in prompts.train too" in caplog.text
