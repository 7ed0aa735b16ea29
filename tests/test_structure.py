"""How the tests stand to each other: what is shared is in support, and no test imports a test."""

import ast
import contextlib
import textwrap
from pathlib import Path

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


def test_the_index_of_support_names_every_module():
    text = (TESTS / "support/__init__.py").read_text(encoding="utf-8")
    named = {line[2:].partition(":")[0] for line in text.splitlines() if line.startswith("- ")}
    assert named == {path.stem for path in (TESTS / "support").glob("[!_]*.py")}
