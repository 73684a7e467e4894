"""Read documents that other tools have tokenized: Megatron-LM's .bin and .idx, datatrove's .ds and .ds.index.

Only end-of-text is moved: these tools write it after each document, and our shards have it before each document.
Documents that are empty or contain only end-of-text are omitted.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.prepare.files import files_revision
from data.prepare.source import Chunk, Source, SourceFile
from data.shards import TOKEN
from data.tokenizer import Tokenizer

MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
# The integer types that can hold a token id, by the code that Megatron-LM has for each.
MEGATRON_DTYPES = {1: "u1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


class TokenFile(NamedTuple):
    """The index of a file in which the tokens of all documents are stored one after the other.

    dtype: the integer type of a token;
    ends: (documents,) int64, the number of tokens in the file up to the end of each document.
    """

    dtype: np.dtype
    ends: np.ndarray


def token_source(patterns: list[str], tokenizer: Tokenizer) -> Source:
    """Return a source of the tokenized files that `patterns` (files or directories) name.

    The names end in .bin or .idx (Megatron-LM) or .ds (datatrove). The files of a directory are sorted. `tokenizer`
    must be the one that made the tokens.

    Raises FileNotFoundError when there is no such file, ValueError for a file of an unknown type.
    """
    paths = list(dict.fromkeys(path for pattern in patterns for path in _find(Path(pattern))))
    files = tuple(SourceFile(str(path), path.stat().st_size) for path in paths)
    described = f"{len(files)} file{'s' if len(files) > 1 else ''}: {paths[0].name}"
    read = functools.partial(read_documents, tokenizer=tokenizer)
    return Source(f"tokens, {described}", files_revision(paths), files, read)


def _find(path: Path) -> list[Path]:
    if path.is_dir():
        found = [file.with_suffix(".bin") for file in path.rglob("*.idx")] + list(path.rglob("*.ds"))
        if not found:
            raise FileNotFoundError(f"no tokens in {path}: expected files named .bin and .idx, or .ds and .ds.index")
        return sorted(found)
    if path.suffix not in (".bin", ".idx", ".ds"):
        raise ValueError(f"{path} has an unknown type: expected .bin with .idx (Megatron-LM), or .ds (datatrove)")
    path = path.with_suffix(".bin") if path.suffix == ".idx" else path
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    return [path]


def open_tokens(path: Path) -> TokenFile:
    """Read the index of a token file.

    Raises ValueError if the index is damaged or does not fit the tokens, OSError if a file is missing or unreadable.
    """
    file = _megatron_index(path.with_suffix(".idx")) if path.suffix == ".bin" else _datatrove_index(path)
    expected = int(file.ends[-1]) * file.dtype.itemsize if len(file.ends) else 0
    if (size := path.stat().st_size) != expected:
        raise ValueError(f"{path} has {size:,} bytes, and its index says {expected:,}: copy both files again")
    return file


def _megatron_index(path: Path) -> TokenFile:
    data = path.read_bytes()
    try:
        if not data.startswith(MEGATRON_MAGIC):
            raise ValueError("it does not begin with MMIDIDX")
        version, code, n_sequences, n_documents = struct.unpack_from("<QBQQ", data, len(MEGATRON_MAGIC))
        if version != 1 or code not in MEGATRON_DTYPES:
            raise ValueError(f"version {version}, tokens of type {code}")
        start = len(MEGATRON_MAGIC) + struct.calcsize("<QBQQ")
        lengths = np.frombuffer(data, "<i4", n_sequences, start).astype(np.int64)
        # The byte offsets, which come next, are not needed: the sequences are stored one after the other.
        documents = np.frombuffer(data, "<i8", n_documents, start + 12 * n_sequences)
        ends = np.concatenate([[0], np.cumsum(lengths)])[documents[1:]]
    except (ValueError, IndexError, struct.error) as error:
        raise ValueError(f"{path} is not an index of Megatron-LM that can be read ({error}): make it again") from None
    return TokenFile(np.dtype(MEGATRON_DTYPES[code]), ends)


def _datatrove_index(path: Path) -> TokenFile:
    ends = np.fromfile(path.with_name(path.name + ".index"), "<u8").astype(np.int64)
    # datatrove states the number of bytes per token only in an optional file, so compute it from the file size.
    size = path.stat().st_size // int(ends[-1]) if len(ends) and ends[-1] else 2
    if size not in (2, 4):
        raise ValueError(f"{path} has {size} bytes for each token of its index, expected 2 or 4: copy both files again")
    return TokenFile(np.dtype(f"<u{size}"), ends)


def read_documents(file: SourceFile, limit: int, tokenizer: Tokenizer) -> Iterator[Chunk]:
    """Read the documents of one file in chunks of about `limit` bytes, with end-of-text before each document.

    Raises ValueError, naming the file, when the index does not fit the tokens or a token id is outside the vocabulary.
    """
    path = Path(file.name)
    dtype, ends = open_tokens(path)
    begins = np.concatenate([[0], ends])
    first, rows = 0, limit // TOKEN.itemsize
    while first < len(ends):
        last = max(first + 1, int(np.searchsorted(begins, begins[first] + rows, side="right")) - 1)
        begin, end = int(begins[first]), int(begins[last])
        tokens = np.fromfile(path, dtype, end - begin, offset=begin * dtype.itemsize)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
            raise ValueError(
                f"{path} holds the tokens {tokens.min()} to {tokens.max()}, and the tokenizer has 0 to "
                f"{tokenizer.vocab_size - 1}: give the tokenizer that made them, --tokenizer DIR"
            )
        data = move_end_of_text(tokens, begins[first : last + 1] - begin, tokenizer.eot).tobytes()
        yield Chunk(file, "tokens", first + 1, (end - begin) * dtype.itemsize, data)
        first = last


def move_end_of_text(tokens: np.ndarray, bounds: np.ndarray, eot: int) -> np.ndarray:
    """Return the documents, each with one end-of-text before it, as one array: (tokens,) uint16.

    If a document begins or ends with end-of-text, this token is removed first (one at each side). Documents that are
    then empty are omitted.

    Args:
        tokens: (n,) of any integer type, the documents one after the other.
        bounds: (documents + 1,), where each document begins, and where the last document ends.
    """
    kept = np.ones(len(tokens), bool)
    for place in (bounds[:-1], bounds[1:] - 1):
        place = place[np.diff(bounds) > 0]
        kept[place[tokens[place] == eot]] = False
    begins = np.concatenate([[0], np.cumsum(kept)])[bounds]  # `bounds` as positions among the kept tokens
    return np.insert(tokens[kept].astype(TOKEN), begins[:-1][np.diff(begins) > 0], eot)
