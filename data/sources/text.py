"""Text files: .txt, .jsonl and .parquet, each plain, .gz or .zst, on this machine or on the hub."""

from __future__ import annotations

import functools
import glob
import gzip
import hashlib
import json
import mmap
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from data.sources import File, Options, Piece, Source

FORMATS = {".txt": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
COMPRESSIONS = ("", ".gz", ".zst")
BLOCK_BYTES = 1 << 20
# The split of a document depends on this much of it, so that a long one need not be held whole.
SPLIT_KEY_BYTES = 1 << 12
# Where a piece may end is looked for in steps of so much, backwards.
SEARCH_BYTES = 1 << 16
# A row group with more text than this is read piece by piece instead of at once.
ROW_GROUP_BYTES = 1 << 26
# A newline right before something that is not white space is a token's beginning with every tokenizer: GPT-2's split
# keeps it from the white space before it. In UTF-8 white space begins with a byte below "!", or C2, E1, E2 or E3.
_SAFE_CUT = re.compile(rb"(?<=.)\n(?=[!-~\xc3-\xdf\xe4-\xf4])", re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")


def text_source(patterns: list[str], options: Options) -> Source:
    """The files that `patterns` (files, directories, globs) name, in that order; those of one pattern sorted.

    Raises FileNotFoundError when a pattern names nothing, ValueError for a file that is of no known kind.
    """
    paths = dict.fromkeys(path for pattern in patterns for path in _expand(pattern))
    files = tuple(File(str(path), path.stat().st_size) for path in paths)
    described = f"{len(files)} file{'s' if len(files) > 1 else ''}: {Path(files[0].name).name}"
    return Source(
        f"text, {described}",
        listing_sha256(files),
        files,
        functools.partial(read_pieces, options=options),
        text_filter(options),
        options,
    )


def listing_sha256(files: Iterable[File]) -> str:
    """What stands for the revision of files that have none: it changes with their names and sizes."""
    listing = "".join(f"{Path(file.name).name} {file.size}\n" for file in files)
    return f"names and sizes of the files, sha256 {hashlib.sha256(listing.encode()).hexdigest()}"


def text_filter(options: Options) -> str:
    """What the options leave out or choose, as `meta.json` states it."""
    chosen = [f"text under {options.text_key!r}"] if options.text_key != "text" else []
    chosen += [f"documents separated by {options.separator!r}"] if options.separator else []
    return "; ".join([*chosen, "strict"] if options.strict else chosen)


def _expand(pattern: str) -> list[Path]:
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
            raise ValueError(f"{file} is of no known kind: expected .txt, .jsonl or .parquet, plain, .gz or .zst")
    return found


def file_format(name: str) -> str | None:
    """ "text", "jsonl" or "parquet" by the name of a file, None for any other kind."""
    for compression in COMPRESSIONS[1:]:
        name = name.removesuffix(compression)
    return FORMATS.get(Path(name).suffix)


def read_pieces(file: File, limit: int, options: Options) -> Iterator[Piece]:
    """Cut one file into pieces of about `limit` bytes.

    Raises ValueError naming the file when it is damaged or lacks the text column, OSError when it cannot be read.
    """
    format = file_format(file.name) or ""
    mark = b"\n" if format == "jsonl" else b""
    if format == "text" and options.separator:
        format, mark = "separated", options.separator.encode()
    with _named_errors(file.name), open_file(file.name) as raw:
        if format == "parquet":
            yield from _parquet_pieces(file, raw, limit, options.text_key)
        elif file.name.startswith("hf://") or file.name.endswith(COMPRESSIONS[1:]):
            yield from _cut_stream(file, raw, format, limit, mark)
        else:
            yield from _cut_file(file, raw, format, limit, mark)


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Say which file a decompressor, or the hub, has failed on."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{name} is not a whole gzip file ({error}): fetch or compress it again") from error
    except zstandard.ZstdError as error:
        raise ValueError(f"{name} is not a whole zstd file ({error}): fetch or compress it again") from error
    except Exception as error:
        if isinstance(error, ValueError | MemoryError) or not name.startswith("hf://"):
            raise
        raise OSError(f"{name} could not be read from the hub ({error}); the same command goes on from here") from error


def open_file(name: str) -> Any:
    """A local path or an hf:// address, open for reading bytes."""
    if name.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        return HfFileSystem().open(name, "rb")
    return open(name, "rb")


def _blocks(raw: BinaryIO, name: str) -> Iterator[bytes]:
    if name.endswith(".zst"):
        yield from _zstd_blocks(raw)
        return
    stream = gzip.GzipFile(fileobj=raw) if name.endswith(".gz") else raw
    while block := stream.read(BLOCK_BYTES):
        yield block


def _zstd_blocks(raw: BinaryIO) -> Iterator[bytes]:
    # zstandard's own stream reader takes a file cut short within a frame for a whole one.
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)  # what `zstd --long=31` needs; the default is 2^27
    frame = decompressor.decompressobj()
    whole = True
    while chunk := raw.read(BLOCK_BYTES // 4):
        while chunk:
            if frame.eof:
                frame = decompressor.decompressobj()
            yield frame.decompress(chunk)
            chunk, whole = frame.unused_data, frame.eof
    if not whole:
        raise zstandard.ZstdError("it ends within a frame")


def _cut_file(file: File, raw: BinaryIO, format: str, limit: int, mark: bytes) -> Iterator[Piece]:
    """Pieces of a plain file, which the workers read: here it is only looked at where a piece may end."""

    def read(begin: int, end: int) -> bytes:
        raw.seek(begin)
        return raw.read(end - begin)

    begin, searched, end = 0, 0, limit
    key: bytes | None = None
    while end < file.size:
        cut = _last_cut(read, searched, end, mark)
        if cut:
            continues, key = key is not None, key or (None if mark else read(0, SPLIT_KEY_BYTES))
            yield Piece(file, format, 1, cut - begin, b"", continues, key, begin, text_bytes=cut - begin)
            begin = searched = cut
            end = cut + limit
        else:
            searched, end = end - max(len(mark), 2), end + limit
    rest = file.size - begin
    yield Piece(file, format, 1, rest, b"", key is not None, key, begin, text_bytes=rest)


def _cut_stream(file: File, raw: BinaryIO, format: str, limit: int, mark: bytes) -> Iterator[Piece]:
    """Pieces of a file that has to be unpacked, or fetched, from its beginning to its end."""
    buffer = bytearray()

    def read(begin: int, end: int) -> bytearray:
        return buffer[begin:end]

    key: bytes | None = None
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
            yield Piece(file, format, first, position - done, data, continues, key)
            del buffer[:cut]
            first, done, searched = first + data.count(mark or b"\n"), position, 0
    yield Piece(file, format, first, file.size - done, bytes(buffer), key is not None, key)


def _last_cut(read: Callable[[int, int], bytes | bytearray], start: int, end: int, mark: bytes) -> int:
    """The last place in start..end after a `mark`, or, without one, where no token can tell; 0 when there is none."""
    pattern = re.compile(b"(?<=%b)" % re.escape(mark)) if mark else _SAFE_CUT
    while True:
        begin = max(start, end - SEARCH_BYTES - len(mark))
        cuts = [match.start() for match in pattern.finditer(read(begin, end))]
        if cuts and cuts[-1]:
            return begin + cuts[-1]
        if begin == start:
            return 0
        # Some of it again, for a mark that lies across.
        end = begin + max(len(mark), 2)


def safe_cut(text: bytes, start: int) -> int:
    """The first place from `start` on where `text` may be cut without changing its tokens, else its end."""
    found = _SAFE_CUT.search(text, start)
    return found.start() if found else len(text)


def _parquet_pieces(file: File, raw: Any, limit: int, text_key: str) -> Iterator[Piece]:
    if not file.name.endswith(".parquet"):
        # Parquet is read from its end, so a compressed one has to be unpacked first.
        with tempfile.TemporaryFile() as unpacked:
            for block in _blocks(raw, file.name):
                unpacked.write(block)
            yield from _row_groups(file, unpacked, limit, text_key, read_here_above=0)
    else:
        yield from _row_groups(file, raw, limit, text_key, read_here_above=ROW_GROUP_BYTES)


def _row_groups(file: File, raw: Any, limit: int, text_key: str, read_here_above: int) -> Iterator[Piece]:
    parquet = open_parquet(raw, file.name)
    schema = parquet.schema_arrow
    if text_key not in schema.names:
        found = ", ".join(schema.names)
        raise ValueError(f"{file.name} has no column {text_key!r} but {found}: name one with --text-key")
    kind = str(schema.field(text_key).type)
    if kind not in ("string", "large_string", "string_view", "binary", "large_binary", "binary_view"):
        raise ValueError(f"{file.name}: column {text_key!r} is {kind}, expected string: name another with --text-key")
    first = 1
    for i in range(parquet.num_row_groups):
        group = parquet.metadata.row_group(i)
        columns = [group.column(j) for j in range(group.num_columns)]
        stored = sum(column.total_compressed_size for column in columns)
        text = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_key)
        if text <= read_here_above:
            yield Piece(file, "parquet", first, stored, row_group=i, text_bytes=text)
            first += group.num_rows
            continue
        rows = max(1, group.num_rows * limit // text)
        for batch in parquet.iter_batches(batch_size=rows, row_groups=[i], columns=[text_key]):
            share = stored * batch.num_rows // group.num_rows
            yield Piece(file, "arrow", first, share, _arrow_stream(batch))
            first += batch.num_rows


def _arrow_stream(batch: Any) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def open_parquet(raw: Any, name: str) -> Any:
    """The file as a `pyarrow.parquet.ParquetFile`. Raises ValueError when it is none."""
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(raw)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{name} is not a whole parquet file ({error}): fetch it again") from error


@functools.lru_cache(maxsize=1)
def _parquet_in_worker(name: str) -> Any:
    return open_parquet(open_file(name), name)


@dataclass
class Documents:
    """The documents of a piece as valid UTF-8, and how many were empty or had invalid UTF-8 replaced."""

    texts: list[bytes] = field(default_factory=list)
    empty: int = 0
    invalid_utf8: int = 0


def parse(piece: Piece, options: Options, documents: Documents) -> Documents:
    """Add the documents of `piece`. Raises ValueError with file and line or row for what cannot be used."""
    for number, raw in _raw_documents(piece, options):
        if not raw:
            if options.strict and not piece.continues:
                raise ValueError(
                    f"{_where(piece, options, number)} is empty: remove it, or leave out --strict to pass over it"
                )
            documents.empty += not piece.continues
            continue
        try:
            if isinstance(raw, str):
                text = raw.encode()
            else:
                raw.decode()
                text = raw
        except UnicodeError as error:
            if options.strict:
                where = _where(piece, options, number, raw, error.start)  # type: ignore[attr-defined]
                raise ValueError(
                    f"{where} has invalid UTF-8: repair it, or leave out --strict to put U+FFFD in its place"
                ) from None
            documents.invalid_utf8 += 1
            plain = _SURROGATE.sub("\ufffd", raw) if isinstance(raw, str) else raw.decode(errors="replace")
            text = plain.encode()
        documents.texts.append(text)
    return documents


def _where(piece: Piece, options: Options, number: int, raw: bytes | str = b"", offset: int = 0) -> str:
    if piece.format == "text":
        if not raw:
            return piece.file.name
        number += bytes(raw[:offset]).count(b"\n") if isinstance(raw, bytes) else 0
    if piece.offset:
        # The process that cut the file did not count.
        mark = re.compile(
            re.escape(options.separator.encode() if piece.format == "separated" and options.separator else b"\n")
        )
        with open(piece.file.name, "rb") as file:
            number += sum(
                1 for _ in mark.finditer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), 0, piece.offset)
            )
    unit = {"text": "line", "jsonl": "line", "separated": "document"}.get(piece.format, "row")
    return f"{piece.file.name}, {unit} {number},"


def _raw_documents(piece: Piece, options: Options) -> Iterable[tuple[int, bytes | str]]:
    if piece.format == "text":
        return [(piece.first, piece.read())]
    if piece.format == "separated":
        separator = (options.separator or "").encode()
        texts = [text.strip(b"\r\n") for text in piece.read().split(separator)]
        # What follows the last separator of a piece is the end of the file, or nothing.
        return enumerate(texts if texts[-1] else texts[:-1], piece.first)
    if piece.format == "jsonl":
        return _json_lines(piece, options)
    return enumerate(_rows(piece, options.text_key), piece.first)


def _rows(piece: Piece, text_key: str) -> Iterator[bytes]:
    import pyarrow

    if piece.format == "arrow":
        table = pyarrow.ipc.open_stream(piece.data).read_all()
    else:
        with _named_errors(piece.file.name):
            try:
                table = _parquet_in_worker(piece.file.name).read_row_group(piece.row_group, columns=[text_key])
            except (pyarrow.ArrowException, OSError) as error:
                where = f"{piece.file.name}, from row {piece.first}"
                raise ValueError(f"{where}, cannot be read ({error}): fetch it again") from error
    return (value.as_py() or b"" for value in table.column(0).cast(pyarrow.large_binary()))


def _json_lines(piece: Piece, options: Options) -> Iterator[tuple[int, bytes | str]]:
    text_key = options.text_key
    for number, line in enumerate(piece.read().split(b"\n"), piece.first):
        if not line.strip():
            continue
        try:
            # Bytes that are no UTF-8 become lone surrogates, which the caller replaces or refuses.
            row = json.loads(line.decode(errors="surrogateescape"))
        except ValueError as error:
            where = _where(piece, options, number)
            raise ValueError(f"{where} is not JSON ({error}): repair or remove it") from None
        if isinstance(row, dict) and isinstance(row.get(text_key), str):
            yield number, row[text_key]
            continue
        where = _where(piece, options, number)
        if isinstance(row, dict) and text_key in row:
            raise ValueError(f"{where} has under {text_key!r} no string but a {type(row[text_key]).__name__}")
        found = f"only {', '.join(row)}" if isinstance(row, dict) else f"is a {type(row).__name__}"
        raise ValueError(f"{where} has no key {text_key!r} but {found}: name one with --text-key")
