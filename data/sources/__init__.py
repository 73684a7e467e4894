"""Where text comes from: one file a source.

A source is a list of files in a fixed order, each read as a sequence of pieces in a fixed order. The process that reads
cuts pieces, which is cheap; the workers turn a piece into documents and those into tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class File:
    """One file of a source. `split` is "train" or "val" where the source says so, None where a hash decides."""

    name: str
    size: int
    split: str | None = None


@dataclass(frozen=True)
class Piece:
    """What one worker takes at a time: whole documents, or a part of one that is too long.

    format: "text" (one document), "separated", "jsonl", "parquet" (a row group) or "arrow" (rows already read).
    first: number of its first document or row, from 1, for messages; counted from `offset` where that is set.
    source_bytes: how much of the file it accounts for, for progress.
    split_key: the first bytes of the document, where the piece is only a part of it.
    offset: where in the file the worker finds it, as it is, `text_bytes` long; None where `data` holds it.
    text_bytes: how much text there is to read; of a row group, about.
    position: index of the file in the source, index of the piece in the file.
    """

    file: File
    format: str
    first: int
    source_bytes: int
    data: bytes = b""
    continues: bool = False
    split_key: bytes | None = None
    offset: int | None = None
    row_group: int = 0
    text_bytes: int = 0
    position: tuple[int, int] = (0, 0)

    @property
    def size(self) -> int:
        """Bytes of text, about."""
        return len(self.data) + self.text_bytes

    def read(self) -> bytes:
        """Its bytes. Raises ValueError when the file is no longer as long as it was."""
        if self.offset is None:
            return self.data
        with open(self.file.name, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.text_bytes)
        if len(data) < self.text_bytes:
            raise ValueError(f"{self.file.name} has become shorter while it was read: begin again with another --out")
        return data


@dataclass(frozen=True)
class Options:
    """How pieces become documents.

    text_key: key or column with the text; separator: what stands between the documents of a text file (None: the file
    is one document); strict: stop at an empty document or invalid UTF-8 instead of leaving out and replacing.
    """

    text_key: str = "text"
    separator: str | None = None
    strict: bool = False


@dataclass(frozen=True)
class Source:
    """A corpus as `data.prepare` reads it. `read(file, limit)` yields pieces of about `limit` bytes."""

    name: str
    revision: str
    files: tuple[File, ...]
    read: Callable[[File, int], Iterator[Piece]]
    filter: str = ""
    options: Options = Options()
