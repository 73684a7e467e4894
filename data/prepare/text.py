"""Text files cut into chunks: .txt, .jsonl and .parquet, each plain, .gz or .zst, on this machine or on the hub.

`data.prepare.documents` turns the chunks into documents, in the worker processes.
"""

from __future__ import annotations

import functools
import glob
import gzip
import hashlib
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import huggingface_hub
import pyarrow
import pyarrow.parquet
import zstandard

from data.prepare.source import Chunk, ParseOptions, Source, SourceFile

FORMATS = {".txt": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
COMPRESSIONS = ("", ".gz", ".zst")
BLOCK_BYTES = 1 << 20  # read at once
# A hash of the first SPLIT_KEY_BYTES of a document decides its split, so a long document is never in memory as a whole.
SPLIT_KEY_BYTES = 1 << 12
# The place where a chunk may end is searched backward in steps of this size.
SEARCH_BYTES = 1 << 16
# The main process reads a row group with more text than this itself and cuts it into several chunks.
ROW_GROUP_BYTES = 1 << 26
# A document may be cut before a newline that is followed by something other than white space, because a token begins
# there with every tokenizer: GPT-2's rule separates the last white space before a word from the white space before it.
# In UTF-8, white space begins with a byte below "!", or with C2, E1, E2 or E3.
_SAFE_CUT = re.compile(rb"(?<=.)\n(?=[!-~\xc3-\xdf\xe4-\xf4])", re.DOTALL)


def text_source(patterns: list[str], options: ParseOptions) -> Source:
    """Return the files that `patterns` (files, directories, globs) match, in that order; those of one pattern sorted.

    Raises FileNotFoundError when a pattern matches nothing, ValueError for a file of an unknown type.
    """
    paths = dict.fromkeys(path for pattern in patterns for path in _expand(pattern))
    files = tuple(SourceFile(str(path), path.stat().st_size) for path in paths)
    described = f"{len(files)} file{'s' if len(files) > 1 else ''}: {Path(files[0].name).name}"
    return Source(
        f"text, {described}",
        listing_sha256(files),
        files,
        functools.partial(read_chunks, options=options),
        text_filter(options),
        options,
    )


def listing_sha256(files: Iterable[SourceFile]) -> str:
    """Return a revision for files that have none of their own: it changes when a name or a size changes."""
    listing = "".join(f"{Path(file.name).name} {file.size}\n" for file in files)
    return f"names and sizes of the files, sha256 {hashlib.sha256(listing.encode()).hexdigest()}"


def text_filter(options: ParseOptions) -> str:
    """Return the options as the text that `meta.json` has under `filter`."""
    chosen = [f"text under {options.text_key!r}"] if options.text_key != "text" else []
    chosen += [f"documents separated by {options.separator!r}"] if options.separator else []
    return "; ".join([*chosen, "strict"] if options.strict else chosen)


def _expand(pattern: str) -> list[Path]:
    """Return the files that one pattern matches, sorted."""
    path = Path(pattern)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and file_format(p.name))
        kinds = ", ".join(suffix + compression for compression in COMPRESSIONS for suffix in FORMATS)
        if not found:
            raise FileNotFoundError(f"no text in {pattern}: expected files named {kinds}")
        return found
    found = (
        [path] if path.is_file() else sorted(Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
    )
    if not found:
        raise FileNotFoundError(f"no such file, directory or pattern: {pattern}")
    for file in found:
        if not file_format(file.name):
            raise ValueError(f"{file} has an unknown type: expected .txt, .jsonl or .parquet, plain, .gz or .zst")
    return found


def file_format(name: str) -> str | None:
    """Return "text", "jsonl" or "parquet" from the name of a file, None for any other type."""
    for compression in COMPRESSIONS[1:]:
        name = name.removesuffix(compression)
    return FORMATS.get(Path(name).suffix)


def read_chunks(file: SourceFile, limit: int, options: ParseOptions) -> Iterator[Chunk]:
    """Cut one file into chunks of about `limit` bytes.

    Raises ValueError naming the file when it is damaged or lacks the text column, OSError when it cannot be read.
    """
    format = file_format(file.name) or ""
    mark = b"\n" if format == "jsonl" else b""
    if format == "text" and options.separator:
        format, mark = "separated", options.separator.encode()
    with named_errors(file.name), open_file(file.name) as raw:
        if format == "parquet":
            yield from _parquet_chunks(file, raw, limit, options.text_key)
        elif file.name.startswith("hf://") or file.name.endswith(COMPRESSIONS[1:]):
            yield from _cut_stream(file, raw, format, limit, mark)
        else:
            yield from _cut_file(file, raw, format, limit, mark)


@contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Add the name of the file to the errors of decompressors and the hub, which do not mention it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{name} is not a complete gzip file ({error}): download or compress it again") from error
    except zstandard.ZstdError as error:
        raise ValueError(f"{name} is not a complete zstd file ({error}): download or compress it again") from error
    except Exception as error:
        if isinstance(error, ValueError | MemoryError) or not name.startswith("hf://"):
            raise
        raise OSError(
            f"{name} could not be read from the hub ({error}): run the same command again to continue"
        ) from error


def open_file(name: str) -> Any:
    """Open a local path or an hf:// address for reading bytes."""
    if name.startswith("hf://"):
        return huggingface_hub.HfFileSystem().open(name, "rb")
    return open(name, "rb")


def _blocks(raw: BinaryIO, name: str) -> Iterator[bytes]:
    """Iterate over the decompressed content of a file."""
    if name.endswith(".zst"):
        yield from _zstd_blocks(raw)
        return
    stream = gzip.GzipFile(fileobj=raw) if name.endswith(".gz") else raw
    while block := stream.read(BLOCK_BYTES):
        yield block


def _zstd_blocks(raw: BinaryIO) -> Iterator[bytes]:
    # The stream reader of zstandard does not notice when a file ends inside a frame.
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)  # what `zstd --long=31` needs; the default is 2^27
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


def _cut_file(file: SourceFile, raw: BinaryIO, format: str, limit: int, mark: bytes) -> Iterator[Chunk]:
    """Cut a plain file. The workers read the content; this process reads only the places where a chunk may end."""

    def read(begin: int, end: int) -> bytes:
        raw.seek(begin)
        return raw.read(end - begin)

    begin, searched, end = 0, 0, limit
    # Without a mark the file is one document, and every chunk after the first continues it. `key` is its first bytes.
    key: bytes | None = None
    while end < file.size:
        cut = _last_cut(read, searched, end, mark)
        if cut:
            continues, key = key is not None, key or (None if mark else read(0, SPLIT_KEY_BYTES))
            yield Chunk(file, format, 1, cut - begin, b"", continues, key, begin, text_bytes=cut - begin)
            begin = searched = cut
            end = cut + limit
        else:
            # No place to cut: make the chunk longer. Search the last bytes again, a mark may lie across the border.
            searched, end = end - max(len(mark), 2), end + limit
    rest = file.size - begin
    yield Chunk(file, format, 1, rest, b"", key is not None, key, begin, text_bytes=rest)


def _cut_stream(file: SourceFile, raw: BinaryIO, format: str, limit: int, mark: bytes) -> Iterator[Chunk]:
    """Cut a file that can only be read from beginning to end, because it is compressed or on the hub."""
    buffer = bytearray()

    def read(begin: int, end: int) -> bytearray:
        return buffer[begin:end]

    key: bytes | None = None  # as in `_cut_file`
    first, done, searched = 1, 0, 0
    for block in _blocks(raw, file.name):
        buffer += block
        if len(buffer) < limit:
            continue
        cut = _last_cut(read, searched, len(buffer), mark)
        searched = max(0, len(buffer) - max(len(mark), 2))
        if cut:
            data, position = bytes(memoryview(buffer)[:cut]), raw.tell()
            continues, key = key is not None, key or (None if mark else bytes(buffer[:SPLIT_KEY_BYTES]))
            yield Chunk(file, format, first, position - done, data, continues, key)
            del buffer[:cut]
            first, done, searched = first + data.count(mark or b"\n"), position, 0
    yield Chunk(file, format, first, file.size - done, bytes(buffer), key is not None, key)


def _last_cut(read: Callable[[int, int], bytes | bytearray], start: int, end: int, mark: bytes) -> int:
    """Return the last place in start..end where a chunk may end, 0 when there is none.

    That is after `mark`, or, when `mark` is empty, where a document may be cut without changing its tokens.
    """
    pattern = re.compile(b"(?<=%b)" % re.escape(mark)) if mark else _SAFE_CUT
    while True:
        begin = max(start, end - SEARCH_BYTES - len(mark))
        cuts = [match.start() for match in pattern.finditer(read(begin, end))]
        if cuts and cuts[-1]:
            return begin + cuts[-1]
        if begin == start:
            return 0
        # Search the first bytes again, a mark may lie across the border.
        end = begin + max(len(mark), 2)


def safe_cut(text: bytes, start: int) -> int:
    """Return the first place from `start` on where `text` may be cut without changing its tokens, else its end."""
    found = _SAFE_CUT.search(text, start)
    return found.start() if found else len(text)


def _parquet_chunks(file: SourceFile, raw: Any, limit: int, text_key: str) -> Iterator[Chunk]:
    if not file.name.endswith(".parquet"):
        # The index of a parquet file is at its end, so a compressed one has to be decompressed first. Workers cannot
        # open the temporary file, so this process reads all row groups.
        with tempfile.TemporaryFile() as unpacked:
            for block in _blocks(raw, file.name):
                unpacked.write(block)
            yield from _row_groups(file, unpacked, limit, text_key, read_here_above=0)
    else:
        yield from _row_groups(file, raw, limit, text_key, read_here_above=ROW_GROUP_BYTES)


def _row_groups(file: SourceFile, raw: Any, limit: int, text_key: str, read_here_above: int) -> Iterator[Chunk]:
    """One chunk per row group, which a worker reads; several for a row group of more than `read_here_above` bytes."""
    parquet = open_parquet(raw, file.name)
    schema = parquet.schema_arrow
    if text_key not in schema.names:
        found = ", ".join(schema.names)
        raise ValueError(f"{file.name} has no column {text_key!r}, only {found}: choose one with --text-key")
    kind = str(schema.field(text_key).type)
    if kind not in ("string", "large_string", "string_view", "binary", "large_binary", "binary_view"):
        raise ValueError(f"{file.name}: column {text_key!r} is {kind}, expected string: choose another with --text-key")
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
