"""What the pages and the docstrings name is there: files, equations, headings, fields, exit codes, commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import typer

from rats.schemas import manifest, reports
from rats.schemas.errors import RatsError

ROOT = Path(__file__).parents[1]
DESIGN = ROOT / "docs" / "design.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = ("pipeline", "schemas", "stages", "trainer")
SOURCES = [path for name in (*PACKAGES, "bench", "mini") for path in sorted((ROOT / name).rglob("*.py"))]
FOLDERS = "|".join((*PACKAGES, "tests", "bench", "mini", "configs", "assets", "docs"))
FILE = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/[\w*./-]*[\w*/]")
DOTTED = re.compile(rf"`(?:rats\.)?((?:{'|'.join(PACKAGES)})(?:\.\w+)+)`")
NAME_IN_FILE = re.compile(rf"`([a-zA-Z_]\w+)(?:\.\w+)?` (?:of|in) `((?:{'|'.join(PACKAGES)})/[\w/]+\.py)`")
NUMBERS = r"(\d+(?:(?:, | and | to )\d+)*)"
LINK = re.compile(r"\]\((?!https?:)([\w./-]*)(?:#([\w-]+))?\)")


def test_every_file_that_a_page_or_a_docstring_names_is_there():
    named = {(name, path) for path in (*PAGES, *SOURCES) for name in FILE.findall(path.read_text())}
    assert sorted(f"{path.relative_to(ROOT)}: {name}" for name, path in named if not list(ROOT.glob(name))) == []


def test_every_module_that_a_docstring_names_by_dots_is_there():
    named = {(name, path) for path in (*PAGES, *SOURCES) for name in DOTTED.findall(path.read_text())}
    assert sorted(f"{path.relative_to(ROOT)}: {name}" for name, path in named if not is_there(name)) == []


def test_every_name_that_a_page_places_in_a_file_is_in_that_file():
    placed = {found for page in PAGES for found in NAME_IN_FILE.findall(page.read_text())}
    assert len(placed) > 10
    assert [(name, file) for name, file in sorted(placed) if name not in words(ROOT / file)] == []


def test_equations_are_numbered_in_order_and_every_one_that_is_cited_is_there():
    defined = [int(number) for number in re.findall(r"^\*\*Equation (\d+)\*\*", DESIGN.read_text(), re.MULTILINE)]
    assert defined == list(range(1, len(defined) + 1))
    on_pages = re.compile(rf"[Ee]quations? {NUMBERS}")
    in_code = re.compile(rf"design\.md,\s+equations? {NUMBERS}")
    cited = {page: on_pages.findall(page.read_text()) for page in (DESIGN, ROOT / "docs" / "architecture.md")}
    cited |= {path: in_code.findall(path.read_text()) for path in SOURCES}
    assert len({path for path, found in cited.items() if found and path in SOURCES}) > 5
    unknown = {
        f"{path.relative_to(ROOT)}: {text}"
        for path, found in cited.items()
        for text in found
        if not {int(number) for number in re.findall(r"\d+", text)} <= set(defined)
    }
    assert unknown == set()


def test_every_heading_that_is_cited_or_linked_is_there():
    links = {(page.parent / (target or page.name), anchor) for page in PAGES for target, anchor in links_of(page)}
    cited = {(ROOT / file, anchor) for path in SOURCES for file, anchor in cited_headings(path)}
    assert cited
    broken = {(path, anchor) for path, anchor in links | cited if not path.exists()}
    broken |= {(p, anchor) for p, anchor in links | cited if anchor and p.exists() and anchor not in headings(p)}
    assert sorted(f"{path}#{anchor}" for path, anchor in broken) == []


def test_the_fields_of_each_document_and_report_are_those_of_its_model():
    found = {name: cells for name, *cells in table_rows() if name in models()}
    assert found.keys() >= {"ShardPlan", "ShardDone", "IndexRow", "ScoreRow", "Snapshot", "RolloutReport", "Cell"}
    told = {name: re.findall(r"`(\w+)`", cells[0]) for name, cells in found.items()}
    assert told == {name: list(models()[name].model_fields) for name in told}


def test_the_exit_codes_are_those_of_the_errors():
    told = {cells[0].strip("`"): int(name) for name, *cells in table_rows() if name.isdigit() and "`" in cells[0]}
    assert told == {error.__name__: error.exit_code for error in RatsError.__subclasses__()}


def test_the_commands_are_those_of_the_command_line():
    (point,) = entry_points(group="console_scripts", name="rats")
    app = typer.main.get_command(__import__(point.module, fromlist=["app"]).app)
    assert told_commands() == set(commands_of(app, ()))


def is_there(dotted: str) -> bool:
    """Whether the longest part of the name that is a module has the rest of it."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:length])
        rest = parts[length : length + 1]
        for path in (place.with_suffix(".py"), place / "__init__.py"):
            if path.is_file():
                text = path.read_text()
                return all(
                    re.search(rf"^(?:(?:class|def) {name}\b|{name}\b|from .*{name})", text, re.M) for name in rest
                )
    return False


def words(path: Path) -> set[str]:
    return set(re.findall(r"\w+", path.read_text()))


def links_of(page: Path) -> list[tuple[str, str]]:
    return LINK.findall(page.read_text())


def cited_headings(path: Path) -> list[tuple[str, str]]:
    return re.findall(r"(docs/\w+\.md)#([\w-]+)", path.read_text())


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def table_rows() -> Iterator[list[str]]:
    """Cells of the design page's tables, from the first that is a bare `Name` or a number on."""
    for line in DESIGN.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        for i, cell in enumerate(cells[:-1]):
            if re.fullmatch(r"`[A-Z]\w+`|\d+", cell):
                yield [cell.strip("`"), *cells[i + 1 :]]
                break


def models() -> dict[str, type[manifest.Record]]:
    both = vars(manifest) | vars(reports)
    return {name: m for name, m in both.items() if isinstance(m, type) and issubclass(m, manifest.Record)}


def told_commands() -> set[tuple[str, ...]]:
    """The table's first cells: "`rats stage rollout`, `score`" names two commands of one group."""
    told: set[tuple[str, ...]] = set()
    for cell in re.findall(r"^\| (`rats .*?) \|", DESIGN.read_text(), re.MULTILINE):
        first, *others = (text.split() for text in re.findall(r"`([^`]+)`", cell))
        told |= {tuple(first[1:])} | {(*first[1:-1], *other) for other in others}
    return told


def commands_of(command: typer.core.TyperGroup, above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name, sub in command.commands.items():
        if hasattr(sub, "commands"):
            yield from commands_of(sub, (*above, name))
        else:
            yield (*above, name)
