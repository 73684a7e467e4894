"""What the tests of `data.prepare` share: a corpus, and functions that run the command and read its results."""

import json
from pathlib import Path

import numpy as np
import pytest

from data.prepare.__main__ import main
from data.prepare.shakespeare import read_plays
from data.shards import open_split
from data.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """About 900 speeches and a play: short and long documents, each different from the others."""
    plays = read_plays()
    speeches = list(dict.fromkeys(plays["macbeth"].split("\n\n")))[:900]
    unusual = ["naïve — 日本語 👩‍👩‍👧 \x00 \r\n<|endoftext|>", " ", "\n\n\n", "a" * 3000]
    return [s for s in speeches if s] + unusual + [plays["pericles"]]


@pytest.fixture(scope="session")
def jsonl(documents, tmp_path_factory) -> Path:
    """The documents as a .jsonl file."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(documents)))
    return path


@pytest.fixture(scope="session")
def run():
    """`run("text", path, "--out", out)`: run `data.prepare` in this process."""

    def run(*arguments: object) -> None:
        main([str(argument) for argument in arguments])

    return run


@pytest.fixture
def refused(run, capsys):
    """`refused("text", path, "--out", out)`: run `data.prepare`, which must fail, and return its error message."""

    def refused(*arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run(*arguments)
        assert stopped.value.code == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    return refused


@pytest.fixture(scope="session")
def contents():
    """`contents(directory)`: the bytes of its files by name, without .lock; with `meta=False`, only of shards."""

    def contents(directory: Path, *, meta: bool = True) -> dict[str, bytes]:
        files = [path for path in sorted(directory.iterdir()) if path.is_file() and path.name != ".lock"]
        files = [path for path in files if meta or path.suffix == ".bin"]
        return {path.name: path.read_bytes() for path in files}

    return contents


@pytest.fixture(scope="session")
def read_all():
    """`read_all(directory, "train")`: all tokens of a split, verified."""

    def read_all(directory: Path, split: str) -> np.ndarray:
        opened = open_split(directory, split)
        opened.verify()
        tokens = np.empty(opened.n_tokens, np.uint16)
        opened.read(0, tokens)
        return tokens

    return read_all


@pytest.fixture(scope="session")
def read_documents(read_all):
    """`read_documents(directory, "train")`: the documents of a split as text."""

    def read_documents(directory: Path, split: str) -> list[str]:
        tokenizer = load_tokenizer(directory)
        tokens = read_all(directory, split)
        assert tokens[0] == tokenizer.eot
        begins = np.flatnonzero(tokens == tokenizer.eot)
        return [tokenizer.decode(part[1:].tolist()) for part in np.split(tokens, begins[1:])]

    return read_documents
