"""What waits for a module of torch's: done when that is imported, which may be never."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(name: str, do: Callable[[ModuleType], None]) -> None:
    """Do something with a module as soon as it is imported, at once if it has been.

    torch keeps tables in modules that it loads on demand, and to load them costs: the table of
    inductor brings a compiler. Whoever imports one finds our line in it, and nobody else pays.

    Example:
        >>> seen = []
        >>> when_imported("sys", seen.append)
        >>> seen == [sys]
        True
    """
    module = sys.modules.get(name)
    if module is not None:
        do(module)
    else:
        sys.meta_path.insert(0, _Watcher(name, do))


class _Watcher(MetaPathFinder):
    """Finds one module where the other finders find it, and has something done with it."""

    def __init__(self, name: str, do: Callable[[ModuleType], None]) -> None:
        self._name, self._do, self._is_asking = name, do, False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self._name or self._is_asking:
            return None
        self._is_asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._is_asking = False
        if spec is None or spec.loader is None:
            return spec
        loader, load = spec.loader, spec.loader.exec_module

        def load_and_do(module: ModuleType) -> None:
            load(module)
            # Whoever asks where the module is need not import it. This one did.
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self._do(module)

        loader.exec_module = load_and_do  # type: ignore[method-assign]
        return spec
