"""Aligned windows: every token once, documents whole, the same packing as a plain slow one, and one index for all."""

import itertools
import multiprocessing
import resource

import numpy as np
import pytest
import torch

from data import aligned
from data.aligned import AlignedWindows, document_groups, pack
from data.loader import IGNORE_INDEX, Loader, permute
from data.shards import open_split
from tests.data.test_loader import write_shard

T, EOT, VOCAB = 32, 0, 5000


def make_tokens(lengths, seed=0):
    """Return documents of these lengths one after the other: end-of-text, then random ids."""
    chosen = np.random.default_rng(seed)
    return np.concatenate([[EOT, *chosen.integers(1, VOCAB, n - 1)] for n in lengths])


@pytest.fixture
def lengths():
    return [*np.random.default_rng(1).geometric(0.05, 400).tolist(), 1, 1, T, T + 1, 5 * T, 7 * T + 3]


@pytest.fixture
def dataset(tmp_path, lengths):
    tokens = make_tokens(lengths)
    for i, part in enumerate(np.array_split(tokens, 3)):
        write_shard(tmp_path / f"train_{i:06d}.bin", part)
    return tmp_path


def open_windows(dataset, sequence_length=T):
    return AlignedWindows(open_split(dataset, "train"), sequence_length, VOCAB, EOT)


def test_the_index_is_closed_when_its_windows_are_not_used_anymore(dataset):
    windows = open_windows(dataset)
    file = windows._file
    del windows
    assert file.closed


def read_windows(windows):
    """Return all windows in order: inputs and targets (windows, T)."""
    rows = np.empty((2, len(windows), windows.sequence_length), np.int64)
    for w in range(len(windows)):
        windows.read(w, rows[0, w], rows[1, w])
    return rows


def slow_pack(bounds, T):
    """The rule of the documentation, written without any data structure."""
    windows, pieces, rests = [], [], set()
    for start, end in itertools.pairwise(bounds):
        while end - start > T:
            windows.append([(start, T)])
            start += T
            rests.add(start)
        pieces.append((start, end - start))
    while pieces:
        window, gap = [], T
        while gap and pieces:
            fitting = [piece for piece in pieces if piece[1] <= gap]
            # Of pieces of the same length, the one that became available last.
            if fitting:
                best = max(enumerate(pieces), key=lambda item: (item[1][1] <= gap, item[1][1], item[0]))[0]
                piece = pieces.pop(best)
            elif gap > T // 32:
                shortest = min(enumerate(pieces), key=lambda item: (item[1][1], -item[0]))[0]
                start, n = pieces.pop(shortest)
                piece = (start, gap)
                pieces.append((start + gap, n - gap))
                rests.add(start + gap)
            else:
                break
            window.append(piece)
            gap -= piece[1]
        windows.append([p for p in window if p[0] not in rests] + [p for p in window if p[0] in rests])
    return windows


@pytest.mark.parametrize("seed", range(6))
def test_packing_equals_a_plain_slow_one(seed):
    chosen = np.random.default_rng(seed)
    kinds = [chosen.integers(1, 3 * T, 150), chosen.integers(18, 22, 150), np.full(90, 20)]
    bounds = np.concatenate([[0], np.cumsum(kinds[seed % 3])]) + 7
    assert list(pack(bounds, T)) == slow_pack(bounds.tolist(), T)


def test_every_token_is_an_input_once_with_the_token_after_it_as_target(dataset, lengths):
    tokens = make_tokens(lengths)
    windows = open_windows(dataset)
    inputs, targets = read_windows(windows)
    counted = targets != IGNORE_INDEX
    pairs = sorted(zip(inputs[counted].tolist(), targets[counted].tolist(), strict=True))
    assert pairs == sorted(itertools.pairwise(tokens.tolist()))
    assert windows.count(np.arange(len(windows))) == len(tokens) - 1
    for w in range(len(windows)):
        assert windows.count(np.array([w])) == counted[w].sum()
        assert (inputs[w][~counted[w]] == 0).all()
    assert (~counted).mean() < 0.02


def test_documents_are_whole_and_begin_the_windows(dataset, lengths):
    tokens = make_tokens(lengths)
    starts = np.flatnonzero(tokens == EOT)
    windows = open_windows(dataset)
    inputs, _ = read_windows(windows)
    text = [row.tolist() for row in inputs]
    for start, n in zip(starts, lengths, strict=True):
        if 12 <= n <= T and start + n < len(tokens):  # long enough to be found in one place only
            document = tokens[start : start + n].tolist()
            assert any(row[i : i + n] == document for row in text for i in range(T - n + 1))
    # Only the middle of a document of more than T tokens begins a window otherwise.
    inside = sum(row[0] != EOT for row in text)
    assert inside <= sum((n - 1) // T for n in lengths)
    long = sum(n > T for n in lengths)
    assert f"{long:,} of {len(lengths):,} documents are longer than 32 tokens, 0 others are cut" in windows.summary
    assert f"{inside} windows begin inside a document" in windows.summary


def test_with_a_mask_each_piece_is_a_document(dataset):
    split = open_split(dataset, "train")
    windows = AlignedWindows(split, T, VOCAB, EOT, document_mask=True)
    plain = read_windows(open_windows(dataset))
    rows = np.empty((3, T), np.int64)
    for w in range(len(windows)):
        windows.read(w, *rows)
        assert np.array_equal(rows[:2], plain[:, w])
        borders = np.flatnonzero(np.diff(rows[2])) + 1
        # Where a document ends, the target is the end-of-text or the next token of a document that was cut.
        assert {*(np.flatnonzero(rows[0] == EOT) if rows[1, -1] != IGNORE_INDEX else [])} - {0} <= {*borders}
        assert (rows[2][rows[1] == IGNORE_INDEX] == -1).all()
        assert (rows[2][rows[1] != IGNORE_INDEX] >= 0).all()
        assert (np.diff(rows[2])[np.diff(rows[2]) > 0] == 1).all()


def test_documents_that_fit_nowhere_are_cut_instead_of_padded(tmp_path):
    write_shard(tmp_path / "train_000000.bin", make_tokens([20] * 100))
    windows = open_windows(tmp_path)
    assert len(windows) == 63  # 1,999 targets in windows of 32; with one document each it would be 100
    assert "0 of 100 documents are longer than 32 tokens, " in windows.summary


def test_order_and_resume_on_other_numbers_of_processes(dataset):
    windows = open_windows(dataset)
    n, B = len(windows), 6
    rows = torch.from_numpy(read_windows(windows))
    expected = [w for epoch in range(3) for w in permute(np.arange(n), n, 9, epoch).tolist()]
    step = 0
    for world_size, micro_batch in ((1, 6), (3, 1), (2, 2), (4, 3)):
        options = {"batch_tokens": B * T, "micro_batch": micro_batch, "seed": 9, "start_step": step}
        loaders = [
            Loader(open_windows(dataset), rank=rank, world_size=world_size, **options) for rank in range(world_size)
        ]
        for _ in range(2 * n // B // 4):
            parts = [m for loader in loaders for m in next(loader) if m.weight]
            chosen = expected[step * B : (step + 1) * B]
            assert torch.equal(torch.cat([m.inputs for m in parts]), rows[0, chosen])
            assert torch.equal(torch.cat([m.targets for m in parts]), rows[1, chosen])
            targets = [(m.targets != IGNORE_INDEX).sum().item() for m in parts]
            assert [m.weight for m in parts] == pytest.approx([t / sum(targets) for t in targets])
            step += 1
        for loader in loaders:
            loader.close()


def test_memory_stays_constant_over_many_batches(dataset):
    loader = Loader(open_windows(dataset), batch_tokens=6 * T, micro_batch=6, seed=1)
    for _ in range(100):
        next(loader)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3_000):
        next(loader)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2048  # KiB on Linux, bytes on macOS
    loader.close()


def test_groups_cover_all_documents_and_bound_what_is_packed_at_once(dataset, lengths, monkeypatch):
    expected = np.append(np.flatnonzero(make_tokens(lengths) == EOT), sum(lengths) - 1)
    for tokens, documents in ((100, 1 << 17), (1 << 24, 7), (64, 3)):
        monkeypatch.setattr(aligned, "GROUP_TOKENS", tokens)
        monkeypatch.setattr(aligned, "GROUP_DOCUMENTS", documents)
        groups = list(document_groups(open_split(dataset, "train"), EOT))
        assert max(len(group) - 1 for group in groups) <= min(documents, tokens + 1)
        assert [0, *(i for group in groups for i in group[1:])] == expected.tolist()
        assert all(a[-1] == b[0] for a, b in itertools.pairwise(groups))


def _open_and_describe(dataset):
    return open_windows(dataset).summary


def test_index_is_made_once_and_again_for_another_text_or_after_damage(dataset, capsys):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert len(set(pool.map(_open_and_describe, [dataset] * 3))) == 1
    path = dataset / f"aligned-train-{T}.index"
    before = path.read_bytes()
    capsys.readouterr()
    open_windows(dataset)
    assert "packing" not in capsys.readouterr().err
    path.write_bytes(before[:-8])
    open_windows(dataset)
    assert "packing the documents" in capsys.readouterr().err
    assert path.read_bytes() == before
    write_shard(dataset / "train_000002.bin", make_tokens([9] * 50))
    open_windows(dataset)
    assert path.read_bytes() != before
    assert not list(dataset.glob("*.partial"))


def test_error_where_the_index_cannot_be_written_says_what_to_do(dataset, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(aligned.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match=r"cannot write .*aligned-train-32\.index: No space left .* make room"):
        open_windows(dataset)


def test_error_for_a_token_outside_the_vocabulary_names_the_shard(dataset):
    windows = AlignedWindows(open_split(dataset, "train"), T, 10, EOT)
    with pytest.raises(ValueError, match=r"train_00000\d\.bin.*vocabulary of 10"):
        read_windows(windows)
