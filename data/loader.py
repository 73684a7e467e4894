"""Windows of tokens to batches, in an order that depends on the seed alone.

The n-th global batch holds the same windows on 1 process or 64, whatever the micro-batch, so a run can go on from one
integer, its step, on any number of processes, and two curves compare step by step.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from data.shards import Split

IGNORE_INDEX = -100  # a target that does not count, as in F.cross_entropy
FEISTEL_ROUNDS = 6
STEPS_AHEAD = 2  # batches kept ready beside the one in use: a slow read is hidden as long as reads are fast on average


class MicroBatch(NamedTuple):
    """Some windows of a global batch, or of a validation."""

    inputs: Tensor  # (b, T) int64
    targets: Tensor  # (b, T) int64, the token after each input, IGNORE_INDEX where none counts
    share: float  # of the targets that count in all of it: what the mean loss of these weighs


class Windows(Protocol):
    """What batches are made of: so many windows of T inputs and the tokens that follow them, in a fixed order."""

    sequence_length: int  # T
    fingerprint: str  # tells whether two hold the same
    source: str  # where the text comes from, as far as known

    def __len__(self) -> int: ...

    def read(self, window: int, inputs: np.ndarray, targets: np.ndarray) -> None:
        """Fill inputs and targets, (T,) int64 each, with a window."""

    def count(self, windows: np.ndarray) -> int:
        """How many targets count in these windows."""


class TokenWindows:
    """A split cut into windows: w is tokens [w*T, w*T + T + 1), each sharing its last token with the next.

    Args:
        split: the tokens.
        sequence_length: T.
        vocab_size: ids from here on are an error that names the shard.
        tokens: the first so many targets of the split, or all it has, each once; the last window may be short. None is
            whole windows alone, as training takes them.

    Raises ValueError where there is no window.
    """

    def __init__(self, split: Split, sequence_length: int, vocab_size: int, *, tokens: int | None = None) -> None:
        self.split, self.sequence_length, self.vocab_size = split, sequence_length, vocab_size
        available = split.n_tokens - 1
        whole = available // sequence_length * sequence_length
        self.n_targets = whole if tokens is None else min(tokens, available)
        if self.n_targets < 1:
            raise ValueError(
                f"the {split.name} split has {split.n_tokens:,} tokens, not one window of sequence_length "
                f"{sequence_length} + 1: use a shorter sequence_length or more text"
            )
        self.fingerprint, self.source = split.fingerprint, split.meta.source if split.meta else ""
        self._read = np.empty(sequence_length + 1, dtype=np.uint16)

    def __len__(self) -> int:
        return ceil_div(self.n_targets, self.sequence_length)

    def read(self, window: int, inputs: np.ndarray, targets: np.ndarray) -> None:
        """Fill inputs and targets, (T,) int64 each, with a window."""
        start = window * self.sequence_length
        n = min(self.sequence_length, self.n_targets - start)
        tokens = self._read[: n + 1]
        self.split.read(start, tokens)
        if (largest := int(tokens.max())) >= self.vocab_size:
            place = start + int(tokens.argmax())
            raise ValueError(
                f"token {largest} at position {place:,} of the {self.split.name} split ({self.split.shard_at(place)}) "
                f"is outside the vocabulary of {self.vocab_size}: the shard belongs to another tokenizer, or is damaged"
            )
        inputs[:n], inputs[n:] = tokens[:-1], 0
        targets[:n], targets[n:] = tokens[1:], IGNORE_INDEX

    def count(self, windows: np.ndarray) -> int:
        """How many targets count in these windows."""
        return int(np.minimum(self.sequence_length, self.n_targets - windows * self.sequence_length).sum())


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

    An epoch visits every window once; global step s takes windows s*B .. s*B + B - 1 of the endless sequence of epochs.
    A thread reads ahead into buffers that are used in turn: a batch is valid until the next one is asked for, by when
    copies of it to a device must have ended.

    Args:
        windows: what to read.
        batch_tokens: tokens of a global batch, over all ranks: B windows of `windows.sequence_length`.
        micro_batch: at most so many windows in a MicroBatch.
        pin_memory: page-locked buffers, for asynchronous copies to a GPU.

    Raises:
        ValueError: for a combination that cannot work, with the numbers in it.
    """

    def __init__(
        self,
        windows: Windows,
        *,
        batch_tokens: int,
        micro_batch: int,
        seed: int,
        shuffle: bool = True,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        T = windows.sequence_length
        if batch_tokens % T:
            raise ValueError(f"batch_tokens {batch_tokens} is no multiple of sequence_length {T}")
        self.windows_per_step = batch_tokens // T
        if self.windows_per_step < world_size:
            raise ValueError(
                f"batch_tokens {batch_tokens} are {self.windows_per_step} windows of {T} tokens, fewer than the "
                f"{world_size} processes: raise batch_tokens or use fewer processes"
            )
        self.windows, self.seed, self.shuffle = windows, seed, shuffle
        self.share = rank_share(self.windows_per_step, rank, world_size)
        # As many micro-batches on every rank, though shares may differ by one: FSDP gathers weights in step.
        self.micro_batches_per_step = ceil_div(ceil_div(self.windows_per_step, world_size), micro_batch)
        self.step = start_step

        self._ready: queue.Queue[tuple[int, np.ndarray, Tensor] | BaseException] = queue.Queue()
        self._free: queue.Queue[Tensor | None] = queue.Queue()
        for _ in range(STEPS_AHEAD + 1):  # inputs and targets, (2, rows, T)
            self._free.put(torch.empty((2, len(self.share), T), dtype=torch.int64, pin_memory=pin_memory))
        self._in_use: Tensor | None = None
        self._thread: threading.Thread | None = None  # started by the first batch asked for

    def order(self, step: int) -> np.ndarray:
        """The windows of global step `step`, in order: (B,) int64."""
        place = step * self.windows_per_step + np.arange(self.windows_per_step)
        epoch, window = place // len(self.windows), place % len(self.windows)
        if self.shuffle:
            for e in np.unique(epoch):
                window[epoch == e] = permute(window[epoch == e], len(self.windows), self.seed, int(e))
        return window

    def _read_ahead(self) -> None:
        try:
            step = self.step
            while (buffer := self._free.get()) is not None:
                inputs, targets = buffer.numpy()
                order = self.order(step)
                for i, window in enumerate(order[self.share.start : self.share.stop]):
                    self.windows.read(int(window), inputs[i], targets[i])
                self._ready.put((step, order, buffer))
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
        step, order, self._in_use = ready
        self.step = step + 1
        return self._divide(self._in_use, order)

    def _divide(self, buffer: Tensor, order: np.ndarray) -> list[MicroBatch]:
        """The buffer (2, rows, T) in micro-batches of nearly the same size, as views.

        Where there are fewer windows than those, one stands for nothing: its targets are all IGNORE_INDEX.
        """
        in_all, mine = self.windows.count(order), order[self.share.start : self.share.stop]
        micro_batches = []
        for part in range(self.micro_batches_per_step):
            rows = rank_share(len(mine), part, self.micro_batches_per_step)
            inputs, targets = buffer[:, rows.start : rows.stop]
            if not rows:
                inputs, targets = buffer[0, :1], torch.full_like(buffer[1, :1], IGNORE_INDEX)
            share = self.windows.count(mine[rows.start : rows.stop]) / max(1, in_all)
            micro_batches.append(MicroBatch(inputs, targets, share))
        return micro_batches

    def close(self) -> None:
        """End the reading thread, if there is one."""
        self._free.put(None)
        if self._thread is not None:
            self._thread.join()


def validation_batches(
    windows: Windows, *, micro_batch: int, rank: int = 0, world_size: int = 1
) -> Iterator[MicroBatch]:
    """This rank's share of all windows, in order, each once.

    Every rank gets as many batches, the last ones perhaps with no target that counts, so the sums over all ranks do not
    depend on their number.
    """
    in_all = windows.count(np.arange(len(windows)))
    mine, largest_share = rank_share(len(windows), rank, world_size), ceil_div(len(windows), world_size)
    for batch in range(ceil_div(largest_share, micro_batch)):
        places = mine[batch * micro_batch : (batch + 1) * micro_batch]
        rows = torch.zeros((2, max(1, len(places)), windows.sequence_length), dtype=torch.int64)
        inputs, targets = rows
        targets.fill_(IGNORE_INDEX)
        for i, window in enumerate(places):
            windows.read(window, inputs[i].numpy(), targets[i].numpy())
        yield MicroBatch(inputs, targets, windows.count(np.asarray(places, dtype=np.int64)) / in_all)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def rank_share(n: int, rank: int, world_size: int) -> range:
    """The contiguous part of range(n) that falls to a rank; parts differ by one at most."""
    return range(n * rank // world_size, n * (rank + 1) // world_size)
