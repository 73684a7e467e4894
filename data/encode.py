"""Pieces of a source to tokens to shards: parsed, encoded and checked in many processes, written by one in order."""

from __future__ import annotations

import hashlib
import itertools
import math
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from data.shards import ShardWriter
from data.sources import Options, Piece, Source
from data.sources.text import SPLIT_KEY_BYTES, Documents, parse, safe_cut
from data.tokenizer import Tokenizer, load_tokenizer

SPLITS = ("train", "val")
# Re-encoded with the reference tokenizer: this share of the bytes, and so many documents for each shard's worth.
CHECKED_BYTES = 0.002
CHECKED_DOCUMENTS = 16
# Of a long document no more than is left to check, but this much.
CHECKED_PREFIX = 1 << 10
# Text that is being encoded, for each worker: documents longer than half of this are encoded one at a time.
IN_FLIGHT_BYTES = 1 << 27


@dataclass(frozen=True)
class Validation:
    """Which documents are held out: those whose hash falls into `fraction`, until they make `tokens`."""

    description: str
    fraction: float
    tokens: int | None = None

    def candidate(self, piece: Piece, text: bytes) -> bool:
        """Whether a document may go to the validation split. A function of its first bytes, wherever it stands."""
        if piece.file.split is not None:
            return piece.file.split == "val"
        key = piece.split_key or text[:SPLIT_KEY_BYTES]
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) < self.fraction * 2**64


@dataclass(frozen=True)
class Encoded:
    """Pieces after encoding; the arrays have one entry a document.

    tokens: all of them one after the other, each document preceded by end-of-text; lengths: end-of-text included;
    candidate: may go to validation; text_bytes: UTF-8 bytes; continues: the first goes on with the one before.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    candidate: np.ndarray
    text_bytes: np.ndarray
    continues: bool
    empty: int
    invalid_utf8: int


class Encoder:
    """Turns pieces into tokens. `shard_tokens` says how often to check."""

    def __init__(self, tokenizer: Tokenizer, options: Options, validation: Validation, shard_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.validation = validation
        self.shard_tokens = shard_tokens

    def __call__(self, pieces: list[Piece]) -> Encoded:
        documents = Documents()
        candidate: list[bool] = []
        for piece in pieces:
            begun = len(documents.texts)
            parse(piece, self.options, documents)
            candidate += [self.validation.candidate(piece, text) for text in documents.texts[begun:]]
        tokens, lengths = self.tokenizer.encode_documents(documents.texts)
        begins = np.cumsum(lengths) - lengths
        self._check(pieces[0], documents.texts, tokens, begins)
        # A piece that goes on with a document stands first.
        continues = pieces[0].continues and len(lengths) > 0
        lengths = lengths + 1
        lengths[:1] -= continues
        return Encoded(
            tokens=np.insert(tokens, begins[int(continues) :], self.tokenizer.eot),
            lengths=lengths,
            candidate=np.array(candidate, bool),
            text_bytes=np.array([len(text) for text in documents.texts], np.int64),
            continues=continues,
            empty=documents.empty,
            invalid_utf8=documents.invalid_utf8,
        )

    def _check(self, piece: Piece, texts: list[bytes], tokens: np.ndarray, begins: np.ndarray) -> None:
        """Hold the bulk encoder against the reference on a sample of the documents."""
        if not self.tokenizer.bulk_encoder.startswith("gigatoken"):
            return
        at_least = math.ceil(CHECKED_DOCUMENTS * len(tokens) / self.shard_tokens)
        left = CHECKED_BYTES * sum(len(text) for text in texts)
        order = random.Random(repr(piece.position)).sample(range(len(texts)), len(texts))
        for n, i in enumerate(order):
            if n >= at_least and left <= 0:
                return
            sample = texts[i][: safe_cut(texts[i], max(CHECKED_PREFIX, int(left)))]
            left -= len(sample)
            expected = self.tokenizer.encode(sample.decode())
            if tokens[begins[i] : begins[i] + len(expected)].tolist() != expected:
                raise ValueError(
                    f"{self.tokenizer.bulk_encoder} and the reference tokenizer disagree on a document near "
                    f"{piece.file.name}: {sample[:60]!r}...; uninstall gigatoken to do without it"
                )


_encoder: Encoder


def _start_worker(tokenizer: Path, *settings: Any) -> None:
    global _encoder
    # Ctrl-C is the parent's to handle; a worker whose parent was killed would otherwise wait for work for ever.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _encoder = Encoder(load_tokenizer(tokenizer), *settings)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _encode_in_worker(pieces: list[Piece]) -> Encoded:
    return _encoder(pieces)


def encode_in_order(
    batches: Iterable[list[Piece]], encoder: Encoder, tokenizer: Path, workers: int
) -> Iterator[tuple[list[Piece], Encoded]]:
    """Encode `batches` in `workers` processes (one: in this one), yielding results in order. Memory is bounded."""
    if workers == 1:
        yield from ((batch, encoder(batch)) for batch in batches)
        return
    settings = (tokenizer, encoder.options, encoder.validation, encoder.shard_tokens)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=settings)
    waiting: deque[tuple[list[Piece], int, Future[Encoded]]] = deque()
    in_flight = 0
    try:
        for batch in batches:
            size = sum(piece.size for piece in batch)
            while len(waiting) > 2 * workers or (waiting and in_flight + size > workers * IN_FLIGHT_BYTES):
                done, done_size, future = waiting.popleft()
                yield done, future.result()
                in_flight -= done_size
            in_flight += size
            future = pool.submit(_encode_in_worker, batch)
            waiting.append(([replace(piece, data=b"") for piece in batch], size, future))
        while waiting:
            done, _, future = waiting.popleft()
            yield done, future.result()
    except BrokenProcessPool as error:
        raise OSError("a worker process died, perhaps for want of memory: run it again with fewer --workers") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def read_batches(source: Source, files: range, start: tuple[int, int], limit: int) -> Iterator[list[Piece]]:
    """The pieces of `files` (indices into the source's) from position `start` on, small ones put together."""
    batch: list[Piece] = []
    size = 0
    for i in files:
        if i < start[0]:
            continue
        for j, piece in enumerate(source.read(source.files[i], limit)):
            if (i, j) < start:
                continue
            if piece.continues and batch:
                yield batch
                batch, size = [], 0
            batch.append(replace(piece, position=(i, j)))
            size += piece.size
            if size >= limit:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


class Progress:
    """Megabytes a second, tokens and time left: one line that changes on a terminal, else a line now and then."""

    def __init__(self, total: int, dataset: DatasetWriter) -> None:
        self.total = max(total, 1)
        self.dataset = dataset
        self.began = time.monotonic()
        self.first_source = dataset.counted["source_bytes"]
        self.first_text = sum(dataset.counted["text_bytes"].values())
        self.terminal = sys.stderr.isatty()
        self.shown = self.began

    def update(self, last: bool = False) -> None:
        """Show where the work stands, if it is time to."""
        now = time.monotonic()
        if not last and now - self.shown < (0.2 if self.terminal else 10):
            return
        self.shown, seconds = now, max(now - self.began, 1e-3)
        source = self.total if last else self.dataset.counted["source_bytes"]
        text = sum(self.dataset.counted["text_bytes"].values()) - self.first_text
        tokens = sum(writer.n_tokens for writer in self.dataset.writers.values())
        left = seconds * (self.total - source) / max(source - self.first_source, 1)
        when = f"in {timedelta(seconds=round(seconds))}" if last else f"{timedelta(seconds=round(left))} left"
        line = f"{min(source / self.total, 1):4.0%} {text / seconds / 1e6:7.1f} MB/s {tokens:15,} tokens {when}"
        print(f"\r{line}" if self.terminal else line, end="" if self.terminal else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Show the end, and leave the line."""
        self.update(last=True)
        if self.terminal:
            print(file=sys.stderr)


class DatasetWriter:
    """The dataset as it is written: the two splits, what was counted, and how far the source has been read."""

    def __init__(self, directory: Path, validation: Validation, shard_tokens: int, end_of_text: int) -> None:
        self.writers = {split: ShardWriter(directory, split, shard_tokens, end_of_text) for split in SPLITS}
        self.validation = validation
        self.shard_tokens = shard_tokens
        self.counted: dict[str, Any] = {
            "position": [0, 0],
            "source_bytes": 0,
            "text_bytes": dict.fromkeys(SPLITS, 0),
            "skipped": {"empty": 0, "invalid_utf8": 0, "longer_than_shard": 0},
            "open_split": "train",
            "open_tokens": 0,
            "val_is_full": False,
        }

    def add(self, pieces: list[Piece], encoded: Encoded) -> None:
        """Write what the next pieces of the source became."""
        counted = self.counted
        if len(encoded.lengths):
            self._count_long(encoded)
            val = self._assign(encoded)
            counted["open_split"] = "val" if val[-1] else "train"
            ends = np.cumsum(encoded.lengths)
            # Runs of documents that go the same way.
            begins = np.flatnonzero(np.diff(val, prepend=not val[0]))
            parts: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
            for begin, end in itertools.pairwise([*begins.tolist(), len(val)]):
                first = ends[begin - 1] if begin else 0
                parts["val" if val[begin] else "train"].append(encoded.tokens[first : ends[end - 1]])
            for split, chosen in (("train", ~val), ("val", val)):
                self.writers[split].write(np.concatenate([encoded.tokens[:0], *parts[split]]))
                counted["text_bytes"][split] += int(encoded.text_bytes[chosen].sum())
        counted["skipped"]["empty"] += encoded.empty
        counted["skipped"]["invalid_utf8"] += encoded.invalid_utf8
        counted["source_bytes"] += sum(piece.source_bytes for piece in pieces)
        file, piece = pieces[-1].position
        counted["position"] = [file, piece + 1]

    def _assign(self, encoded: Encoded) -> np.ndarray:
        """(documents,) bool: which go to validation."""
        val = encoded.candidate.copy()
        if encoded.continues:
            val[0] = self.counted["open_split"] == "val"
        limit, written = self.validation.tokens, self.writers["val"].n_tokens
        for i in np.flatnonzero(val) if limit is not None else ():
            # Whole documents while they fit, but at least one.
            if not (encoded.continues and i == 0):
                self.counted["val_is_full"] |= bool(written and written + encoded.lengths[i] > limit)
                val[i] = not self.counted["val_is_full"]
            written += int(encoded.lengths[i]) * bool(val[i])
        return val

    def _count_long(self, encoded: Encoded) -> None:
        lengths = encoded.lengths.copy()
        before = self.counted["open_tokens"] if encoded.continues else 0
        lengths[0] += before
        long = np.count_nonzero(lengths > self.shard_tokens) - (before > self.shard_tokens)
        self.counted["skipped"]["longer_than_shard"] += int(long)
        self.counted["open_tokens"] = int(lengths[-1])

    def state(self) -> dict[str, Any]:
        """All that `restore` needs, as JSON; what it speaks of is on the disk."""
        for writer in self.writers.values():
            writer.flush()
        return {"counted": self.counted, **{split: writer.state() for split, writer in self.writers.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to `state`."""
        self.counted = state["counted"]
        for split, writer in self.writers.items():
            writer.restore(state[split])

    def discard(self) -> None:
        """Delete all that was written."""
        for writer in self.writers.values():
            writer.restore({"finished": [], "tokens": 0, "documents": 0})
