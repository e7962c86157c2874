"""What goes wrong in a long run: rewards that fail, memory that ends, generators that are missing, requests to stop."""

from __future__ import annotations

import csv
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from rats.schemas.errors import ConfigError, DataError, RetryLaterError
from rats.stages.train.resume import stop_flag
from rats.trainer import randomness
from rats.trainer.checkpoint import read_checkpoint
from rats.trainer.data import collate
from rats.trainer.loop import train
from rats.trainer.methods.rats import gap_spread
from tests.support.toy import ToyReward, ToyStream, ToyStudent, objective, run_of, settings, train_in, train_on


class FlakyReward(ToyReward):
    """Fails on one picture in ten, a third of them by NaN, by infinity and by an exception each."""

    def __init__(self, share: float = 0.1) -> None:
        super().__init__()
        self.share = share

    def score(self, images_B3HW, prompts):
        scores_B = images_B3HW.float().flatten(1).mean(1)
        # by the picture, so that asking again about it fails again
        fates = [int(float(image.detach().sum()) * 1e4) % 1000 / 1000 for image in images_B3HW]
        for i, fate in enumerate(fates):
            if fate < self.share / 3:
                raise ValueError("cannot read this picture")
            if fate < self.share:
                scores_B = torch.cat([scores_B[:i], scores_B[i : i + 1] * float("nan"), scores_B[i + 1 :]])
        return scores_B


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def weights(run) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in run.learner.parameters]


def test_a_reward_that_fails_on_a_tenth_of_the_samples_is_masked_and_counted(tmp_path):
    run = train_in(tmp_path, settings(steps=30, batch=8, micro_batch=8, checkpoint_every=30), reward=FlakyReward())
    assert run.state.asked == 240 and 8 <= run.state.bad <= 48
    assert run.state.bad == sum(int(row["bad"]) for row in rows(tmp_path))
    assert all(
        np.isfinite(float(row["loss_total"])) and np.isfinite(float(row["grad_total"])) for row in rows(tmp_path)
    )
    assert all(torch.isfinite(p).all() for p in run.learner.parameters)


def test_a_bad_sample_is_as_if_its_terms_were_zero(tmp_path):
    chosen = settings(steps=1, checkpoint_every=1)
    train_in(tmp_path / "bad", chosen, reward=ToyReward({0: float("nan")}))
    three = settings(steps=1, checkpoint_every=1, batch=3)
    given = objective(three)
    train(given, ToyStream(position=1, batch=3), run_of(given, tmp_path / "good"))  # without the bad first one
    bad, good = rows(tmp_path / "bad")[0], rows(tmp_path / "good")[0]
    assert (bad["bad"], good["bad"]) == ("1", "0")
    for name in ("grad_total", "grad_reward", "grad_shape"):
        assert float(bad[name]) == pytest.approx(0.75 * float(good[name]), rel=1e-5)
    assert float(bad["loss_total"]) == pytest.approx(float(good["loss_total"]), rel=1e-6)


def test_a_step_of_bad_samples_only_has_no_update_and_moves_on(tmp_path):
    given = objective(settings(steps=1, checkpoint_every=1, max_bad=1.0), reward=FlakyReward(share=1.0))
    run = run_of(given, tmp_path)
    before = weights(run)
    train_on(given, run)
    (row,) = rows(tmp_path)
    assert weights(run) == before and run.state.position == 4 and not run.learner.optimizer.state
    assert (row["bad"], row["loss_total"], row["grad_total"]) == ("4", "", "")


def test_a_reward_that_fails_too_often_ends_the_run_with_65_and_a_way_out(tmp_path):
    with pytest.raises(DataError, match=r"no score for 2\d of the last 40 samples.*max_bad = 0.25.*--resume") as error:
        train_in(tmp_path, settings(steps=40, checkpoint_every=5), reward=FlakyReward(share=0.6))
    assert error.value.exit_code == 65 and len(rows(tmp_path)) == 10


class Diverged(ToyStudent):
    """A network whose velocity is not finite for one sample of a batch."""

    def velocity(self, x_BTC, sigma, conditioning):
        v_BTC = super().velocity(x_BTC, sigma, conditioning)
        return torch.cat([v_BTC[:2], v_BTC[2:3] * torch.nan, v_BTC[3:]])


def test_a_student_that_has_diverged_is_told_before_a_reward_is_asked(tmp_path):
    reward = ToyReward()
    given = objective(settings(), Diverged(), reward)
    with pytest.raises(DataError, match="step 0: the student's final latent is not finite for key-0002; no weight"):
        train_on(given, run_of(given, tmp_path))
    assert reward.seen == []


class SmallMemory(ToyStudent):
    """A network that runs out of memory above so many samples, as CUDA does."""

    def __init__(self, fits: int) -> None:
        super().__init__()
        self.fits, self.refused = fits, 0

    def velocity(self, x_BTC, sigma, conditioning):
        if len(x_BTC) > self.fits:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().velocity(x_BTC, sigma, conditioning)


def test_running_out_of_memory_halves_the_micro_batch_once_and_for_all(tmp_path, caplog):
    chosen, student = settings(augment=0.5), SmallMemory(fits=1)
    given = objective(chosen, student)
    run = train_on(given, run_of(given, tmp_path / "small"))
    assert student.refused == 2 and run.state.micro_batch == 1
    assert "out of memory with micro-batches of 4: 2 from here on" in caplog.text
    whole = train_in(tmp_path / "large", chosen)
    for p, q in zip(run.learner.parameters, whole.learner.parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    again = run_of(objective(chosen), tmp_path / "small", resume=True)
    assert again.state.micro_batch == 1


def test_a_single_sample_that_does_not_fit_is_refused_with_the_ways_out(tmp_path):
    given = objective(settings(), SmallMemory(fits=0))
    with pytest.raises(ConfigError, match=r"micro-batch of 1 does not fit.*gradient_checkpointing.*lora"):
        train_on(given, run_of(given, tmp_path))


def test_any_other_error_of_the_network_is_not_taken_for_memory(tmp_path):
    class Broken(ToyStudent):
        def velocity(self, x_BTC, sigma, conditioning):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    given = objective(settings(), Broken())
    with pytest.raises(RuntimeError, match="mat1"):
        train_on(given, run_of(given, tmp_path))


def test_the_generators_come_back_as_they_were():
    randomness.seed_all(3)
    random.gauss(0, 1), np.random.randn(3), torch.rand(5)  # leaves half a pair of normals behind in two of them
    states = randomness.capture()
    first = (random.gauss(0, 1), np.random.randn(), float(torch.rand(1)))
    randomness.restore(states)
    assert (random.gauss(0, 1), np.random.randn(), float(torch.rand(1))) == first


@pytest.mark.parametrize("name", ["torch", "numpy.keys", "python.words"])
def test_a_checkpoint_without_a_generator_is_refused(tmp_path, name):
    train_in(tmp_path, settings())
    saved = read_checkpoint(tmp_path / "checkpoints" / "000006")
    states = saved.tensors()["rng-00000"]
    del states[name]
    with pytest.raises(DataError, match=f"no state of the generator {name}: start over with --force"):
        randomness.restore(states)


def test_a_checkpoint_without_the_generators_file_is_refused(tmp_path):
    run = train_in(tmp_path, settings())
    saved = read_checkpoint(tmp_path / "checkpoints" / "000006")
    (saved.path / "rng-00000.safetensors").unlink()
    with pytest.raises(DataError, match="no state of the generator"):
        run.restore(saved)


def test_a_stop_abandons_the_step_under_way_and_keeps_the_one_before(tmp_path):
    given, asked = objective(settings(micro_batch=1)), iter(range(100))
    run = run_of(given, tmp_path)
    before = weights(run)
    run.stop_when(lambda: next(asked) >= 2)  # in the third of the first step's four micro-batches
    with pytest.raises(SystemExit) as stopped:
        train_on(given, run)
    saved = read_checkpoint(tmp_path / "checkpoints" / "000000")
    assert stopped.value.code == 143 and (saved.state.step, saved.state.position) == (0, 0) and weights(run) == before


class AwayReward(ToyReward):
    """Behind a server that is gone from the third step on."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.stopping = 0, lambda: False

    def score(self, images_B3HW, prompts):
        self.asked += 1
        if self.asked > 2 * 2:  # two micro-batches a step
            raise RetryLaterError("away")
        return super().score(images_B3HW, prompts)


@pytest.mark.parametrize(("told", "raises"), [(True, SystemExit), (False, RetryLaterError)])
def test_a_stop_while_a_reward_server_is_away_keeps_the_steps_that_are_done(tmp_path, told, raises):
    reward = AwayReward()
    given = objective(settings(checkpoint_every=6, micro_batch=2), reward=reward)
    run = run_of(given, tmp_path)
    run.stop_when(lambda: told and reward.asked > 2 * 2)
    with pytest.raises(raises) as ended:
        train_on(given, run)
    assert reward.stopping() == told
    if told:
        assert ended.value.code == 143 and read_checkpoint(tmp_path / "checkpoints" / "000002").state.step == 2
    else:
        assert not (tmp_path / "checkpoints").exists()


def test_a_large_checkpoint_is_not_begun_when_seconds_are_left(tmp_path, monkeypatch):
    given = objective(settings())
    run = run_of(given, tmp_path)
    monkeypatch.setattr("rats.trainer.run.QUICK", 1)
    run.stop_when(lambda: run.state.step == 3)
    with pytest.raises(SystemExit):
        train_on(given, run)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000002"]


def test_a_run_that_an_observer_finishes_ends_as_if_it_were_at_its_last_step(tmp_path):
    given = objective(settings())
    run = run_of(given, tmp_path)
    with run.with_callbacks(lambda run, row: run.finish("enough") if row["step"] == 2 else None):
        train_on(given, run)
    saved = read_checkpoint(tmp_path / "checkpoints" / "000003")
    assert saved.state.finished == "enough" and len(rows(tmp_path)) == 3
    resumed = run_of(given, tmp_path, resume=True)
    assert train_on(given, resumed).state.step == 3


def test_the_spread_of_the_gap_is_measured_at_every_nfe_of_the_student():
    batch = collate(ToyStream().take(), torch.device("cpu"))
    tau = gap_spread(objective(settings(gate={"tau": "gap"})), batch)
    alone = [gap_spread(objective(settings(gate={"tau": "gap"}, nfe=(nfe,))), batch) for nfe in (2, 3)]
    assert min(alone) > 0 and alone[0] != alone[1] and tau not in alone


def test_the_first_sigterm_is_noted_and_the_second_ends_the_process_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped, stop_flag() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
