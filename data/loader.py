"""Combine windows of tokens into batches, in an order that does not depend on the number of processes.

A window is a sequence of T inputs and their T targets. All windows of a step together are its global batch, which is
divided between all processes. The global batch of step n has the same windows for any number of processes and any
micro-batch size. Therefore the position of a run in its data is one integer, the step, and a run can resume on another
number of processes.

Letters in shapes: T is the sequence length, B the number of windows in a global batch, and b the number of windows in a
micro-batch.
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

# A target with this value does not count in the loss: `F.cross_entropy` skips it by default. This value replaces
# targets that are padding or tokens of a prompt.
IGNORE_INDEX = -100
# The number of rounds of the Feistel network in `permute` (below). Three rounds are enough for a pseudorandom
# permutation if each round applies a pseudorandom function (Luby & Rackoff 1988). Here this function is only a cheap
# hash, so more rounds are used.
FEISTEL_ROUNDS = 6
# Number of batches that the background thread prepares in addition to the batch in use. With this reserve, one slow
# read (such as the first read of a file on a network disk) usually does not delay the training step.
STEPS_AHEAD = 2


class MicroBatch(NamedTuple):
    """The windows of one forward pass: a part of a global batch, or of all validation windows.

    The mean loss over a global batch is the sum of weight * (mean loss of the micro-batch) over its micro-batches. A
    plain average of the means would be wrong if the micro-batches differ in their number of targets.
    """

    inputs: Tensor  # (b, T) int64
    targets: Tensor  # (b, T) int64: the token after each input, or IGNORE_INDEX
    # The number of targets in this micro-batch divided by that in the global batch, or in all validation windows.
    # Targets with the value IGNORE_INDEX are not counted.
    weight: float
    # (b, T) int64, a number for each input. Neighbors have equal numbers if and only if they are in the same document.
    # None means that there is no document mask.
    documents: Tensor | None = None


class Windows(Protocol):
    """A sequence of windows in a fixed order; each window has T inputs and T targets.

    sequence_length: T;
    fingerprint: a text made from hashes, equal for equal data;
    source: where the text comes from, or "" if this is not known;
    document_mask: whether each token attends to its own document only. If True, `read` has to fill `documents` too.
    """

    sequence_length: int
    fingerprint: str
    source: str
    document_mask: bool

    def __len__(self) -> int: ...

    def read(self, window: int, inputs: np.ndarray, targets: np.ndarray, documents: np.ndarray | None = None) -> None:
        """Write the window with the number `window` to `inputs` and `targets`, (T,) int64 each.

        If `document_mask` is True, also fill `documents`, (T,) int64. Neighboring inputs have equal numbers in it if
        and only if they belong to the same document.
        """

    def count(self, windows: np.ndarray) -> int:
        """Return how many targets are in the windows with the numbers `windows`, (k,), not counting IGNORE_INDEX."""


class TrainingWindows(Windows, Protocol):
    """Windows that training reads, in one or more epochs. Each epoch contains every window once."""

    def order(self, places: np.ndarray, seed: int, shuffle: bool) -> np.ndarray:
        """Return the numbers of the windows at the given `places`, (k,) int64. `read` takes such a number.

        The windows of all epochs form one sequence: epoch e begins at place e * len(self). `places`, (k,), are
        consecutive places in this sequence, counted from 0. With `shuffle`, each epoch has its own order; otherwise the
        windows come in the order of the text.
        """
        # A batch may begin in one epoch and end in the next, so that no windows are left out at the end of an epoch.
        epoch, window = places // len(self), places % len(self)
        if shuffle:
            for e in np.unique(epoch):
                window[epoch == e] = permute(window[epoch == e], len(self), seed, int(e))
        return window


class TokenWindows(TrainingWindows):
    """A split cut into windows of T inputs and T targets: window w has tokens [w*T, w*T + T + 1) of the split.

    Args:
        split: the tokens.
        sequence_length: T.
        vocab_size: `read` raises a ValueError, which names the shard, if a token id is not below this number.
        tokens: use this number of targets from the beginning of the split, or all if the split has fewer. The last
            window is padded if it is not full. With None, use all full windows, as training does.
        shift: if True, cut the split at different places in each epoch (see `shift_of`), which moves every window by up
            to T - 1 tokens. Window w of epoch e then has the number e * len(self) + w.
        mask_eot: the id of end-of-text, with which each document begins. Each token then attends to its own document
            only. With None, there is no document mask.

    Raises:
        ValueError: when the split is too short for one full window or, with `tokens`, for one target.
    """

    def __init__(
        self,
        split: Split,
        sequence_length: int,
        vocab_size: int,
        *,
        tokens: int | None = None,
        shift: bool = False,
        mask_eot: int | None = None,
    ) -> None:
        self.split, self.sequence_length, self.vocab_size, self.shift = split, sequence_length, vocab_size, shift
        self.mask_eot, self.document_mask = mask_eot, mask_eot is not None
        # The first token of the split is an input but never a target, so there is one target fewer than there are
        # tokens. With `shift`, windows move by up to T - 1 tokens, so T - 1 tokens have to follow the last window.
        available = split.n_tokens - 1 - (sequence_length - 1 if shift else 0)
        in_full_windows = available // sequence_length * sequence_length
        self.n_targets = in_full_windows if tokens is None else min(tokens, available)
        if self.n_targets < 1:
            raise ValueError(
                f"the {split.name} split has {split.n_tokens:,} tokens, not one window of sequence_length "
                f"{sequence_length} + 1{' that can be shifted' if shift else ''}: use a shorter sequence_length or "
                f"more text"
            )
        self.fingerprint, self.source = split.fingerprint, split.meta.source if split.meta else ""
        # (T + 1,): a buffer that all calls of `read` use, so that they do not allocate memory for each window.
        self._read = np.empty(sequence_length + 1, dtype=np.uint16)

    def __len__(self) -> int:
        return ceil_div(self.n_targets, self.sequence_length)

    def read(self, window: int, inputs: np.ndarray, targets: np.ndarray, documents: np.ndarray | None = None) -> None:
        """Fill `inputs`, `targets` and `documents`, each (T,) int64, with one window.

        Raises ValueError for a token id outside the vocabulary, OSError when a shard cannot be read.
        """
        epoch, window = divmod(window, len(self))
        start = window * self.sequence_length
        n = min(self.sequence_length, self.n_targets - start)
        # n + 1 tokens give n pairs of input and target. Neighboring windows overlap by one token: the last target of a
        # window is the first input of the next window. Without this overlap, the first token of each window would never
        # be a target.
        tokens = self._read[: n + 1]
        read_tokens(self.split, start + shift_of(epoch, self.sequence_length), tokens, self.vocab_size)
        # The input id of padding may be any valid id: with causal attention, no earlier position attends to padding.
        inputs[:n], inputs[n:] = tokens[:-1], 0
        targets[:n], targets[n:] = tokens[1:], IGNORE_INDEX
        if documents is not None:
            np.cumsum(inputs == self.mask_eot, out=documents)

    def count(self, windows: np.ndarray) -> int:
        """Return how many targets the windows with the numbers `windows`, (k,), have: T each, or fewer with padding."""
        places = windows % len(self)
        return int(np.minimum(self.sequence_length, self.n_targets - places * self.sequence_length).sum())

    def order(self, places: np.ndarray, seed: int, shuffle: bool) -> np.ndarray:
        """Return the numbers of the windows at `places`, (k,).

        With `shift`, a window of epoch e has e * len(self) added to its number, so that `read` knows the epoch.
        """
        windows = super().order(places, seed, shuffle)
        return windows + places // len(self) * len(self) if self.shift else windows


def shift_of(epoch: int, sequence_length: int) -> int:
    """Return by how many tokens the windows of an epoch are shifted: 0 for epoch 0, and always less than T.

    The shift is T times the fractional part of epoch * golden ratio, rounded down. These fractional parts never repeat,
    and for every n, the first n of them are spread almost evenly over [0, 1).
    """
    return int(epoch * ((5**0.5 - 1) / 2) % 1 * sequence_length)


def read_tokens(split: Split, start: int, tokens: np.ndarray, vocab_size: int) -> None:
    """Fill `tokens`, (n,) uint16, with the tokens of the split from `start` on.

    Raises ValueError, naming the shard, for a token id outside the vocabulary, OSError when a shard cannot be read.
    """
    split.read(start, tokens)
    # Check ids here, where the shard is known. On a GPU, an id outside the embedding table stops the process with an
    # assertion in a kernel that names neither the shard nor the position.
    if (largest := int(tokens.max())) >= vocab_size:
        place = start + int(tokens.argmax())
        raise ValueError(
            f"token {largest} at position {place:,} of the {split.name} split ({split.shard_at(place)}) is outside the "
            f"vocabulary of {vocab_size}: the shard was made with another tokenizer, or it is damaged; prepare the "
            "dataset again"
        )


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Return the elements at positions `index` of a pseudorandom permutation of 0..n-1, which seed and epoch determine.

    A shuffled list of all windows would take memory proportional to the corpus. This function computes any element
    without the others: a Feistel network (Luby & Rackoff 1988) permutes the numbers below some 4^k that is at least n,
    and "cycle walking" (Black & Rogaway 2002) restricts the permutation to 0..n-1.

    Args:
        index: (k,) int64, positions in 0..n-1.

    Returns:
        (k,) int64.
    """
    # A Feistel network divides a number into two halves with the same number of bits. So the number of bits of n - 1 is
    # rounded up to an even number, 2 * half.
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    # SeedSequence mixes seed and epoch. With the sum seed + epoch as the seed, epoch 1 of seed 0 would have the same
    # order as epoch 0 of seed 1.
    keys = np.random.SeedSequence([seed, epoch]).generate_state(FEISTEL_ROUNDS, np.uint64)
    result = index.astype(np.uint64)
    outside = np.ones(len(result), dtype=bool)
    # Cycle walking: values that are n or larger are permuted again, until they are below n. A value that starts in
    # 0..n-1 always comes back to 0..n-1, and two different values never become equal. The network permutes at most 4n
    # numbers, so a few passes are enough.
    while outside.any():
        walking = result[outside]
        left, right = walking >> half, walking & mask
        for key in keys:
            # The round function: a hash of the right half. 0x9E37... is 2^64 / golden ratio (Knuth's Fibonacci
            # hashing), and 0xD6E8... is the multiplier of a published 64-bit hash (degski64). Any change of this
            # function changes the order of windows in every run.
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            # The right half is kept, and the left half is XORed with a hash of the right half. Such a round can be
            # undone for any hash function, so it is a permutation. Then the halves swap places, so that the next round
            # changes the other half.
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        result[outside] = (left << half) | right
        outside = result >= n
    return result.astype(np.int64)


class Loader:
    """Iterates over this rank's part of every global batch, from `start_step` on. The iteration never ends.

    Each iteration gives a list of micro-batches. Global step s takes the windows at places s*B .. s*B + B - 1 of the
    sequence of all epochs (see `TrainingWindows.order`). A background thread reads the next batches into a fixed set of
    buffers. The tensors of a step are valid until the next step is requested, so copies of them to a device must have
    finished by then.

    Args:
        windows: the data.
        batch_tokens: tokens of a global batch over all ranks, B * T.
        micro_batch: the largest number of windows in a MicroBatch.
        seed: determines the order of the windows if `shuffle` is True.
        shuffle: with False, the windows come in the order of the text.
        start_step: the first global step, as stored in a checkpoint.
        rank, world_size: the index of this process, and the number of processes.
        pin_memory: if True, allocate page-locked buffers, from which copies to a GPU can be asynchronous.

    Raises:
        ValueError: when batch_tokens is not a multiple of T, or a batch has fewer windows than there are ranks.
    """

    def __init__(
        self,
        windows: TrainingWindows,
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
            raise ValueError(f"batch_tokens must be a multiple of sequence_length {T}, got {batch_tokens}")
        self.windows_per_step = batch_tokens // T
        if self.windows_per_step < world_size:
            raise ValueError(
                f"batch_tokens {batch_tokens} are {self.windows_per_step} windows of {T} tokens, fewer than the "
                f"{world_size} processes: raise batch_tokens or use fewer processes"
            )
        self.windows, self.seed, self.shuffle = windows, seed, shuffle
        # The positions of this rank's windows within a global batch: rank 0 has the first, rank 1 the next, and so on.
        self.rows = split_evenly(self.windows_per_step, rank, world_size)
        # Every rank makes the same number of forward passes. Under FSDP, each pass gathers weights from all ranks, so
        # the other ranks would wait forever for a rank that makes fewer passes.
        self.micro_batches_per_step = ceil_div(ceil_div(self.windows_per_step, world_size), micro_batch)
        self.step = start_step

        # Buffers circulate through two queues: free buffers go to the thread through `_free`, and full buffers come
        # back through `_ready`. All buffers are allocated here, because page-locking memory is slow.
        self._ready: queue.Queue[tuple[int, list[float], Tensor] | BaseException] = queue.Queue()
        self._free: queue.Queue[Tensor | None] = queue.Queue()
        for _ in range(STEPS_AHEAD + 1):
            # (2 or 3, rows, T): inputs, targets and, with a document mask, documents.
            shape = (2 + windows.document_mask, len(self.rows), T)
            self._free.put(torch.empty(shape, dtype=torch.int64, pin_memory=pin_memory))
        self._in_use: Tensor | None = None
        # The first call of `next` starts the thread, so that a Loader that is never used has no running thread.
        self._thread: threading.Thread | None = None

    def order(self, step: int) -> np.ndarray:
        """Return the numbers of the windows of global step `step`, in order: (B,) int64."""
        place = step * self.windows_per_step + np.arange(self.windows_per_step)
        return self.windows.order(place, self.seed, self.shuffle)

    def _read_ahead(self) -> None:
        """Fill free buffers, one for each step, until `close` sends None. Runs in the background thread."""
        try:
            step = self.step
            while (buffer := self._free.get()) is not None:
                arrays, order = buffer.numpy(), self.order(step)
                for i, window in enumerate(order[self.rows.start : self.rows.stop]):
                    self.windows.read(int(window), *arrays[:, i])
                self._ready.put((step, self._weights(order), buffer))
                step += 1
        except BaseException as error:
            # Python only prints an exception that ends a thread, and `next` would wait forever. So pass the exception
            # on to `next`, which raises it.
            self._ready.put(error)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        if self._thread is None:
            # A daemon thread does not keep the process alive when training ends with an exception.
            self._thread = threading.Thread(target=self._read_ahead, name="loader", daemon=True)
            self._thread.start()
        # A call of `next` means that the caller no longer uses the previous step, so its buffer can be filled again.
        if self._in_use is not None:
            self._free.put(self._in_use)
            self._in_use = None
        ready = self._ready.get()
        if isinstance(ready, BaseException):
            self._ready.put(ready)  # the next call raises it again
            raise ready
        step, weights, self._in_use = ready
        # The step that the caller requests next. The thread may already have read this step and later ones.
        self.step = step + 1
        return self._divide(self._in_use, weights)

    def _parts(self) -> list[range]:
        """Return, for each micro-batch of a step, the range of its rows in the buffer. The sizes are nearly equal."""
        n = self.micro_batches_per_step
        return [split_evenly(len(self.rows), part, n) for part in range(n)]

    def _weights(self, order: np.ndarray) -> list[float]:
        """Return the weight of each of this rank's micro-batches: its fraction of the targets of the global batch.

        The weights of all ranks together add up to 1, or to 0 if the global batch has no targets.
        """
        in_all, mine = self.windows.count(order), order[self.rows.start : self.rows.stop]
        return [self.windows.count(mine[rows.start : rows.stop]) / max(1, in_all) for rows in self._parts()]

    def _divide(self, buffer: Tensor, weights: list[float]) -> list[MicroBatch]:
        """Divide a buffer (2 or 3, rows, T) into micro-batches, which are views of the buffer.

        If a rank has fewer windows than micro-batches, one of its micro-batches has weight 0, and all targets of this
        micro-batch are IGNORE_INDEX.
        """
        micro_batches = []
        for rows, weight in zip(self._parts(), weights, strict=True):
            inputs, targets, *documents = buffer[:, rows.start : rows.stop]
            if not rows:
                # The forward pass still has to run (see micro_batches_per_step), and it needs at least one row.
                inputs, targets, *documents = buffer[:, :1]
                targets = torch.full_like(targets, IGNORE_INDEX)
            micro_batches.append(MicroBatch(inputs, targets, weight, *documents))
        return micro_batches

    def close(self) -> None:
        """Stop the background thread, if it runs, and wait until it has ended."""
        self._free.put(None)
        if self._thread is not None:
            self._thread.join()


def validation_batches(
    windows: Windows, *, micro_batch: int, rank: int = 0, world_size: int = 1
) -> Iterator[MicroBatch]:
    """Iterate once over this rank's part of all windows, in order.

    Every rank yields the same number of batches, so that the ranks can communicate during each batch. The last batch of
    a rank may have no windows, only padding. The sum of weight * (mean loss of the batch) over all batches of all ranks
    is the mean loss of all targets.
    """
    in_all = windows.count(np.arange(len(windows)))
    mine, most_windows = split_evenly(len(windows), rank, world_size), ceil_div(len(windows), world_size)
    for batch in range(ceil_div(most_windows, micro_batch)):
        places = mine[batch * micro_batch : (batch + 1) * micro_batch]
        # (2 or 3, b, T): inputs, targets and, with a document mask, documents. A batch without windows has one row of
        # padding, because every rank has to run a forward pass.
        shape = (2 + windows.document_mask, max(1, len(places)), windows.sequence_length)
        inputs, targets, *documents = rows = torch.zeros(shape, dtype=torch.int64)
        targets.fill_(IGNORE_INDEX)
        for i, window in enumerate(places):
            windows.read(window, *rows[:, i].numpy())
        weight = windows.count(np.asarray(places, dtype=np.int64)) / in_all
        yield MicroBatch(inputs, targets, weight, *documents)


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def split_evenly(n: int, part: int, parts: int) -> range:
    """Cut `range(n)` into `parts` contiguous ranges whose lengths differ by at most one, and return number `part`."""
    return range(n * part // parts, n * (part + 1) // parts)
