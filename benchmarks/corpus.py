"""The corpora of the tokenization benchmark: text files of this machine, and repeated plays of Shakespeare."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import regex
from tiktoken_ext.openai_public import r50k_pat_str

from data.prepare.shakespeare import read_plays

# Suffixes of files of code, markup and prose.
CODE = {".py", ".pyi", ".pyx", ".c", ".h", ".hpp", ".cpp", ".cu", ".cuh", ".js", ".ts", ".sh", ".pl", ".java", ".rs"}
MARKUP = {".html", ".xml", ".svg", ".css", ".json", ".ipynb", ".toml", ".yaml", ".yml", ".cmake", ".po"}
PROSE = {".txt", ".md", ".rst", ".tex"}
PLAYS_BYTES = 10**9  # size of the corpus of repeated plays
SAMPLE_BYTES = 20e6  # size of the sample of documents whose words are counted


def write_files(roots: list[str], path: Path) -> tuple[float, float]:
    """Write the text files under `roots` to a .jsonl file. Returns the result of `write_corpus`."""
    return write_corpus(text_files(roots), path)


def write_plays(path: Path) -> tuple[float, float]:
    """Write at least PLAYS_BYTES bytes of plays to a .jsonl file. Returns the result of `write_corpus`."""
    return write_corpus(repeated_plays(PLAYS_BYTES), path)


def text_files(roots: list[str]) -> Iterator[str]:
    """Yield the text of each file under `roots` that has a suffix of a text file. Yield equal contents only once.

    Symbolic links, empty files and files that are not UTF-8 are skipped.
    """
    seen = set()
    for path in itertools.chain.from_iterable(sorted(Path(root).rglob("*")) for root in roots):
        if path.suffix not in CODE | MARKUP | PROSE or path.is_symlink() or not path.is_file():
            continue
        data = path.read_bytes()
        digest = hashlib.sha256(data).digest()
        if not data or digest in seen:
            continue
        seen.add(digest)
        try:
            yield data.decode()
        except UnicodeDecodeError:
            continue


def repeated_plays(size: int) -> Iterator[str]:
    """Yield the plays again and again, until the yielded texts have at least `size` bytes in total."""
    written = 0
    for text in itertools.cycle(read_plays().values()):
        if written >= size:
            return
        yield text
        written += len(text.encode())


def write_corpus(texts: Iterator[str], path: Path) -> tuple[float, float]:
    """Write texts to a .jsonl file.

    Returns the megabytes of text, and the number of different words per megabyte. A word is one of the pieces into
    which GPT-2's tokenizer splits a text before it merges bytes. They are counted in a random sample of the documents.
    """
    size, lengths = 0, []
    with open(path, "w", encoding="utf-8") as file:
        for text in texts:
            lengths.append(len(text.encode()))
            size += lengths[-1]
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    probability = min(1.0, SAMPLE_BYTES / max(size, 1))
    generator = random.Random(0)
    chosen = [generator.random() < probability for _ in lengths]
    words: set[str] = set()
    with open(path, encoding="utf-8") as file:
        for line in itertools.compress(file, chosen):
            words.update(regex.findall(r50k_pat_str, json.loads(line)["text"]))
    sampled = sum(itertools.compress(lengths, chosen))
    return size / 1e6, len(words) / max(sampled / 1e6, 1e-9)
