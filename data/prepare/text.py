"""Cut text files (.txt, .jsonl, .csv, .parquet, .arrow; each plain, .gz or .zst; local or remote) into chunks.

A chunk is a part of a file. Later, worker processes turn the chunks into documents with `data.prepare.documents`.
"""

from __future__ import annotations

import functools
import gzip
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet
import zstandard

from data.plain_text import HEAD_BYTES, detect_encoding, refuse_nul, separator_pattern, utf8_blocks
from data.prepare.files import (
    compression,
    display_name,
    file_format,
    file_system,
    files_revision,
    find_files,
    find_remote_files,
    is_remote,
)
from data.prepare.source import Chunk, ParseOptions, Source, SourceFile
from data.tables import parse_csv
from data.tokenizer_files import END_OF_TEXT

BLOCK_BYTES = 1 << 20  # bytes read at once
FILES_EXAMINED = 100  # `unused_separators` examines at most this many files
# A hash of the first SPLIT_KEY_BYTES of a document decides its split (train or val). So a long document never has to be
# in memory as a whole.
SPLIT_KEY_BYTES = 1 << 12
# `_last_cut` reads backward, in steps of this many bytes, until it finds a place where a chunk may end.
SEARCH_BYTES = 1 << 16
# If a row group of a parquet file has more bytes of text than this, the main process cuts it into several chunks.
ROW_GROUP_BYTES = 1 << 26
# A text file without a separator is one document. If it has at most this many bytes, it is one chunk, so that filters
# and --val-tokens see the whole document. A longer one is cut at a safe cut (defined below) or, if this many bytes
# contain none, at a place that is not safe, which bounds the memory.
LONGEST_PIECE = 1 << 22
# A safe cut is a place where a document can be divided without changing its tokens. The place before a newline or space
# is a safe cut if the character after the newline or space is not white space. Each of our tokenizers begins a token
# there. _NO_SPACE matches the beginning of a UTF-8 character that is not white space. All ASCII white space is below
# "!". In UTF-8, other white space begins with C2, E1, E2 or E3, and is among U+0085, U+00A0, U+1680, U+180E (in old
# versions of Unicode), U+2000-200F, U+2028-202F, U+205F and U+3000.
_NO_SPACE = (
    rb"(?:[!-~\xc3-\xe0\xe4-\xf4]|\xc2[\xa1-\xbf]|\xe1(?!\x9a\x80|\xa0\x8e)..|"
    rb"\xe2(?!\x80[\x80-\x8f\xa8-\xaf]|\x81\x9f)..|\xe3(?!\x80\x80)..)"
)
_SAFE_CUT = re.compile(rb"(?<=.)[\n ](?=" + _NO_SPACE + rb")", re.DOTALL)
# Safe cuts in the bytes of a file, where a line may also end in \r\n or \r. No cut is between \r and \n.
_FILE_CUT = re.compile(rb"(?:(?<=[^\r])\n|(?<=.)(?:\r\n?| ))(?=" + _NO_SPACE + rb")", re.DOTALL)
# Safe cuts for text without white space: between an ASCII letter and a digit, between a letter or digit and the ASCII
# punctuation after it, and between an ideograph and the Chinese punctuation after it. A token ends at these places. The
# place before an apostrophe is not used, because GPT-2's pattern has special cases for apostrophes.
_WORD_CUT = re.compile(
    rb"(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])|(?<=[A-Za-z0-9])(?=[!-&(-/:-@\[-`{-~])"
    rb"|(?<=[\xe5-\xe8][\x80-\xbf][\x80-\xbf])(?=\xe3\x80[\x81\x82]|\xef\xbc[\x81\x8c])"
)
# The types that the column with the text may have. A column of type "null" has no value in any row.
_TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
# Whether a place is a safe cut depends on at most this many bytes around the place.
_CUT_CONTEXT = 8


def text_source(patterns: list[str], options: ParseOptions) -> Source:
    """Return a source of the files that `patterns` (files, directories, globs) match.

    The order of the files is that of the patterns; the files of one pattern are sorted. Raises FileNotFoundError when a
    pattern matches nothing, ValueError for a file of an unknown type.
    """
    sizes: dict[str, int] = {}
    for pattern in patterns:
        if is_remote(pattern):
            sizes |= find_remote_files(pattern)
        else:
            sizes |= {str(path): path.stat().st_size for path in find_files(pattern)}
    files = tuple(SourceFile(name, size) for name, size in sizes.items())
    described = f"{len(files)} file{'s' if len(files) > 1 else ''}: {display_name(Path(files[0].name).name)}"
    read = functools.partial(read_chunks, options=options)
    return Source(f"text, {described}", files_revision(sizes), files, read, text_filter(options), options)


def unused_separators(source: Source) -> list[str]:
    """Return the names of text files that contain <|endoftext|>, which may be meant as a separator of documents.

    If a separator is given, returns an empty list. Examines only the beginnings of the first FILES_EXAMINED files.
    """
    found = []
    for file in source.files[:FILES_EXAMINED] if not source.options.separator else ():
        if file_format(file.name) == "text":
            with named_errors(file.name), open_file(file.name) as raw:
                if END_OF_TEXT.encode() in next(text_blocks(file, raw), b""):
                    found.append(file.name)
    return found


def text_filter(options: ParseOptions) -> str:
    """Describe the options that change the documents. This text is a part of `filter` in `meta.json`."""
    chosen = [f"text under {options.text_key!r}"] if options.text_key != "text" else []
    chosen += [f"documents separated by {options.separator!r}"] if options.separator else []
    return "; ".join([*chosen, "strict"] if options.strict else chosen)


def read_chunks(file: SourceFile, limit: int, options: ParseOptions) -> Iterator[Chunk]:
    """Cut one file into chunks of about `limit` bytes, or of about LONGEST_PIECE bytes if the file is one document.

    Raises ValueError naming the file when it is damaged or lacks the text column, OSError when it cannot be read.
    """
    format = file_format(file.name) or ""
    marks = re.compile(b"\n") if format == "jsonl" else None
    if format == "text" and options.separator:
        format, marks = "separated", separator_pattern(options.separator)
    elif format == "text":
        limit = LONGEST_PIECE
    with named_errors(file.name), open_file(file.name) as raw:
        if format == "parquet":
            yield from _parquet_chunks(file, raw, limit, options.text_key)
            return
        if format == "arrow":
            yield from _arrow_chunks(file, raw, limit, options.text_key)
            return
        if format == "csv":
            yield from _csv_chunks(file, raw, limit, options.text_key)
            return
        if not is_remote(file.name) and not compression(file.name):
            encoding, begin = detect_encoding(raw.read(HEAD_BYTES), file.name)
            if encoding == "utf-8":
                yield from _cut_file(file, raw, format, limit, marks, begin)
                return
            raw.seek(0)
        yield from _cut_stream(file, raw, format, limit, marks)


def text_blocks(file: SourceFile, raw: BinaryIO) -> Iterator[bytes]:
    """Decompress a text file, convert it to UTF-8, and iterate over its bytes from `file.begin` to `file.end`."""
    position = 0
    for block in utf8_blocks(_blocks(raw, file.name), file.name):
        begin = max(file.begin - position, 0)
        end = len(block) if file.end is None else max(file.end - position, 0)
        position += len(block)
        if part := block[begin:end]:
            yield part


@contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Replace an error of a decompressor or of remote storage with a ValueError or OSError that names the file."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{name} is not a complete gzip file ({error}): download or compress it again") from error
    except zstandard.ZstdError as error:
        raise ValueError(f"{name} is not a complete zstd file ({error}): download or compress it again") from error
    except Exception as error:
        if isinstance(error, ValueError | MemoryError) or not is_remote(name):
            raise
        place = " from the hub" if name.startswith("hf://") else ""
        raise OSError(f"{name} could not be read{place} ({error}): run the same command again to continue") from error


def open_file(name: str) -> Any:
    """Open a local path, or an address such as hf:// or s3://, for reading bytes."""
    return file_system(name).open(name, "rb") if is_remote(name) else open(name, "rb")


def _blocks(raw: BinaryIO, name: str) -> Iterator[bytes]:
    """Iterate over the decompressed content of a file."""
    if compression(name) == ".zst":
        yield from _zstd_blocks(raw)
        return
    stream = gzip.GzipFile(fileobj=raw) if compression(name) == ".gz" else raw
    while block := stream.read(BLOCK_BYTES):
        yield block


def _zstd_blocks(raw: BinaryIO) -> Iterator[bytes]:
    # The stream reader of zstandard does not notice when a file ends inside a frame. So decompress frame by frame here.
    # The default of max_window_size, 2^27, is too small for files that were made with `zstd --long=31`.
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = decompressor.decompressobj()
    complete = True
    while chunk := raw.read(BLOCK_BYTES // 4):
        while chunk:
            if frame.eof:
                frame = decompressor.decompressobj()
            yield frame.decompress(chunk)
            chunk, complete = frame.unused_data, frame.eof
    if not complete:
        raise zstandard.ZstdError("it ends inside a frame")


def _cut_file(
    file: SourceFile, raw: BinaryIO, format: str, limit: int, marks: re.Pattern[bytes] | None, start: int
) -> Iterator[Chunk]:
    """Cut a plain UTF-8 file, whose text begins at byte `start`, after any byte-order mark.

    The workers read the content. This process reads only the bytes that decide the cuts and the document's split.
    """

    def read(begin: int, end: int) -> bytes:
        raw.seek(begin)
        return raw.read(end - begin)

    stop = file.size if file.end is None else start + file.end
    begin = searched = start + file.begin
    end = begin + limit
    # `marks` is the pattern of the separators or newlines. If it is None, the file is one document, and `key`, the
    # beginning of this document, decides its split.
    key: bytes | None = None
    while end < stop:
        cut = _last_cut(read, searched, end, marks)
        if not cut and not marks:
            cut = _forced_cut(read, begin, end)
        if cut:
            continues, key = key is not None, key or (None if marks else read(begin, begin + SPLIT_KEY_BYTES))
            yield Chunk(file, format, 1, cut - begin, b"", continues, key, begin, text_bytes=cut - begin)
            begin = searched = cut
            end = cut + limit
        else:
            # There is no place to cut, so make the chunk longer, and search its last bytes again (see `_context`).
            searched, end = max(begin, end - _context(marks)), end + limit
    rest = max(stop - begin, 0)
    yield Chunk(file, format, 1, rest, b"", key is not None, key, begin, text_bytes=rest)


def _cut_stream(
    file: SourceFile, raw: BinaryIO, format: str, limit: int, marks: re.Pattern[bytes] | None
) -> Iterator[Chunk]:
    """Cut a file that can only be read from beginning to end: it is compressed, remote, or in UTF-16 or UTF-32."""
    buffer = bytearray()

    def read(begin: int, end: int) -> bytearray:
        return buffer[begin:end]

    key: bytes | None = None  # as in `_cut_file`
    first, done, searched = 1, 0, 0
    for block in text_blocks(file, raw):
        buffer += block
        if len(buffer) < limit:
            continue
        cut = _last_cut(read, searched, len(buffer), marks)
        if not cut and not marks:
            cut = _forced_cut(read, 0, len(buffer))
        if cut:
            data, position = bytes(memoryview(buffer)[:cut]), min(raw.tell(), file.size)
            continues, key = key is not None, key or (None if marks else bytes(buffer[:SPLIT_KEY_BYTES]))
            yield Chunk(file, format, first, position - done, data, continues, key)
            del buffer[:cut]
            first += sum(1 for _ in marks.finditer(data)) if marks else data.count(b"\n")
            done, searched = position, 0
        else:
            searched = max(0, len(buffer) - _context(marks))
    yield Chunk(file, format, first, file.size - done, bytes(buffer), key is not None, key)


def _context(marks: re.Pattern[bytes] | None) -> int:
    """Return by how many bytes consecutive searches overlap, so that a match across their border is found."""
    return len(marks.pattern) if marks else _CUT_CONTEXT


def _last_cut(
    read: Callable[[int, int], bytes | bytearray], start: int, end: int, marks: re.Pattern[bytes] | None
) -> int:
    """Return the last place in start..end where a chunk may end, or 0 if there is none.

    With `marks`, a chunk may end after a match of this pattern (see `_last_mark`); no match reaches across `start`.
    Without marks, a chunk may end at a safe cut.
    """
    if marks:
        # Usually the last bytes are enough.
        for begin in (max(start, end - SEARCH_BYTES), start):
            if cut := _last_mark(read(begin, end), marks, _context(marks) if begin > start else 0):
                return begin + cut
        return 0
    while True:
        begin = max(start, end - SEARCH_BYTES - _CUT_CONTEXT)
        cut = _last_safe_cut(read(begin, end))
        if cut:
            return begin + cut
        if begin == start:
            return 0
        # Search the first bytes of this block again: a match that begins before the block may end in them.
        end = begin + _CUT_CONTEXT


def _last_mark(text: bytes | bytearray, marks: re.Pattern[bytes], first: int) -> int:
    r"""Return the end of the last mark in `text` at which `bytes.split` cuts the whole file, or 0 if none is certain.

    `text` is a block of the file. `split` goes from left to right, and no two of its matches overlap: in three
    newlines, the mark "\n\n" matches once. So a match is certain only if no possible match before it overlaps it. The
    search begins at a certain match. Matches that begin before `first` are ignored, because a match that begins before
    `text` may overlap them.
    """
    end = first
    for match in re.finditer(b"(?=(%b))" % marks.pattern, text):  # the lookahead also finds matches that overlap
        if match.start() >= end:
            return max(found.end() for found in marks.finditer(text, match.start()))
        end = max(end, match.end(1))
    return 0


def _last_safe_cut(text: bytes | bytearray) -> int:
    """Return the last safe cut in `text`, or 0 if there is none. A _WORD_CUT is used only if there is no _FILE_CUT."""
    for pattern in (_FILE_CUT, _WORD_CUT):
        if cut := max((match.start() for match in pattern.finditer(text)), default=0):
            return cut
    return 0


def _forced_cut(read: Callable[[int, int], bytes | bytearray], begin: int, end: int) -> int:
    """Return the last border between two characters in begin..end. A document without a safe cut is cut there."""
    last = read(end - 4, end)
    for i in reversed(range(4)):
        # Do not cut before a continuation byte (10xxxxxx), or before \n, which may be the second byte of \r\n.
        if last[i] & 0xC0 != 0x80 and last[i] != ord("\n"):
            return end - 4 + i
    return end  # the byte before `end` is \n, or the text is invalid UTF-8


def safe_cut(text: bytes, start: int) -> int:
    """Return the first place from `start` on where a cut does not change the tokens, or len(text) if there is none."""
    found = _SAFE_CUT.search(text, start)
    return found.start() if found else len(text)


def _csv_chunks(file: SourceFile, raw: BinaryIO, limit: int, text_key: str) -> Iterator[Chunk]:
    """Cut a CSV file. This process reads it, because only a reader of the whole file knows where its rows end."""

    def lines() -> Iterator[str]:
        rest = b""
        for block in text_blocks(file, raw):
            refuse_nul(block, file.name)
            *whole, rest = (rest + block).split(b"\n")
            yield from ((line + b"\n").decode(errors="surrogateescape") for line in whole)
        yield rest.decode(errors="surrogateescape")

    rows = parse_csv(lines(), file.name)
    column = _find_column(next(rows, []), file.name, text_key)
    texts: list[bytes] = []
    first, size, done = 1, 0, 0

    def chunk(position: int) -> Chunk:
        batch = pyarrow.record_batch({text_key: pyarrow.array(texts, pyarrow.large_binary())})
        return Chunk(file, "arrow", first, position - done, _arrow_stream(batch))

    for row in rows:
        texts.append(row[column].encode(errors="surrogateescape"))
        size += len(texts[-1])
        if size >= limit:
            yield chunk(position := min(raw.tell(), file.size))
            first, size, done, texts = first + len(texts), 0, position, []
    yield chunk(file.size)


def _find_column(names: list[str], file: str, text_key: str) -> int:
    """Return the index of the column `text_key`. Raises ValueError when no column, or more than one, has this name."""
    if text_key not in names:
        found = ", ".join(names) or "an empty header"
        raise ValueError(f"{file} has no column {text_key!r}, only {found}: choose one with --text-key")
    if names.count(text_key) > 1:
        raise ValueError(f"{file} has {names.count(text_key)} columns named {text_key!r}: rename all but one")
    return names.index(text_key)


def _parquet_chunks(file: SourceFile, raw: Any, limit: int, text_key: str) -> Iterator[Chunk]:
    if compression(file.name):
        # The index of a parquet file is at its end, so a compressed file has to be decompressed first. Workers cannot
        # open the temporary file, so this process reads all row groups.
        with tempfile.TemporaryFile() as unpacked:
            for block in _blocks(raw, file.name):
                unpacked.write(block)
            yield from _row_groups(file, unpacked, limit, text_key, read_here_above=0)
    else:
        yield from _row_groups(file, raw, limit, text_key, read_here_above=ROW_GROUP_BYTES)


def _arrow_chunks(file: SourceFile, raw: Any, limit: int, text_key: str) -> Iterator[Chunk]:
    """Cut a file in Arrow's stream format, which `save_to_disk` of the library `datasets` writes."""
    stream = raw if not compression(file.name) else pyarrow.BufferReader(b"".join(_blocks(raw, file.name)))
    try:
        reader = pyarrow.ipc.open_stream(stream)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file.name} is not a file in Arrow's stream format ({error}): save it again") from error
    _check_text_column(reader.schema, file.name, text_key)
    first, done = 1, 0
    for batch in reader:
        batch = batch.select([text_key])
        rows = max(1, batch.num_rows * limit // max(batch.nbytes, 1))
        for start in range(0, batch.num_rows, rows):
            part = batch.slice(start, rows)
            position = min(raw.tell(), file.size)
            yield Chunk(file, "arrow", first, position - done, _arrow_stream(part))
            first, done = first + part.num_rows, position


def _check_text_column(schema: Any, name: str, text_key: str) -> None:
    """Raise ValueError unless the file has exactly one column named `text_key`, and this column holds text."""
    column = schema.field(_find_column(schema.names, name, text_key)).type
    kind = str(column.value_type if pyarrow.types.is_dictionary(column) else column)
    if kind not in _TEXT_TYPES:
        raise ValueError(f"{name}: column {text_key!r} is {kind}, expected string: choose another with --text-key")


def _row_groups(file: SourceFile, raw: Any, limit: int, text_key: str, read_here_above: int) -> Iterator[Chunk]:
    """Yield one chunk for each row group, without its content, which a worker reads later.

    A row group with more than `read_here_above` bytes of text is read in this process and gives several chunks.
    """
    parquet = open_parquet(raw, file.name)
    _check_text_column(parquet.schema_arrow, file.name, text_key)
    first = 1
    for i in range(parquet.num_row_groups):
        group = parquet.metadata.row_group(i)
        columns = [group.column(j) for j in range(group.num_columns)]
        stored = sum(column.total_compressed_size for column in columns)
        text = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_key)
        if text <= read_here_above:
            yield Chunk(file, "parquet", first, stored, row_group=i, text_bytes=text)
            first += group.num_rows
            continue
        rows = max(1, group.num_rows * limit // text)
        for batch in parquet.iter_batches(batch_size=rows, row_groups=[i], columns=[text_key]):
            source_bytes = stored * batch.num_rows // group.num_rows
            yield Chunk(file, "arrow", first, source_bytes, _arrow_stream(batch))
            first += batch.num_rows


def _arrow_stream(batch: Any) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def open_parquet(raw: Any, name: str) -> Any:
    """Open a file as a `pyarrow.parquet.ParquetFile`. Raises ValueError when it is not one."""
    try:
        return pyarrow.parquet.ParquetFile(raw)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{name} is not a complete parquet file ({error}): download it again") from error
