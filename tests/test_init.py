"""The package itself: what it imports, what it names, what it says where there is no torch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import ostinato

ROOT = Path(__file__).parents[1]

# Python finds no torch, as if it were not installed.
WITHOUT_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoTorch())
"""


def python(code):
    """Run code in a process of its own and return what it printed."""
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_importing_ostinato_imports_neither_torch_nor_numpy():
    loaded = python("import sys, ostinato; print({'torch', 'numpy'} & set(sys.modules))")
    assert loaded == "set()"


@pytest.mark.parametrize("name", ["numpy", "reference"])
def test_this_module_does_not_import_torch(name):
    assert (
        python(f"import sys, ostinato; ostinato.{name}; print('torch' in sys.modules)") == "False"
    )


@pytest.mark.parametrize("statement", ["import ostinato; ostinato.nn", "from ostinato import nn"])
def test_without_torch_the_error_names_the_extra(statement):
    code = f"""{WITHOUT_TORCH}
try:
    {statement}
except ImportError as error:
    print(error)
"""
    assert python(code) == "ostinato.nn needs PyTorch: pip install ostinato[torch]"


def test_without_torch_a_function_names_the_extra_too():
    code = f"""{WITHOUT_TORCH}
try:
    from ostinato import replace
except ImportError as error:
    print(error)
"""
    assert python(code) == "ostinato.replace needs PyTorch: pip install ostinato[torch]"


def test_every_public_name_is_there_and_listed():
    assert set(ostinato.__all__) <= set(dir(ostinato))
    for name in ostinato.__all__:
        assert getattr(ostinato, name) is not None


@pytest.mark.parametrize("name", ["opacus", "bench"])
def test_a_submodule_is_there_after_importing_the_package_alone(name):
    code = f"import sys, ostinato; before = 'torch' in sys.modules; print(before, ostinato.{name})"
    assert python(code).startswith(f"False <module 'ostinato.{name}'")


def test_what_the_documents_name_is_there_after_importing_the_package_alone():
    text = (ROOT / "docs" / "api.md").read_text()
    named = set(re.findall(r"^\| `ostinato\.(\w+)`", text, re.M))
    assert {"nn", "opacus", "bench"} <= named
    names = sorted(named)
    code = f"import operator, ostinato; operator.attrgetter(*{names})(ostinato); print('found')"
    assert python(code) == "found"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'ostinato' has no attribute 'gru'"):
        ostinato.gru  # noqa: B018
