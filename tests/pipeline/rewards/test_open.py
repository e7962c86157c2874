"""Rewards by name: of other people's packages, of hub repositories at one commit, and through their own packages."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from rats.pipeline.rewards.clip import PickScore
from rats.pipeline.rewards.hpsv2 import HPSv2
from rats.pipeline.rewards.open import open_reward, pin_reward, reward_fingerprint
from rats.schemas import plugins
from rats.schemas.errors import ConfigError
from rats.schemas.params import Params, RewardParams
from rats.stages.rollout.rollout import pin_params
from tests.pipeline.rewards.test_rewards import PROMPTS, pictures
from tests.support.project import ROOT, settings

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LATER = "89abcdef0123456789abcdef0123456789abcdef"

EXAMPLE = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "rewards.md").read_text(), re.DOTALL)[0]
SOMEBODYS = (
    EXAMPLE
    + '''

class Half:
    """Knows nothing of checkpoints."""
'''
)


@pytest.fixture
def somebodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Another distribution: a module, its metadata with entry points, and a file for its reward."""
    site = tmp_path / "site"
    about = site / "somebodys_rewards-1.0.dist-info"
    about.mkdir(parents=True)
    (site / "somebodys_rewards.py").write_text(SOMEBODYS)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys-rewards\nVersion: 1.0\n")
    lines = ["redness = somebodys_rewards:Redness", "half = somebodys_rewards:Half", "gone = somebodys_rewards:Gone"]
    (about / "entry_points.txt").write_text("\n".join(["[rats.rewards]", *lines]))
    (tmp_path / "gain.txt").write_text("2.0")
    monkeypatch.syspath_prepend(str(site))
    plugins.plugins_in.cache_clear()
    yield tmp_path / "gain.txt"
    plugins.plugins_in.cache_clear()


def test_a_reward_of_somebody_s_own_package_is_found_by_its_entry_point(somebodys: Path) -> None:
    params = RewardParams(name="red", adapter="redness", path=str(somebodys))
    reward = open_reward(params)
    images = pictures(2).requires_grad_()
    scores = reward.score(images, PROMPTS[:2])
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert reward.name == "red" and reward.fingerprint == reward_fingerprint(params)
    torch.testing.assert_close(scores, 2 * images[:, 0].mean((1, 2)))
    assert gradient[:, 0].all() and not gradient[:, 1:].any()


def test_wrong_adapters_are_refused_with_the_way_out(somebodys: Path) -> None:
    with pytest.raises(ValueError, match="'pickscor'.*did you mean 'pickscore'"):
        RewardParams(name="it", adapter="pickscor", path=str(somebodys))
    with pytest.raises(ConfigError, match="'half' lacks 'checkpoints', which docs/rewards.md"):
        open_reward(RewardParams(name="it", adapter="half", path=str(somebodys)))
    with pytest.raises(ConfigError, match="'gone' cannot be imported"):
        open_reward(RewardParams(name="it", adapter="gone", path=str(somebodys)))


def publish(cache: Path, repository: str, commit: str, folder: Path) -> Path:
    """A snapshot in the hub's cache, as `main` is now."""
    place = cache / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / "main").write_text(commit)
    return place / "snapshots" / commit


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_the_driver_pins_a_hub_s_reward_to_its_commit_so_that_workers_read_one_content(hub: Path, models: Path) -> None:
    publish(hub, "someone/pick", COMMIT, models / "pickscore")
    reward = {"name": "pick", "adapter": "pickscore", "path": "someone/pick"}
    local = {"name": "hpsv2", "adapter": "hpsv2", "path": str(models / "hpsv2"), "revision": "v1"}
    params, _ = pin_params(Params.model_validate(settings(models, hub, rewards=[local, reward])))
    assert [one.revision for one in params.rewards] == ["v1", COMMIT]
    publish(hub, "someone/pick", LATER, models / "pickscore")
    (hub / "models--someone--pick" / "snapshots" / LATER / "config.json").write_text("{}")
    assert pin_reward(RewardParams.model_validate(reward)).revision == LATER
    assert open_reward(params.rewards[1]).fingerprint == PickScore.identify(models / "pickscore")


def test_a_file_of_a_hub_repository_chooses_the_version_of_hpsv2(hub: Path, models: Path) -> None:
    place = publish(hub, "xswu/HPSv2", COMMIT, models / "hpsv2")
    (place / "open_clip_model.safetensors").unlink()
    network = HPSv2(models / "hpsv2")
    for number, version in enumerate(("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt")):
        state = torch.load(write_state(models / "hpsv2", hub / "state.pt", number), weights_only=True)
        torch.save({"state_dict": state}, place / version)
    scores = {}
    for path in ("xswu/HPSv2", "xswu/HPSv2/HPS_v2.1_compressed.pt", "xswu/HPSv2/HPS_v2_compressed.pt"):
        reward = open_reward(RewardParams(name="it", adapter="hpsv2", path=path))
        scores[path] = float(reward.score(pictures(1), PROMPTS[:1]))
    newest, chosen, older = scores.values()
    assert newest == chosen != older == float(network.score(pictures(1), PROMPTS[:1]))
    with pytest.raises(ConfigError, match=f"has no HPS_v3.pt .commit {COMMIT}"):
        open_reward(RewardParams(name="it", adapter="hpsv2", path="xswu/HPSv2/HPS_v3.pt"))


def write_state(folder: Path, path: Path, change: int) -> Path:
    """The folder's tensors as a .pt file, one of them `change`d."""
    from safetensors.torch import load_file

    state = load_file(folder / "open_clip_model.safetensors")
    state["visual.proj"] = state["visual.proj"].roll(change, 0)
    torch.save(state, path)
    return path


def test_a_checkpoint_that_is_only_a_pytorch_model_bin_loads_and_scores_the_same(hub: Path, models: Path) -> None:
    place = publish(hub, "someone/old", COMMIT, models / "pickscore")
    (place / "model.safetensors").unlink()
    torch.save(CLIPModel.from_pretrained(models / "pickscore").state_dict(), place / "pytorch_model.bin")
    old = open_reward(RewardParams(name="it", adapter="pickscore", path="someone/old"))
    assert torch.equal(
        old.score(pictures(2), PROMPTS[:2]), PickScore(models / "pickscore").score(pictures(2), PROMPTS[:2])
    )


@pytest.mark.skipif(find_spec("hpsv2") is not None, reason="the packages are here: see tests/rewards")
@pytest.mark.parametrize("adapter", ["hpsv2", "image-reward"])
def test_without_its_package_an_official_reward_says_how_to_install_it(adapter: str, models: Path) -> None:
    params = RewardParams(name="it", adapter=adapter, path=str(models / adapter), backend="official")
    for attempt in (open_reward, reward_fingerprint):
        with pytest.raises(ConfigError, match=f"needs the package '{adapter}'.*pip install 'rats.rewards.'"):
            attempt(params)


@pytest.mark.parametrize("adapter", ["clip", "pickscore", "url"])
def test_rewards_without_a_package_have_no_official_backend(adapter: str, models: Path) -> None:
    params = RewardParams(name="it", adapter=adapter, path=str(models / "pickscore"), backend="official")
    with pytest.raises(
        ConfigError, match=r"has no package of its own.*\(hpsv2, image-reward have\): leave backend out"
    ):
        open_reward(params)
