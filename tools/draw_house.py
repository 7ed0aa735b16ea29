"""Draws the house in docs/architecture.md: every file with its own first sentence.

    python tools/draw_house.py --check | --write

Between `<!-- house: begin -->` and `<!-- house: end -->` stand the folders, the floors of
src/ostinato (pyproject.toml, the first contract of import-linter) and, of each file, the first
sentence of its docstring or of the comment that it opens with. `--check` fails where the page says
something else, or a file says nothing; `--write` brings the page up to date.
"""

import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/architecture.md"
BEGIN, END = "<!-- house: begin -->", "<!-- house: end -->"
WIDTH = 128
# Folders beside the package.
BESIDE = {
    "tests/support": "what all tests share; tests/conftest.py has the fixtures",
    "benchmarks": "ours beside its peers, and what the machine can do",
    "examples": "real data, a cell of one's own, and a script that scales",
    "features": "what torch.nn refuses: each row of docs/features.md, for both libraries",
    "tools": "what the commands of the Makefile run",
}
CSRC = {
    "csrc": "C++ and CUDA",
    "csrc/cpu": "the CPU engine; it knows neither torch nor NumPy, only addresses and sizes",
    "csrc/cuda": "the GPU engine; shipped as text, and compiled on the user's machine",
}
COMMENT = re.compile(r"(?:\s*//.*\n)+")


def first_sentence(text: str) -> str:
    """Cuts a docstring or a comment after its first sentence, without the full stop."""
    paragraph = " ".join(text.strip().partition("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", paragraph, maxsplit=1)[0].removesuffix(".")


def of_python(path: Path) -> str:
    return first_sentence(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")


def of_cxx(path: Path) -> str:
    """Reads the comment that a file opens with; it may stand behind `#pragma once`."""
    text = path.read_text(encoding="utf-8").removeprefix("#pragma once\n")
    found = COMMENT.match(text)
    lines = [line.strip().removeprefix("//") for line in found[0].splitlines()] if found else []
    return first_sentence("\n".join(line.strip() for line in lines))


def entry(names: str, says: str, indent: int, column: int) -> list[str]:
    """Draws one file: its name, and beside it what it says of itself."""
    first = " " * indent + names
    return textwrap.wrap(
        says,
        WIDTH,
        initial_indent=first.ljust(column - 2) + "  ",
        subsequent_indent=" " * column,
        break_long_words=False,
        break_on_hyphens=False,
    )


def entries(files: list[tuple[str, str]], indent: int) -> Iterator[str]:
    column = indent + max(len(names) for names, _ in files) + 2
    for names, says in files:
        if not says:
            raise SystemExit(f"{names}: expected a first sentence that says what the file is")
        yield from entry(names, says, indent, column)


def floors() -> list[tuple[str, list[str]]]:
    """Reads the floors and their modules, from above, out of the first contract."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    body = text[text.index("[[tool.importlinter.contracts]]") :]
    body = body[body.index("layers = [") :].partition("\n]")[0]
    found: list[tuple[str, list[str]]] = []
    for line in map(str.strip, body.splitlines()[1:]):
        if line.startswith("#"):
            found.append((line[1:].strip(), []))
        else:
            found[-1][1].extend(re.findall(r"\w+", line))
    return found


def package_files(name: str, modules: list[str]) -> Iterator[tuple[str, str]]:
    """Yields the files of one floor; of a package among them, all of its own."""
    folder = ROOT / "src/ostinato" / name
    for module in modules:
        if (folder / module).is_dir():
            inner = sorted(path.stem for path in (folder / module).glob("*.py"))
            for file, says in package_files(f"{name}{module}/", inner):
                # The package itself is the folder's line.
                is_package = file.endswith("__init__.py")
                yield (f"{module}/" if is_package else f"  {Path(file).name}"), says
        else:
            yield f"{name}{module}.py", of_python(folder / f"{module}.py")


def of_package() -> Iterator[str]:
    yield "src/ostinato/"
    yield from entries([("__init__.py", of_python(ROOT / "src/ostinato/__init__.py"))], 2)
    for title, modules in floors():
        yield f"  -- {title} --"
        yield from entries(list(package_files("", modules)), 2)


def of_csrc(folder: str) -> list[tuple[str, str]]:
    """Lists the files of a folder. A source that opens with its header's include is with that."""
    found: dict[str, str] = {}
    paths = sorted(p for p in (ROOT / folder).iterdir() if p.is_file())
    for path in sorted(paths, key=lambda path: path.suffix == ".cpp"):
        header = path.with_suffix(".h").name
        if path.read_text(encoding="utf-8").startswith(f'#include "{header}"'):
            found[f"{header}, .cpp"] = found.pop(header)
        else:
            found[path.name] = of_cxx(path)
    return sorted(found.items())


def house() -> str:
    """Draws all of it."""
    lines: list[str] = []
    for folder, says in CSRC.items():
        lines += [f"{folder}/: {says}", *entries(of_csrc(folder), 2)]
    lines += of_package()
    for folder, says in BESIDE.items():
        paths = sorted((ROOT / folder).glob("*.py"))
        found = [(p.name, of_python(p)) for p in paths if p.name != "__init__.py"]
        lines += [f"{folder}/: {says}", *entries(found, 2)]
    return "\n".join(["```", *lines, "```"])


def drawn_again(text: str) -> str | None:
    """Puts the house into a page; None where it has no place for that."""
    begin, end = text.find(f"{BEGIN}\n"), text.find(f"\n{END}")
    if not 0 <= begin < end:
        return None
    return f"{text[:begin]}{BEGIN}\n{house()}{text[end:]}"


def main() -> int:
    if sys.argv[1:] not in (["--check"], ["--write"]):
        print(__doc__, file=sys.stderr)
        return 2
    text = PAGE.read_text(encoding="utf-8")
    drawn = drawn_again(text)
    if drawn is None:
        print(f"{PAGE}: expected {BEGIN} and {END}", file=sys.stderr)
        return 1
    if sys.argv[1] == "--write":
        PAGE.write_text(drawn, encoding="utf-8")
    elif drawn != text:
        print(f"{PAGE}: not what the files say: tools/draw_house.py --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
