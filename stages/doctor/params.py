"""Checks what the parameter file needs: devices, model, prompts, rewards, disk space. Fetches nothing."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from rats.pipeline.families.models import FamilyStudent
from rats.pipeline.families.open import Model
from rats.pipeline.files.atomic import check_creatable
from rats.pipeline.files.local import LocalPlace
from rats.pipeline.files.places import EXTRAS, open_store
from rats.pipeline.prompts import Prompt, planned_samples
from rats.pipeline.rewards.clip import vocabulary
from rats.pipeline.rewards.open import examine_reward, reward_fingerprint
from rats.pipeline.store.publish import check_out
from rats.pipeline.weights.files import find_weights
from rats.pipeline.weights.hashes import NETWORK
from rats.pipeline.weights.hub import find_checkpoint, is_hub_id, only_cached, resolve_checkpoint
from rats.pipeline.weights.loading import torch_device, torch_dtype
from rats.schemas.errors import ConfigError, RatsError, one_line
from rats.schemas.manifest import PlannedSample
from rats.schemas.params import Params, PromptSource, RewardParams, Split, load_params, with_variant
from rats.schemas.plugins import REWARDS, load_plugin
from rats.schemas.recipe import DECODER, make_recipe
from rats.schemas.train_params import check_dtype
from rats.stages.doctor.devices import devices, driver
from rats.stages.doctor.packages import CheckRow, check_row, extras, plugins
from rats.stages.measure.splits import shared_with_train
from rats.stages.plan.flops import conditioning_shapes
from rats.stages.plan.sizes import embedding_bytes, latents_bytes, shard_bytes
from rats.stages.plan.text import size
from rats.stages.rollout.rollout import texts_of, wanted_samples

PROMPT_LENGTH = 100
"""Assumed length in characters of a prompt that cannot be read here."""
PUBLISHED = "data/teacher/{}"
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def check_params(path: Path, overrides: Sequence[str], is_default: bool) -> list[CheckRow]:
    """Rows for devices, extras and plugins, and for everything that the parameter file refers to."""
    try:
        params = load_params(path, overrides)
    except RatsError as error:
        nobody = is_default and not path.exists()
        found = f"no {path} in this folder: `rats init DIR` writes one" if nobody else str(error)
        return [*extras(), *_devices(), *_hub(), *plugins(None), check_row("params", False, found, needed=not nobody)]
    model = Model.of(params)
    with only_cached():
        there = [*plugins(params), check_row("params", True, str(path))]
        there += [_attempt(name, check) for name, check in _checks(params, model).items()]
        there += _leaks(params)
        if all(one["ok"] for one in there if one["check"] == "model" or one["check"].startswith("prompts")):
            there += [
                _attempt(f"tokens of {split}", partial(_tokens, params, model, split)) for split in _splits(params)
            ]
            there.append(_attempt("disk", partial(_disk, params, model)))
    return [*extras(_wanted(params)), *_devices(), *_hub(), *there]


def _wanted(params: Params) -> set[str]:
    """The extras of this package that these parameters use."""
    trackers = {tracker for name in params.evaluate.variants for tracker in with_variant(params, name).trackers}
    store = EXTRAS.get(params.store.path.partition("://")[0], "")
    official = any(reward.backend == "official" for reward in params.rewards)
    used = {"judge": bool(params.evaluate.judges), "tracking": "tensorboard" in trackers, "rewards": official}
    used["datasets"] = any(_needs_datasets(getattr(params.prompts, split)) for split in SPLITS)
    return {name for name, is_used in used.items() if is_used} | ({store} if store else set())


def _needs_datasets(source: object) -> bool:
    """Files are read by us, wherever they lie; a whole repository of the hub by its own settings is not."""
    return isinstance(source, PromptSource) and source.files is None and not Path(source.path).exists()


def _splits(params: Params) -> list[Split]:
    return [split for split in SPLITS if getattr(params.prompts, split) is not None]


def _devices() -> Iterator[CheckRow]:
    for device in devices():
        memory = f", {size(device['bytes'])}" if "bytes" in device else ""
        bf16 = f", {'bf16' if device['bf16'] else 'no bf16'}" if "bf16" in device else ""
        by = f", driver {driver() or 'unknown'}" if device["name"].startswith("cuda") else ""
        yield check_row(f"device {device['name']}", True, f"{device['kind']}{memory}{bf16}{by}", needed=False)


def _hub() -> Iterator[CheckRow]:
    """Where fetched models lie, and whether more can be fetched. No request is made."""
    from huggingface_hub import constants, get_token

    offline = ", offline by HF_HUB_OFFLINE: nothing will be fetched" if constants.HF_HUB_OFFLINE else ""
    free = LocalPlace(constants.HF_HUB_CACHE).free()
    yield check_row("hub cache", True, f"{constants.HF_HUB_CACHE}, {size(free or 0)} free{offline}", needed=False)
    login = "there is a token" if get_token() else "no token: `hf auth login`, for models behind a licence"
    yield check_row("hub login", bool(get_token()), login, needed=False)


def _checks(params: Params, model: Model) -> dict[str, Callable[[], str]]:
    """A check for each thing that the file refers to."""
    checks: dict[str, Callable[[], str]] = {
        "compute.device": lambda: str(torch_device(params.compute.device)),
        "model": lambda: check_model(model),
    }
    for split in _splits(params):
        checks[f"prompts.{split}"] = partial(_prompts, params, split)
    for reward in params.rewards:
        checks[f"reward {reward.name}"] = partial(_reward, reward)
    for split in _splits(params):
        checks[PUBLISHED.format(split)] = partial(_published, params, PUBLISHED.format(split))
    return checks


def _attempt(name: str, check: Callable[[], str]) -> CheckRow:
    try:
        return check_row(name, True, check())
    except RatsError as error:
        return check_row(name, False, str(error))
    except Exception as error:  # of a family or reward from another package, for whose author the place is what helps
        place = traceback.extract_tb(error.__traceback__)[-1]
        return check_row(name, False, f"{one_line(error)} ({place.filename}, line {place.lineno}): tell its author")


def check_model(model: Model) -> str:
    """Opens the whole model without the values of its weights, and draws a picture of no values.

    Returns what was found. Raises a RatsError for what a stage would refuse.
    """
    check_dtype(model.params.dtype)
    horizons = len(model.outline.grids()[1])
    parts = model.folder.parts(NETWORK, DECODER, *model.family.encoders)
    model.examined().rehearse_decoding(parts[DECODER])
    found = [files for part in parts.values() if (files := find_weights(part))]
    said = [model.params.path, model.params.family, f"{horizons} horizons", *map(str, model.params.loras)]
    variants = sorted({files.variant for files in found if files.variant})
    weights = f"{size(sum(files.bytes for files in found))} of weights"
    return ", ".join([*said, f"{weights} ({' and '.join(variants)} variants)" if variants else weights])


def _prompts(params: Params, split: Split) -> str:
    samples, source = _samples(params, split), getattr(params.prompts, split)
    if samples is None:
        return f"in {source}, a data set of the hub that is fetched when a command reads it"
    where = source if Path(str(source)).exists() else f"{source}, a data set of the hub, by prompts.{split}.count"
    return f"{len({sample.prompt_id for sample in samples})} in {where}"


def _tokens(params: Params, model: Model, split: Split) -> str:
    source = getattr(params.prompts, split)
    if isinstance(source, PromptSource) and is_hub_id(source.path):
        return "counted when the data set has been fetched"
    return model.lengths(texts_of(wanted_samples(params, split))).text


def _samples(params: Params, split: Split) -> list[PlannedSample] | None:
    """The samples of a rollout. For a data set on the hub, `count` of them with placeholder texts, or None."""
    source = getattr(params.prompts, split)
    if not isinstance(source, PromptSource) or not is_hub_id(source.path):
        return wanted_samples(params, split)
    if source.count is None:
        return None
    stand_ins = [Prompt(f"{number:0{PROMPT_LENGTH}}", "") for number in range(source.count)]
    return planned_samples(stand_ins, params.teacher.noises_per_prompt)


def _published(params: Params, out: str) -> str:
    """Where `rats init`'s dvc.yaml publishes a split, and the other stages look for it."""
    store = params.store.path
    place = LocalPlace(store) if "://" in store else open_store(store)  # in a bucket there is no local folder
    check_out(place.absolute() / "set", Path(out))
    return "a rollout can be published there"


def _leaks(params: Params) -> list[CheckRow]:
    """What the held-out splits share with the train split, which is nobody's error and rarely meant."""
    said = shared_with_train(params.prompts)
    if not said and len(_splits(params)) > 1:
        return [check_row("held out", True, "no prompt and no known concept of the other splits is in prompts.train")]
    return [check_row("held out", False, one, needed=False) for one in said]


def _reward(reward: RewardParams) -> str:
    """Its fingerprint, for which all its files are read, and the folder of its tokenizer's vocabulary."""
    examine_reward(reward)
    found, adapter = f"{reward.adapter}, {reward_fingerprint(reward)[:12]}", load_plugin(REWARDS, reward.adapter)
    source = getattr(adapter, "tokenizer_source", None)
    if source is None or reward.backend == "official":
        return found
    checkpoint, _ = resolve_checkpoint(reward.path, reward.revision, adapter.checkpoints)
    folder = find_checkpoint(checkpoint, adapter.checkpoints).parent
    return f"{found}, vocabulary in {vocabulary(folder, source)}"


def _disk(params: Params, model: Model) -> str:
    """Compares the bytes that rollouts of all prompts take with the free and the used space."""
    student, place = model.outline, open_store(params.store.path)
    found = [_samples(params, split) for split in _splits(params)]
    needed = sum(_rollout_bytes(params, student, samples) for samples in found if samples is not None)
    all_ = "all prompts" if None not in found else "all prompts whose number is known"
    free, said = place.free(), f"rollouts of {all_} write {size(needed)}"
    if free is None or place.local is None:
        return f"{said} to {place}"
    check_creatable(place.local / "set")
    there = sum(file.stat().st_size for file in place.local.rglob("*") if file.is_file())
    said += f"; {size(free)} are free in {place}, which holds {size(there)}"
    if needed > free + there:
        raise ConfigError(f"{said}: free some space, or name another store.path")
    return said


def _rollout_bytes(params: Params, student: FamilyStudent, samples: list[PlannedSample]) -> int:
    """Bytes of a complete rollout: samples, embeddings, indexes and scores."""
    recipe = make_recipe(params, {}, "", *student.grids(), student.latent_shape())
    latents, a_shard = latents_bytes(recipe), params.store.shard_samples
    shards = [samples[start : start + a_shard] for start in range(0, len(samples), a_shard)]
    embedding = embedding_bytes(conditioning_shapes(student), torch_dtype(params.model.dtype))
    prompts = len({sample.prompt_id for sample in samples})
    return prompts * embedding + sum(shard_bytes(recipe, latents, group, len(params.rewards)) for group in shards)
