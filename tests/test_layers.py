"""Imports between the project's modules point in one direction (`python -m scripts.layers`)."""

import ast
from pathlib import Path

import pytest

from scripts.layers import (
    IMPORTS_IN_FUNCTIONS,
    TRAIN_MODULES,
    TRAIN_NAMES,
    Place,
    check_tree,
    find_cycles,
    find_modules,
    find_statements,
    imported_modules,
    is_allowed,
    main,
    read_tree,
    room_of,
)

ROOT = Path(__file__).parent.parent


@pytest.fixture
def project(tmp_path):
    """`project({"model.py": "import torch"})`: the root of a small project with these files and an empty train.py."""

    def write(files):
        for name, text in ({"train.py": ""} | files).items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            for package in file.relative_to(tmp_path).parents[:-1]:
                (tmp_path / package / "__init__.py").touch()
        return tmp_path

    return write


def row(root, title):
    """The row of the table for the project in `root` whose title begins with `title`."""
    (found,) = (row for row in check_tree(read_tree(root)) if row.title.startswith(title))
    return found


def places(source):
    return [(ast.unparse(node), place) for node, place in find_statements(ast.parse(source))]


def test_this_project_has_no_cycle_no_upward_import_and_stays_within_the_limits():
    rows = check_tree(read_tree(ROOT))
    violations = [
        f"{row.title}: {row.found}, the limit is {row.limit}\n  " + "\n  ".join(row.violations)
        for row in rows
        if row.failed
    ]
    assert not violations, "\n" + "\n".join(violations)


def test_modules_are_top_level_files_and_packages_without_tests_and_datasets(project):
    root = project({"model.py": "", "data/prepare/text.py": "", "tests/test_model.py": ""})
    (root / "runs").mkdir()
    (root / "runs/notes.py").write_text("import model")  # not a package: no __init__.py
    assert set(find_modules(root)) == {"train", "model", "data", "data.prepare", "data.prepare.text"}


def test_a_statement_is_found_at_module_level_inside_a_function_and_under_type_checking():
    source = """
import a
try:
    import b
except ImportError:
    b = None
class C:
    import c
    def method(self):
        if self:
            import d
async def function():
    def inner():
        from e import x, y
if TYPE_CHECKING:
    from f import F
else:
    import g
def annotated():
    if typing.TYPE_CHECKING:
        import h
"""
    expected = {
        "import a": Place.MODULE,
        "import b": Place.MODULE,
        "import c": Place.MODULE,
        "import d": Place.FUNCTION,
        "from e import x, y": Place.FUNCTION,
        "from f import F": Place.TYPE_CHECKING,
        "import g": Place.MODULE,
        "import h": Place.TYPE_CHECKING,
    }
    assert dict(places(source)) == expected


@pytest.mark.parametrize(
    ("importer", "is_package", "statement", "expected"),
    [
        (
            "train",
            False,
            "import torch, data.loader as loader, model",
            [("data.loader", "data.loader"), ("model", "model")],
        ),
        ("train", False, "import data.loader.Loader", [("data.loader", "data.loader.Loader")]),
        ("train", False, "from data import loader, Split", [("data.loader", "loader"), ("data", "Split")]),
        (
            "train",
            False,
            "from data.loader import Loader, permute",
            [("data.loader", "Loader"), ("data.loader", "permute")],
        ),
        ("train", False, "from dataclasses import field", []),
        ("data.shards", False, "from . import loader", [("data.loader", "loader")]),
        ("data.shards", False, "from .loader import Loader", [("data.loader", "Loader")]),
        ("data.prepare", True, "from .. import loader", [("data.loader", "loader")]),
        ("data.prepare.text", False, "from ..loader import Loader", [("data.loader", "Loader")]),
    ],
)
def test_a_statement_imports_the_longest_module_that_exists(importer, is_package, statement, expected):
    modules = {"train", "model", "data", "data.loader", "data.shards", "data.prepare", "data.prepare.text"}
    node = ast.parse(statement).body[0]
    assert list(imported_modules(node, importer, is_package, modules)) == expected


def test_a_cycle_is_reported_with_the_file_and_line_of_each_import(project):
    root = project(
        {
            "data/a.py": "from data.b import x",
            "data/b.py": "import torch\nimport data.c",
            "data/c.py": "from data import a",
        }
    )
    (cycle,) = find_cycles(read_tree(root).edges)
    assert [str(edge) for edge in cycle] == [
        "data/a.py:1: data.a imports data.b at module level",
        "data/b.py:2: data.b imports data.c at module level",
        "data/c.py:1: data.c imports data.a at module level",
    ]


def test_cycles_are_counted_for_each_group_of_modules_once(project):
    two_cycles_in_one_group = {
        "eval/a.py": "import eval.b, eval.c",
        "eval/b.py": "import eval.a",
        "eval/c.py": "import eval.a",
    }
    another_group = {"data/x.py": "import data.y", "data/y.py": "import data.x"}
    no_cycle = {"model.py": "import kernels.loss", "kernels/loss.py": "", "eval/d.py": "import eval.a, model"}
    root = project(two_cycles_in_one_group | another_group | no_cycle)
    assert row(root, "import cycles at module level").found == 2


@pytest.mark.parametrize(
    ("back", "counts"),
    [
        ("import data.a", (1, 1, 1)),
        ("def f():\n    import data.a", (0, 1, 1)),
        ("if TYPE_CHECKING:\n    import data.a", (0, 0, 1)),
    ],
)
def test_cycles_are_counted_by_the_place_of_their_imports(project, back, counts):
    root = project({"data/a.py": "import data.b", "data/b.py": back})
    assert tuple(r.found for r in check_tree(read_tree(root)) if r.title.startswith("import cycles")) == counts
    assert main([str(root)]) == (1 if counts[1] else 0)


def test_a_package_that_imports_its_modules_is_no_cycle(project):
    root = project({"generation/options.py": "", "generation/decode.py": "from generation.options import Options"})
    (root / "generation/__init__.py").write_text("from generation.decode import generate")
    assert main([str(root)]) == 0
    (root / "generation/options.py").write_text("from generation import generate")
    assert row(root, "import cycles at module level").found == 1


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("train", "training.setup", True),
        ("training.setup", "model", True),
        ("training.setup", "eval.loss", True),
        ("report.page", "eval.reference", True),
        ("report.run_log", "training.run_directory", True),
        ("training.run_directory", "report.curves", False),
        ("eval.run", "training.checkpoint", False),
        ("sample", "training.checkpoint", False),
        ("classify", "training.optim", True),
        ("sample", "train", False),
        ("scripts.sweep", "train", True),
        ("bench", "scripts.sweep", False),
        ("model", "pretrained", False),
        ("pretrained", "model", True),
        ("kernels.loss", "model", False),
        ("generation.text", "heads", False),
        ("data.loader", "model", False),
        ("data.loader", "files", True),
        ("data.shards", "data.prepare.hub", False),
        ("data.prepare.job", "data.shards", True),
        ("device", "processes", False),
        ("files", "data.shards", False),
    ],
)
def test_which_module_may_import_which(importer, imported, allowed):
    assert is_allowed(importer, imported) is allowed


def test_a_room_is_the_longest_name_and_not_a_prefix_of_a_word():
    assert room_of("data.prepare.text") == "data.prepare"
    assert room_of("data.prepared") == room_of("data") == "data"
    assert room_of("modeling") is None


@pytest.mark.parametrize(
    "statement", ["import model", "def f():\n    import model", "if TYPE_CHECKING:\n    import model"]
)
def test_an_upward_import_is_named_wherever_it_is(project, statement, capsys):
    root = project({"model.py": "", "data/loader.py": statement})
    assert main([str(root)]) == 1
    assert "data.loader imports model" in capsys.readouterr().out


def test_an_upward_import_of_several_names_counts_once(project):
    assert (
        row(project({"model.py": "", "data/a.py": "from model import GPT, GPTConfig"}), "imports that do not").found
        == 1
    )


def test_a_module_without_a_room_is_named(project, capsys):
    assert main([str(project({"utils.py": ""}))]) == 1
    assert "utils is in no room" in capsys.readouterr().out


def test_imports_inside_functions_are_counted_those_of_other_projects_included(project):
    lines = "def f():\n" + "    import torch\n" * IMPORTS_IN_FUNCTIONS
    assert main([str(project({"model.py": lines}))]) == 0
    assert row(project({"model.py": lines + "    import numpy\n"}), "imports inside functions").failed


def test_the_names_and_modules_that_train_imports_are_limited(project):
    names = ", ".join(f"name_{i}" for i in range(TRAIN_NAMES))
    assert main([str(project({"model.py": "", "train.py": f"import torch\nfrom model import {names}"}))]) == 0
    assert row(project({"train.py": f"from model import {names}, more"}), "names that train.py imports").failed
    modules = [f"data/part_{i}.py" for i in range(TRAIN_MODULES + 1)]
    imports = "\n".join(f"import data.part_{i}" for i in range(TRAIN_MODULES + 1))
    assert row(project(dict.fromkeys(modules, "") | {"train.py": imports}), "modules that train.py imports").failed


def test_the_command_prints_the_table_and_refuses_a_directory_without_train_py(project, tmp_path, capsys):
    assert main([str(project({}))]) == 0
    assert "imports inside functions" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "empty")])
    assert "no train.py" in capsys.readouterr().err
