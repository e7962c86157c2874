"""The content address against real bytes: a field in the recipe moves them, a field that is not does not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import attention_backend
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from rats.pipeline.families.open import Model
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.weights.folder import ModelFolder
from rats.schemas.errors import ConfigError
from rats.schemas.params import ComputeParams, ModelParams, Params, TeacherParams
from rats.schemas.recipe import IN_RECIPE, NOT_IN_RECIPE, fingerprint
from rats.stages.plan.plan import plan_rollout
from rats.stages.rollout.rollout import read_recipe, rollout_stage
from tests.support import tiny
from tests.support.project import settings

PROMPTS = ("a red fox", "a blue whale")

FLIPS: dict[str, Any] = {
    "model.dtype": "bfloat16",
    "teacher.steps": 5,
    "teacher.nfe": [3],
    "teacher.horizons": "all",
    "teacher.guidance_scale": 9.0,
    "teacher.true_cfg_scale": 3.5,
    "teacher.negative_prompt": "a house at night",
    "teacher.max_sequence_length": 6,
    "teacher.height": 24,
    "teacher.width": 24,
    "teacher.seed": 1,
}
"""A field of the recipe, and a value that must move every sample."""

ELSEWHERE = {"model.family", "compute.device", "teacher.frames"}
"""Another family is another model, frames are a video's (tests of wan), and the tests have one device."""

COMPUTE = {"compute.threads", "compute.micro_batch", "compute.attention", "compute.compile"}
"""They move last bits on some machines: shown to be in force instead, below."""


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that reads the embedded guidance scale too."""
    return tiny.write_flux(tmp_path_factory.mktemp("guided") / "flux", guidance_embeds=True)


@pytest.fixture(scope="module")
def project(flux: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder with a rollout, and the hash of its samples by key."""
    folder = tmp_path_factory.mktemp("address")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder, rolled(Params.model_validate(values(flux, folder)))


def values(flux: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    return settings(flux.parent, folder, **{"rewards": [], **changes})


def rolled(params: Params) -> dict[str, str]:
    """Hash by key of what a rollout makes."""
    report = rollout_stage(params, "train")
    shards = ShardSet.open(Path(params.store.path) / report.fingerprint)
    return {row.key: row.blake3 for row in shards.index(shards.snapshot(report.snapshot_number))}


@pytest.mark.parametrize("field", FLIPS)
def test_a_field_of_the_recipe_moves_every_sample(field: str, flux: Path, project: tuple[Path, dict[str, str]]) -> None:
    folder, before = project
    block, name = field.split(".")
    after = rolled(Params.model_validate(values(flux, folder, **{block: {name: FLIPS[field]}})))
    assert set(after) == set(before)
    assert [key for key in before if before[key] == after[key]] == [], f"{field} is in the address and changes nothing"


def test_every_field_of_the_recipe_has_a_test_that_it_is_in_force() -> None:
    assert set(FLIPS) | ELSEWHERE | COMPUTE == set(IN_RECIPE)


def test_fields_that_are_not_in_the_recipe_move_no_sample(
    flux: Path, project: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder, before = project
    shutil.copytree(flux, tmp_path / "elsewhere" / "flux")
    (tmp_path / "prompts.txt").write_text("\n".join(["a first one", *reversed(PROMPTS)]))
    prompts = {"train": str(tmp_path / "prompts.txt"), "test": "t.csv", "validation": "v.csv"}
    elsewhere = tmp_path / "elsewhere" / "flux"
    changes = {
        "model": {"path": str(elsewhere), "revision": "v2", "transformer": str(elsewhere / "transformer")},
        "prompts": prompts,
        "teacher": {"noises_per_prompt": 2, "scored_frames": 3},
        "store": {"path": str(tmp_path / "store"), "shard_samples": 5},
        "train": {"alpha": 7.0, "seed": 3, "steps": 9},
        "variants": {"rats": {}, "off": {"gate.form": "off"}},
        "evaluate": {"seed": 4},
    }
    flipped = {name if isinstance(change, dict) else block for block, change in changes.items() for name in change}
    unmoved = {"workers", "rewards", "loras"}  # LoRAs enter by the network's hash: tests of pipeline/weights/fuse.py
    assert {name.split(".")[-1] for name in NOT_IN_RECIPE} - flipped - set(changes) == unmoved
    params = Params.model_validate(values(flux, folder, **changes))
    assert plan_rollout(params, "train")["samples"] == 6
    after = rolled(params)
    assert before.items() < after.items()


def test_stage_one_reads_nothing_of_the_blocks_that_are_listed_as_a_whole(
    flux: Path, project: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder, before = project
    params = Params.model_validate(values(flux, folder, store={"path": str(tmp_path / "store")}))
    # so no field that they have or will ever have can move a byte
    assert rolled(params.model_copy(update={"train": None, "variants": None, "evaluate": None})) == before


def test_threads_micro_batch_and_attention_are_what_the_network_sees(flux: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(PROMPTS[0])
    seen: set[tuple[Any, ...]] = set()

    def look(module: nn.Module, args: Any) -> None:
        if any(parameter.is_meta for parameter in module.parameters()):
            return  # the outline's evaluation, which computes nothing
        if isinstance(module, FluxTransformer2DModel):
            backends = {processor._attention_backend.value for processor in module.attn_processors.values()}
            seen.add((torch.get_num_threads(), *backends))
        if isinstance(module, nn.Linear) and args[0].ndim == 3 and args[0].shape[1] == 4:
            seen.add((len(args[0]),))

    hook = register_module_forward_pre_hook(look)
    compute, teacher = {"threads": 2, "micro_batch": 3}, {"steps": 2, "nfe": [2], "true_cfg_scale": 1.0}
    try:
        # as DIFFUSERS_ATTN_BACKEND does: a recipe that says sdpa must mean it
        with attention_backend("_native_math"):
            rolled(Params.model_validate(values(flux, tmp_path, compute=compute, teacher=teacher)))
    finally:
        hook.remove()
    assert seen == {(2, "native"), (3,)}


def test_compile_compiles_the_network(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda call: call)  # loading the compiler takes seconds
    small = TeacherParams(height=16, width=16, max_sequence_length=8)
    compiled, plain = (
        Model(ModelParams(path=str(flux)), small, ComputeParams(compile=on)).open_teacher().network
        for on in (True, False)
    )
    assert compiled._compiled_call_impl is not None and plain._compiled_call_impl is None


@pytest.mark.parametrize("component", ["transformer", "text_encoder_2", "tokenizer", "scheduler"])
def test_a_changed_file_of_the_model_is_a_new_address(
    component: str, flux: Path, project: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder, _ = project
    shutil.copytree(flux, tmp_path / "flux")
    params = Params.model_validate(values(tmp_path / "flux", folder))
    assert plan_rollout(params, "train")["samples_missing"] == 0
    before = read_recipe(params, Model.of(params))
    file = next(path for path in sorted((tmp_path / "flux" / component).iterdir()) if path.suffix == ".json")
    file.write_text(file.read_text().replace("{", '{"rats_test": 1, ', 1))
    assert fingerprint(read_recipe(params, Model.of(params))) != fingerprint(before)


def test_a_worker_whose_weights_are_not_the_recipes_makes_nothing(
    flux: Path, project: tuple[Path, dict[str, str]], models: Path
) -> None:
    folder, _ = project
    params = Params.model_validate(values(flux, folder))
    recipe = ShardSet.open(folder / "store" / plan_rollout(params, "train")["fingerprint"]).recipe
    ModelFolder(ModelParams(path=str(flux))).check(recipe.weights)
    with pytest.raises(ConfigError, match=r"transformer holds other weights"):
        ModelFolder(ModelParams(path=str(models / "flux"))).check(recipe.weights)


def test_a_hub_model_is_pinned_to_its_commit_before_workers_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flux: Path
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--small"
    shutil.copytree(flux, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    there = ModelFolder(ModelParams(path="someone/small"))
    assert there.root.name == there.pinned().params.revision == commit
    assert ModelFolder(ModelParams(path=str(flux), revision="v1")).pinned().params.revision == "v1"
