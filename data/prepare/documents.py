"""Turn a chunk (a part of a source file) into documents. This code runs in the worker processes, if there are any."""

from __future__ import annotations

import functools
import mmap
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow

from data.plain_text import line_feeds, refuse_nul, separator_pattern
from data.prepare.source import Chunk, ParseOptions
from data.prepare.text import named_errors, open_file, open_parquet, text_blocks
from data.tables import parse_json_object

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Documents:
    """Documents as valid UTF-8, and counts for the report.

    texts: the documents;
    numbers: for each document, the number of its line or row, or of the document itself (see `raw_documents`);
    empty: the number of empty documents, which were skipped;
    invalid_utf8: the number of documents in which invalid UTF-8 was replaced;
    carriage_returns: the number of line ends of text files that were \\r\\n or \\r and became \\n;
    separators: how often the separator between documents was found;
    filtered: for each reason, the number of documents that the filters rejected.
    """

    texts: list[bytes] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    empty: int = 0
    invalid_utf8: int = 0
    carriage_returns: int = 0
    separators: int = 0
    filtered: dict[str, int] = field(default_factory=dict)


def parse(chunk: Chunk, options: ParseOptions, documents: Documents) -> Documents:
    """Add the documents of `chunk`, and their counts, to `documents`, and return `documents`.

    Raises ValueError naming the file and the line or row when a document cannot be used.
    """
    filtering = options.filters.by_text
    for number, raw in raw_documents(chunk, options, documents):
        if not raw:
            if options.strict and not chunk.continues:
                raise ValueError(
                    f"{place(chunk, options, number)}: the document is empty; remove it, or omit --strict to skip it"
                )
            documents.empty += not chunk.continues
            continue
        try:
            if isinstance(raw, str):
                text = raw.encode()
            else:
                raw.decode()
                text = raw
        except UnicodeError as error:
            if options.strict:
                where = place(chunk, options, number, raw, error.start)  # type: ignore[attr-defined]
                raise ValueError(
                    f"{where}: invalid UTF-8; repair it, or omit --strict to replace it with U+FFFD"
                ) from None
            documents.invalid_utf8 += 1
            plain = _SURROGATE.sub("\ufffd", raw) if isinstance(raw, str) else raw.decode(errors="replace")
            text = plain.encode()
        # Do not filter a part of a document: other parts of the document may be in the dataset already.
        if filtering and chunk.whole and (reason := options.filters.reject(text)):
            documents.filtered[reason] = documents.filtered.get(reason, 0) + 1
            continue
        documents.texts.append(text)
        documents.numbers.append(number)
    return documents


def place(chunk: Chunk, options: ParseOptions, number: int, raw: bytes | str = b"", offset: int = 0) -> str:
    """Return the place of an error, for messages: the file, and the number of the line, document or row.

    `number` is the one that `raw_documents` yields with the document. `offset` is the position of the error in the
    document `raw`. For a text file without `raw`, the result is only the file.
    """
    if chunk.format == "text":
        if not raw:
            return chunk.file.name
        number += bytes(raw[:offset]).count(b"\n") if isinstance(raw, bytes) else 0
    if chunk.offset is None and chunk.file.begin:
        # `number` counts lines from `begin` on, but messages count them from the beginning of the file.
        with open_file(chunk.file.name) as opened:
            skipped = text_blocks(replace(chunk.file, begin=0, end=chunk.file.begin), opened)
            number += sum(block.count(b"\n") for block in skipped)
    if chunk.offset:
        # Count the lines or documents before the chunk only here, for the message, because counting is slow.
        separated = chunk.format == "separated" and options.separator
        mark = separator_pattern(options.separator or "") if separated else re.compile(rb"\n|\r(?!\n)")
        with open(chunk.file.name, "rb") as file:
            number += sum(
                1 for _ in mark.finditer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), 0, chunk.offset)
            )
    unit = {"text": "line", "jsonl": "line", "separated": "document"}.get(chunk.format, "row")
    return f"{chunk.file.name}, {unit} {number}"


def raw_documents(
    chunk: Chunk, options: ParseOptions, documents: Documents
) -> Iterable[tuple[int, bytes | str | None]]:
    """Yield (number, text) for each document. The text may be empty or None, and may be invalid UTF-8.

    The number, for error messages, is that of the document's line, of its row (tables), or of the document itself
    (files with separators).
    """
    if chunk.format in ("text", "separated"):
        text = chunk.read()
        refuse_nul(text, chunk.file.name)
        text, changed = line_feeds(text)
        documents.carriage_returns += changed
        if chunk.format == "text":
            return [(chunk.first, text)]
        separator = line_feeds((options.separator or "").encode())[0]
        texts = [text.strip(b"\n") for text in text.split(separator)]
        documents.separators += len(texts) - 1
        # A chunk ends after a separator, so the last of `texts` is empty, except at the end of the file.
        return enumerate(texts if texts[-1] else texts[:-1], chunk.first)
    if chunk.format == "jsonl":
        return _json_lines(chunk, options)
    return enumerate(_rows(chunk, options.text_key), chunk.first)


@functools.lru_cache(maxsize=1)
def _open_parquet(name: str) -> Any:
    """Open a parquet file, or return it if it is still open: consecutive chunks are often row groups of one file."""
    return open_parquet(open_file(name), name)


def _rows(chunk: Chunk, text_key: str) -> Iterator[bytes]:
    if chunk.format == "arrow":
        table = pyarrow.ipc.open_stream(chunk.data).read_all()
    else:
        with named_errors(chunk.file.name):
            try:
                table = _open_parquet(chunk.file.name).read_row_group(chunk.row_group, columns=[text_key])
            except (pyarrow.ArrowException, OSError) as error:
                where = f"{chunk.file.name}, from row {chunk.first}"
                raise ValueError(f"{where}: cannot be read ({error}); download the file again") from error
    column = table.column(0)
    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return (value.as_py() or b"" for value in column.cast(pyarrow.large_binary()))


def _json_lines(chunk: Chunk, options: ParseOptions) -> Iterator[tuple[int, str | None]]:
    text_key = options.text_key
    for number, line in enumerate(chunk.read().split(b"\n"), chunk.first):
        if not line.strip():
            continue
        try:
            # Invalid UTF-8 becomes lone surrogates, which `parse` replaces or refuses.
            row = parse_json_object(line.decode(errors="surrogateescape"), "")
        except ValueError as error:
            raise ValueError(f"{place(chunk, options, number)}{error}") from None
        text = row.get(text_key, "")
        if text_key not in row:
            where = place(chunk, options, number)
            raise ValueError(f"{where}: no key {text_key!r}, only {', '.join(row)}; choose one with --text-key")
        if not isinstance(text, str | None):
            where, found = place(chunk, options, number), type(text).__name__
            raise ValueError(f"{where}: {text_key!r} is of type {found}, expected str; choose another --text-key")
        yield number, text
