"""pyproject.toml and requirements.txt agree with the tree and with each other."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from scripts.layers import find_modules, find_statements

ROOT = Path(__file__).parent.parent
OPTIONAL = ("cluster", "language")  # extras that requirements.txt leaves out
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def distribution(requirement):
    """The normalized name of a distribution: `jsonargparse[signatures]==4.53.0` -> `jsonargparse`."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


@pytest.fixture(scope="module")
def pinned():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return {distribution(line) for line in lines if line and not line.startswith("#")}


def test_requirements_txt_has_a_version_of_each_dependency_and_no_other(pinned):
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    groups = [project["dependencies"], *(extras[name] for name in extras if name not in OPTIONAL)]
    assert {distribution(requirement) for group in groups for requirement in group} == pinned
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert all("==" in line for line in lines if line and not line.startswith("#"))


def test_requirements_txt_lists_each_package_that_a_module_imports(pinned):
    own = {name.partition(".")[0] for name in find_modules(ROOT)}
    providers = importlib.metadata.packages_distributions()
    optional = {"lm_eval", "ctranslate2", "trackio"}  # used if they are installed
    optional |= {name for extra in OPTIONAL for name in PROJECT["project"]["optional-dependencies"][extra]}
    missing = set()
    for file in find_modules(ROOT).values():
        for node, _ in find_statements(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for package in {name.partition(".")[0] for name in names} - own - optional - sys.stdlib_module_names:
                if not pinned & {distribution(name) for name in providers.get(package, [package])}:
                    missing.add(f"{file.relative_to(ROOT)} imports {package}")
    assert not missing


def test_every_top_level_module_is_installed():
    modules = {name for name, file in find_modules(ROOT).items() if file.parent == ROOT}
    assert set(PROJECT["tool"]["setuptools"]["py-modules"]) == modules


def test_citation_and_changelog_name_the_version():
    version = PROJECT["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_wheel_contains_each_module_and_the_templates_of_the_report(tmp_path):
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    # A copy, because a build writes into the tree.
    templates = [*sorted((ROOT / "report/templates").iterdir()), ROOT / "serve/page.html", ROOT / "serve/page.js"]
    metadata = [ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE")]
    for file in [*find_modules(ROOT).values(), *templates, *metadata]:
        copy = tmp_path / "project" / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run(command, cwd=tmp_path / "project", check=True)
    (wheel,) = (tmp_path / "project").glob("*.whl")
    contents = set(zipfile.ZipFile(wheel).namelist())
    expected = {file.relative_to(ROOT).as_posix() for file in [*find_modules(ROOT).values(), *templates]}
    assert expected == {name for name in contents if ".dist-info/" not in name}
