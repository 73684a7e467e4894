"""Choose which documents are kept, by length and by language, and remove duplicates."""

from __future__ import annotations

import hashlib
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LANGUAGE_BYTES = 1 << 12  # the language of a document is recognized from this many bytes at its beginning
SEEN_FILE = "documents-seen.sqlite"  # the file of `SeenDocuments`, in the directory of an incomplete dataset


@dataclass(frozen=True)
class Filters:
    """Conditions that a document has to meet to be kept.

    A document that is cut into several chunks is always kept, unless `merge_parts` removes it as a duplicate.

    min_chars, max_chars: limits of the document's length in characters; None is no limit;
    languages: ISO 639 codes of the accepted languages (see `find_language`); empty accepts every language;
    deduplicate: omit a document that equals an earlier document.
    """

    min_chars: int = 0
    max_chars: int | None = None
    languages: tuple[str, ...] = ()
    deduplicate: bool = False

    @property
    def by_text(self) -> bool:
        """Whether there is a condition on the text of a single document: any condition except `deduplicate`."""
        return bool(self.min_chars or self.max_chars is not None or self.languages)

    def describe(self) -> str:
        """Return the conditions as the text that `meta.json` has under `filter`."""
        conditions = [f"at least {self.min_chars} characters"] if self.min_chars else []
        conditions += [f"at most {self.max_chars} characters"] if self.max_chars is not None else []
        conditions += [f"language {' or '.join(self.languages)}"] if self.languages else []
        return "; ".join([*conditions, "without duplicates"] if self.deduplicate else conditions)

    def reject(self, text: bytes) -> str | None:
        """Return the reason why a document is omitted, a key of `skipped` in `meta.json`; None if it is kept."""
        if self.min_chars or self.max_chars is not None:
            n = len(text.decode())
            if n < self.min_chars:
                return "too_short"
            if self.max_chars is not None and n > self.max_chars:
                return "too_long"
        if self.languages and find_language(text) not in self.languages:
            return "other_language"
        return None


def find_language(text: bytes) -> str:
    """Return the ISO 639 code of the most probable language of a document, which is judged by its beginning."""
    return languages().classify(text[:LANGUAGE_BYTES].decode(errors="ignore"))[0]


def languages() -> Any:
    """Return the module py3langid (Lui and Baldwin 2012), which recognizes the language of a text.

    Raises ValueError when the package is missing.
    """
    try:
        # Imported here: py3langid is not installed with this project, and only a filter of languages needs it.
        import py3langid
    except ImportError:
        raise ValueError("--language needs the package py3langid: pip install py3langid") from None
    return py3langid


def check_languages(codes: tuple[str, ...]) -> None:
    """Raise ValueError for a code that py3langid does not know, or when py3langid is not installed."""
    if not codes:
        return
    known = sorted(code for code, _ in languages().rank(""))
    if unknown := [code for code in codes if code not in known]:
        raise ValueError(f"--language {unknown[0]} is not known: expected {', '.join(known)}")


class SeenDocuments:
    """The hashes of all documents so far. They are in a file, because memory may be too small for so many hashes.

    Each hash is stored with the number (see `find_new`) of the first document that has it. After an interruption, the
    file may contain hashes of documents that the continued run reads again. These documents have the same numbers as
    before, so they do not count as duplicates.

    Raises OSError when the file cannot be read or written.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / SEEN_FILE
        try:
            self._database = sqlite3.connect(self.path)
        except sqlite3.Error as error:
            raise self._explain(error) from error
        self._execute("CREATE TABLE IF NOT EXISTS seen (hash BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID")

    def find_new(self, tokens: np.ndarray, lengths: np.ndarray, first_number: int) -> np.ndarray:
        """Store the hashes of documents. Return which of them differ from all earlier documents: (documents,) bool.

        Args:
            tokens: (tokens,) uint16, the documents one after the other.
            lengths: (documents,) the number of tokens of each document.
            first_number: the number of the first of these documents, which is how many documents come before it in the
                dataset, including duplicates.
        """
        new = np.empty(len(lengths), bool)
        begin = 0
        for i, n in enumerate(lengths.tolist()):
            # 128 bits: the probability that two among 10 billion different documents have equal hashes is about 1e-19.
            digest = hashlib.blake2b(tokens[begin : begin + n].data, digest_size=16).digest()
            self._execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", digest, first_number + i)
            ((number,),) = self._execute("SELECT number FROM seen WHERE hash = ?", digest)
            new[i], begin = number == first_number + i, begin + n
        return new

    def _execute(self, statement: str, *values: object) -> list[tuple[int]]:
        try:
            return self._database.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._explain(error) from error

    def _explain(self, error: sqlite3.Error) -> OSError:
        return OSError(f"cannot write {self.path}: {error}; make room and run the same command again")

    def flush(self) -> None:
        """Write all hashes to the disk. If the process dies, the hashes since the last call are lost."""
        try:
            self._database.commit()
        except sqlite3.Error as error:
            raise self._explain(error) from error

    def clear(self) -> None:
        """Delete all hashes."""
        self._execute("DELETE FROM seen")

    def remove(self) -> None:
        """Close and delete the file, which a complete dataset does not need."""
        self._database.close()
        self.path.unlink(missing_ok=True)
