"""Read and write token shards: files of token ids in llm.c's format. `meta.json` in their directory describes them.

A shard is a header of 256 little-endian int32 (20240520, version 1, token count, zeros), then the tokens, uint16. Each
document is preceded by `<|endoftext|>` and may continue in the next shard. Shards written by llm.c have no `meta.json`;
their tokens are assumed to be GPT-2's.

Shards are read with `preadv` instead of through a memory map. With a memory map, the signal SIGBUS would end the
process if a shard became shorter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.known_datasets import prepare_command
from files import PARTIAL_SUFFIX, file_sha256, sync_directory, write_json

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
TOKEN = np.dtype("<u2")
MAX_SHARD_TOKENS = 2**31 - 1  # the header stores the token count as int32
META_FILE = "meta.json"
# As long as this file exists, the dataset in its directory is incomplete. `data.prepare` deletes the file at the end.
PROGRESS_FILE = "prepare-progress.json"


@dataclass(frozen=True)
class ShardMeta:
    """The entry of one shard in `meta.json`. `documents` is the number of documents that begin in the shard."""

    file: str
    tokens: int
    documents: int
    sha256: str


@dataclass(frozen=True)
class DatasetMeta:
    """The content of `meta.json`. The dictionaries described as "of each split" have the keys "train" and "val".

    tokenizer, tokenizer_sha256, vocab_size: kind, fingerprint and size of the tokenizer;
    source, revision, filter: where the text comes from, its version, and which part of it was kept;
    validation: how the validation split was chosen;
    shard_tokens: number of tokens in a full shard;
    tokens, documents, text_bytes: totals of each split; `text_bytes` (bytes of UTF-8) is empty for downloaded shards;
    shards: the shards of each split, in order;
    skipped: for each reason, the number of documents that were omitted, changed or longer than a shard. The entry
        "carriage_returns" is the number of changed line ends;
    versions: versions of the libraries that made the dataset;
    part: "I of N" for part I of a dataset that is prepared in N parts, otherwise empty;
    tokenizer_given: whether --tokenizer DIR gave the tokenizer. The file has this entry only if it is true.
    """

    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    source: str
    revision: str
    filter: str
    validation: str
    shard_tokens: int
    tokens: dict[str, int]
    documents: dict[str, int]
    text_bytes: dict[str, int]
    shards: dict[str, tuple[ShardMeta, ...]]
    skipped: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    part: str = ""
    tokenizer_given: bool = False

    def save(self, directory: Path) -> None:
        """Write `directory/meta.json` atomically."""
        described = dataclasses.asdict(self)
        if not self.tokenizer_given:
            del described["tokenizer_given"]
        write_json(directory / META_FILE, described)


def read_meta(directory: str | Path) -> DatasetMeta | None:
    """Return the dataset's `meta.json`, or None if the dataset has none (shards of llm.c, with GPT-2 tokens).

    Raises FileNotFoundError for a missing directory, ValueError for a file that is not a dataset description.
    """
    directory = _existing(directory)
    path = directory / META_FILE
    if not path.exists():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        shards = {split: tuple(ShardMeta(**shard) for shard in listed) for split, listed in raw.pop("shards").items()}
        return DatasetMeta(shards=shards, **raw)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a dataset description that this version can read ({error}): prepare the dataset again"
        ) from None


def _existing(directory: str | Path) -> Path:
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"no dataset at {directory}: make it with `{prepare_command(directory)}`")
    return directory


def read_header(path: Path) -> int:
    """Return the token count in the header of the shard at `path`, after checking it against the file's size.

    Raises OSError when the file cannot be read, ValueError when it is not a complete shard.
    """
    try:
        with open(path, "rb") as file:
            header = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise OSError(f"cannot read shard {path}: {error.strerror}") from error
    if len(header) < HEADER_BYTES:
        raise ValueError(
            f"shard {path} is truncated: {len(header)} bytes, but its header alone has {HEADER_BYTES}; "
            "download the shard or prepare the dataset again"
        )
    magic, version, n_tokens = (int(value) for value in np.frombuffer(header, "<i4", 3))
    if magic != MAGIC:
        raise ValueError(
            f"{path} is not a token shard: it begins with {magic}, expected {MAGIC} (llm.c's format for GPT-2 tokens)"
        )
    if version != VERSION:
        raise ValueError(f"shard {path} has format version {version}, expected {VERSION} (uint16 tokens)")
    expected = HEADER_BYTES + n_tokens * TOKEN.itemsize
    if n_tokens < 0 or size != expected:
        word = "truncated" if size < expected else "too long"
        raise ValueError(
            f"shard {path} is {word}: its header says {n_tokens:,} tokens, which is {expected:,} bytes, but the file "
            f"has {size:,}; download the shard or prepare the dataset again"
        )
    return n_tokens


class Split:
    """The tokens of one split (train or val), as a single sequence across its shards. Not thread-safe."""

    def __init__(self, paths: list[Path], counts: list[int], meta: DatasetMeta | None, name: str) -> None:
        self.name = name
        self.meta = meta
        self.paths = paths
        # _ends[i] is the number of tokens in shards 0 to i together.
        self._ends = [int(end) for end in np.cumsum(counts)]
        self.n_tokens = self._ends[-1]
        # Only one shard is open at a time, because a dataset can have more shards than a process may have open files.
        self._open_shard = -1
        self._descriptor = -1

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (1-D, contiguous uint16) with the tokens at positions [start, start + len(out)).

        Raises ValueError for a range outside the split or an `out` of another dtype or layout, OSError when a shard has
        vanished or become shorter since `open_split`.
        """
        if out.dtype != TOKEN or out.ndim != 1 or not out.flags.c_contiguous:
            raise ValueError(f"out must be a contiguous 1-D uint16 array, got {out.dtype} of shape {out.shape}")
        if start < 0 or start + len(out) > self.n_tokens:
            raise ValueError(
                f"tokens {start}..{start + len(out)} are outside the {self.name} split of {self.n_tokens:,} tokens"
            )
        shard = bisect_right(self._ends, start)
        done = 0
        while done < len(out):
            begin = self._ends[shard - 1] if shard else 0
            n = min(len(out) - done, self._ends[shard] - start - done)
            self._read_shard(shard, start + done - begin, out[done : done + n])
            done += n
            shard += 1

    @property
    def fingerprint(self) -> str:
        """A hash of the sha256 of every shard or, without `meta.json`, only of the names and token counts of shards."""
        if self.meta is not None:
            described = [shard.sha256 for shard in self.meta.shards[self.name]]
        else:
            described = [f"{path.name} {end}" for path, end in zip(self.paths, self._ends, strict=True)]
        return hashlib.sha256("\n".join(described).encode()).hexdigest()

    def shard_at(self, position: int) -> Path:
        """Return the path of the shard that holds the token at `position`."""
        return self.paths[bisect_right(self._ends, position)]

    def _read_shard(self, shard: int, position: int, out: np.ndarray) -> None:
        path = self.paths[shard]
        view = out.view(np.uint8).data
        offset = HEADER_BYTES + position * TOKEN.itemsize
        try:
            if shard != self._open_shard:
                self.close()
                self._descriptor = os.open(path, os.O_RDONLY)
                self._open_shard = shard
            # `preadv` may read fewer bytes than requested.
            while len(view):
                n = os.preadv(self._descriptor, [view], offset)
                if n == 0:
                    raise OSError(f"it ends at byte {offset:,}; it was longer when the dataset was opened")
                view, offset = view[n:], offset + n
        except OSError as error:
            raise OSError(f"cannot read shard {path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Close the open shard, if there is one. The next `read` opens the shard that it needs."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._open_shard = -1, -1

    def __del__(self) -> None:
        # `__del__` also runs if `__init__` failed before it set the attribute.
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()

    def verify(self) -> None:
        """Compare the sha256 of every shard with `meta.json`.

        Raises ValueError naming the first shard that differs, or when there is no `meta.json`.
        """
        if self.meta is None:
            raise ValueError(f"{self.paths[0].parent} has no {META_FILE}, so there are no hashes to verify its shards")
        for path, listed in zip(self.paths, self.meta.shards[self.name], strict=True):
            found = file_sha256(path)
            if found != listed.sha256:
                raise ValueError(
                    f"shard {path} is damaged: sha256 {found}, {META_FILE} says {listed.sha256}; "
                    "delete the dataset and prepare it again"
                )


def list_shards(directory: Path, split: str) -> list[Path]:
    """Return the shards of `split` in order.

    Names are `train_000000.bin`, or those of llm.c: `fineweb_train_000001.bin` or `tiny_shakespeare_train.bin`.
    """
    name = re.escape(split)
    pattern = re.compile(rf"((.*[_-])?{name}_\d+|.+[_-]{name})\.bin")
    return sorted(path for path in directory.iterdir() if pattern.fullmatch(path.name))


def open_split(directory: str | Path, split: str) -> Split:
    """Open the "train" or "val" split of a dataset, after checking the shards' headers, sizes and `meta.json` entries.

    Raises FileNotFoundError when the directory, the split or a listed shard is missing, ValueError when the dataset is
    incomplete, the split has no tokens, or a shard does not match its header or `meta.json`, OSError when a shard
    cannot be read. No file stays open.
    """
    directory = _existing(directory)
    if (directory / PROGRESS_FILE).exists():
        raise ValueError(f"{directory} is not complete: run the `python -m data.prepare` command again to continue it")
    meta = read_meta(directory)
    paths = list_shards(directory, split)
    if not paths and not (meta and meta.shards.get(split)):
        raise FileNotFoundError(f"{directory} has no {split} shards (*{split}_NNNNNN.bin): prepare the dataset again")
    counts = [read_header(path) for path in paths]
    if meta is not None:
        _check_listed(directory, split, meta, paths, counts)
    if not sum(counts):
        raise ValueError(f"the {split} shards in {directory} hold no tokens: prepare the dataset again from more text")
    return Split(paths, counts, meta, split)


def _check_listed(directory: Path, split: str, meta: DatasetMeta, paths: list[Path], counts: list[int]) -> None:
    """Raise ValueError or FileNotFoundError if the shards in the directory are not those that `meta.json` lists."""
    listed = {shard.file: shard.tokens for shard in meta.shards.get(split, ())}
    for path, count in zip(paths, counts, strict=True):
        if path.name not in listed:
            raise ValueError(f"shard {path} is not in {META_FILE}: remove it, or prepare the dataset again")
        if listed[path.name] != count:
            raise ValueError(
                f"shard {path} holds {count:,} tokens, {META_FILE} says {listed[path.name]:,}: "
                "prepare the dataset again"
            )
    missing = sorted(listed.keys() - {path.name for path in paths})
    if missing:
        raise FileNotFoundError(f"{directory} lacks {missing[0]}, which {META_FILE} lists: prepare the dataset again")


class ShardWriter:
    """Writes one split as shards of `shard_tokens` tokens, each under a temporary name until it is complete.

    To be able to continue after an interruption, call `flush()` and save the result of `state()` from time to time. A
    new writer continues from this state after `restore`, which deletes everything that was written later.
    """

    def __init__(self, directory: Path, split: str, shard_tokens: int, end_of_text: int) -> None:
        self.directory = directory
        self.split = split
        self.shard_tokens = shard_tokens
        self.end_of_text = end_of_text
        self.finished: list[ShardMeta] = []
        # The shard that is being written: its file, and its numbers of tokens and documents so far.
        self._file: Any = None
        self._tokens = 0
        self._documents = 0

    @property
    def n_tokens(self) -> int:
        """The number of tokens written so far, in all shards."""
        return sum(shard.tokens for shard in self.finished) + self._tokens

    @property
    def n_documents(self) -> int:
        """The number of documents begun so far, in all shards."""
        return sum(shard.documents for shard in self.finished) + self._documents

    def _path(self, partial: bool = False) -> Path:
        return self.directory / f"{self.split}_{len(self.finished):06d}.bin{PARTIAL_SUFFIX if partial else ''}"

    def write(self, tokens: np.ndarray) -> None:
        """Append the next `tokens` (1-D uint16) of the split. The tokens may begin and end inside a document."""
        tokens = np.ascontiguousarray(tokens, TOKEN)
        while len(tokens):
            head, tokens = np.split(tokens, [self.shard_tokens - self._tokens])
            try:
                if self._file is None:
                    self._file = open(self._path(partial=True), "wb")  # noqa: SIM115
                    # The token count is not known yet: `_finish_shard` overwrites this header.
                    self._file.write(_header(0))
                self._file.write(head.data)
            except OSError as error:
                raise self._explain(error) from error
            self._tokens += len(head)
            self._documents += int(np.count_nonzero(head == self.end_of_text))
            if self._tokens == self.shard_tokens:
                self._finish_shard()

    def _explain(self, error: OSError) -> OSError:
        remedy = "make room and run the same command again: it continues where it stopped; or choose another --out"
        return OSError(f"cannot write {self._path()}: {error.strerror}; {remedy}")

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        path = self._path()
        try:
            self._file.seek(0)
            self._file.write(_header(self._tokens))
            self.flush()
            self._file.close()
            os.replace(self._path(partial=True), path)
        except OSError as error:
            raise self._explain(error) from error
        sync_directory(self.directory)
        self.finished.append(ShardMeta(path.name, self._tokens, self._documents, file_sha256(path)))
        self._file, self._tokens, self._documents = None, 0, 0

    def finish(self) -> tuple[ShardMeta, ...]:
        """Complete the last shard, which may be shorter. Return the `meta.json` entries of all shards, in order."""
        self._finish_shard()
        return tuple(self.finished)

    def flush(self) -> None:
        """Force everything that was written so far to the disk (fsync)."""
        if self._file is not None:
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as error:
                raise self._explain(error) from error

    def state(self) -> dict[str, Any]:
        """Return a JSON value for `restore`. Call `flush` first, because `restore` needs all data on the disk."""
        shards = [dataclasses.asdict(shard) for shard in self.finished]
        return {"finished": shards, "tokens": self._tokens, "documents": self._documents}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to `state`: delete everything that was written after the state was saved.

        Raises ValueError when the files on the disk no longer contain what `state` describes.
        """
        self.finished = [ShardMeta(**shard) for shard in state["finished"]]
        for shard in self.finished:
            if read_header(self.directory / shard.file) != shard.tokens:
                raise ValueError(
                    f"{self.directory / shard.file} has changed since it was written: "
                    f"delete {self.directory} and prepare the dataset again"
                )
        partial, complete = self._path(partial=True), self._path()
        if state["tokens"]:
            # The shard may have been completed and renamed after the state was saved.
            if not partial.exists() and complete.exists():
                os.replace(complete, partial)
            size = HEADER_BYTES + state["tokens"] * TOKEN.itemsize
            if not partial.exists() or partial.stat().st_size < size:
                raise ValueError(
                    f"{partial} is missing or shorter than it was: "
                    f"delete {self.directory} and prepare the dataset again"
                )
            self._file = open(partial, "r+b")  # noqa: SIM115
            self._file.truncate(size)
            self._file.seek(0, os.SEEK_END)
        self._tokens, self._documents = state["tokens"], state["documents"]
        keep = {shard.file for shard in self.finished} | ({partial.name} if state["tokens"] else set())
        for path in _written(self.directory, self.split):
            if path.name not in keep:
                path.unlink()


def _written(directory: Path, split: str) -> Iterable[Path]:
    """Return the files of `split` that a ShardWriter may have written, complete or partial."""
    pattern = re.compile(rf"{split}_\d{{6}}\.bin({re.escape(PARTIAL_SUFFIX)})?")
    return [path for path in directory.iterdir() if pattern.fullmatch(path.name)]


def _header(n_tokens: int) -> bytes:
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:3] = MAGIC, VERSION, n_tokens
    return header.tobytes()
