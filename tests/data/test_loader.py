"""The loader: its order depends on the seed alone, each epoch has every window once, memory stays constant."""

import resource
import threading

import numpy as np
import pytest
import torch

from data.loader import IGNORE_INDEX, Loader, TokenWindows, permute, split_evenly, validation_batches
from data.shards import HEADER_BYTES, MAGIC, VERSION, open_split

T = 16


def write_shard(path, tokens):
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


@pytest.fixture
def dataset(tmp_path):
    """1,003 tokens whose ids are their positions, in shards that end inside windows."""
    tokens = np.arange(1003)
    for i, part in enumerate(np.split(tokens, [201, 555])):
        write_shard(tmp_path / f"train_{i:06d}.bin", part)
    write_shard(tmp_path / "val_000000.bin", tokens[:100])
    return tmp_path


def make(dataset, **changes):
    options = {"batch_tokens": 8 * T, "sequence_length": T, "micro_batch": 8, "vocab_size": 1003, "seed": 5} | changes
    shift = options.pop("shift", False)
    split = open_split(dataset, "train")
    windows = TokenWindows(split, options.pop("sequence_length"), options.pop("vocab_size"), shift=shift)
    return Loader(windows, **options)


def global_batch(loader_step):
    """Join the micro-batches of one step to a pair (inputs, targets) of (rows, T), without those of weight 0."""
    rows = [m for m in loader_step if m.weight]
    return torch.cat([m.inputs for m in rows]), torch.cat([m.targets for m in rows])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 62, 64, 1000, 4097])
def test_permute_is_a_permutation_that_changes_with_seed_and_epoch(n):
    orders = [permute(np.arange(n), n, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    for order in orders:
        assert sorted(order) == list(range(n))
    if n >= 62:
        for a, b in [(0, 1), (0, 2), (1, 2)]:
            assert (orders[a] != orders[b]).mean() > 0.9
        # Place and value are not correlated, within 5 standard errors.
        assert abs(np.corrcoef(orders[0], np.arange(n))[0, 1]) < 5 / np.sqrt(n)


def test_permute_of_a_large_range_stays_inside_and_has_no_duplicates():
    n = 97_656_249  # 100B tokens in windows of 1,024
    order = permute(np.arange(100_000), n, 1337, 3)
    assert order.min() >= 0
    assert order.max() < n
    assert len(np.unique(order)) == 100_000
    assert abs(order.mean() / n - 0.5) < 0.01


def test_each_epoch_has_every_window_once_in_a_new_order(dataset):
    loader = make(dataset)
    n = len(loader.windows)
    assert n == 62
    rows = torch.cat([global_batch(next(loader))[0] for _ in range(16)])  # 128 windows: two epochs and four windows
    starts = rows[:, 0]
    assert sorted(starts[:n].tolist()) == [w * T for w in range(n)]
    assert sorted(starts[n : 2 * n].tolist()) == [w * T for w in range(n)]
    assert starts[:n].tolist() != starts[n : 2 * n].tolist()
    assert torch.equal(rows, starts[:, None] + torch.arange(T))  # complete windows, also across the end of a shard
    loader.close()


def test_targets_are_the_tokens_that_follow(dataset):
    loader = make(dataset)
    inputs, targets = global_batch(next(loader))
    assert torch.equal(targets, inputs + 1)
    loader.close()


def test_without_shuffling_the_text_is_read_in_order(dataset):
    loader = make(dataset, shuffle=False)
    inputs = torch.cat([global_batch(next(loader))[0] for _ in range(7)])
    assert torch.equal(inputs.flatten(), torch.arange(7 * 8 * T))
    loader.close()


def test_shifted_windows_are_cut_elsewhere_in_each_epoch_and_resume_on_other_ranks(dataset):
    n = (1003 - T) // T  # windows that fit with any shift
    starts = []
    for epoch in range(5):
        offset = int(epoch * 0.6180339887498949 % 1 * T)
        starts += [w * T + offset for w in permute(np.arange(n), n, 5, epoch)]
    assert len({start % T for start in starts}) == 5
    step = 0
    for world_size in (1, 2, 3):
        ranks = [make(dataset, shift=True, rank=r, world_size=world_size, start_step=step) for r in range(world_size)]
        for _ in range(6):
            parts = [global_batch(next(rank)) for rank in ranks]
            inputs, targets = (torch.cat([part[side] for part in parts]) for side in (0, 1))
            expected = torch.tensor(starts[8 * step : 8 * step + 8])[:, None] + torch.arange(T)
            assert torch.equal(inputs, expected)
            assert torch.equal(targets, inputs + 1)
            step += 1
        for rank in ranks:
            rank.close()


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 3), (1, 1), (2, 8), (2, 3), (3, 2), (3, 1), (8, 1)])
def test_the_global_batch_is_the_same_on_any_number_of_ranks_and_any_micro_batch(dataset, world_size, micro_batch):
    whole = make(dataset)
    ranks = [make(dataset, rank=r, world_size=world_size, micro_batch=micro_batch) for r in range(world_size)]
    for _ in range(10):
        expected = global_batch(next(whole))
        steps = [next(rank) for rank in ranks]
        assert len({len(step) for step in steps}) == 1  # FSDP needs the same number on every rank
        assert max(len(m.inputs) for step in steps for m in step) <= micro_batch
        assert sum(m.weight for step in steps for m in step) == pytest.approx(1, abs=1e-12)
        assert all(m.weight == pytest.approx(len(m.inputs) / 8) for step in steps for m in step if m.weight)
        for side in (0, 1):
            assert torch.equal(torch.cat([global_batch(step)[side] for step in steps]), expected[side])
    for loader in (whole, *ranks):
        loader.close()


def test_rank_with_fewer_windows_than_micro_batches_gets_one_of_weight_0(dataset):
    last = make(dataset, batch_tokens=5 * T, micro_batch=1, rank=0, world_size=2)  # the ranks have 2 and 3 windows
    step = next(last)
    assert [m.weight for m in step].count(0) == 1
    assert all((m.targets == IGNORE_INDEX).all() for m in step if m.weight == 0)
    last.close()


def test_with_a_mask_batches_say_which_document_each_input_belongs_to(tmp_path):
    documents = [[0, *[i] * (i % 23)] for i in range(1, 60)]
    tokens = np.concatenate(documents)
    write_shard(tmp_path / "train_000000.bin", tokens)
    write_shard(tmp_path / "val_000000.bin", tokens)
    of_each = np.cumsum(tokens == 0)

    def make_windows(split, **options):
        return TokenWindows(open_split(tmp_path, split), T, 60, mask_eot=0, **options)

    loaders = [
        Loader(make_windows("train"), batch_tokens=5 * T, micro_batch=1, seed=0, shuffle=False, rank=r, world_size=2)
        for r in range(2)
    ]
    found = [torch.cat([m.documents for loader in loaders for m in next(loader) if m.weight]) for _ in range(6)]
    for loader in loaders:
        loader.close()
    found.append(
        torch.cat([m.documents for m in validation_batches(make_windows("val", tokens=30 * T), micro_batch=4)])
    )
    for rows, first in zip(found, [*range(0, 30 * T, 5 * T), 0], strict=True):
        for i, row in enumerate(rows):
            expected = of_each[first + i * T : first + (i + 1) * T]
            assert torch.equal(row.diff(), torch.from_numpy(np.diff(expected)))


def test_one_integer_is_enough_to_resume(dataset):
    whole, later = make(dataset), make(dataset, start_step=5)
    for _ in range(5):
        next(whole)
    for _ in range(8):
        assert torch.equal(global_batch(next(whole))[0], global_batch(next(later))[0])
    assert whole.step == later.step == 13
    whole.close()
    later.close()


def test_order_never_changes():
    """These numbers must not change: a resumed run would get other batches than before."""
    assert permute(np.arange(8), 1000, 1337, 0).tolist() == [846, 504, 693, 930, 290, 438, 328, 733]


def test_memory_and_buffers_stay_constant_over_10_000_batches(dataset):
    loader = make(dataset)
    buffers = set()
    for _ in range(100):
        buffers.add(next(loader)[0].inputs.data_ptr())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(10_000):
        buffers.add(next(loader)[0].inputs.data_ptr())
    assert len(buffers) <= 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2048  # KiB on Linux, bytes on macOS
    loader.close()


def test_closed_loader_leaves_no_thread(dataset):
    loader = make(dataset)
    next(loader)
    loader.close()
    assert not any(thread.name == "loader" for thread in threading.enumerate())


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize(("tokens", "counted"), [(48, 48), (50, 50), (10_000, 99)])
def test_validation_has_each_target_once_on_any_number_of_ranks(dataset, world_size, tokens, counted):
    seen = []
    batches = []
    for rank in range(world_size):
        windows = TokenWindows(open_split(dataset, "val"), T, 1003, tokens=tokens)
        mine = list(validation_batches(windows, micro_batch=2, rank=rank, world_size=world_size))
        batches.append(len(mine))
        for batch in mine:
            valid = batch.targets != IGNORE_INDEX
            assert batch.weight == pytest.approx(valid.sum().item() / counted, abs=1e-12)
            assert torch.equal(batch.inputs[valid] + 1, batch.targets[valid])
            seen += batch.targets[valid].tolist()
    assert seen == list(range(1, counted + 1))
    assert len(set(batches)) == 1


def test_error_for_a_token_outside_the_vocabulary_names_shard_and_position(dataset):
    loader = make(dataset, vocab_size=990)
    with pytest.raises(ValueError, match=r"token 99\d at position 99\d .*train_000002\.bin.*vocabulary of 990"):
        for _ in range(10):
            next(loader)


def test_error_for_a_deleted_shard_is_raised_by_next(dataset):
    loader = make(dataset, shuffle=False)
    next(loader)
    (dataset / "train_000002.bin").unlink()
    with pytest.raises(OSError, match="train_000002"):
        for _ in range(20):
            next(loader)


def test_error_for_a_shard_that_shrinks_while_open_names_it(dataset):
    loader = make(dataset, shuffle=False)
    with open(dataset / "train_000002.bin", "r+b") as file:
        file.truncate(HEADER_BYTES + 8)
    with pytest.raises(OSError, match="train_000002"):
        for _ in range(20):
            next(loader)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_tokens": 100}, "batch_tokens must be a multiple of sequence_length 16, got 100"),
        ({"batch_tokens": 2 * T, "world_size": 3}, "fewer than the 3 processes"),
        ({"sequence_length": 1024, "batch_tokens": 1024}, "1,003 tokens, not one window"),
    ],
)
def test_impossible_arguments_are_refused_with_the_numbers(dataset, changes, message):
    with pytest.raises(ValueError, match=message):
        make(dataset, **changes)


def test_split_evenly_covers_everything_once():
    for n in range(20):
        for world_size in range(1, 9):
            parts = [split_evenly(n, rank, world_size) for rank in range(world_size)]
            assert [i for part in parts for i in part] == list(range(n))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
