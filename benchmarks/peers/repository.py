"""Load a Python file of a peer that is not an installed package, but a clone of a repository."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_file(path: Path) -> ModuleType:
    """Execute a Python file of another repository, and return it as a module.

    Raises FileNotFoundError if there is no such file.
    """
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}: give the directory of the peer's repository")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
