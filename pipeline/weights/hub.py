"""Finds models and checkpoints: local files and folders, or hub repositories. Never imports torch."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path

from rats.pipeline.project import real_folder
from rats.pipeline.weights.hashes import SMALL_FILES
from rats.schemas.errors import ConfigError, StorageError, reason

_CACHED: ContextVar[bool] = ContextVar("cached", default=False)
"""Whether only the local cache of the hub is used."""


PIPELINE_PATTERNS = ("model_index.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.jinja", "*/*.model")
"""The files of a diffusers folder, without the single-file copies at the top of hub repositories."""


VARIANTS = ["*.fp16.*", "*.fp16-*", "*.fp32.*", "*.fp32-*", "*.bf16.*", "*.bf16-*", "*.non_ema.*", "*.non_ema-*"]
"""Patterns of further copies of the same weights, which are fetched only where a component has no others."""

INSTEAD = (("*.fp16.*", "*.fp16-*"), ("*.bin",))
"""What is fetched of a component whose weights are not among the pipeline's patterns, the first that exists."""
DECODER_PATTERNS = ("model_index.json", "vae/*.json", "vae/*.safetensors")
"""The files of a pipeline that are needed to decode stored latents."""


def resolve(
    path: str | Path,
    revision: str | None = None,
    patterns: Sequence[str] | None = None,
    without: Sequence[str] = VARIANTS,
) -> Path:
    """A local file or folder as it is, or the snapshot of a hub repository, whose folder is named by its commit.

    Of a hub, what fits `patterns` and not `without` is fetched. Raises ConfigError when there is neither.
    """
    local = Path(path)
    if local.exists():
        return local
    if not local.is_absolute() and (left := real_folder(Path.cwd()) / local).exists():
        raise ConfigError(f"{path} is not in this copy of the project: name it {left}, or track it by git or `dvc add`")
    if not is_hub_id(str(path)):
        raise ConfigError(f"no model at '{path}' (looked in {Path.cwd()}): give a folder or a hub id like org/name")
    return _download(str(path), revision, patterns, without)


@contextmanager
def only_cached() -> Iterator[None]:
    """Nothing is fetched in this block. A hub repository that is not in the cache is a ConfigError."""
    token = _CACHED.set(True)
    try:
        yield
    finally:
        _CACHED.reset(token)


def find_checkpoint(path: Path, names: Sequence[str]) -> Path:
    """The file itself, or the first of `names` that the folder has. Raises ConfigError when it has none of them."""
    if path.is_file():
        return path
    found = [path / name for name in names if (path / name).is_file()]
    if not found:
        raise ConfigError(f"no {' or '.join(names)} in {path}: give the folder of such a checkpoint or the file itself")
    return found[0]


def resolve_checkpoint(path: str, revision: str | None, names: Sequence[str]) -> tuple[Path, str | None]:
    """A local file or folder as it is, or a checkpoint of a hub repository; and the hub's commit.

    On a hub, `path` is `org/name` or `org/name/file`: that file, or the first of `names` that exists, is
    fetched with the small files beside it. Raises ConfigError if there is none.
    """
    parts = path.split("/")
    repository, file = "/".join(parts[:2]), "/".join(parts[2:])
    if Path(path).exists() or not is_hub_id(repository):
        return resolve(path), revision
    wanted = [file] if file else list(names)
    for name in wanted:
        snapshot = resolve(repository, revision, (name, *SMALL_FILES))
        revision = snapshot.name  # one commit, however many names are tried
        if (snapshot / name).is_file():
            return snapshot / name, revision
    raise ConfigError(f"hub repository '{repository}' has no {' or '.join(wanted)} (commit {revision})")


def absolute_if_local(path: str) -> str:
    """A local path made absolute, since a worker may run in another folder; a hub id unchanged."""
    return str(Path(path).absolute()) if Path(path).exists() else path


def is_hub_id(path: str) -> bool:
    """Whether it is of the form `org/name`. If a folder `org` exists here, a missing local folder is meant."""
    organisation, _, name = path.partition("/")
    return bool(organisation and name) and "/" not in name and path[0] not in "./~" and not Path(organisation).is_dir()


def refuse_full_disk(error: BaseException, folder: str) -> None:
    """StorageError where a download failed for want of space; `folder` is the cache that it went to."""
    for one in _chain(error):
        full = isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT)
        # the hub's own downloader, written in Rust, passes on the text alone
        if full or "No space left on device" in str(one) or "Disk quota exceeded" in str(one):
            raise StorageError(
                f"the disk of the hub's cache {folder} is full: free some space there, or set HF_HOME to a folder on "
                "another disk, then run the same command again"
            ) from error


def telling_cause(error: BaseException) -> BaseException:
    """The error itself, or of one that only says that "an error occurred" the first below it that says more."""
    telling = (one for one in _chain(error) if str(one) and not str(one).startswith("An error occurred"))
    return next(telling, error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def _download(repository: str, revision: str | None, patterns: Sequence[str] | None, without: Sequence[str]) -> Path:
    from huggingface_hub import constants, snapshot_download

    revised, cached = (f" at revision {revision}" if revision else ""), _CACHED.get()
    try:
        download = partial(snapshot_download, revision=revision, local_files_only=cached, ignore_patterns=list(without))
        return Path(download(repository, allow_patterns=list(patterns) if patterns else None))
    except Exception as error:  # the hub raises a dozen kinds, of three libraries: all mean the same here
        refuse_full_disk(error, constants.HF_HUB_CACHE)
        if cached:
            raise ConfigError(
                f"'{repository}'{revised} is no local folder and not in the hub's cache: the first command that needs "
                f"it fetches it, or `hf download {repository}` now (a gated one after `hf auth login`)"
            ) from error
        raise ConfigError(
            f"no local folder '{repository}' and no such hub repository{revised} in reach ({reason(error)}): "
            "check the name, the network and `hf auth login`"
        ) from error
