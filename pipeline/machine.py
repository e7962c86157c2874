"""The machine that computes: its threads, and what else of it and of the software decides the last bits of a result."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import torch

from rats.schemas.errors import ConfigError
from rats.schemas.maker import Maker, Software
from rats.schemas.params import Params
from rats.schemas.plugins import FAMILIES, OFFICIAL, REWARDS, load_plugin, plugins_in

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")

OURS = ("pipeline", "schemas", "stages/rollout")
"""The folders of `rats` whose sources compute a sample or a score."""

LIBRARIES = ("rats", "torch", "diffusers", "transformers", "tokenizers", "safetensors", "numpy")
"""Packages whose version may change bytes."""

VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_DYNAMIC",
    "MKL_ENABLE_INSTRUCTIONS",
    "NPY_DISABLE_CPU_FEATURES",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_DYNAMIC",
    "OMP_THREAD_LIMIT",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_CORETYPE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_BLAS_PREFER_CUBLASLT",
)
"""Environment variables by which torch, oneDNN, MKL, numpy and CUDA choose kernels. Numbers of threads are not among
them: `threads` sets those."""

INSTRUCTIONS = re.compile(r"sse4_2|avx.*|amx.*|fma|asimd.*|sve.*|bf16|i8mm")
"""The processor's flags by which kernels are chosen."""


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Sets torch's threads as in the recipe: another number sums in another order, and gives other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on_its_threads(
    stage: Callable[Concatenate[Params, _Args], _Result],
) -> Callable[Concatenate[Params, _Args], _Result]:
    """Decorates a stage `stage(params, ...)`: all of it runs with `compute.threads`, whatever OMP_NUM_THREADS says."""

    @wraps(stage)
    def run(params: Params, *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        with threads(params.compute.threads):
            return stage(params, *args, **kwargs)

    return run


def software(params: Params) -> Software:
    """Code, versions and settings of this process, as far as they decide bytes. It starts no device.

    Raises ConfigError if the family or a reward cannot be imported.
    """
    return Software(code=_code(*_plugins(params)), versions=_versions(params), kernels=_kernels())


def maker(params: Params) -> Maker:
    """The same with the machine, of a process that computes with `params`."""
    return Maker(**software(params).model_dump(), machine=_machine(params.compute.device))


def refuse_other(driver: Software, here: Software) -> None:
    """Raises ConfigError if this worker would write other bytes than the driver's software: names the difference."""
    for found in driver.differences(here)[:1]:
        way_out = {
            "kernels": "set it alike for the driver and all workers",
            "versions": "install the same version for the driver and all workers",
            "code": "install the same rats and plug-ins for the driver and all workers, and start the workers again",
        }
        raise ConfigError(
            f"the worker on {platform.node()} would write other bytes: {found.name} is {found.second} there and "
            f"{found.first} at the driver",
            way_out[found.group],
        )


def _plugins(params: Params) -> list[tuple[str, str]]:
    """Group and name of the family and of the rewards in use, whether ours or somebody else's."""
    official = [reward.adapter for reward in params.rewards if reward.backend == "official"]
    others = [reward.adapter for reward in params.rewards if reward.backend != "official"]
    found = [(FAMILIES, params.model.family), *((REWARDS, name) for name in others)]
    return sorted({*found, *((OFFICIAL, name) for name in official)})


@cache
def _code(*plugins: tuple[str, str]) -> str:
    """Read once a process, as near as possible to the sources' import: files may change later."""
    return hash_sources([*_our_sources(), *_their_sources(plugins)])


def hash_sources(paths: Iterable[Path]) -> str:
    """sha256 of the files' names and contents, wherever they are installed."""
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _our_sources() -> list[Path]:
    root = Path(__file__).parents[1]
    return [path for folder in OURS for path in sorted((root / folder).rglob("*.py"))]


def _their_sources(plugins: tuple[tuple[str, str], ...]) -> list[Path]:
    """The sources of plug-ins outside `rats`: of one in a package, all of the package's folder."""
    found: set[Path] = set()
    for group, name in plugins:
        module = sys.modules.get(load_plugin(group, name).__module__)
        file = getattr(module, "__file__", None)
        if module is None or file is None or module.__name__.startswith("rats."):
            continue
        found.update(Path(file).parent.glob("*.py") if module.__package__ else [Path(file)])
    return sorted(found)


def _versions(params: Params) -> dict[str, str]:
    distributions = [point.dist for group, name in _plugins(params) for point in plugins_in(group)[name]]
    names = [*LIBRARIES, *(found.name for found in distributions if found is not None)]
    return {name: known for name in names if (known := _version(name))}


def _version(name: str) -> str | None:
    """Without the local part: the build, such as +cu128, is a fact of the machine."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None


def _kernels() -> dict[str, str]:
    backends = torch.backends
    flags = {
        "dtype": torch.get_default_dtype(),
        "float32 matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "mkldnn": backends.mkldnn.enabled,
        "cudnn": (backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic),
        "cudnn tf32": backends.cudnn.allow_tf32,
        "flash attention": backends.cuda.flash_sdp_enabled(),
        "memory-efficient attention": backends.cuda.mem_efficient_sdp_enabled(),
        "cudnn attention": backends.cuda.cudnn_sdp_enabled(),
        "math attention": backends.cuda.math_sdp_enabled(),
    }
    found = {name: str(value) for name, value in flags.items()}
    return found | {name: os.environ[name] for name in VARIABLES if name in os.environ}


def _machine(device: str) -> dict[str, str]:
    found = {
        "processor": " ".join([platform.machine(), *_processor()]),
        "cpu kernels": torch.backends.cpu.get_cpu_capability(),
        "torch build": torch.__version__,
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        found["device"] = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        found["cuda"] = f"{torch.version.cuda}, cudnn {torch.backends.cudnn.version()}"
    return found


def _processor() -> list[str]:
    """Vendor and instruction sets of the first core, where the system tells them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return [platform.processor()]
    vendor = re.search(r"^(?:vendor_id|CPU implementer)\s*: (\S+)", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.+)$", text, re.MULTILINE)
    sets = [flag for flag in sorted(flags[1].split()) if INSTRUCTIONS.fullmatch(flag)] if flags else []
    return [*([vendor[1]] if vendor else []), *sets]
