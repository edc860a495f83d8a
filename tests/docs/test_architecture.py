"""docs/architecture.md shows the layers of the import contract, and the contract has every package."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0][
    "layers"
]
PAGE = (ROOT / "docs/architecture.md").read_text()


def names(text: str) -> list[set[str]]:
    """The names of each layer, from `a --> b & c` or `a | b`."""
    return [set(re.findall(r"\w+", layer)) for layer in text.replace("&", " ").split("-->")]


def test_the_diagram_is_the_import_contract() -> None:
    lines = re.search(r"flowchart TD\n(.*?)```", PAGE, re.DOTALL)
    assert lines is not None
    chain: list[set[str]] = []
    for line in lines[1].strip().splitlines():
        layers = names(line)
        assert not chain or chain[-1] == layers[0], line
        chain += layers[1:] if chain else layers
    assert chain == [set(re.findall(r"\w+", layer)) for layer in LAYERS]


def test_every_package_is_in_a_layer_and_has_a_line() -> None:
    known = {name for layer in LAYERS for name in re.findall(r"\w+", layer)}
    package = ROOT / "src/spo"
    present = {p.stem for p in package.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert present - {"__init__"} == known
    listed = {
        n for row in re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE) for n in re.findall(r"`(\w+)`", row)
    }
    assert known <= listed


def test_every_page_of_the_documentation_is_in_its_index() -> None:
    index = (ROOT / "docs/README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


def test_every_link_within_the_documentation_leads_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_test_that_the_documentation_names_is_there() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for file in re.findall(r"tests/[\w/]+\.py", page.read_text()):
            assert (ROOT / file).exists(), f"{page.name}: {file}"


def defined(file: Path) -> set[str]:
    """Functions and Class.method names of a module."""
    found: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
    return found


def test_every_call_of_one_update_is_in_the_code() -> None:
    calls = re.findall(r"([\w/]+\.py): ([\w.]+)", (ROOT / "docs/one_update.md").read_text(encoding="utf-8"))
    assert len(calls) > 40
    known = {file: defined(ROOT / "src/spo" / file) for file, _ in calls}
    assert [f"{file}: {name}" for file, name in calls if name not in known[file]] == []


@pytest.mark.smoke
def test_imports_keep_the_contracts() -> None:
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
