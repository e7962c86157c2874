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
LAYERS = {"pipeline", "schemas", "stages", "trainer"}
PACKAGES = LAYERS | {"trainer/methods"}


def test_the_package_list_is_the_folders_on_disk():
    setuptools = PROJECT["tool"]["setuptools"]
    folders = {f"rats.{name.replace('/', '.')}": name for name in PACKAGES}
    assert set(setuptools["packages"]) == set(folders)
    assert setuptools["package-dir"] == folders
    found = [path.parent for layer in LAYERS for path in (ROOT / layer).rglob("__init__.py")]
    assert {path.relative_to(ROOT).as_posix() for path in found} == PACKAGES


def test_the_four_packages_are_flat_but_for_the_methods():
    below = [path for name in PACKAGES for path in (ROOT / name).iterdir() if path.is_dir()]
    assert {path.name for path in below} - {"__pycache__"} == {"methods"}


def test_every_file_that_is_not_python_is_packaged():
    patterns = PROJECT["tool"]["setuptools"]["package-data"].get("rats.stages", [])
    others = [p for name in PACKAGES for p in (ROOT / name).iterdir() if p.is_file() and p.suffix != ".py"]
    assert [p.name for p in others if not any(p.match(pattern) for pattern in patterns)] == []


def test_files_stay_under_300_lines():
    sizes = {path: len(path.read_text().splitlines()) for name in PACKAGES for path in (ROOT / name).glob("*.py")}
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


def test_dask_is_imported_by_the_executor_only_and_typer_by_the_command_line_only():
    assert importers("dask") | importers("distributed") == {"stages/executor.py", "stages/executor_cluster.py"}
    assert {name.partition("_")[0].removesuffix(".py") for name in importers("typer")} == {"stages/cli"}


def test_dvc_yaml_is_what_init_writes_for_params_yaml():
    expected = dvc_yaml(load_params(ROOT / "params.yaml"), ROOT)
    assert (ROOT / "dvc.yaml").read_text() == expected, "write it anew: rats init --dvc ."


def test_the_dvc_cache_links_instead_of_copying():
    assert 'type = "reflink,hardlink,copy"' in (ROOT / ".dvc" / "config").read_text()


def importers(module: str) -> set[str]:
    """Files whose code imports `module`."""
    paths = [path for name in PACKAGES for path in (ROOT / name).glob("*.py")]
    return {path.relative_to(ROOT).as_posix() for path in paths if module in imports(path)}


def imports(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports, inside functions too."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names = plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in names}
