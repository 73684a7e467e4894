"""Several datasets in one run: each has a fixed share of the windows, evenly spread.

A schedule of at most about 10,000 windows, in which each dataset has exactly its share, is repeated without end. After
any number of windows, a dataset has its share of them rounded up or down. Over any range as long as the schedule, and
so over any 100 steps where the weights are percentages, its share is exact. Which window a place in the run has follows
from the place and the seed alone, so the state of a run is still one integer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from data.loader import TrainingWindows

MAX_SCHEDULE = 10_000  # shares that need a longer schedule are rounded to multiples of 1 / MAX_SCHEDULE


def exact_shares(weights: Sequence[float]) -> list[Fraction]:
    """Return weights (above 0) as fractions of their sum, with a common denominator of about MAX_SCHEDULE at most."""
    exact = [Fraction(str(weight)) for weight in weights]  # as written: 0.1 is a tenth
    shares = [weight / sum(exact) for weight in exact]
    if math.lcm(*(share.denominator for share in shares)) > MAX_SCHEDULE:
        rounded = [max(1, round(share * MAX_SCHEDULE)) for share in shares]
        shares = [Fraction(n, sum(rounded)) for n in rounded]
    return shares


def make_schedule(shares: Sequence[Fraction]) -> np.ndarray:
    """Return which dataset each place has, (n,), for the shortest n in which every share is a whole number.

    The k-th window of a dataset with share s may come once its share of the places so far is above k - 1, and must come
    before k / s. Taking the one that must come first keeps both limits (the quota method of Balinski & Young 1975).
    """
    n = math.lcm(*(share.denominator for share in shares))
    counts = [int(share * n) for share in shares]
    taken = [0] * len(shares)
    schedule = []
    for place in range(1, n + 1):
        waiting = [i for i, count in enumerate(counts) if taken[i] * n < count * place]
        first = min(waiting, key=lambda i: (taken[i] + 1) / counts[i])
        taken[first] += 1
        schedule.append(first)
    return np.array(schedule)


class MixtureWindows(TrainingWindows):
    """The windows of several datasets. Window w of dataset i is called w * n + i, for n datasets.

    Args:
        parts: the windows of each dataset, all of the same length T.
        weights: one for each, above 0; only their ratios matter.

    Attributes:
        shares: the fraction of the windows of a run that each dataset has.
    """

    def __init__(self, parts: Sequence[TrainingWindows], weights: Sequence[float]) -> None:
        self.parts, self.sequence_length = parts, parts[0].sequence_length
        self.document_mask = parts[0].document_mask
        self.shares = exact_shares(weights)
        self._schedule = make_schedule(self.shares)
        # For each place of the schedule, how many windows of the same dataset come before it.
        self._earlier = np.zeros_like(self._schedule)
        for i in range(len(parts)):
            own = self._schedule == i
            self._earlier[own] = np.arange(own.sum())
        described = [f"{part.fingerprint} {share}" for part, share in zip(parts, self.shares, strict=True)]
        self.fingerprint = hashlib.sha256("\n".join(described).encode()).hexdigest()
        self.source = "; ".join(part.source for part in parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def order(self, places: np.ndarray, seed: int, shuffle: bool) -> np.ndarray:
        """Return the windows at consecutive places (k,) of the run. Each dataset has epochs of its own."""
        # Seeds of their own: datasets of the same length would otherwise have the same order.
        seeds = np.random.SeedSequence([seed, len(self.parts)]).generate_state(len(self.parts)).tolist()
        repetition, place = np.divmod(places, len(self._schedule))
        dataset = self._schedule[place]
        windows = np.empty_like(places)
        for i, part in enumerate(self.parts):
            own = dataset == i
            if own.any():
                earlier = repetition[own] * int(self.shares[i] * len(self._schedule)) + self._earlier[place[own]]
                windows[own] = part.order(earlier, seeds[i], shuffle) * len(self.parts) + i
        return windows

    def read(self, window: int, inputs: np.ndarray, targets: np.ndarray, documents: np.ndarray | None = None) -> None:
        """Fill `inputs`, `targets` and `documents`, (T,) int64, with one window."""
        own, i = divmod(window, len(self.parts))
        self.parts[i].read(own, inputs, targets, documents)

    def count(self, windows: np.ndarray) -> int:
        """Return the number of targets in these windows (k,)."""
        own, i = np.divmod(windows, len(self.parts))
        return sum(part.count(own[i == n]) for n, part in enumerate(self.parts))
