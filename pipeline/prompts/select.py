"""Which files a source of prompts is: one, those of a folder, or those of a hub repository."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rats.pipeline.prompts.text import FORMATS, format_of, known_format, unreadable
from rats.schemas.errors import ConfigError
from rats.schemas.params import PromptSource

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
"""How published tables write the splits into their files' names."""


_LEFT_BY_TOOLS = {"config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
"""Of a data set's clone or copy, what says how it is made."""

_NO_PROMPTS = {"copying", "licence", "license", "notice", "readme", "requirements"}
"""Texts of a project that would be read line by line with its prompts."""


def exists(path: Path) -> bool:
    """Whether there is a file or folder; a name that no file can have is none. ConfigError where nobody may look."""
    try:
        return path.exists()
    except PermissionError as error:
        raise unreadable(path, error) from None
    except (OSError, ValueError):
        return False


def selected(source: PromptSource, root: Path) -> list[Path]:
    """The files below `root`, or `root` itself if it is one, that `files` and `split` leave, all of one format.

    Hidden files and folders do not count, nor do the notes of `datasets`: they are other tools'.

    Raises:
        ConfigError: none is left, or several formats; splits side by side of which none is chosen.
    """
    if not root.is_dir():
        return [_alone(source, root)]
    found = sorted(path for path in _matching(source, root) if format_of(path.name))
    if source.split is not None:
        found = [path for path in found if _is_of(path.relative_to(root), source.split)]
    elif source.files is None:
        _refuse_several_splits(source, [path.relative_to(root) for path in found])
    if source.files is None:
        _refuse_texts_of_a_project(source, found)
    kinds = {format_of(path.name) for path in found}
    if not kinds and source.split is not None:
        raise ConfigError(f"{source} has no file whose name says split {source.split}: leave split: out, or use files:")
    if len(kinds) != 1:
        raise ConfigError(
            f"{source}: {len(found)} files of {len(kinds)} formats; name some of one of {', '.join(FORMATS)} by files:"
        )
    return found


def _alone(source: PromptSource, path: Path) -> Path:
    known_format(path)
    if source.files is not None:
        raise ConfigError(f"{source} is a file, and files: chooses in a folder or hub repository: leave it out")
    if source.split is not None and not _is_of(Path(path.name), source.split):
        raise ConfigError(
            f"{source} is a file whose name says no split {source.split}: leave split: out, or name another file"
        )
    return path


def _matching(source: PromptSource, root: Path) -> list[Path]:
    pattern = source.files or "**/*"
    try:
        found = [path for path in root.glob(pattern) if path.is_file()]
    except (NotImplementedError, ValueError, IndexError) as error:
        raise ConfigError(f"{source}: files: {pattern!r} is no pattern below that folder ({error})") from None
    asked = set(Path(pattern).parts)
    return [path for path in found if not any(_is_left(part, asked) for part in path.relative_to(root).parts)]


def _is_left(part: str, asked: set[str]) -> bool:
    return (part.startswith((".", "__")) or part in _LEFT_BY_TOOLS) and part not in asked


def _is_of(path: Path, split: str) -> bool:
    """Whether a word of the path is the split's name, or another way to write it."""
    words = re.split(r"[^a-z0-9]+", path.as_posix().lower())
    return not set(words).isdisjoint(SPLITS.get(split, (split.lower(),)))


def _refuse_several_splits(source: PromptSource, paths: Sequence[Path]) -> None:
    there = [split for split in SPLITS if any(_is_of(path, split) for path in paths)]
    if len(there) > 1:
        raise ConfigError(f"{source} holds several splits: choose by split: {' or '.join(there)}, or by files:")


def _refuse_texts_of_a_project(source: PromptSource, paths: Sequence[Path]) -> None:
    for path in paths:
        if path.suffix.lower() == ".txt" and path.stem.lower() in _NO_PROMPTS:
            raise ConfigError(f"{source} holds {path.name}, whose lines are no prompts: choose the others by files:")
