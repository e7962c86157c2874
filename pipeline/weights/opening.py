"""The boundary around other people's libraries: whatever they raise while a file is opened becomes a RatsError.

The way out follows the cause: a missing package is installed, a GPU that is not here is no reason to fetch a file
again, and only a damaged file is fetched again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import safe_open

from rats.pipeline.bounds import bounded_file
from rats.pipeline.weights.hashes import read_json
from rats.schemas.errors import ConfigError, DataError, RatsError, StorageError, brief, reason

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
"""These pass as they are: the stages answer them with smaller batches."""
NO_GPU = ("No GPU", "CUDA is not available", "not compiled with CUDA", "requires a GPU", "NVIDIA driver")
"""What libraries say where a file needs an accelerator."""
SENTENCEPIECE = "sentencepiece"
"""transformers reads a vocabulary of spiece.model with it. Without it, it raises a ValueError, or asks for tiktoken."""
_READS_VALUES = re.compile(r"\bmeta[ _]tensor|\bmeta device", re.IGNORECASE)
"""What torch says where values are asked of a tensor on the meta device: there is no class of error for it."""
OTHER_SHAPES = ("size mismatch", "size of tensor", "expected shape", "mismatched sizes", "ignore_mismatched_sizes")

POINTER = b"version https://git-lfs.github.com/spec/"
GIT_LFS = "it is a Git LFS pointer and not the file itself, run `git lfs pull` in its clone"


@contextmanager
def opening(path: Path | str, kind: str, remedy: str = "fetch or export it again") -> Iterator[None]:
    """Turns every error of the libraries within into one line with the file, the reason and the way out.

    Args:
        path: The file or folder that is opened.
        kind: What it is opened as.
        remedy: The way out where the file itself is wrong.

    Raises:
        ConfigError: A package or a GPU is missing.
        StorageError: This user may not read the file.
        DataError: Everything else.
    """
    try:
        yield
    except (RatsError, *OUT_OF_MEMORY):
        raise
    except Exception as error:  # the libraries raise a dozen kinds for one cause
        raise _explained(error, path, kind, remedy) from error


@contextmanager
def unless_values_are_read() -> Iterator[None]:
    """Ends the block, without an error, where code reads the values of a tensor on the meta device, which has none.

    So it does where an operation is not made for that device (NotImplementedError), such as one of another package.
    """
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        if not (isinstance(error, NotImplementedError) or _READS_VALUES.search(str(error))):
            raise


def _explained(error: Exception, path: Path | str, kind: str, remedy: str) -> RatsError:
    text = f"{path} does not load as {kind} ({said(error)})"
    if isinstance(error, ImportError | PackageNotFoundError):
        return ConfigError(f"{text}: a package is missing or of another version, install the one that this names")
    if isinstance(error, ValueError | OSError) and _asks_for_sentencepiece(str(error)):
        return ConfigError(f"{text}: pip install sentencepiece, or give the folder a tokenizer.json")
    if any(words in str(error) for words in NO_GPU):
        return ConfigError(f"{text}: use a machine with a GPU, or name a folder of plain weights")
    if isinstance(error, PermissionError):
        return StorageError(f"{text}: give this user the right to read it")
    if any(words in str(error) for words in OTHER_SHAPES):
        return DataError(f"{text}: its weights are not those of its config.json, take both from one source")
    return DataError(f"{text}: {GIT_LFS if _is_pointer(Path(path)) else remedy}")


def _is_pointer(path: Path) -> bool:
    """Whether the file is what a clone without Git LFS has in place of a large file."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(POINTER)) == POINTER


def said(error: Exception) -> str:
    """The reason; with the kind of the error where its text alone says little, such as KeyError: 'a'.

    Of a pickle that torch refuses it is ours: torch's own goes on to say how to run what is in it.
    """
    if "weights_only" in str(error):
        return "it holds more than tensors, which could run code"
    text = reason(error)
    is_short = len(text.split()) < 3 and text != type(error).__name__
    return f"{type(error).__name__}: {text}" if is_short else text


def _asks_for_sentencepiece(text: str) -> bool:
    return find_spec(SENTENCEPIECE) is None and (SENTENCEPIECE in text or "tiktoken" in text)


def check_config(cls: Any, folder: Path) -> None:
    """Checks that a component's configuration is that of a `cls` of plain weights.

    Raises:
        ConfigError: No configuration, one of another class, or quantized weights.
        DataError: A damaged file.
    """
    config = read_json(folder / "config.json")
    if other := _other_class(cls, config):
        raise ConfigError(f"{folder} holds a {other}, not a {cls.__name__}: name a pipeline with one")
    if (quantized := config.get("quantization_config")) is not None:
        method = brief(quantized.get("quant_method") if isinstance(quantized, dict) else quantized)
        library = "transformers" if hasattr(cls, "config_class") else "diffusers"
        raise ConfigError(
            f"{folder} holds quantized weights ({method}), which are not read here: name the model that was quantized, "
            f'or write plain weights where the package for {method} is, by `python -c "import torch, {library} as m; '
            f"m.{stock_class(cls).__name__}.from_pretrained('{folder}', torch_dtype=torch.bfloat16).dequantize()"
            ".save_pretrained('PLAIN')\"`, and put them in its place"
        )


def stock_class(cls: Any) -> Any:
    """The class of diffusers or transformers that `cls` is, or is made from: the one that others can open."""
    return next(one for one in cls.__mro__ if one.__module__.split(".")[0] in ("diffusers", "transformers"))


def _other_class(cls: Any, config: dict[str, Any]) -> str | None:
    """The class or kind that a configuration names, where `cls` cannot be it; None where it can."""
    name = config.get("_class_name")
    if name is not None:
        return None if name in [parent.__name__ for parent in cls.__mro__] else brief(name)
    asked = getattr(getattr(cls, "config_class", None), "model_type", None)
    kind = config.get("model_type")
    if not asked or not kind or kind == asked:
        return None
    # a folder of a whole CLIP model holds its text encoder too, as `clip` for `clip_text_model`
    return None if asked == f"{kind}_text_model" else f"model of model_type {brief(kind)}"


def check_headers(cls: Any, paths: Iterable[Path]) -> None:
    """Reads the names of the tensors in files of weights. Raises DataError, naming the file, for one that is cut."""
    for path in paths:
        check_file(path, cls.__name__)


def check_file(path: Path, kind: str) -> None:
    """Reads the names and shapes of the tensors in one file of weights; `kind`: what it belongs to.

    Raises DataError for a file that is cut or no file of weights.
    """
    with opening(path, kind):
        if path.suffix != ".safetensors":
            torch.load(path, "meta", weights_only=True, mmap=is_zipfile(path))
            return
        with safe_open(bounded_file(path), "pt") as file:
            file.keys()
