"""Where a project really lies, seen from one of its copies: a worktree of git, or what DVC makes for an experiment.

A copy has what git tracks, and not the store. It may be the project's folder or, of a project that is a part of a
repository, one below the copy's top.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

EXPERIMENTS = (".dvc", "tmp", "exps")
"""Where `dvc exp run --temp` and `--queue` copy the repository to, below the folder that holds .dvc."""


def real_folder(folder: Path) -> Path:
    """The folder of the project itself that `folder`, in a copy of it, stands for; else `folder`, made absolute."""
    folder = folder.absolute()
    top = _top(folder)
    origin = top and (_of_experiment(top) or _of_worktree(top))
    if top is None or origin is None or not (real := origin / folder.relative_to(top)).is_dir():
        return folder
    return real_folder(real)


def worktrees(folder: Path) -> Iterator[Path]:
    """The other worktrees of the repository that `folder` lies in: their experiments use its store too."""
    top = _top(folder.absolute())
    for link in sorted(top.glob(".git/worktrees/*/gitdir")) if top else ():
        worktree = Path(link.read_text(encoding="utf-8").strip()).parent
        if worktree.is_dir():
            yield worktree


def _top(folder: Path) -> Path | None:
    """The top of the repository or copy that `folder` lies in."""
    return next((one for one in (folder, *folder.parents) if (one / ".git").exists()), None)


def _of_experiment(top: Path) -> Path | None:
    """The top of the repository that DVC copied to `top`."""
    below = next((one for one in top.parents if one.parts[-3:] == EXPERIMENTS), None)
    return below and _top(below.parents[2])


def _of_worktree(top: Path) -> Path | None:
    """The main worktree of the repository of which `top` is another one; None too where it is bare or a submodule."""
    with suppress(OSError, UnicodeDecodeError):  # a folder .git is the main one's
        own = top / (top / ".git").read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        shared = (own / (own / "commondir").read_text(encoding="utf-8").strip()).resolve()
        return shared.parent if shared.name == ".git" else None
    return None
