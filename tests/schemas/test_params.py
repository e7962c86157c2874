"""params.yaml: read, overridden, and refused with a hint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rats.schemas.errors import ConfigError
from rats.schemas.params import Params, load_params, with_variant

TEXT = """
model: {path: assets/flux-mini}
prompts: {train: a.txt}
rewards:
  - {name: hps, adapter: hpsv2, path: r}
train: {reward: hps, lr: 1e-4}
variants:
  rats: {}
  off: {gate.form: off, lr: 2e-5}
evaluate: {variants: [rats, off]}
"""


def write(folder: Path, text: str = TEXT) -> Path:
    path = folder / "params.yaml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str = TEXT, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_params(write(folder, text), overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_is_read_and_its_paths_stay_as_written(tmp_path: Path) -> None:
    params = load_params(write(tmp_path))
    assert (params.model.path, params.train.lr, params.teacher.steps) == ("assets/flux-mini", 1e-4, 50)


def test_an_unquoted_off_is_a_word_and_not_false(tmp_path: Path) -> None:
    params = load_params(write(tmp_path))
    assert params.evaluate.variants == ("rats", "off")
    assert with_variant(params, "off").gate.form == "off"


def test_true_and_false_are_still_booleans(tmp_path: Path) -> None:
    assert load_params(write(tmp_path), ["compute.compile=true"]).compute.compile is True


def test_a_variant_changes_only_what_it_names(tmp_path: Path) -> None:
    params = load_params(write(tmp_path))
    assert with_variant(params, "rats") == params.train
    off = with_variant(params, "off")
    assert off.lr == 2e-5
    assert off.model_copy(update={"lr": 1e-4, "gate": params.train.gate}) == params.train


def test_overrides_reach_blocks_lists_and_variants(tmp_path: Path) -> None:
    overrides = ["train.alpha=2", "teacher.nfe=[3, 5]", "train.nfe=[3]", "rewards.0.path=x", "variants.off.gate.tau=.2"]
    params = load_params(write(tmp_path), overrides)
    assert (params.train.alpha, params.teacher.nfe, params.rewards[0].path) == (2, (3, 5), "x")
    assert with_variant(params, "off").gate.tau == 0.2


def test_an_override_makes_a_block_that_the_file_leaves_out(tmp_path: Path) -> None:
    assert load_params(write(tmp_path), ["train.gate.form=figure"]).train.gate.form == "figure"


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("train.alhpa=2", "did you mean 'alpha'?"),
        ("train.gate.from=off", "did you mean 'form'?"),
        ("trian.alpha=2", "did you mean 'train'?"),
        ("rewards.0.pth=x", "did you mean 'path'?"),
        ("variants.off.shape.spcae=x0", "did you mean 'space'?"),
        ("evaluate.variants=[rats, rats]", "names one twice"),
        ("evaluate.variants=[rast]", "did you mean 'rats'?"),
        ("train.reward=hpss", "did you mean 'hps'?"),
        ("train.alpha", "no '='"),
        ("train.alpha=-1", "train.alpha = -1"),
        ("train.alpha.beta=1", "train.alpha"),
        ("rewards.7.path=x", "rewards.7"),
        ("train.nfe=[4]", "teacher.nfe"),
        ("train=[", "not YAML"),
        ("Train.lr=1", "did you mean train.lr?"),
        ("train.LR=1", "unknown key 'train.LR', did you mean 'lr'?"),
        ("train.lr=.inf", "train.lr = inf: a finite number"),
        ("train.lr=1e40", "train.lr = 1e+40: a finite number"),
        ("train.margin=-.inf", "a finite number"),
        ("train.margin=.nan", "a finite number"),
        ("train.alpha={3: 2, 5: 1e39}", "train.alpha = {3: 2, 5: 1e+39}: a finite number"),
        ("variants.off.gate.tau=.inf", "gate.tau = inf: a finite number"),
        (f"teacher.seed={2**64}", "teacher.seed = 18446744073709551616: Input should be less than or equal to"),
        (f"train.last_k={2**63}", "at most 64 bits"),
        ("compute.device=meta", "compute.device = 'meta': torch's meta device holds no values"),
        ("teacher.negative_prompt=1e5", "put it in quotes"),
        ("evaluate.variants=rats", "a list is meant"),
        ("variants.rats=5", "a block of keys and values is meant"),
        ("teacher=3", "expected keys such as steps, nfe"),
        ("prompts=a.txt", "expected keys such as train"),
        ("prompts.train=[a cat, a dog]", "name a file with a prompt a line"),
        ("prompts.train=", "name a file with a prompt a line"),
        ("prompts.test=[a cat]", "name a file with a prompt a line"),
        ("prompts.train={path: [a]}", "a text is meant"),
        ("prompts.train=" + "x" * 300, "no file can be called so"),
        ("model.path=${HOME}/flux", "variables of the shell are not filled in"),
        ("store.path=$HOME/store", "variables of the shell are not filled in"),
        ("prompts.train={path: $DATA/p.csv}", "variables of the shell are not filled in"),
        ("model.path=''", "no file can be called so"),
    ],
)
def test_a_wrong_override_names_itself_and_the_way_out(tmp_path: Path, override: str, hint: str) -> None:
    assert hint in refusal(tmp_path, overrides=(override,))


def test_an_unknown_key_names_the_file_and_the_nearest_key(tmp_path: Path) -> None:
    text = refusal(tmp_path, TEXT + "teacher: {guidance_scal: 3}\n")
    assert "params.yaml: unknown key 'teacher.guidance_scal', did you mean 'guidance_scale'?" in text


@pytest.mark.parametrize(
    "text", ["", "- a", "a: [", "a: 1\na: 2", "a: {b: 1, b: 2}", "\0", "&a [*a]", "!!python/name:os.system {}"]
)
def test_what_is_no_mapping_of_known_keys_is_refused(tmp_path: Path, text: str) -> None:
    refusal(tmp_path, text)


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rats init"):
        load_params(tmp_path / "none.yaml")


def test_two_rewards_of_one_name_are_refused(tmp_path: Path) -> None:
    reward = "{name: hps, adapter: hpsv2, path: r}"
    assert "two rewards" in refusal(tmp_path, overrides=(f"rewards=[{reward}, {reward}]",))


def test_an_unknown_variant_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'rats'"):
        with_variant(load_params(write(tmp_path)), "rast")


def test_a_variant_that_is_used_by_nobody_is_checked_too(tmp_path: Path) -> None:
    assert "unknown key 'lrr'" in refusal(tmp_path, overrides=("variants.rats.lrr=1",))


def test_params_need_no_defaults_from_the_test_machine(tmp_path: Path) -> None:
    params = load_params(write(tmp_path))
    assert Params.model_validate(params.model_dump()) == params


@pytest.mark.parametrize(
    ("lora", "alpha"),
    [({}, 32.0), ({"rank": 8}, 8.0), ({"rank": 8, "alpha": None}, 8.0), ({"rank": 8, "alpha": 3}, 3.0)],
)
def test_the_adapters_alpha_follows_their_rank_unless_it_is_set(tmp_path, lora, alpha):
    params = load_params(write(tmp_path), ["train.lora=" + json.dumps(lora)])
    assert params.train.lora.model_dump() == {"rank": lora.get("rank", 32), "alpha": alpha, "targets": None}


def test_the_alpha_of_a_variant_follows_the_variant_s_rank(tmp_path):
    overrides = ["train.lora={rank: 16}", "variants.low={lora.rank: 4}", "variants.strong={lora.alpha: 24}"]
    params = load_params(write(tmp_path), overrides)
    chosen = {name: with_variant(params, name).lora for name in ("rats", "low", "strong")}
    assert {name: (lora.rank, lora.alpha) for name, lora in chosen.items()} == {
        "rats": (16, 16.0),
        "low": (4, 4.0),
        "strong": (16, 24.0),
    }


def test_a_number_is_what_dvc_reads(tmp_path: Path) -> None:
    assert load_params(write(tmp_path), ["teacher.seed=0100"]).teacher.seed == 100
    text = TEXT.replace("1e-4", "1.5e3")
    assert load_params(write(tmp_path, text)).train.lr == 1500.0


def test_the_home_folder_is_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    changes = ["model.path=~/flux", "prompts.test={path: ~/p.csv}", "rewards.0.path=~/r", "store.path=~/s"]
    params = load_params(write(tmp_path), [*changes, "model.transformer=a~b"])
    assert (params.model.path, params.rewards[0].path) == ("/home/somebody/flux", "/home/somebody/r")
    assert (str(params.prompts.test), params.store.path) == ("/home/somebody/p.csv", "/home/somebody/s")
    assert params.model.transformer == "a~b"


@pytest.mark.parametrize("key", ["no gate", "a.b", "a/b", "-a", "'${x}'", "''", "größe", "a" * 65, "a=b", "1", "1e5"])
def test_a_variant_has_a_name_that_folders_the_shell_and_dvc_take(tmp_path: Path, key: str) -> None:
    text = refusal(tmp_path, TEXT.replace("  rats: {}", f"  rats: {{}}\n  {key}: {{}}"))
    assert "letters from a to z" in text or "quote it" in text


def test_plain_names_of_variants_are_taken(tmp_path: Path) -> None:
    changes = [f"variants.{name}.lr=1" for name in ("nfe-3", "A_b", "1e5", "null")]
    assert load_params(write(tmp_path), changes).variants["nfe-3"] == {"lr": 1}
