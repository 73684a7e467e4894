"""Windows that begin at the beginning of a document, if possible. Best-fit packing fills them with whole documents.

A window is a sequence of T tokens that training reads. Most documents of at most T tokens stay whole, and they are
combined so that they fill windows ("Fewer Truncations Improve Language Modeling", Ding et al. 2024). Three more rules
keep all tokens and waste little computation:

- A document of more than T tokens is cut every T tokens, and its last piece is packed like a whole document.
- If no remaining document fits into the gap at the end of a window, and the gap is more than T / 32 tokens, the
  shortest remaining document is cut, and its beginning fills the gap.
- If no remaining document fits, and the gap is at most T / 32 tokens, the gap becomes padding.

Each token of the split, except the last one, is an input once in an epoch. The target of an input is the next token of
the split, even if this token is an input of another window. A document begins with end-of-text, so the target of a
document's last token is the end-of-text of the next document.

The packing is computed once and stored in an index file beside the shards. To bound the memory, the documents are
divided into groups of about 16 million tokens, and each group is packed separately.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock

from data.loader import IGNORE_INDEX, TrainingWindows, read_tokens
from data.shards import Split
from files import PARTIAL_SUFFIX

# Documents are packed in groups of about GROUP_TOKENS tokens and at most GROUP_DOCUMENTS documents.
GROUP_TOKENS, GROUP_DOCUMENTS = 1 << 24, 1 << 17
MAX_PADDING = 32  # at most T / MAX_PADDING tokens of a window are padding, except in the last window of a group
HEADER_BYTES = 1024
VERSION = 1  # version of the file format and of the packing algorithm; an index of another version is replaced
# The tables of an index file. A piece is a document or a part of one. The pieces of a window follow each other.
WINDOW = np.dtype([("piece", "<i8"), ("targets", "<i4")])  # index of its first piece, number of its targets
PIECE = np.dtype([("start", "<i8"), ("length", "<i4")])  # position of its first token, number of its tokens


class AlignedWindows(TrainingWindows):
    """Windows of whole documents, if possible. A window has documents or parts of documents, then padding if needed.

    Args:
        split: the tokens.
        sequence_length: T.
        vocab_size: `read` raises a ValueError, which names the shard, if a token id is not below this number.
        eot: the id of end-of-text, with which each document begins.
        document_mask: if True, each token attends to its own document only.

    Raises:
        ValueError: when the split has fewer than two tokens.
        OSError: when a shard cannot be read, or the index beside the shards cannot be read or written.
    """

    def __init__(
        self, split: Split, sequence_length: int, vocab_size: int, eot: int, *, document_mask: bool = False
    ) -> None:
        if split.n_tokens < 2:
            raise ValueError(f"the {split.name} split has {split.n_tokens} token, expected an input and its target")
        self.split, self.sequence_length, self.vocab_size = split, sequence_length, vocab_size
        self.document_mask = document_mask
        self.fingerprint, self.source = split.fingerprint, split.meta.source if split.meta else ""
        self._path = split.paths[0].parent / f"aligned-{split.name}-{sequence_length}.index"
        self._header = _find_index(self._path, split, sequence_length, eot)
        self._file = open(self._path, "rb")  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._read = np.empty(sequence_length + 1, np.uint16)

    def __len__(self) -> int:
        return self._header["windows"]

    @property
    def summary(self) -> str:
        """A line to print: how many documents are cut, and what fraction of the windows' tokens is padding."""
        header, T = self._header, self.sequence_length
        padding = 1 - (self.split.n_tokens - 1) / (len(self) * T)
        return (
            f"{len(self):,} aligned windows, {padding:.2%} padding: {header['long']:,} of {header['documents']:,} "
            f"documents are longer than {T} tokens, {header['cut']:,} others are cut, and {header['inside']:,} windows "
            f"begin inside a document"
        )

    def read(self, window: int, inputs: np.ndarray, targets: np.ndarray, documents: np.ndarray | None = None) -> None:
        """Fill `inputs`, `targets` and `documents`, each (T,) int64, with one window.

        `documents` gets, for each input, the index of its document within the window, and -1 for padding. Raises
        ValueError for a token id outside the vocabulary, OSError when a shard or the index cannot be read.
        """
        done = 0
        if documents is not None:
            documents.fill(-1)  # padding
        for i, (start, length) in enumerate(self._pieces(window)):
            # Read one token more than the piece has: the extra token is the target of the piece's last token.
            tokens = self._read[: length + 1]
            read_tokens(self.split, start, tokens, self.vocab_size)
            inputs[done : done + length], targets[done : done + length] = tokens[:-1], tokens[1:]
            if documents is not None:
                documents[done : done + length] = i
            done += length
        # Padding needs no attention mask: with causal attention, no token attends to the padding after it.
        inputs[done:], targets[done:] = 0, IGNORE_INDEX

    def count(self, windows: np.ndarray) -> int:
        """Return how many targets are in the windows with the numbers `windows`, (k,), not counting IGNORE_INDEX."""
        return sum(int(self._windows(window, 1)["targets"][0]) for window in windows.tolist())

    def _pieces(self, window: int) -> list[tuple[int, int]]:
        """Return (start in the split, number of tokens) of each piece of a window."""
        first, end = self._windows(window, 2)["piece"].tolist()
        return self._table(PIECE, HEADER_BYTES + first * PIECE.itemsize, end - first).tolist()

    def _windows(self, window: int, n: int) -> np.ndarray:
        offset = HEADER_BYTES + self._header["pieces"] * PIECE.itemsize + window * WINDOW.itemsize
        return self._table(WINDOW, offset, n)

    def _table(self, dtype: np.dtype, offset: int, n: int) -> np.ndarray:
        """Read `n` rows of a table, from byte `offset` of the index on.

        This uses `pread` instead of a memory map, because the pages of a map would count as resident memory.
        """
        data = os.pread(self._file.fileno(), n * dtype.itemsize, offset)
        if len(data) < n * dtype.itemsize:
            raise OSError(f"{self._path} has become shorter since it was opened: start again")
        return np.frombuffer(data, dtype)


def _find_index(path: Path, split: Split, sequence_length: int, eot: int) -> dict[str, Any]:
    """Return the header of the index at `path`. If there is no complete index for these arguments, write it first."""
    wanted = {"version": VERSION, "tokens": split.fingerprint, "sequence_length": sequence_length, "eot": eot}
    if (header := _read_header(path, wanted)) is not None:
        return header
    try:
        # If several processes need the index at the same time, one of them writes it, and the others wait.
        with FileLock(path.with_suffix(".lock")):
            if (header := _read_header(path, wanted)) is None:
                print(f"packing the documents of {path.parent} into windows of {sequence_length} ...", file=sys.stderr)
                header = _write_index(path, split, wanted)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise  # the error is about a shard, and its message already names the shard
        raise OSError(
            f"cannot write {path}: {error.strerror}; data.windows aligned stores an index beside the shards: make "
            f"room, or start the run once as a user with write permission"
        ) from error
    return header


def _read_header(path: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """Return the header of the index if the index is complete and its header contains `wanted`, otherwise None."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(HEADER_BYTES))
            size = HEADER_BYTES + header["pieces"] * PIECE.itemsize + (header["windows"] + 1) * WINDOW.itemsize
            complete = os.fstat(file.fileno()).st_size == size
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return header if complete and header.items() >= wanted.items() else None


def _write_index(path: Path, split: Split, wanted: dict[str, Any]) -> dict[str, Any]:
    """Pack the documents of a split. Write the index (header, pieces, windows), and return its header."""
    T = wanted["sequence_length"]
    counts = dict.fromkeys(("documents", "long", "cut", "inside", "pieces", "windows"), 0)
    temporary = path.with_name(path.name + PARTIAL_SUFFIX)
    # The table of windows follows the table of pieces. So collect the windows in a temporary file first.
    with open(temporary, "wb") as file, tempfile.TemporaryFile(dir=path.parent) as windows:
        file.write(bytes(HEADER_BYTES))
        for bounds in document_groups(split, wanted["eot"]):
            _write_group(bounds, T, file, windows, counts)
        windows.write(np.array([(counts["pieces"], 0)], WINDOW).tobytes())
        windows.seek(0)
        shutil.copyfileobj(windows, file)
        header = wanted | counts
        file.seek(0)
        file.write(json.dumps(header).encode().ljust(HEADER_BYTES))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return header


def _write_group(bounds: np.ndarray, T: int, pieces: BinaryIO, windows: Any, counts: dict[str, int]) -> None:
    """Pack the documents between `bounds` (see `document_groups`), and append their pieces and windows to the tables.

    The group's totals are added to `counts`.
    """
    begins = set(bounds.tolist())
    rows: list[tuple[int, int]] = []
    packed: list[tuple[int, int]] = []
    found = 0  # number of documents of at most T tokens that were not cut
    lengths = np.diff(bounds)
    for window in pack(bounds, T):
        rows.append((counts["pieces"] + len(packed), sum(length for _, length in window)))
        packed += window
        counts["inside"] += window[0][0] not in begins
        found += sum(start in begins and start + length in begins for start, length in window)
    pieces.write(np.array(packed, PIECE).tobytes())
    windows.write(np.array(rows, WINDOW).tobytes())
    counts["pieces"] += len(packed)
    counts["windows"] += len(rows)
    counts["documents"] += len(lengths)
    counts["long"] += (long := int((lengths > T).sum()))
    counts["cut"] += len(lengths) - long - found


def document_groups(split: Split, eot: int) -> Iterator[np.ndarray]:
    """Iterate over groups of documents. A group is an array (documents + 1,) int64 of positions in the split.

    A group has the start of each document, and then the end of the last document. The last token of the split is only a
    target, so no document includes it. Tokens before the first end-of-text are a document too.
    """
    limit = split.n_tokens - 1
    buffer = np.empty(min(GROUP_TOKENS, limit), np.uint16)
    waiting = np.zeros(1, np.int64)  # start of the last document so far, which may continue in the next tokens
    for first in range(0, limit, GROUP_TOKENS):
        tokens = buffer[: limit - first]
        split.read(first, tokens)
        found = first + np.flatnonzero(tokens == eot)
        bounds = np.concatenate([waiting, found[found > 0]])
        if first + len(tokens) == limit:
            bounds = np.append(bounds, limit)
        waiting = bounds[-1:]
        for i in range(0, len(bounds) - 1, GROUP_DOCUMENTS):
            yield bounds[i : i + GROUP_DOCUMENTS + 1]


def pack(bounds: np.ndarray, T: int) -> Iterator[list[tuple[int, int]]]:
    """Put documents into windows of T tokens. Yields the pieces of each window: (start, length) in the split.

    Documents of more than T tokens are cut first. Then each window repeatedly takes the longest remaining piece that
    fits into the rest of the window, the gap. If no piece fits, the shortest piece is cut or the gap becomes padding,
    as the module's docstring describes. In a window, pieces that begin a document come first.

    Args:
        bounds: (documents + 1,), the starts of the documents, and the end of the last document.
        T: sequence length.
    """
    starts: list[list[int]] = [[] for _ in range(T + 1)]  # starts[n]: where the remaining pieces of n tokens begin
    available = 0  # bit n is set if there is a remaining piece of n tokens

    def put(start: int, length: int) -> None:
        nonlocal available
        starts[length].append(start)
        available |= 1 << length

    def take(length: int) -> int:
        nonlocal available
        start = starts[length].pop()
        if not starts[length]:
            available ^= 1 << length
        return start

    rests: set[int] = set()  # starts of the pieces that continue a document
    for start, end in itertools.pairwise(bounds.tolist()):
        for begin in range(start, end - T, T):
            yield [(begin, T)]
        rest = start + (end - start - 1) // T * T
        put(rest, end - rest)
        if rest > start:
            rests.add(rest)
    while available:
        window: list[tuple[int, int]] = []
        gap = T
        while gap and available:
            fitting = available & ((2 << gap) - 1)
            if fitting:
                length = fitting.bit_length() - 1
                window.append((take(length), length))
            elif gap > T // MAX_PADDING:
                shortest = (available & -available).bit_length() - 1
                length = gap
                window.append((take(shortest), length))
                put(rest := window[-1][0] + length, shortest - length)
                rests.add(rest)
            else:
                break
            gap -= length
        yield sorted(window, key=lambda piece: piece[0] in rests)
