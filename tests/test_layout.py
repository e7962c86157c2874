"""The repository holds together: packages, settings, sizes."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

from rats.schemas.params import load_params
from rats.stages.init import dvc_yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = {"pipeline", "schemas", "stages", "trainer"}


def folders() -> list[Path]:
    """Every folder with modules below the four packages."""
    return sorted(path.parent for name in PACKAGES for path in (ROOT / name).rglob("__init__.py"))


def modules() -> list[Path]:
    return [path for folder in folders() for path in folder.glob("*.py")]


def dotted(folder: Path) -> str:
    return ".".join(["rats", *folder.relative_to(ROOT).parts])


def test_the_package_list_is_the_folders_on_disk():
    setuptools = PROJECT["tool"]["setuptools"]
    # of `rats` itself there is `python -m rats` alone: with an __init__ it would hide the four
    assert setuptools["packages"] == ["rats", *sorted(map(dotted, folders()))]
    assert [path.name for path in (ROOT / "rats").glob("*.py")] == ["__main__.py"]
    assert setuptools["package-dir"] == {f"rats.{name}": name for name in PACKAGES}
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == PACKAGES


def test_a_folder_has_at_most_ten_modules():
    counts = {dotted(folder): len(list(folder.glob("*.py"))) - 1 for folder in folders()}
    flat = {"rats.schemas", "rats.trainer"}  # one kind of thing each: what is on disk, the arithmetic of a step
    assert {name: count for name, count in counts.items() if count > 10 and name not in flat} == {}


def test_every_folder_says_what_it_is_for():
    assert [dotted(f) for f in folders() if not ast.get_docstring(ast.parse((f / "__init__.py").read_text()))] == []


def test_tests_lie_in_the_folders_of_what_they_test():
    ours = {folder.relative_to(ROOT) for folder in folders()}
    beside = {Path(name) for name in (".", "bench", "fixtures", "rewards", "support")}
    found = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("*.py")}
    assert found <= ours | beside


def test_every_file_that_is_not_python_is_packaged():
    packaged = PROJECT["tool"]["setuptools"]["package-data"]
    others = [path for folder in folders() for path in folder.iterdir() if path.is_file() and path.suffix != ".py"]
    left_out = [p for p in others if not any(p.match(pattern) for pattern in packaged.get(dotted(p.parent), []))]
    assert left_out == []


def test_files_stay_under_300_lines():
    sizes = {path: len(path.read_text().splitlines()) for path in modules()}
    assert {str(path.relative_to(ROOT)): size for path, size in sizes.items() if size > 300} == {}


def test_every_dependency_has_an_exact_pin():
    pins = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["dvc"], *extras["judge"], *extras["dev"]]
    names = {re.split(r"[\[<>=!~ ]", requirement)[0].lower() for requirement in wanted}
    assert names - pins == set()


def test_dev_installs_what_the_main_job_needs():
    extras = PROJECT["project"]["optional-dependencies"]
    assert set(extras["dvc"] + extras["judge"]) <= set(extras["dev"])


def test_dask_is_imported_by_the_workers_only_and_typer_by_the_command_line_only():
    assert importers("dask") | importers("distributed") == {"stages/workers"}
    assert importers("typer") == {"stages/cli"}


def test_dvc_yaml_is_what_init_writes_for_params_yaml():
    expected = dvc_yaml(load_params(ROOT / "params.yaml"), ROOT)
    assert (ROOT / "dvc.yaml").read_text() == expected, "write it anew: rats init --dvc ."


def test_the_dvc_cache_links_instead_of_copying():
    assert 'type = "reflink,hardlink,copy"' in (ROOT / ".dvc" / "config").read_text()


def importers(module: str) -> set[str]:
    """Folders whose code imports `module`."""
    return {path.parent.relative_to(ROOT).as_posix() for path in modules() if module in imports(path)}


def imports(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports, inside functions too."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names = plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in names}
