"""`rats init`: writes a project for a model, prompts and rewards, or the dvc.yaml of a params.yaml."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rats.pipeline.files.atomic import atomic_write
from rats.pipeline.prompts import Prompt, read_prompts
from rats.schemas.errors import CannotCreateError, ConfigError
from rats.schemas.params import Params, PromptSource, TeacherParams, load_params, read_params
from rats.schemas.plugins import FAMILIES, REWARDS, load_plugin, plugins_in
from rats.schemas.yaml_values import parse
from rats.stages.templates.render import render

HUB_REWARDS = (
    ("hpsv2", "xswu/HPSv2"),
    ("pickscore", "yuvalkirstain/PickScore_v1"),
    ("image-reward", "THUDM/ImageReward"),
)
SHARES = {"test": 0.2, "validation": 0.1}
"""Shares of the concepts in each split."""
LEAST = {"test": 2, "validation": 1}
"""Concepts of a split at least: an evaluation's intervals are over them."""

EXAMPLES = tuple(
    Prompt(f"a {adjective} {thing}", thing)
    for thing in (
        "lighthouse",
        "teapot",
        "fox",
        "bicycle",
        "cathedral",
        "market",
        "violin",
        "harbour",
        "glacier",
        "robot",
    )
    for adjective in ("small", "weathered", "golden")
)
PLOTS = (
    ("reward", ("reward_student", "reward_teacher")),
    ("gate", ("gate_mean",)),
    ("gradient norms", ("grad_reward", "grad_shape")),
)
DVC_CONFIG = '[core]\n    analytics = false\n    check_update = false\n[cache]\n    type = "reflink,hardlink,copy"\n'
IGNORED = "/store/\n/data/teacher/\n/runs/\n/reports/\n"


def init_project(
    folder: Path,
    model: str,
    prompts: Path | PromptSource | None,
    rewards: Sequence[str],
    force: bool,
    family: str | None = None,
) -> list[Path]:
    """Write params.yaml, dvc.yaml, prompts split by concept, and DVC's and git's settings into `folder`.

    Args:
        folder: Made if it is not there.
        model: A pipeline folder or a hub id.
        prompts: A file or table to split; a few examples if None.
        rewards: "adapter=path"; the first one trains. If empty, the published rewards by their hub ids.
        force: Replace files.
        family: Of the model. If not given, it follows from the hub id of a published one, or from model_index.json,
            which alone is fetched of a hub.

    Raises:
        ConfigError: an unknown adapter or family, a pipeline that no installed family draws, fewer than four concepts,
            or what `load_params` would refuse; nothing is written then.
        CannotCreateError: a file is there already.
    """
    from rats.pipeline.families.index import family_of  # this import takes seconds, and `--dvc` does not need it

    splits = split_by_concept(read_prompts(prompts) if prompts else EXAMPLES)
    pairs = [_reward(text) for text in rewards] or list(HUB_REWARDS)
    model = os.path.expanduser(model)
    values = {
        "model": seen_from(folder, model),
        "local": Path(model).exists(),
        **_suggested(family_of(model, family)),
        "rewards": [{"adapter": adapter, "path": seen_from(folder, path)} for adapter, path in pairs],
    }
    files = project_files(folder, render("init_params.yaml.j2", values), splits)
    return write_files(folder, files, force)


def project_files(folder: Path, params: str, splits: Mapping[str, Sequence[Prompt]]) -> dict[str, str]:
    """The files of a project by name, from the text of its params.yaml and its prompts."""
    files = {f"prompts/{split}.csv": _csv(part) for split, part in splits.items()}
    files |= {"params.yaml": params, ".gitignore": IGNORED}
    files |= {".dvc/config": DVC_CONFIG, ".dvc/.gitignore": "/config.local\n/tmp\n/cache\n"}
    files[".dvcignore"] = "__pycache__/\n*.pyc\n"
    return files | {"dvc.yaml": _dvc_of(params, str(folder / "params.yaml"), folder)}


def write_files(folder: Path, files: Mapping[str, str], force: bool) -> list[Path]:
    """Writes them all; CannotCreateError, and nothing is written, where one is there and `force` replaces none."""
    _refuse_to_replace(folder, list(files), force)
    return [_write(folder / name, text) for name, text in files.items()]


def table_of(prompts: Path | None, column: str | None, field: str | None) -> Path | PromptSource | None:
    """What `init_project` splits: the file as it is, or a column of it."""
    if column is None and field is None:
        return prompts
    if prompts is None:
        raise ConfigError("--column and --field say where prompts lie in a table: name it by --prompts FILE")
    return PromptSource.model_construct(path=str(prompts), column=column or "prompt", field=field)


def next_commands(folder: Path) -> list[str]:
    """What to type after `rats init`, as the shell takes it."""
    return [
        f"cd {shlex.quote(str(folder))}",
        "rats doctor",
        "rats stage rollout --split train --out data/teacher/train",
    ]


def write_dvc(folder: Path) -> Path:
    """Writes `dvc.yaml` beside a `params.yaml`, for its splits, rewards and variants."""
    path = folder / "params.yaml"
    load_params(path)  # says so when it cannot be read
    return _write(folder / "dvc.yaml", _dvc_of(path.read_text(encoding="utf-8"), str(path), folder))


def _dvc_of(text: str, where: str, folder: Path) -> str:
    return dvc_yaml(read_params(text, where), folder, set(_at_home(parse(text, where))))


def _at_home(value: Any) -> Iterator[str]:
    """The paths in a parameter file that begin with ~, filled in."""
    if isinstance(value, str) and value.startswith("~"):
        yield os.path.expanduser(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for one in inner:
        yield from _at_home(one)


@dataclass(frozen=True)
class _Deps:
    """How DVC is told of files: by the parameter that names them, so that it sees them change.

    Attributes:
        params: The whole file.
        folder: Where it lies; its paths are seen from there.
        at_home: Those that the file begins with ~, which DVC does not know: they are written out.
    """

    params: Params
    folder: Path
    at_home: Collection[str]

    def named(self, name: str, path: str) -> str:
        return path if path in self.at_home else f"${{{name}}}"

    def those_there(self, places: Mapping[str, str]) -> list[str]:
        """Hub ids are no files and so no deps."""
        return [self.named(name, path) for name, path in places.items() if _is_there(self.folder, path)]

    def prompts(self, split: str) -> str:
        """The file that they are in; of the hub's tables the parameters, which pin them."""
        source = getattr(self.params.prompts, split)
        if not isinstance(source, PromptSource):
            return self.named(f"prompts.{split}", source)
        there = _is_there(self.folder, source.path)
        return self.named(f"prompts.{split}.path", source.path) if there else "params.yaml"


def dvc_yaml(params: Params, folder: Path, at_home: Collection[str] = ()) -> str:
    """The pipeline of `params`: a stage for each split and variant; the arguments are those of `_Deps`."""
    deps = _Deps(params, folder, at_home)
    models = {"model.path": params.model.path}
    models |= {f"model.loras[{i}].path": lora.path for i, lora in enumerate(params.model.loras)}
    models |= {f"rewards[{i}].path": reward.path for i, reward in enumerate(params.rewards)}
    real = [judge.real_features for judge in params.evaluate.judges]
    features = {f"evaluate.judges[{i}].real_features": path for i, path in enumerate(real) if path}
    bound = {name: source for name in params.evaluate.variants if (source := _source(params, name))}
    judged = "test" if params.prompts.test else "train"
    values = {
        "splits": {split: deps.prompts(split) for split in sorted({"train", judged}, reverse=True)},
        "tables": any(isinstance(source, PromptSource) for _, source in params.prompts),
        "judged": judged,
        "models": deps.those_there(models),
        "features": deps.those_there(features),
        "variants": params.evaluate.variants,
        "free": [name for name in params.evaluate.variants if name not in bound],
        "bound": list(bound.items()),
        "plots": PLOTS,
    }
    return render("init_dvc.yaml.j2", values)


def _is_there(folder: Path, path: str) -> bool:
    """Whether a path of the parameter file leads somewhere; the project's folder need not be there yet."""
    return os.path.exists(os.path.normpath(os.path.join(os.path.realpath(folder), path)))


def split_by_concept(prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    """Train, validation and test prompts without common concepts. A concept's split depends on its name alone."""
    concepts = sorted({prompt.concept for prompt in prompts}, key=lambda name: hashlib.sha256(name.encode()).digest())
    if len(concepts) <= sum(LEAST.values()):
        raise ConfigError(
            f"{len(concepts)} concepts cannot be split in three, and test needs two: add prompts about other things"
        )
    where: dict[str, str] = {}
    rest = list(concepts)
    for split, share in SHARES.items():
        count = max(LEAST[split], round(share * len(concepts)))
        where |= dict.fromkeys(rest[:count], split)
        rest = rest[count:]
    return {
        split: [prompt for prompt in prompts if where.get(prompt.concept, "train") == split]
        for split in ("train", "validation", "test")
    }


def _suggested(family: str) -> dict[str, Any]:
    """The template's values for the family: its name, and the settings of its teacher."""
    cls = load_plugin(FAMILIES, family)
    return {"family": family, "embeds_guidance": cls.embeds_guidance, "teacher": TeacherParams(**cls.suggested)}


def _source(params: Params, name: str) -> str | None:
    """The run whose gate a variant takes its value from."""
    return params.variants[name].get("gate.value_from") or params.train.gate.value_from


def _reward(text: str) -> tuple[str, str]:
    adapter, equals, path = text.partition("=")
    if not equals or adapter not in plugins_in(REWARDS):
        raise ConfigError(
            f"--reward {text!r}: write ADAPTER=PATH with one of the adapters {', '.join(sorted(plugins_in(REWARDS)))}"
        )
    return adapter, os.path.expanduser(path)


def seen_from(folder: Path, path: str) -> str:
    """A local path from the folder, if it lies in there; else the whole path, which holds in copies of the folder too.

    DVC and git make copies elsewhere, for experiments and worktrees.
    """
    if not os.path.exists(path):
        return path
    inside = os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
    return os.path.abspath(path) if inside.startswith(os.pardir) else inside


def _csv(prompts: Sequence[Prompt]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("prompt", "concept", "kind"), *((p.text, p.concept, p.kind) for p in prompts)])
    return text.getvalue()


def _refuse_to_replace(folder: Path, names: Sequence[str], force: bool) -> None:
    for name in names:
        if (folder / name).exists() and not force:
            raise CannotCreateError(f"{folder / name} is there already: choose another folder, or add --force")


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, text.encode())
    return path
