"""Where files stand: tests import no test, and docs/architecture.md draws what there is."""

import ast
import contextlib
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import draw_house

TESTS = Path(__file__).parent


def imported(text):
    """Return what a program imports, within functions and in programs in its strings as well."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Constant) and "import " in str(node.value):
            with contextlib.suppress(SyntaxError):
                found |= imported(textwrap.dedent(node.value))
    return found


def test_nobody_imports_a_test_or_conftest():
    files = {path: path.read_text(encoding="utf-8") for path in TESTS.rglob("*.py")}
    never = {path.stem for path in TESTS.glob("test_*.py")} | {"conftest"}
    assert {path: names for path in files if (names := imported(files[path]) & never)} == {}


def test_the_page_draws_every_file_with_its_own_first_sentence():
    text = draw_house.PAGE.read_text(encoding="utf-8")
    assert draw_house.drawn_again(text) == text


def test_the_first_sentence_is_what_is_drawn():
    assert draw_house.first_sentence("One\nsentence: a. Another one.\n\nMore.") == "One sentence: a"
    lines = draw_house.entry("name.py", "one two three " * 12, indent=2, column=12)
    assert lines[0].startswith("  name.py   one two")
    assert lines[1].startswith(" " * 12 + "two")
    assert max(map(len, lines)) <= draw_house.WIDTH


def test_every_module_of_the_package_stands_on_a_floor():
    named = [module for _, modules in draw_house.floors() for module in modules]
    package = TESTS.parent / "src/ostinato"
    files = {path.stem for path in package.glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert sorted(named) == sorted(files | folders)
