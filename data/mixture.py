"""Train on several datasets in one run. Each dataset gives a fixed fraction of the windows, evenly spread over the run.

A schedule is a list of datasets: each place in the list stands for one window of the run. It has at most about 10,000
places, and each dataset has exactly its fraction of these places. After its last place, the schedule begins again.
Among the first n windows of a run, a dataset with fraction f has f n windows, rounded up or down. The window at a place
in the run depends only on the place, the seed, the datasets and their weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from data.loader import TrainingWindows

# Approximate maximum length of a schedule. Fractions that need a longer schedule are rounded to multiples of
# 1 / MAX_SCHEDULE, and then divided by their sum.
MAX_SCHEDULE = 10_000


def exact_fractions(weights: Sequence[float]) -> list[Fraction]:
    """Return weights (above 0) as fractions of their sum, with a common denominator of about MAX_SCHEDULE at most."""
    exact = [Fraction(str(weight)) for weight in weights]  # from decimal text, so that 0.1 is exactly 1/10
    fractions = [weight / sum(exact) for weight in exact]
    if math.lcm(*(fraction.denominator for fraction in fractions)) > MAX_SCHEDULE:
        rounded = [max(1, round(fraction * MAX_SCHEDULE)) for fraction in fractions]
        fractions = [Fraction(n, sum(rounded)) for n in rounded]
    return fractions


def make_schedule(fractions: Sequence[Fraction]) -> np.ndarray:
    """Return the index of the dataset at each place of the schedule: (n,).

    n is the smallest length that gives each dataset a whole number of places. Here places, and the windows of each
    dataset, are counted from 1. Window k of a dataset with fraction f may be put at place p if k - 1 < f p, and must be
    put at place k / f or earlier (its deadline). Each place takes the window with the earliest deadline of those that
    may be put there (the quota method of Balinski & Young 1975).
    """
    n = math.lcm(*(fraction.denominator for fraction in fractions))
    counts = [int(fraction * n) for fraction in fractions]
    taken = [0] * len(fractions)
    schedule = []
    for place in range(1, n + 1):
        waiting = [i for i, count in enumerate(counts) if taken[i] * n < count * place]
        first = min(waiting, key=lambda i: (taken[i] + 1) / counts[i])
        taken[first] += 1
        schedule.append(first)
    return np.array(schedule)


class MixtureWindows(TrainingWindows):
    """The windows of several datasets. With n datasets, window w of dataset i has the number w * n + i.

    Args:
        parts: the windows of each dataset, all of the same length T.
        weights: a number above 0 for each dataset; only their ratios matter.

    Attributes:
        fractions: for each dataset, its fraction of the windows of a run.
    """

    def __init__(self, parts: Sequence[TrainingWindows], weights: Sequence[float]) -> None:
        self.parts, self.sequence_length = parts, parts[0].sequence_length
        self.document_mask = parts[0].document_mask
        self.fractions = exact_fractions(weights)
        self._schedule = make_schedule(self.fractions)
        # For each place of the schedule, the number of earlier places in the schedule with the same dataset.
        self._earlier = np.zeros_like(self._schedule)
        for i in range(len(parts)):
            own = self._schedule == i
            self._earlier[own] = np.arange(own.sum())
        described = [f"{part.fingerprint} {fraction}" for part, fraction in zip(parts, self.fractions, strict=True)]
        self.fingerprint = hashlib.sha256("\n".join(described).encode()).hexdigest()
        self.source = "; ".join(part.source for part in parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def order(self, places: np.ndarray, seed: int, shuffle: bool) -> np.ndarray:
        """Return the numbers of the windows at the consecutive `places`, (k,).

        Each dataset has its own epochs: it begins a new epoch when all its windows have been read.
        """
        # Each dataset has its own seed: datasets of the same length would otherwise be shuffled in the same order.
        seeds = np.random.SeedSequence([seed, len(self.parts)]).generate_state(len(self.parts)).tolist()
        repetition, place = np.divmod(places, len(self._schedule))
        dataset = self._schedule[place]
        windows = np.empty_like(places)
        for i, part in enumerate(self.parts):
            own = dataset == i
            if own.any():
                earlier = repetition[own] * int(self.fractions[i] * len(self._schedule)) + self._earlier[place[own]]
                windows[own] = part.order(earlier, seeds[i], shuffle) * len(self.parts) + i
        return windows

    def read(self, window: int, inputs: np.ndarray, targets: np.ndarray, documents: np.ndarray | None = None) -> None:
        """Fill `inputs`, `targets` and `documents`, each (T,) int64, with one window."""
        own, i = divmod(window, len(self.parts))
        self.parts[i].read(own, inputs, targets, documents)

    def count(self, windows: np.ndarray) -> int:
        """Return how many targets are in the windows with the numbers `windows`, (k,), not counting IGNORE_INDEX."""
        own, i = np.divmod(windows, len(self.parts))
        return sum(part.count(own[i == n]) for n, part in enumerate(self.parts))
