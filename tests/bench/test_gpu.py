"""The benchmark for a GPU runs on the CPU at tiny size, so that it does not rot; with a GPU it is held to its bars."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.gpu_models import FULL
from rats.pipeline.families.flux import Flux

BEYOND_MEMORY = "100000000000"


def test_rollout_and_lora_steps_are_measured_and_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "gpu.json"
    options = ["--only", "rate", "rollout", "step", "--batches", "1", "2", "--nfe", "2", "--repeats", "1"]
    found = gpu.main(["--tiny", *options, "--out", str(out)])
    assert json.loads(out.read_text()) == found == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(cell["pixels"], cell["batch"]) for cell in found["rollout"]] == [(32, 1), (16, 1), (32, 2), (16, 2)]
    for cell in found["rollout"]:
        again = cell["batch"] / (cell["step_seconds"] * 10)
        assert cell["samples_per_second"] == pytest.approx(again) and 0 < cell["share"] < 1
    (step,) = found["step"]
    assert step["nfe"] == 2 and step["seconds"] > 0 and step["trained_parameters"] > 0
    assert set(step["parts"]) == {"network forward", "decode", "reward", "backward, optimizer"}
    assert all(seconds > 0 for seconds in step["parts"].values())
    assert [bar["met"] for bar in found["bars"]] == [None, None]
    assert found["devices"][-1]["name"] == "cpu" and found["versions"]["torch"] == torch.__version__


def test_a_cell_that_does_not_fit_in_memory_says_so_and_the_others_go_on():
    found = gpu.main(["--tiny", "--only", "rollout", "--batches", BEYOND_MEMORY, "1", "--repeats", "1"])
    said = {(cell["batch"], cell.get("said")) for cell in found["rollout"]}
    assert said == {(1, None), (int(BEYOND_MEMORY), "OOM")}


def test_an_error_that_is_not_the_memorys_is_not_hidden():
    meter = gpu.Meter(gpu.TINY, "cpu", repeats=1, until=math.inf)
    with pytest.raises(RuntimeError, match="size"):
        meter.cell({}, 0.0, lambda: {"x": torch.ones(2) @ torch.ones(3)})


def test_a_cell_for_which_there_is_no_time_says_so():
    found = gpu.main(["--tiny", "--only", "rollout", "compiled", "step", "--minutes", "0"])
    cells = found["rollout"] + found["step"]
    assert {cell["said"] for cell in cells} == {"no time left"} and len(cells) == 2 * 6 + 2


def test_drift_is_the_distance_in_units_of_the_reference():
    reference = torch.tensor([[0.0, 3.0], [4.0, 0.0]])
    found = gpu.drift(reference, reference + 0.2)
    assert found["drift_relative"] == pytest.approx(0.4 / 5)
    assert found["drift_psnr_db"] == pytest.approx(20 * math.log10(4 / 0.2), abs=1e-4)
    assert gpu.drift(reference, reference) == {"drift_psnr_db": None, "drift_relative": 0.0}


def test_the_full_model_has_as_many_parameters_as_flux_dev():
    with torch.device("meta"):
        network = Flux.network_class.from_config(dict(FULL.network))
    assert sum(parameter.numel() for parameter in network.parameters()) == 11_901_408_320


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's compiler on itself
def test_compiled_latents_are_compared_with_eager_ones():
    found = gpu.main(["--tiny", "--only", "rollout", "compiled", "--batches", "1", "--repeats", "1"])
    compiled = [cell for cell in found["rollout"] if cell["recipe"] == "compiled"]
    assert len(compiled) == 2 and all(cell["drift_relative"] < 1e-4 for cell in compiled)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_the_card_meets_the_bars(tmp_path: Path):
    found = gpu.main(["--out", str(tmp_path / "gpu.json")])
    assert [bar["met"] for bar in found["bars"]] == [True, True], found["bars"]
    assert all(cell["drift_relative"] > 0 for cell in found["rollout"] if cell["recipe"] == "compiled")
