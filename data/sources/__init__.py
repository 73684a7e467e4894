"""Where text comes from: one file a source.

A source is a list of files in a fixed order, each read as a sequence of pieces in a fixed order. The process that reads
cuts pieces, which is cheap; the workers turn a piece into documents and those into tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class File:
    """One file of a source. `split` is "train" or "val" where the source says so, None where a hash decides."""

    name: str
    size: int
    split: str | None = None


@dataclass(frozen=True)
class Piece:
    """What one worker takes at a time: whole documents, or a part of one that is too long.

    format: "text" (one document), "separated", "jsonl", "parquet" (a row group, which the worker reads) or "arrow"
    (rows already read). first: number of its first line, document or row, from 1, for messages.
    position: index of the file in the source, index of the piece in the file.
    source_bytes: how much of the file it accounts for, for progress.
    split_key: the first bytes of the document, where the piece is only a part of it.
    text_bytes: about how much text a row group holds.
    offset: where `data` stands in the file, if it stands there as it is (uncompressed, on this machine).
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


@dataclass(frozen=True)
class Span:
    """A piece on its way to another process, which reads the data from the file again: cheaper than sending it."""

    piece: Piece
    length: int

    @classmethod
    def of(cls, piece: Piece) -> Piece | Span:
        """`piece` without its data, where that can be read again."""
        return piece if piece.offset is None else cls(replace(piece, data=b""), len(piece.data))

    def read(self) -> Piece:
        """The piece with its data."""
        with open(self.piece.file.name, "rb") as file:
            file.seek(self.piece.offset or 0)
            return replace(self.piece, data=file.read(self.length))


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
