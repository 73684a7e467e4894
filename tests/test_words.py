"""American spelling, and none of the names and expressions that were replaced because readers stumbled over them."""

import io
import json
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = ("*.py", "*.md", "*.yaml", "*.yml", "*.toml", "*.cff", "*.sh", "*.ipynb", "Makefile", ".ci/run")

# Names in code (`share`, but not `share_of_time`), and what to write instead. As words in prose they are allowed.
OLD_NAMES = {
    "meet": "rendezvous",
    "least": "all_reduce_min",
    "share": "weight",
    "fitted_to": "planned_for",
    "told": "reduced",
    "orthogonalise": "newton_schulz",
}

# Expressions in comments, docstrings, messages and documents, and what to write instead.
OLD_EXPRESSIONS = {
    r"(one|each|every|next|last|first|second|earlier) (life|lives)|lives? of a run": "process, or attempt at a run",
    r"may not wait": "on a stop request, skip validation",
    r"the one time in a step": "the only host-device synchronization of a step",
    r"what of it is seldom|seldom meant": "warnings about unusual settings",
    r"the least of a number": "all-reduce with MIN",
    r"softmax does not see": "softmax is unchanged",
    r"targets that count in all|of these weighs": "this micro-batch's fraction of the global batch's targets",
    r"sees all there is": "a single query needs no causal mask",
    r"the learning rate's course": "learning-rate schedule",
    r"held to it by": "checked by",
    r"(is|are|was|were) passed over": "is skipped",
    r"so many (windows|steps|tokens|times)": "a number of",
    r"let alone": "not interrupted",
}

# Stems before -ise, -ised, -iser, -ising, -isation, ...: American English has a z.
_IZE = (
    "author capital categor character colon custom emphas equal factor familiar final general harmon initial italic "
    "linear local material maxim memor minim modern normal optim organ orthogonal parallel penal popular prior "
    "priorit quant random real recogn regular serial special stabil standard summar symbol synchron synthes token util "
    "vector visual"
)
BRITISH_SPELLINGS = (
    rf"({'|'.join(_IZE.split())})is(e|ed|er|ers|es|ing|able|ation|ations)(?![a-z])",
    r"(behavi|col|fav|flav|harb|hon|lab|neighb|rum)our(?!ly|=)",  # colour= is a parameter of tqdm
    r"(?<![a-z])(centre|centred|centring|fibre|(kilo|centi|milli)?metres?)(?![a-z])",
    r"(cancel|channel|label|level|model|signal|total|travel|fuel)l(ed|ing)(?![a-z])",
    r"(?<![a-z])(analys(e|ed|er|ing)|artefacts?|catalogues?|defence|fulfil|fulfils|fulfilment|grey|judgement|learnt)(?![a-z])",
    r"(?<![a-z])(licence|offence|practise|programmes?|spelt|whilst)(?![a-z])",
)


def find(patterns, text):
    """(line number, words) of each match. Spaces in a pattern also match a line break inside a comment."""
    pattern = re.compile("|".join(f"(?:{p})" for p in patterns).replace(" ", r"[\s#]+"), re.IGNORECASE)
    return [(text.count("\n", 0, match.start()) + 1, match[0]) for match in pattern.finditer(text)]


def find_names(source):
    """(line number, name) of each identifier in Python code that is one of OLD_NAMES."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [(t.start[0], t.string) for t in tokens if t.type == tokenize.NAME and t.string in OLD_NAMES]


def read(file):
    """The text of a file. Of a notebook: the text of its cells, without their outputs."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return text


@pytest.fixture(scope="module")
def documents():
    """The text of each tracked file, without this one, which has to contain the words."""
    listing = subprocess.run(["git", "ls-files", "-z", "--", *FILES], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout: there is no list of tracked files")
    files = [ROOT / name for name in listing.stdout.split("\0") if name]
    return {file.relative_to(ROOT).as_posix(): read(file) for file in files if file != Path(__file__) and file.exists()}


def report(found):
    return "\n" + "\n".join(f"{name}:{line}: {words!r}" for name, lines in found.items() for line, words in lines)


def test_american_spelling(documents):
    found = {name: matches for name, text in documents.items() if (matches := find(BRITISH_SPELLINGS, text))}
    assert not found, report(found)


def test_no_replaced_expression(documents):
    found = {name: matches for name, text in documents.items() if (matches := find(OLD_EXPRESSIONS, text))}
    assert not found, report(found)


def test_no_replaced_name(documents):
    python = {name: text for name, text in documents.items() if name.endswith(".py")}
    found = {name: matches for name, text in python.items() if (matches := find_names(text))}
    assert not found, report(found)


@pytest.mark.parametrize(
    "text",
    [
        "Normalised",
        "tokenisation",
        "test_initialisation",
        "behaviour",
        "run_colours",
        "centred_head",
        "labelled",
        "grey",
    ],
)
def test_a_british_spelling_is_found(text):
    assert find(BRITISH_SPELLINGS, f"first line\n{text}") != []


@pytest.mark.parametrize(
    "text",
    [
        "raise otherwise precise pointwise pairwise noise promise exercise",
        "optimism, specialist, synthesis, analyses, emphasis, characteristic, organism",
        "color center initialize labeled modeling parameter diameter perimeter our hours four",
        "programmed, license, cancellation, greyhound",
    ],
)
def test_an_american_word_is_not_taken_for_a_british_one(text):
    assert find(BRITISH_SPELLINGS, text) == []


def test_an_expression_is_found_across_the_lines_of_a_comment():
    assert find(OLD_EXPRESSIONS, "x = 1\n# The one\n    # time in a step") == [(2, "The one\n    # time in a step")]


def test_a_name_is_found_in_code_and_not_in_prose():
    source = '"""At least a share of them meet."""\nat_least = total * share  # told\nprocesses.least(1)\n'
    assert find_names(source) == [(2, "share"), (3, "least")]
