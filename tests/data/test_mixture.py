"""Mixtures: exact fractions, each dataset in epochs of its own, and an order that depends on seed and step alone."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from data.aligned import AlignedWindows
from data.loader import Loader, TokenWindows, permute
from data.mixture import MixtureWindows, exact_fractions, make_schedule
from data.shards import open_split
from tests.data.test_loader import write_shard

T = 8


@pytest.fixture
def datasets(tmp_path):
    """Three datasets of 300, 1,000 and 300 tokens, whose ids say which one they are from."""
    directories = []
    for i, n in enumerate((300, 1000, 300)):
        (tmp_path / str(i)).mkdir()
        write_shard(tmp_path / str(i) / "train_000000.bin", np.arange(n) + 1000 * i)
        directories.append(tmp_path / str(i))
    return directories


def mix(datasets, weights=(0.5, 0.2, 0.3)):
    """Open the mixture; each loader needs its own, because a split is not for several threads."""
    return MixtureWindows([TokenWindows(open_split(name, "train"), T, 3000) for name in datasets], weights)


def walk(windows, weights, seed, n):
    """Return the first tokens of the first n windows of a run, by a plain form that counts from the beginning."""
    lengths = [len(part) for part in windows.parts]
    seeds = np.random.SeedSequence([seed, len(weights)]).generate_state(len(weights)).tolist()
    total = sum(Fraction(str(weight)) for weight in weights)
    fractions = [Fraction(str(weight)) / total for weight in weights]
    taken, tokens = [0] * len(weights), []
    for place in range(1, n + 1):
        # Of the datasets that may have this place without exceeding their fraction, the one that is due first.
        i = min(
            (i for i in range(len(weights)) if taken[i] < place * fractions[i]),
            key=lambda i: (taken[i] + 1) / fractions[i],
        )
        epoch, window = divmod(taken[i], lengths[i])
        tokens.append(1000 * i + T * int(permute(np.array([window]), lengths[i], seeds[i], epoch)[0]))
        taken[i] += 1
    return tokens


WEIGHTS = [(0.5, 0.2, 0.3), (70, 29, 1), (1, 1, 1), (123_456_789, 7, 50_000_000)]


@pytest.mark.parametrize("B", [1, 7, 10])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_shares_are_exact_over_any_100_steps(datasets, weights, B):
    windows = mix(datasets, weights)
    parts = np.array([windows.order(step * B + np.arange(B), 3, True) % 3 for step in range(350)])
    fractions = np.array(weights) / sum(weights)
    for i in range(3):
        so_far = np.cumsum(parts.flatten() == i)
        assert (
            abs(so_far - fractions[i] * np.arange(1, len(so_far) + 1)).max() < 1.2
        )  # 0.2 for fractions that are rounded
        sums = np.convolve((parts == i).sum(axis=1), np.ones(100), "valid")
        if weights in WEIGHTS[:2]:
            assert (sums == round(100 * B * fractions[i])).all()
        assert abs(sums - 100 * B * fractions[i]).max() < 2


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_schedule_never_differs_from_a_share_by_a_whole_window(weights):
    fractions = exact_fractions(weights)
    schedule = make_schedule(fractions)
    assert len(schedule) <= 10_002
    for i, fraction in enumerate(fractions):
        so_far = np.cumsum(schedule == i)
        assert so_far[-1] == fraction * len(schedule)
        assert abs(so_far - float(fraction) * np.arange(1, len(schedule) + 1)).max() < 1


def test_batches_equal_a_plain_form_on_any_number_of_processes_after_any_resume(datasets):
    windows, B, step = mix(datasets), 9, 0
    expected = walk(windows, (0.5, 0.2, 0.3), 5, 36 * B)
    for world_size, micro_batch in ((1, 9), (2, 2), (4, 3), (1, 4)):
        options = {"batch_tokens": B * T, "micro_batch": micro_batch, "seed": 5, "start_step": step}
        loaders = [Loader(mix(datasets), rank=rank, world_size=world_size, **options) for rank in range(world_size)]
        for _ in range(9):
            parts = [m for loader in loaders for m in next(loader) if m.weight]
            inputs = torch.cat([m.inputs for m in parts])
            assert inputs[:, 0].tolist() == expected[step * B : step * B + B]
            assert torch.equal(inputs, inputs[:, :1] + torch.arange(T))
            assert torch.equal(torch.cat([m.targets for m in parts]), inputs + 1)
            assert sum(m.weight for m in parts) == pytest.approx(1)
            step += 1
        for loader in loaders:
            loader.close()


def test_every_dataset_is_read_in_epochs_of_its_own(datasets):
    windows = mix(datasets, (1, 2, 1))
    n = [len(part) for part in windows.parts]
    assert n == [37, 124, 37]
    seen = np.concatenate([windows.order(step * 8 + np.arange(8), 1, True) for step in range(40)])
    first = [w // 3 for w in seen.tolist() if w % 3 == 0]
    last = [w // 3 for w in seen.tolist() if w % 3 == 2]
    assert sorted(first[:37]) == list(range(37))
    assert first != last  # equally long, but not in the same order
    plain = np.concatenate([windows.order(step * 8 + np.arange(8), 1, False) for step in range(9)])
    assert [w // 3 for w in plain.tolist() if w % 3 == 1] == list(range(36))


def test_shifted_and_aligned_windows_can_be_mixed(datasets):
    splits = [open_split(name, "train") for name in datasets]
    parts = [TokenWindows(splits[0], T, 3000, shift=True), AlignedWindows(splits[1], T, 3000, 1500)]
    windows = MixtureWindows(parts, (3, 1))
    order = np.concatenate([windows.order(step * 8 + np.arange(8), 1, True) for step in range(30)])
    inputs, targets = np.empty((2, len(order), T), np.int64)
    for row, window in enumerate(order.tolist()):
        windows.read(window, inputs[row], targets[row])
    assert windows.count(order) == (targets >= 0).sum()
    from_first = inputs[:, 0] < 1000
    assert from_first.sum() == 180
    assert len(set((inputs[from_first, 0] % T).tolist())) == 180 // 36  # one shift in each epoch
