"""What is done with a module when it is imported, and not before."""

import importlib
import importlib.util
import sys

import pytest

from ostinato.later import when_imported


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that nobody has imported yet."""
    (tmp_path / "awaited.py").write_text("table = []\nfrom awaited_too import other\n")
    (tmp_path / "awaited_too.py").write_text("other = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path)
    yield "awaited"
    for name in ("awaited", "awaited_too"):
        sys.modules.pop(name, None)
    sys.meta_path[:] = before


def test_it_is_done_once_after_the_module_has_run(module):
    when_imported(module, lambda found: found.table.append("ours"))
    finders = len(sys.meta_path)
    assert module not in sys.modules
    assert importlib.import_module(module).table == ["ours"]
    assert len(sys.meta_path) == finders - 1
    assert importlib.import_module(module).table == ["ours"]
    # A module that runs again is empty, as its own text says.
    assert importlib.reload(sys.modules[module]).table == []


def test_it_is_done_at_once_with_what_is_there(module):
    found = importlib.import_module(module)
    when_imported(module, lambda found: found.table.append("ours"))
    assert found.table == ["ours"]


def test_each_who_waits_is_served(module):
    for k in range(3):
        when_imported(module, lambda found, k=k: found.table.append(k))
    assert sorted(importlib.import_module(module).table) == [0, 1, 2]


def test_to_look_for_a_module_is_not_to_import_it(module):
    when_imported(module, lambda found: found.table.append("ours"))
    assert importlib.util.find_spec(module).origin.endswith("awaited.py")
    assert importlib.import_module(module).table == ["ours"]


def test_a_module_that_fails_can_be_imported_again(module, tmp_path):
    (tmp_path / "awaited_too.py").rename(tmp_path / "elsewhere")
    when_imported(module, lambda found: found.table.append("ours"))
    with pytest.raises(ImportError, match="awaited_too"):
        importlib.import_module(module)
    (tmp_path / "elsewhere").rename(tmp_path / "awaited_too.py")
    importlib.invalidate_caches()
    assert importlib.import_module(module).table == ["ours"]


def test_a_module_that_is_not_there_stays_so():
    when_imported("ostinato_has_no_such_module", print)
    try:
        with pytest.raises(ModuleNotFoundError, match="ostinato_has_no_such_module"):
            importlib.import_module("ostinato_has_no_such_module")
    finally:
        sys.meta_path.pop(0)
