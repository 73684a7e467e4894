"""The interface of every corpus: a list of files in a fixed order, each read as a sequence of chunks in a fixed order.

The main process cuts files into chunks, which is cheap. Worker processes turn each chunk into documents, and the
documents into tokens. To add a corpus, write a module with a function that returns a `Source`, and a subcommand in
`__main__.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from data.prepare.filters import Filters


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    name: path, hf:// address, or any name that the source's `read` understands;
    size: number of bytes of the stored file or, if `begin` and `end` select a part of it, of this part;
    split: "train" or "val" if the source defines the split, None if `ValidationRule` decides for each document;
    begin, end: the part of the text to read. Both are byte positions in the text after its conversion to UTF-8 without
        a byte-order mark. If `end` is None, the part reaches to the end of the text.
    """

    name: str
    size: int
    split: str | None = None
    begin: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Chunk:
    """A part of a file, the unit of work of a worker process: whole documents, or a part of a very long document.

    file: the file from which the chunk was cut;
    format: "text" (one document, or a part of it), "separated" (documents with separators), "jsonl", "parquet" (a row
        group), "arrow" (rows already read), or "tokens" (uint16, end-of-text before each document);
    first: number of the chunk's first line, document or row, for error messages, counted from 1 at byte `file.begin`;
        always 1 if `offset` is set;
    source_bytes: how many bytes of the file the chunk covers, for the progress display;
    data: the content of the chunk, if `offset` is None and the format is not "parquet";
    continues: whether the chunk begins inside a document that began in an earlier chunk;
    split_key: the first bytes of the document, which decide its split, if the chunk is only a part of a document;
        otherwise None;
    offset: byte position in the file from which the worker reads `text_bytes` bytes; None if `data` or `row_group`
        gives the content;
    row_group: for "parquet", the index of the row group;
    text_bytes: how many bytes of text the worker has to read; for a row group, an estimate;
    position: (index of the file in the source, index of the chunk in the file).
    """

    file: SourceFile
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
    def whole(self) -> bool:
        """Whether the documents of the chunk are whole, neither cut into chunks nor divided between the splits."""
        return self.split_key is None and self.file.begin == 0 and self.file.end is None

    @property
    def size(self) -> int:
        """The number of bytes of text; for a row group, an estimate."""
        return len(self.data) + self.text_bytes

    def read(self) -> bytes:
        """Return the content of a chunk that is not a row group. Raises ValueError when the file has become shorter."""
        if self.offset is None:
            return self.data
        with open(self.file.name, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.text_bytes)
        if len(data) < self.text_bytes:
            raise ValueError(f"{self.file.name} has become shorter while it was read: start again with another --out")
        return data


@dataclass(frozen=True)
class ParseOptions:
    """How chunks become documents.

    text_key: JSON key or table column that holds the text;
    separator: the text between the documents of a text file; None if each file is one document;
    strict: raise an error for an empty document or invalid UTF-8. If False, skip the document or replace invalid bytes;
    filters: conditions that a document has to meet to be kept.
    """

    text_key: str = "text"
    separator: str | None = None
    strict: bool = False
    filters: Filters = field(default_factory=Filters)


@dataclass(frozen=True)
class Source:
    """A corpus.

    name, revision, filter: the values of `source`, `revision` and `filter` in `meta.json`;
    files: its files, in the order of the dataset;
    read: `read(file, limit)` iterates over the chunks of a file, each of about `limit` bytes;
    options: how the chunks become documents.
    """

    name: str
    revision: str
    files: tuple[SourceFile, ...]
    read: Callable[[SourceFile, int], Iterator[Chunk]]
    filter: str = ""
    options: ParseOptions = ParseOptions()
