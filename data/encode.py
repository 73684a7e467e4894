"""Pieces of a source to tokens: parsing, encoding, checking, in as many processes as wanted and always in order."""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.sources import Options, Piece, Source
from data.sources.text import SPLIT_KEY_BYTES, Documents, parse, safe_cut
from data.tokenizer import Tokenizer, load_tokenizer

# Re-encoded with the reference tokenizer: this share of the bytes, and so many documents for each shard's worth.
CHECKED_BYTES = 0.002
CHECKED_DOCUMENTS = 16


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
            sample = texts[i][: safe_cut(texts[i], SPLIT_KEY_BYTES)]
            left -= len(sample)
            expected = self.tokenizer.encode(sample.decode())
            if tokens[begins[i] : begins[i] + len(expected)].tolist() != expected:
                raise ValueError(
                    f"{self.tokenizer.bulk_encoder} and the reference tokenizer disagree on a document near "
                    f"{piece.file.name}, {piece.first}: {sample[:60]!r}...; uninstall gigatoken to do without it"
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
    waiting: deque = deque()
    try:
        for batch in batches:
            waiting.append(([replace(piece, data=b"") for piece in batch], pool.submit(_encode_in_worker, batch)))
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
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
            size += max(len(piece.data), piece.source_bytes)
            if size >= limit:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
