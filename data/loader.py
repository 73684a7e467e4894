"""Token shards to batches, in an order that depends on the seed alone.

The n-th global batch holds the same windows on 1 process or 64, whatever the micro-batch, so a run can go on from one
integer, its step, on any number of processes, and two curves compare step by step.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.shards import Split

IGNORE_INDEX = -100  # a target that does not count, as in F.cross_entropy
FEISTEL_ROUNDS = 6
STEPS_AHEAD = 2  # batches kept ready beside the one in use: a slow read is hidden as long as reads are fast on average


class MicroBatch(NamedTuple):
    """Some windows of a global batch; its share of the loss is tokens / (tokens of the whole batch)."""

    inputs: Tensor  # (b, T) int64
    targets: Tensor  # (b, T) int64, the token after each input
    tokens: int  # targets that count


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where each index of 0..n-1 goes in the shuffled order of an epoch: a permutation, in constant memory.

    A Feistel network over the next even number of bits (Luby & Rackoff 1988), walked again from each value that falls
    outside 0..n-1 until it falls inside (Black & Rogaway 2002, "cycle walking"). index and result: (k,) int64.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(FEISTEL_ROUNDS, np.uint64)
    result = index.astype(np.uint64)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        walking = result[outside]
        left, right = walking >> half, walking & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads every bit upwards
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        result[outside] = (left << half) | right
        outside = result >= n
    return result.astype(np.int64)


class Loader:
    """This rank's part of every global batch, from `start_step` on without end.

    Window w of the split is tokens [w*T, w*T + T + 1). An epoch visits every window once; global step s takes windows
    s*B .. s*B + B - 1 of the endless sequence of epochs. A thread reads ahead into buffers that are used in turn: a
    batch is valid until the next one is asked for, by when copies of it to a device must have ended.

    Args:
        split: the tokens.
        batch_tokens: tokens of a global batch, over all ranks; a multiple of `sequence_length`.
        sequence_length: T.
        micro_batch: at most so many windows in a MicroBatch.
        vocab_size: ids from here on are an error that names the shard.
        pin_memory: page-locked buffers, for asynchronous copies to a GPU.

    Raises:
        ValueError: for a combination that cannot work, with the numbers in it.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_tokens: int,
        sequence_length: int,
        micro_batch: int,
        vocab_size: int,
        seed: int,
        shuffle: bool = True,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        if batch_tokens % sequence_length:
            raise ValueError(f"batch_tokens {batch_tokens} is no multiple of sequence_length {sequence_length}")
        self.windows_per_step = batch_tokens // sequence_length
        if self.windows_per_step < world_size:
            raise ValueError(
                f"batch_tokens {batch_tokens} are {self.windows_per_step} windows of {sequence_length} tokens, fewer "
                f"than the {world_size} processes: raise batch_tokens or use fewer processes"
            )
        self.split, self.vocab_size, self.seed, self.shuffle = split, vocab_size, seed, shuffle
        self.sequence_length = sequence_length
        self.n_windows = count_windows(split, sequence_length)
        self.share = rank_share(self.windows_per_step, rank, world_size)
        # As many micro-batches on every rank, though shares may differ by one: FSDP gathers weights in step.
        self.micro_batches_per_step = ceil_div(ceil_div(self.windows_per_step, world_size), micro_batch)
        self.step = start_step

        rows = len(self.share)
        self._ready: queue.Queue[tuple[int, Tensor] | BaseException] = queue.Queue()
        self._free: queue.Queue[Tensor | None] = queue.Queue()
        for _ in range(STEPS_AHEAD + 1):
            self._free.put(torch.empty((rows, sequence_length + 1), dtype=torch.int64, pin_memory=pin_memory))
        self._in_use: Tensor | None = None
        self._thread: threading.Thread | None = None  # started by the first batch asked for

    def windows(self, step: int) -> np.ndarray:
        """The windows of this rank's share of global step `step`, in order: (rows,) int64."""
        place = step * self.windows_per_step + np.arange(self.share.start, self.share.stop)
        epoch, window = place // self.n_windows, place % self.n_windows
        if self.shuffle:
            for e in np.unique(epoch):
                window[epoch == e] = permute(window[epoch == e], self.n_windows, self.seed, int(e))
        return window

    def _read_ahead(self) -> None:
        try:
            step = self.step
            read = np.empty(self.sequence_length + 1, dtype=np.uint16)
            while (buffer := self._free.get()) is not None:
                rows = buffer.numpy()
                for row, window in zip(rows, self.windows(step), strict=True):
                    start = int(window) * self.sequence_length
                    self.split.read(start, read)
                    check_vocabulary(self.split, start, read, self.vocab_size)
                    row[:] = read
                self._ready.put((step, buffer))
                step += 1
        except BaseException as error:
            self._ready.put(error)  # raised where the batch is asked for

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._read_ahead, name="loader", daemon=True)
            self._thread.start()
        if self._in_use is not None:
            self._free.put(self._in_use)
            self._in_use = None
        ready = self._ready.get()
        if isinstance(ready, BaseException):
            self._ready.put(ready)
            raise ready
        step, self._in_use = ready
        self.step = step + 1
        return split_rows(self._in_use, self.micro_batches_per_step)

    def close(self) -> None:
        """End the reading thread, if there is one."""
        self._free.put(None)
        if self._thread is not None:
            self._thread.join()


def validation_batches(
    split: Split,
    *,
    tokens: int,
    sequence_length: int,
    micro_batch: int,
    vocab_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[MicroBatch]:
    """This rank's share of the first `tokens` targets of a split (or of all it has), in order, each counted once.

    The last window may be short: what it lacks is IGNORE_INDEX. Every rank gets as many batches, the last ones perhaps
    with no target that counts, so the sums over all ranks do not depend on their number.
    """
    n_targets = min(tokens, split.n_tokens - 1)
    n_windows = ceil_div(n_targets, sequence_length)
    share = rank_share(n_windows, rank, world_size)
    read = np.empty(sequence_length + 1, dtype=np.uint16)
    largest_share = ceil_div(n_windows, world_size)
    for batch in range(ceil_div(largest_share, micro_batch)):
        windows = share[batch * micro_batch : (batch + 1) * micro_batch]
        rows = torch.zeros((max(1, len(windows)), sequence_length + 1), dtype=torch.int64)
        targets = torch.full((len(rows), sequence_length), IGNORE_INDEX)
        counted = 0
        for row, window in enumerate(windows):
            start = window * sequence_length
            n = min(sequence_length, n_targets - start)
            split.read(start, read[: n + 1])
            check_vocabulary(split, start, read[: n + 1], vocab_size)
            rows[row, : n + 1] = torch.from_numpy(read[: n + 1].astype(np.int64))
            targets[row, :n] = rows[row, 1 : n + 1]
            counted += n
        yield MicroBatch(rows[:, :-1], targets, counted)


def count_windows(split: Split, sequence_length: int) -> int:
    """Whole windows of T + 1 tokens, each sharing its last token with the next."""
    n = (split.n_tokens - 1) // sequence_length
    if n < 1:
        raise ValueError(
            f"the {split.name} split has {split.n_tokens:,} tokens, not one window of sequence_length "
            f"{sequence_length} + 1: use a shorter sequence_length or more text"
        )
    return n


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def rank_share(n: int, rank: int, world_size: int) -> range:
    """The contiguous part of range(n) that falls to a rank; parts differ by one at most."""
    return range(n * rank // world_size, n * (rank + 1) // world_size)


def split_rows(rows: Tensor, parts: int) -> list[MicroBatch]:
    """Divide windows (n, T + 1) into `parts` micro-batches of nearly the same size, as views.

    Where there are fewer windows than parts, one stands for nothing: its targets are all IGNORE_INDEX.
    """
    micro_batches = []
    for part in range(parts):
        share = rank_share(len(rows), part, parts)
        inputs, targets = rows[share.start : share.stop, :-1], rows[share.start : share.stop, 1:]
        if not share:
            inputs, targets = rows[:1, :-1], torch.full_like(rows[:1, 1:], IGNORE_INDEX)
        micro_batches.append(MicroBatch(inputs, targets, len(share) * (rows.size(1) - 1)))
    return micro_batches


def check_vocabulary(split: Split, start: int, tokens: np.ndarray, vocab_size: int) -> None:
    """Raise a ValueError that names the shard if a token, read from `start` on, is not in the vocabulary."""
    if (largest := int(tokens.max())) >= vocab_size:
        place = start + int(tokens.argmax())
        raise ValueError(
            f"token {largest} at position {place:,} of the {split.name} split ({split.shard_at(place)}) is outside the "
            f"vocabulary of {vocab_size}: the shard belongs to another tokenizer, or is damaged"
        )
