"""The loop, its metrics and its checkpoints on toys: what is logged, what is refused, what survives."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
import torch
from blake3 import blake3

from rats.schemas.errors import DataError
from rats.stages.train.teacher_calls import CountedStream, CountedStudent, TeacherCallCounter
from rats.trainer.checkpoint import Checkpoints, RunState, read_checkpoint
from rats.trainer.loop import train
from rats.trainer.metrics import CsvLog
from tests.support.toy import (
    IDENTITY,
    NFE,
    SAMPLES,
    ToyReward,
    ToyStream,
    ToyStudent,
    objective,
    run_of,
    settings,
    stored,
    train_in,
    train_on,
)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def trace(folder: Path) -> list[dict[str, str]]:
    """All columns but the clock's."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows(folder)]


def weights(run) -> dict[str, bytes]:
    return {name: p.detach().numpy().tobytes() for name, p in run.learner.network.named_parameters()}


def test_every_step_has_a_row_with_its_own_nfe_and_its_own_horizons(tmp_path):
    run = train_in(tmp_path, settings())
    table = rows(tmp_path)
    assert [int(row["step"]) for row in table] == list(range(6))
    assert [int(row["nfe"]) for row in table] == [2, 3, 2, 3, 2, 3]
    assert [row["loss_shape_k3"] == "" for row in table] == [True, False] * 3
    assert [row["grad_reward"] != "" for row in table] == [True, False, False] * 2
    assert int(table[-1]["position"]) == 24 and run.state.step == 6


def test_the_gap_the_gate_and_the_total_are_those_of_the_formulas(tmp_path):
    train_in(tmp_path, settings(alpha=2.0, reward_weight=0.5))
    for row in rows(tmp_path):
        value = {name: float(text) for name, text in row.items() if text}
        assert value["gap"] == pytest.approx(value["reward_teacher"] - value["reward_student"], abs=1e-6)
        assert value["loss_reward"] == pytest.approx(-0.5 * value["reward_student"], abs=1e-6)
        horizons = [value[f"loss_shape_k{k}"] for k in range(1, int(row["nfe"]) + 1)]
        assert value["loss_shape"] == pytest.approx(sum(horizons) / len(horizons), rel=1e-5)
        assert 0 < value["gate_mean"] < 1 and value["gate_std"] > 0


def test_training_closes_the_distance_to_the_teacher(tmp_path):
    train_in(tmp_path, settings(steps=60, reward_weight=0.0, gate={"form": "off"}, checkpoint_every=60))
    losses = [float(row["loss_shape"]) for row in rows(tmp_path)]
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])


def test_training_for_the_reward_alone_raises_it(tmp_path):
    train_in(tmp_path, settings(steps=40, alpha=0.0, checkpoint_every=40))
    rewards = [float(row["reward_student"]) for row in rows(tmp_path)]
    assert rewards[-1] > rewards[0] + 0.05
    assert rows(tmp_path)[0]["grad_shape"] == "0.0"


@pytest.mark.parametrize("changes", [{}, {"last_k": 1}, {"augment": 0.5}], ids=["full", "last-k", "augmented"])
def test_micro_batches_make_the_same_update_as_the_whole_batch(tmp_path, changes):
    changes = changes | {"steps": 4}
    if "augment" in changes:  # each micro-batch has its own augmentation, so only the shaping loss may be compared
        changes |= {"reward_weight": 0.0}
    whole, parts = (train_in(tmp_path / str(m), settings(micro_batch=m, checkpoint_every=4, **changes)) for m in (4, 3))
    for name, p in whole.learner.network.named_parameters():
        torch.testing.assert_close(p, dict(parts.learner.network.named_parameters())[name], rtol=1e-4, atol=1e-5)


def test_logging_the_gradient_of_each_term_does_not_change_the_update(tmp_path):
    often, never = (train_in(tmp_path / str(n), settings(log_gradients_every=n, steps=5)) for n in (1, 100))
    for name, p in often.learner.network.named_parameters():
        torch.testing.assert_close(p, dict(never.learner.network.named_parameters())[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("nfe", [(3, 5, 3, 8), (3, 5), (8,), (2, 3, 5, 8, 13)])
@pytest.mark.parametrize("every", [1, 2, 10])
def test_gradients_of_each_term_are_logged_at_every_number_of_steps(nfe, every):
    chosen = settings(nfe=nfe, log_gradients_every=every)
    moments = [chosen.moment(step) for step in range(120)]
    logged = [moment.nfe for moment in moments if moment.split]
    assert set(logged) == set(nfe) and moments[0].split
    assert len(logged) >= 120 // (every + 2) and (every == 1 or not moments[1].split)


def test_without_a_limit_no_gradient_is_clipped(tmp_path):
    free, loose, tight = (train_in(tmp_path / str(n), settings(clip_norm=n)) for n in (None, 1e6, 1e-4))
    assert weights(free) == weights(loose) != weights(tight)
    assert len(free.gradient_norms()) == 6 and free.gradient_norms() == loose.gradient_norms()


def test_two_runs_are_equal_to_the_last_bit(tmp_path):
    one, two = (train_in(tmp_path / name, settings(augment=1.0)) for name in "ab")
    assert weights(one) == weights(two) and trace(tmp_path / "a") == trace(tmp_path / "b")


def test_a_step_runs_the_students_n_evaluations_and_scores_no_teacher_sample(tmp_path):
    student, reward, witness = ToyStudent(), ToyReward(), TeacherCallCounter()
    given = objective(settings(augment=1.0), CountedStudent(student, witness), reward)
    run, finals = run_of(given, tmp_path), [stored(i).x_HTC[-1:].float() for i in range(SAMPLES)]
    with witness.watching(student.network):
        train(given, CountedStream(ToyStream(), witness), run)
    assert witness.student_forwards == 3 * sum(NFE)
    assert (witness.teacher_forwards, witness.teacher_reward_calls, len(reward.seen)) == (0, 0, 2 * 6)
    decoded = {digest(student.decode(final)[0]) for final in finals}
    assert not decoded & {digest(picture) for pictures in reward.seen for picture in pictures}


def digest(picture: torch.Tensor) -> str:
    return blake3(picture.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite_costs_its_sample_and_nothing_else(tmp_path, bad):
    run = train_in(tmp_path, settings(), reward=ToyReward({3: bad}))
    table = rows(tmp_path)
    assert [row["bad"] for row in table] == ["0", "0", "0", "1", "0", "0"]
    assert (run.state.bad, run.state.asked, run.state.gate_count) == (1, 24, 23)
    assert all(torch.isfinite(p).all() for p in run.learner.parameters)
    assert all(float(row[name]) == float(row[name]) for row in table for name in ("loss_total", "grad_total"))


def test_a_gradient_that_is_not_finite_changes_no_weight(tmp_path):
    given = objective(settings())
    run = run_of(given, tmp_path)
    before = weights(run)
    run.learner.parameters[0].register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(DataError, match="step 0: the gradient"):
        train_on(given, run)
    assert weights(run) == before


def test_a_stop_saves_the_step_and_exits_143(tmp_path):
    given = objective(settings())
    run = run_of(given, tmp_path)
    run.stop_when(lambda: run.state.step == 3)
    with pytest.raises(SystemExit) as stopped:
        train_on(given, run)
    assert stopped.value.code == 143 and read_checkpoint(tmp_path / "checkpoints" / "000003").state.position == 12


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9, "augment": 1.0, "last_k": 1}], ids=["plain", "ema"])
def test_a_resumed_run_equals_an_undisturbed_one_to_the_last_bit(tmp_path, changes):
    straight = train_in(tmp_path / "a", settings(**changes))
    train_in(tmp_path / "b", settings(**changes | {"steps": 4}))
    resumed = train_in(tmp_path / "b", settings(**changes), resume=True)
    assert weights(straight) == weights(resumed) and trace(tmp_path / "a") == trace(tmp_path / "b")
    assert straight.state.gate_mean == resumed.state.gate_mean
    assert all(torch.equal(straight.learner.ema[name], p) for name, p in resumed.learner.ema.items())


@pytest.mark.parametrize("file", ["network.safetensors", "optimizer.safetensors", "state.json", "metrics.csv"])
def test_a_damaged_newest_checkpoint_falls_back_with_a_warning(tmp_path, file, caplog):
    train_in(tmp_path, settings())
    damaged = tmp_path / "checkpoints" / "000006" / file
    damaged.write_bytes(damaged.read_bytes()[:-3])
    assert Checkpoints(tmp_path / "checkpoints").newest().state.step == 4
    assert "000006 is damaged" in caplog.text


def test_a_run_made_shorter_takes_up_no_checkpoint_beyond_its_end(tmp_path):
    train_in(tmp_path, settings())
    assert Checkpoints(tmp_path / "checkpoints").newest(at_most=5).state.step == 4


def test_one_flipped_bit_in_a_checkpoint_is_found(tmp_path):
    train_in(tmp_path, settings())
    path = tmp_path / "checkpoints" / "000006"
    data = bytearray((path / "network.safetensors").read_bytes())
    data[-5] ^= 1
    (path / "network.safetensors").write_bytes(data)
    with pytest.raises(DataError, match="network.safetensors has another hash"):
        read_checkpoint(path)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    train_in(tmp_path, settings(checkpoints_total_limit=2))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["000004", "000006"]


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    run = train_in(tmp_path, settings())
    tensors = Checkpoints(tmp_path / "checkpoints").newest().tensors()
    with pytest.raises(DataError, match="another network"):
        run.learner.restore({**tensors, "network": {"other": torch.zeros(1)}})


def test_the_state_of_the_stream_is_one_number_in_a_checkpoint(tmp_path):
    path = Checkpoints(tmp_path).save(
        RunState(5, 77, 1.5, 3, 0.1), {"network": {}}, {"metrics.csv": b"step\n"}, IDENTITY, 4
    )
    saved = read_checkpoint(path)
    assert (saved.state.position, saved.snapshot, saved.identity) == (77, 4, IDENTITY)
    assert saved.state.gate_mean == 0.5


@pytest.mark.parametrize("damage", ["a step too many", "a torn line", "gone"])
def test_a_run_that_goes_on_has_the_rows_of_its_checkpoint_whatever_became_of_the_file(tmp_path, damage):
    train_in(tmp_path, settings(steps=4))
    expected = trace(tmp_path)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("4,2,0.1" + (",0" * 17 + "\n" if damage == "a step too many" else ""))
    if damage == "gone":
        (tmp_path / "metrics.csv").unlink()
    run_of(objective(settings(steps=4)), tmp_path, resume=True)
    assert trace(tmp_path) == expected


def test_metrics_never_write_through_a_hardlink_into_a_cache(tmp_path):
    CsvLog(tmp_path / "metrics.csv", ["step"]).append({"step": 0})
    os.link(tmp_path / "metrics.csv", tmp_path / "cached.csv")
    before = (tmp_path / "cached.csv").read_bytes()
    CsvLog(tmp_path / "metrics.csv", ["step"], before).append({"step": 1})
    assert (tmp_path / "cached.csv").read_bytes() == before


def test_the_average_of_the_weights_is_what_is_saved_for_the_student(tmp_path):
    run = train_in(tmp_path, settings(ema=0.5))
    own = weights(run)
    with run.learner.averaged():
        assert {name: t.numpy().tobytes() for name, t in run.learner.ema.items()} == weights(run) != own
    assert weights(run) == own
