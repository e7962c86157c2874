"""A plug-in's name belongs to one package, and its faults are one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from rats.schemas.errors import ConfigError
from rats.schemas.params import ModelParams
from rats.schemas.plugins import FAMILIES, load_plugin, plugins_in
from rats.stages.doctor.packages import plugins

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Writes a distribution with one module and one family, as pip leaves it."""

    def write(distribution: str, module: str, name: str, text: str) -> None:
        about = tmp_path / f"{distribution}-2.5.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 2.5\n")
        (about / "entry_points.txt").write_text(f"[{FAMILIES}]\n{name} = {module}:Mine\n")
        (tmp_path / f"{module}.py").write_text(text)
        plugins_in.cache_clear()

    monkeypatch.syspath_prepend(str(tmp_path))
    yield write
    plugins_in.cache_clear()


def test_a_name_of_ours_that_another_package_takes_is_refused_by_both_names(install: Install):
    install("evil-families", "evil_families", "flux", "class Mine: pass\n")
    both = f"families: 'flux' is a name in both evil-families 2.5 and rats {version('rats')}: uninstall one"
    with pytest.raises(ConfigError, match=both):
        load_plugin(FAMILIES, "flux")
    with pytest.raises(ValueError, match=both):
        ModelParams(path="x", family="flux")
    (row,) = (row for row in plugins(None) if row["check"] == "family flux")
    assert not row["ok"] and both in row["found"]
    assert load_plugin(FAMILIES, "sd3").__name__ == "StableDiffusion3"


FAULTS = {
    "raise RuntimeError('no driver')": "RuntimeError: no driver",
    "raise ValueError('\\x1b[2Jodd')": r"ValueError: \[2Jodd",
    "import sys; sys.exit('bye')": "SystemExit: bye",
    "class Mine:": "(IndentationError|SyntaxError): expected an indented block",
    "import nothing_of_this_name": "No module named 'nothing_of_this_name'",
}


@pytest.mark.parametrize("text", FAULTS)
def test_whatever_the_import_of_a_plug_in_raises_is_one_line(install: Install, text: str):
    install("faulty", f"faulty_{list(FAULTS).index(text)}", "faulty", text + "\n")
    with pytest.raises(ConfigError, match=rf"'faulty' cannot be imported \({FAULTS[text]}") as raised:
        load_plugin(FAMILIES, "faulty")
    assert str(raised.value).isprintable()
    (row,) = (row for row in plugins(None) if row["check"] == "family faulty")
    assert not row["ok"] and row["found"].startswith("faulty 2.5: ")
