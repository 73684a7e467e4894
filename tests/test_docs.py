"""The documents refer to files, functions and options that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def headings(document):
    """The anchors of a document's headings, as GitHub forms them."""
    lines = re.findall(r"^#+ (.*)", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in lines}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_each_link_leads_to_a_file_that_has_the_linked_name(document):
    broken = []
    for text, target in LINK.findall(document.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (document.parent / path).resolve() if path else document
        if not file.exists():
            broken.append(f"{target} does not exist")
        elif anchor and anchor not in headings(file):
            broken.append(f"{target}: there is no such heading")
        elif file.suffix == ".py":
            source = file.read_text(encoding="utf-8")
            names = text.strip("`").split(".")  # `Class.method`
            undefined = [name for name in names if not re.search(rf"(?m)^\s*(def|class) {name}\b|^{name} = ", source)]
            broken += [f"{path} does not define {name}" for name in undefined]
    assert not broken, "\n".join(broken)


def test_the_map_of_the_readme_names_each_module_and_directory():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    packages = {f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")}
    files = {path.name for path in ROOT.glob("*.py")}
    assert not {name for name in packages | files if f"`{name}`" not in readme}
