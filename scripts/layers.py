"""Check the direction of the imports between the project's modules: `python -m scripts.layers`.

The script parses every Python file except the tests. It counts import cycles, forbidden imports (see LAYERS and
FORBIDDEN), imports inside functions, and the imports of train.py. If a number exceeds its limit, the violations are
listed and the exit status is 1. Cycles that exist only because of imports under TYPE_CHECKING have no limit.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import NamedTuple

# The layers of the project from top to bottom. Each row lists its rooms: a room is a package, or a module that is in no
# package. A module may import only modules of its own room and of the rows below.
LAYERS = (
    ("scripts", "bench"),
    ("benchmarks",),
    ("train", "sample", "classify"),
    ("pet",),
    ("classification",),
    ("report", "serve"),
    ("training",),
    ("eval",),
    ("generation", "heads", "cloze"),
    ("pretrained",),
    ("model",),
    ("kernels",),
    ("data.prepare",),
    ("data",),
    ("processes",),
    ("device", "weights"),
    ("checkpoints", "openai_checkpoint"),
    ("checks", "command", "files", "other_formats"),
    ("openmp",),
)
# Pairs (importer, imported) that are forbidden although they point downward. sample.py runs a model, so it must not
# depend on the code that trains models.
FORBIDDEN = {("sample", "training")}

# The largest allowed number of imports inside functions. Such an import hides a dependency.
IMPORTS_IN_FUNCTIONS = 39
# The largest numbers of names that train.py may import, and of modules that it may import them from. A reader of
# train.py must know all of them.
TRAIN_NAMES, TRAIN_MODULES = 20, 8


class Place(Enum):
    """The part of a file that an import statement is in."""

    MODULE = "at module level"
    FUNCTION = "inside a function"
    TYPE_CHECKING = "under TYPE_CHECKING"


class Statement(NamedTuple):
    """An import statement."""

    node: ast.Import | ast.ImportFrom
    place: Place


class Edge(NamedTuple):
    """One name that a module of the project imports from another module of the project."""

    importer: str
    imported: str
    name: str
    place: Place
    where: str  # file:line

    def __str__(self) -> str:
        return f"{self.where}: {self.importer} imports {self.imported} {self.place.value}"


class Tree(NamedTuple):
    """The import statements of a project."""

    statements: list[tuple[str, Statement]]  # (file such as "data/loader.py", one of its import statements)
    edges: list[Edge]
    modules: set[str]


class Row(NamedTuple):
    """A line of the printed table. The check fails if `found` exceeds `limit`; with None, there is no limit."""

    title: str
    found: int
    limit: int | None
    violations: list[str]

    @property
    def failed(self) -> bool:
        """True if there is a limit and `found` exceeds it."""
        return self.limit is not None and self.found > self.limit


def find_modules(root: Path) -> dict[str, Path]:
    """Return {dotted name: file} of the modules in `root` and in the packages below it, except the package `tests`."""
    files = sorted(root.glob("*.py"))
    for package in sorted(root.glob("*/__init__.py")):
        if package.parent.name != "tests":
            files += sorted(package.parent.rglob("*.py"))
    modules = {}
    for file in files:
        parts = file.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return modules


def find_statements(node: ast.AST, place: Place = Place.MODULE) -> Iterator[Statement]:
    """Yield the import statements in a syntax tree, in the order of the file."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield Statement(node, place)
    elif isinstance(node, ast.If) and _is_type_checking(node.test):
        for statement in node.body:
            yield from find_statements(statement, Place.TYPE_CHECKING)
        for statement in node.orelse:
            yield from find_statements(statement, place)
    else:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and place is Place.MODULE:
            place = Place.FUNCTION
        for child in ast.iter_child_nodes(node):
            yield from find_statements(child, place)


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imported_modules(
    node: ast.Import | ast.ImportFrom, importer: str, is_package: bool, modules: Collection[str]
) -> Iterator[tuple[str, str]]:
    """Yield (module, name) for each name that a statement imports from one of `modules`.

    `from data import loader` imports the module data.loader if there is one, else the name `loader` of data.
    """
    if isinstance(node, ast.Import):
        candidates = [(alias.name, alias.name) for alias in node.names]
    else:
        base = node.module or ""
        if node.level:  # relative: one dot is the package of the importer, each further dot is the package above
            package = importer.split(".")
            package = package[: len(package) - node.level + is_package]
            base = ".".join([*package, *filter(None, [base])])
        candidates = [(f"{base}.{alias.name}", alias.name) for alias in node.names]
    for path, name in candidates:
        while path and path not in modules:
            path = path.rpartition(".")[0]
        if path:
            yield path, name


def read_tree(root: Path) -> Tree:
    """Parse all modules of the project in `root`, without the tests.

    Raises:
        SyntaxError: a file is not valid Python.
    """
    modules = find_modules(root)
    statements, edges = [], []
    for module, file in modules.items():
        path = file.relative_to(root).as_posix()
        for statement in find_statements(ast.parse(file.read_text(encoding="utf-8"), filename=str(file))):
            statements.append((path, statement))
            where = f"{path}:{statement.node.lineno}"
            is_package = file.name == "__init__.py"
            for imported, name in imported_modules(statement.node, module, is_package, modules):
                edges.append(Edge(module, imported, name, statement.place, where))
    return Tree(statements, edges, set(modules))


def find_cycles(edges: Sequence[Edge]) -> list[list[Edge]]:
    """Return one cycle for each group of modules that import each other, directly or through other modules.

    This cycle is a shortest one through the alphabetically first module of the group.
    """
    graph: dict[str, dict[str, Edge]] = {}
    for edge in edges:
        graph.setdefault(edge.importer, {}).setdefault(edge.imported, edge)
    reachable = {module: _reachable(graph, module) for module in graph}
    cycles, seen = [], set[str]()
    for module in sorted(graph):
        if module in reachable[module] and module not in seen:
            seen |= {other for other in reachable[module] if module in reachable.get(other, ())}
            cycles.append(_shortest_cycle(graph, module))
    return cycles


def _reachable(graph: Mapping[str, Mapping[str, Edge]], start: str) -> set[str]:
    """Return the modules that `start` imports, directly or through other modules."""
    found, pending = set[str](), [start]
    while pending:
        new = set(graph.get(pending.pop(), ())) - found
        found |= new
        pending += new
    return found


def _shortest_cycle(graph: Mapping[str, Mapping[str, Edge]], start: str) -> list[Edge]:
    """Return the edges of a shortest cycle through `start`, by breadth-first search.

    Raises AssertionError if no cycle contains `start`.
    """
    paths: list[list[Edge]] = [[edge] for edge in graph[start].values()]
    visited = {start}
    for path in paths:  # the loop also visits the paths that it appends
        last = path[-1].imported
        if last == start:
            return path
        if last not in visited:
            visited.add(last)
            paths += [[*path, edge] for edge in graph.get(last, {}).values()]
    raise AssertionError(f"{start} is on no cycle")


def room_of(module: str) -> str | None:
    """Return the room of LAYERS with the longest name that contains the module, or None if no room contains it."""
    rooms = [room for row in LAYERS for room in row if module == room or module.startswith(f"{room}.")]
    return max(rooms, key=len, default=None)


def is_allowed(importer: str, imported: str) -> bool:
    """Return whether LAYERS and FORBIDDEN allow the module `importer` to import the module `imported`."""
    rows = {room: row for row, rooms in enumerate(LAYERS) for room in rooms}
    above, below = room_of(importer), room_of(imported)
    if above is None or below is None or above == below:
        return True  # check_tree counts modules without a room separately
    return rows[above] < rows[below] and (above, below) not in FORBIDDEN


def check_tree(tree: Tree) -> list[Row]:
    """Check the imports of a project. Return the rows of the printed table, one for each number that is checked."""
    at_import = [edge for edge in tree.edges if edge.place is Place.MODULE]
    at_run_time = [edge for edge in tree.edges if edge.place is not Place.TYPE_CHECKING]
    # A statement that imports several names from the same module counts as one violation.
    upward = list(dict.fromkeys(str(edge) for edge in tree.edges if not is_allowed(edge.importer, edge.imported)))
    homeless = [f"{module} is in no room of LAYERS: add it" for module in sorted(tree.modules) if not room_of(module)]
    in_functions = [
        f"{path}:{statement.node.lineno}: {ast.unparse(statement.node)}"
        for path, statement in tree.statements
        if statement.place is Place.FUNCTION
    ]
    by_train = [edge for edge in tree.edges if edge.importer == "train"]
    sources = {edge.imported for edge in by_train}
    return [
        _cycle_row("import cycles at module level", at_import, 0),
        _cycle_row("import cycles with imports inside functions", at_run_time, 0),
        _cycle_row("import cycles with imports under TYPE_CHECKING", tree.edges, None),
        Row("imports that do not point downward", len(upward), 0, upward),
        Row("modules that belong to no room", len(homeless), 0, homeless),
        Row("imports inside functions", len(in_functions), IMPORTS_IN_FUNCTIONS, in_functions),
        Row("names that train.py imports", len(by_train), TRAIN_NAMES, [f"{e.imported}.{e.name}" for e in by_train]),
        Row("modules that train.py imports from", len(sources), TRAIN_MODULES, sorted(sources)),
    ]


def _cycle_row(title: str, edges: Sequence[Edge], limit: int | None) -> Row:
    cycles = find_cycles(edges)
    return Row(title, len(cycles), limit, ["\n    ".join(map(str, cycle)) for cycle in cycles])


def describe(rows: Sequence[Row]) -> str:
    """Return the table, followed by the violations of each row that failed."""
    lines = [f"{'':<42}{'found':>7}{'limit':>7}"]
    lines += [f"{row.title:<42}{row.found:>7}{'-' if row.limit is None else row.limit:>7}" for row in rows]
    for row in rows:
        if row.failed:
            lines += ["", f"{row.title}: {row.found}, the limit is {row.limit}"]
            lines += [f"  {violation}" for violation in row.violations]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m scripts.layers", description="Check the direction of the imports.")
    parser.add_argument(
        "root", nargs="?", type=Path, default=Path(), help="directory of the project (default: the current directory)"
    )
    root = parser.parse_args(arguments).root
    if not (root / "train.py").is_file():
        parser.error(f"{root.resolve()} has no train.py: expected the root of the project")
    rows = check_tree(read_tree(root))
    print(describe(rows))
    return 1 if any(row.failed for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
