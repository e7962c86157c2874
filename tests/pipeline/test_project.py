"""A relative store is the project's own, seen from worktrees of git and from what DVC copies for an experiment."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from rats.pipeline.files.places import open_store
from rats.pipeline.project import real_folder, worktrees
from rats.pipeline.weights.hub import resolve
from rats.schemas.errors import ConfigError


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "protocol.file.allow=always"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a project in `sub`, and in git's eyes nothing else."""
    made = tmp_path / "repository"
    (made / "sub").mkdir(parents=True)
    (made / "sub" / "params.yaml").write_text("model: {}\n")
    git(made, "init", "--quiet", "--initial-branch=main")
    git(made, "add", "--all")
    git(made, "commit", "--quiet", "--message", "state")
    return made


def copied_by_dvc(repository: Path, holder: Path) -> Path:
    """As DVC copies the repository below the folder that holds .dvc; alone or from the queue."""
    copy = holder / ".dvc/tmp/exps/standalone/tmp4x"
    git(repository, "clone", "--quiet", str(repository), str(copy))
    return copy


def test_a_worktree_stands_for_the_main_one(repository: Path, tmp_path: Path) -> None:
    git(repository, "worktree", "add", "--quiet", str(tmp_path / "tree"))
    assert real_folder(tmp_path / "tree") == repository
    assert real_folder(tmp_path / "tree" / "sub") == repository / "sub"
    assert list(worktrees(repository / "sub")) == [tmp_path / "tree"]


@pytest.mark.parametrize("holder", [".", "sub"])
def test_a_copy_of_dvc_stands_for_what_it_copied(repository: Path, holder: str) -> None:
    copy = copied_by_dvc(repository, repository / holder)
    assert real_folder(copy / "sub") == repository / "sub"


def test_a_copy_that_dvc_makes_of_a_worktree_stands_for_the_main_one(repository: Path, tmp_path: Path) -> None:
    git(repository, "worktree", "add", "--quiet", str(tmp_path / "tree"))
    assert real_folder(copied_by_dvc(repository, tmp_path / "tree") / "sub") == repository / "sub"


def test_everything_else_stands_for_itself(repository: Path, tmp_path: Path) -> None:
    git(repository, "clone", "--quiet", "--bare", str(repository), str(tmp_path / "bare.git"))
    git(tmp_path / "bare.git", "worktree", "add", "--quiet", "--detach", str(tmp_path / "of bare"))
    git(repository, "submodule", "--quiet", "add", str(tmp_path / "bare.git"), "module")
    git(repository, "worktree", "add", "--quiet", str(tmp_path / "tree"))
    (tmp_path / "tree" / "new").mkdir()  # a project that the main worktree has not
    own = (repository / "sub", repository / "module/sub", tmp_path, tmp_path / "of bare/sub", tmp_path / "tree/new")
    assert [real_folder(folder) for folder in own] == list(own)


def test_the_store_of_a_copy_is_the_projects_unless_it_has_its_own(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(repository, "worktree", "add", "--quiet", str(tmp_path / "tree"))
    monkeypatch.chdir(repository / "sub")
    assert str(open_store("store")) == "store"
    monkeypatch.chdir(tmp_path / "tree" / "sub")
    assert open_store("store").local == repository / "sub" / "store"
    assert open_store(str(tmp_path / "store")).local == tmp_path / "store"
    (tmp_path / "tree" / "sub" / "store").mkdir()
    assert str(open_store("store")) == "store"


def test_a_model_that_git_does_not_track_is_named_where_it_is(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "sub" / "models" / "flux").mkdir(parents=True)
    git(repository, "worktree", "add", "--quiet", str(tmp_path / "tree"))
    monkeypatch.chdir(tmp_path / "tree" / "sub")
    with pytest.raises(ConfigError, match=rf"name it {repository}/sub/models/flux, or track it"):
        resolve("models/flux")
