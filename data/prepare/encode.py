"""Turn chunks of text into tokens, in worker processes. The results come in the order of the source."""

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
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.prepare.documents import Documents, parse, place
from data.prepare.source import Chunk, ParseOptions, Source
from data.prepare.text import SPLIT_KEY_BYTES, safe_cut
from data.shards import TOKEN
from data.tokenizer import Tokenizer, UnknownCharacterError, load_tokenizer

# The tokens from the fast encoder gigatoken are checked: a sample of the documents is encoded again with the reference
# tokenizer. For each shard, the sample has at least CHECKED_DOCUMENTS documents, and in total at least the fraction
# CHECKED_BYTES of the bytes.
CHECKED_BYTES = 0.002
CHECKED_DOCUMENTS = 16
# At least this many bytes of each sampled document are checked (or all bytes, if it has fewer).
CHECKED_PREFIX = 1 << 10
# At most this many bytes of text per worker are waiting or being encoded, which bounds the memory.
IN_FLIGHT_BYTES = 1 << 27


@dataclass(frozen=True)
class ValidationRule:
    """The rule that chooses the documents of the validation split, if the source itself does not define this split.

    description: the text that `meta.json` has under `validation`;
    fraction: a document is a candidate when its hash, as a number in [0, 1), is below this fraction;
    tokens: the validation split takes candidates, in order, until one does not fit into this number of tokens, but it
        always takes the first candidate. With None, it takes all candidates.
    """

    description: str
    fraction: float
    tokens: int | None = None

    def candidate(self, chunk: Chunk, text: bytes) -> bool:
        """Return whether a document of `chunk` is a candidate for the validation split.

        If the source does not define the split, the result depends only on `fraction` and the first bytes of the
        document. So it does not depend on the order of the documents, or on the number of workers or parts.
        """
        if chunk.file.split is not None:
            return chunk.file.split == "val"
        key = chunk.split_key or text[:SPLIT_KEY_BYTES]
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) < self.fraction * 2**64


# Do not reword these descriptions: a run can continue a dataset only if this text has not changed.
SPLIT_OF_SOURCE = ValidationRule("as the source has it", 0.0)


def split_by_hash(fraction: float) -> ValidationRule:
    """Return the rule that holds out this fraction of the documents. With 0, there is no validation split."""
    return ValidationRule(f"{fraction:g} of the documents by hash", fraction)


@dataclass(frozen=True)
class Encoded:
    """The documents of a batch of chunks, after encoding.

    tokens: (tokens,) uint16, all documents one after the other. End-of-text precedes each document, but not the
        continuation of a document from the previous batch;
    lengths: (documents,) int64, the number of tokens of each document, including its end-of-text;
    candidate: (documents,) bool, whether the document is a candidate for the validation split;
    text_bytes: (documents,) int64, the number of UTF-8 bytes of each document;
    continues: whether the first document is the continuation of the last document of the previous batch;
    whole: (documents,) bool, False for a part of a document;
    empty, invalid_utf8, carriage_returns, separators, filtered: counts, as in `Documents`.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    candidate: np.ndarray
    text_bytes: np.ndarray
    continues: bool
    whole: np.ndarray
    empty: int = 0
    invalid_utf8: int = 0
    carriage_returns: int = 0
    separators: int = 0
    filtered: dict[str, int] = field(default_factory=dict)

    def only(self, kept: np.ndarray) -> Encoded:
        """Return only the documents for which `kept`, (documents,) bool, is True."""
        arrays = {name: getattr(self, name)[kept] for name in ("lengths", "candidate", "text_bytes", "whole")}
        return replace(self, tokens=self.tokens[np.repeat(kept, self.lengths)], **arrays)


class Encoder:
    """Turns chunks into tokens. `shard_tokens` determines how many documents are checked (see CHECKED_DOCUMENTS)."""

    def __init__(
        self, tokenizer: Tokenizer, options: ParseOptions, validation: ValidationRule, shard_tokens: int
    ) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.validation = validation
        self.shard_tokens = shard_tokens

    def __call__(self, chunks: list[Chunk]) -> Encoded:
        if chunks[0].format == "tokens":
            return self._take_tokens(chunks)
        documents = Documents()
        candidate: list[bool] = []
        chunk_of: list[Chunk] = []
        for chunk in chunks:
            begun = len(documents.texts)
            parse(chunk, self.options, documents)
            chunk_of += [chunk] * (len(documents.texts) - begun)
            candidate += [self.validation.candidate(chunk, text) for text in documents.texts[begun:]]
        try:
            tokens, lengths = self.tokenizer.encode_documents(documents.texts)
        except UnknownCharacterError as error:
            i, text = error.document, documents.texts[error.document]
            offset = len(text.decode()[: error.position].encode())
            where = place(chunk_of[i], self.options, documents.numbers[i], text, offset)
            raise ValueError(f"{where}: {error}") from None
        begins = np.cumsum(lengths) - lengths
        self._check(chunks[0], documents.texts, tokens, begins)
        # `read_batches` puts a chunk that continues a document at the beginning of a batch. The continuation has no
        # end-of-text of its own.
        continues = chunks[0].continues and len(lengths) > 0
        lengths = lengths + 1
        lengths[:1] -= continues
        return Encoded(
            tokens=np.insert(tokens, begins[int(continues) :], self.tokenizer.eot),
            lengths=lengths,
            candidate=np.array(candidate, bool),
            text_bytes=np.array([len(text) for text in documents.texts], np.int64),
            continues=continues,
            whole=np.array([chunk.whole for chunk in chunk_of], bool),
            empty=documents.empty,
            invalid_utf8=documents.invalid_utf8,
            carriage_returns=documents.carriage_returns,
            separators=documents.separators,
            filtered=documents.filtered,
        )

    def _take_tokens(self, chunks: list[Chunk]) -> Encoded:
        """Return the documents of chunks of the format "tokens", with end-of-text before each document."""
        tokens = np.concatenate([np.frombuffer(chunk.data, TOKEN) for chunk in chunks])
        begins = np.flatnonzero(tokens == self.tokenizer.eot)
        lengths = np.diff(begins, append=len(tokens))
        # There is no text to hash, so the bytes of the first token ids of a document decide its split.
        keys = [tokens[begin + 1 : begin + min(n, SPLIT_KEY_BYTES)] for begin, n in zip(begins, lengths, strict=True)]
        sizes = self.tokenizer.token_bytes()[tokens]
        return Encoded(
            tokens=tokens,
            lengths=lengths,
            candidate=np.array([self.validation.candidate(chunks[0], key.tobytes()) for key in keys], bool),
            text_bytes=np.add.reduceat(sizes, begins) if len(begins) else lengths,
            continues=False,
            whole=np.ones(len(lengths), bool),
        )

    def _check(self, chunk: Chunk, texts: list[bytes], tokens: np.ndarray, begins: np.ndarray) -> None:
        """Compare the tokens from gigatoken with those of the reference tokenizer, for a sample of the documents.

        `begins`, (documents,), is the position of each document in `tokens`. Raises ValueError if a document has
        different tokens.
        """
        if not self.tokenizer.bulk_encoder.startswith("gigatoken"):
            return
        at_least = math.ceil(CHECKED_DOCUMENTS * len(tokens) / self.shard_tokens)
        left = CHECKED_BYTES * sum(len(text) for text in texts)
        # The random order depends only on the position of the chunk, so that a repeated run checks the same documents.
        order = random.Random(repr(chunk.position)).sample(range(len(texts)), len(texts))
        for n, i in enumerate(order):
            if n >= at_least and left <= 0:
                return
            sample = texts[i][: safe_cut(texts[i], max(CHECKED_PREFIX, int(left)))]
            left -= len(sample)
            expected = self.tokenizer.encode(sample.decode())
            if tokens[begins[i] : begins[i] + len(expected)].tolist() != expected:
                raise ValueError(
                    f"{self.tokenizer.bulk_encoder} and the reference tokenizer disagree on a document near "
                    f"{chunk.file.name}: {sample[:60]!r}...; uninstall gigatoken to use the reference, which is slower"
                )


# The encoder of a worker process. `_start_worker` sets it once, because sending it with every batch would be slow.
_encoder: Encoder


def _start_worker(tokenizer: Path, *settings: Any) -> None:
    global _encoder
    # This thread ends the worker if the parent is killed. Otherwise the worker would wait for work forever.
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _encoder = Encoder(load_tokenizer(tokenizer), *settings)


@contextmanager
def _blocked_interrupts() -> Iterator[None]:
    """Block SIGINT in the `with` block, and for good in the processes that are started there.

    On Ctrl-C, the terminal sends SIGINT to all processes. It must not end a worker, not even one that is starting,
    because the parent stops the workers. The parent receives a blocked SIGINT at the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _encode_in_worker(chunks: list[Chunk]) -> Encoded:
    return _encoder(chunks)


def encode_in_order(
    batches: Iterable[list[Chunk]], encoder: Encoder, tokenizer: Path, workers: int
) -> Iterator[tuple[list[Chunk], Encoded]]:
    """Encode `batches` in `workers` processes and yield each batch and its result, in order.

    `tokenizer` is the directory from which the workers load their tokenizer. With `workers` = 1, this process encodes.
    With more workers, the yielded chunks have no `data`. Memory is bounded: batches are read only as fast as they are
    encoded. Raises OSError when a worker dies.
    """
    if workers == 1:
        yield from ((batch, encoder(batch)) for batch in batches)
        return
    settings = (tokenizer, encoder.options, encoder.validation, encoder.shard_tokens)
    # Do not use the start method "fork": a forked copy of a process that has threads can deadlock, and pyarrow and
    # gigatoken start threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=settings)
    waiting: deque[tuple[list[Chunk], int, Future[Encoded]]] = deque()
    in_flight = 0
    try:
        for batch in batches:
            size = sum(chunk.size for chunk in batch)
            while len(waiting) > 2 * workers or (waiting and in_flight + size > workers * IN_FLIGHT_BYTES):
                done, done_size, future = waiting.popleft()
                yield done, future.result()
                in_flight -= done_size
            in_flight += size
            with _blocked_interrupts():  # this call may start a worker
                future = pool.submit(_encode_in_worker, batch)
            waiting.append(([replace(chunk, data=b"") for chunk in batch], size, future))
        while waiting:
            done, _, future = waiting.popleft()
            yield done, future.result()
    except BrokenProcessPool as error:
        raise OSError(
            "a worker process died, perhaps because memory ran out: run the same command again with fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def read_batches(source: Source, files: range, start: tuple[int, int], limit: int) -> Iterator[list[Chunk]]:
    """Iterate over the chunks of `files` (indices into `source.files`) from position `start` on, in batches.

    `start` is (index of the file, index of the chunk in the file). A batch has about `limit` bytes. It may contain
    chunks of several small files, because sending them to workers one by one is slow. A chunk that continues a document
    is always the first chunk of its batch.
    """
    batch: list[Chunk] = []
    size = 0
    for i in files:
        if i < start[0]:
            continue
        for j, chunk in enumerate(source.read(source.files[i], limit)):
            if (i, j) < start:
                continue
            if chunk.continues and batch:
                yield batch
                batch, size = [], 0
            batch.append(replace(chunk, position=(i, j)))
            size += chunk.size
            if size >= limit:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
