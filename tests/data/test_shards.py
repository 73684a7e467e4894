"""Shards: llm.c's format in both directions, reads across shards, damage, many shards, and interruptions."""

import dataclasses
import json
import os
import resource
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from data.shards import HEADER_BYTES, PROGRESS_FILE, DatasetMeta, ShardWriter, open_split, read_meta

EOT = 50256


def by_hand(path: Path, tokens: np.ndarray, magic: int = 20240520, version: int = 1, count: int | None = None) -> None:
    """Write a shard from llm.c's description of the format, without the code under test."""
    header = struct.pack("<256i", magic, version, len(tokens) if count is None else count, *[0] * 253)
    path.write_bytes(header + tokens.astype("<u2").tobytes())


def plain_reader(path: Path) -> np.ndarray:
    """Read a shard as the data loaders of llm.c and build-nanogpt do, without the code under test."""
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(256 * 4), dtype=np.int32)
        assert header[0] == 20240520
        assert header[1] == 1
        tokens = np.frombuffer(file.read(), dtype=np.uint16)
    assert len(tokens) == header[2]
    return tokens


def some_tokens(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, EOT, n, dtype=np.uint16)
    tokens[rng.random(n) < 0.01] = EOT
    tokens[0] = EOT
    return tokens


def write_dataset(directory: Path, tokens: np.ndarray, shard_tokens: int = 1000) -> DatasetMeta:
    writer = ShardWriter(directory, "train", shard_tokens, EOT)
    for part in np.array_split(tokens, 7):
        writer.write(part)
    shards = writer.finish()
    meta = DatasetMeta(
        tokenizer="gpt2",
        tokenizer_sha256="0" * 64,
        vocab_size=50257,
        source="test",
        revision="1",
        filter="",
        validation="",
        shard_tokens=shard_tokens,
        tokens={"train": len(tokens)},
        documents={"train": int((tokens == EOT).sum())},
        text_bytes={"train": 0},
        shards={"train": shards},
    )
    meta.save(directory)
    return meta


def test_format_is_that_of_llm_c_in_both_directions(tmp_path: Path) -> None:
    tokens = some_tokens(2500)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    write_dataset(ours, tokens)
    files = sorted(ours.glob("*.bin"))
    assert [f.name for f in files] == [f"train_00000{i}.bin" for i in range(3)]
    np.testing.assert_array_equal(np.concatenate([plain_reader(f) for f in files]), tokens)

    by_hand(theirs / "fineweb_train_000001.bin", tokens[:1500])
    by_hand(theirs / "fineweb_train_000002.bin", tokens[1500:])
    by_hand(theirs / "fineweb_val_000000.bin", tokens[:10])
    assert read_meta(theirs) is None
    for split, expected in (("train", tokens), ("val", tokens[:10])):
        opened = open_split(theirs, split)
        out = np.empty(len(expected), np.uint16)
        opened.read(0, out)
        np.testing.assert_array_equal(out, expected)


def test_names_of_llm_c_without_a_number_are_found(tmp_path: Path) -> None:
    tokens = some_tokens(100)
    for name in ("tiny_shakespeare_train", "tiny_shakespeare_val", "train", "tiny_retrain"):
        by_hand(tmp_path / f"{name}.bin", tokens)
    assert [path.name for path in open_split(tmp_path, "train").paths] == ["tiny_shakespeare_train.bin"]
    assert [path.name for path in open_split(tmp_path, "val").paths] == ["tiny_shakespeare_val.bin"]


def test_reads_equal_slices_at_all_positions(tmp_path: Path) -> None:
    tokens = some_tokens(3777)
    write_dataset(tmp_path, tokens, shard_tokens=500)
    split = open_split(tmp_path, "train")
    assert split.n_tokens == 3777
    rng = np.random.default_rng(1)
    spans = [(0, 3777), (499, 2), (500, 500), (3776, 1), (3777, 0), (0, 0)]
    spans += [(s, int(rng.integers(0, 3777 - s + 1))) for s in rng.integers(0, 3777, 200).tolist()]
    for start, n in spans:
        out = np.full(n, 7, np.uint16)
        split.read(start, out)
        np.testing.assert_array_equal(out, tokens[start : start + n])
    for start, n in ((-1, 2), (3770, 8)):
        with pytest.raises(ValueError, match="outside the train split of 3,777 tokens"):
            split.read(start, np.empty(n, np.uint16))
    with pytest.raises(ValueError, match="contiguous 1-D uint16"):
        split.read(0, np.empty(4, np.int64))


def test_meta_round_trip_and_counts(tmp_path: Path) -> None:
    tokens = some_tokens(2500)
    meta = write_dataset(tmp_path, tokens)
    assert read_meta(tmp_path) == meta
    assert sum(s.documents for s in meta.shards["train"]) == (tokens == EOT).sum()
    open_split(tmp_path, "train").verify()


def test_verify_names_the_damaged_shard(tmp_path: Path) -> None:
    write_dataset(tmp_path, some_tokens(2500))
    with open(tmp_path / "train_000001.bin", "r+b") as file:
        file.seek(HEADER_BYTES + 100)
        file.write(b"\x01")
    with pytest.raises(ValueError, match=r"train_000001\.bin is damaged"):
        open_split(tmp_path, "train").verify()


def test_errors_for_bad_shards_say_what_is_wrong(tmp_path: Path) -> None:
    tokens = some_tokens(100)
    shard = tmp_path / "train_000000.bin"
    cases = [
        (lambda: by_hand(shard, tokens, magic=20240801), "begins with 20240801, expected 20240520"),
        (lambda: by_hand(shard, tokens, version=7), "format version 7, expected 1"),
        (lambda: by_hand(shard, tokens, count=101), "truncated: its header says 101 tokens"),
        (lambda: by_hand(shard, tokens, count=99), "too long: its header says 99 tokens"),
        (lambda: by_hand(shard, tokens, count=-5), "-5 tokens"),
        (lambda: shard.write_bytes(b"\x00" * 10), "truncated: 10 bytes"),
        (lambda: by_hand(shard, tokens[:0]), "hold no tokens"),
    ]
    for make, message in cases:
        make()
        with pytest.raises(ValueError, match=message):
            open_split(tmp_path, "train")


def test_errors_for_missing_files_say_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python -m data\.prepare fineweb-edu-10b --out .*fineweb-edu-10b"):
        open_split(tmp_path / "fineweb-edu-10b", "train")
    by_hand(tmp_path / "train_000000.bin", some_tokens(10))
    with pytest.raises(FileNotFoundError, match="no val shards"):
        open_split(tmp_path, "val")
    (tmp_path / PROGRESS_FILE).write_text("{}")
    with pytest.raises(ValueError, match=r"not complete: run the `python -m data\.prepare` command again"):
        open_split(tmp_path, "train")


def test_shards_and_meta_must_agree(tmp_path: Path) -> None:
    tokens = some_tokens(2500)
    meta = write_dataset(tmp_path, tokens)
    by_hand(tmp_path / "train_000009.bin", tokens)
    with pytest.raises(ValueError, match=r"train_000009\.bin is not in meta\.json"):
        open_split(tmp_path, "train")
    (tmp_path / "train_000009.bin").unlink()
    by_hand(tmp_path / "train_000002.bin", tokens[:42])
    with pytest.raises(ValueError, match=r"holds 42 tokens, meta\.json says 500"):
        open_split(tmp_path, "train")
    (tmp_path / "train_000002.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks train_000002\.bin"):
        open_split(tmp_path, "train")
    raw = dataclasses.asdict(meta)
    (tmp_path / "meta.json").write_text(json.dumps({**raw, "surprise": 1}))
    with pytest.raises(ValueError, match="not a dataset description"):
        read_meta(tmp_path)
    (tmp_path / "meta.json").write_text("[1, 2")
    with pytest.raises(ValueError, match="not a dataset description"):
        read_meta(tmp_path)


def test_errors_for_a_shard_that_vanishes_or_shrinks_name_it(tmp_path: Path) -> None:
    write_dataset(tmp_path, some_tokens(2500))
    split = open_split(tmp_path, "train")
    out = np.empty(10, np.uint16)
    os.truncate(tmp_path / "train_000001.bin", HEADER_BYTES + 20)
    with pytest.raises(OSError, match=r"train_000001\.bin: it ends at byte 1,044"):
        split.read(1005, out)
    (tmp_path / "train_000002.bin").unlink()
    with pytest.raises(OSError, match=r"train_000002\.bin: No such file"):
        split.read(2100, out)
    split.read(3, out)


def test_a_thousand_shards_of_a_hundred_billion_tokens(tmp_path: Path) -> None:
    per_shard = 100_000_000
    header = struct.pack("<256i", 20240520, 1, per_shard, *[0] * 253)
    for i in range(1000):
        path = tmp_path / f"train_{i:06d}.bin"
        path.write_bytes(header)
        os.truncate(path, HEADER_BYTES + 2 * per_shard)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    try:
        begin = time.perf_counter()
        split = open_split(tmp_path, "train")
        seconds = time.perf_counter() - begin
        out = np.empty(1025, np.uint16)
        for i in range(1000):
            split.read(i * per_shard + per_shard - 512 if i < 999 else i * per_shard, out)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert split.n_tokens == 100_000_000_000
    assert seconds < 1.0


def test_restore_from_every_state_ends_with_the_same_bytes(tmp_path: Path) -> None:
    tokens = some_tokens(2345)
    parts = np.array_split(tokens, 23)
    whole = tmp_path / "whole"
    whole.mkdir()
    write_dataset(whole, tokens, shard_tokens=300)
    expected = {f.name: f.read_bytes() for f in whole.glob("*.bin")}

    for stop in range(1, 23):
        for lost in (0, 1, 4):  # number of writes after the state was saved, which `restore` must undo
            directory = tmp_path / f"{stop}-{lost}"
            directory.mkdir()
            first = ShardWriter(directory, "train", 300, EOT)
            for part in parts[:stop]:
                first.write(part)
            first.flush()
            state = json.loads(json.dumps(first.state()))
            for part in parts[stop : stop + lost]:
                first.write(part)
            first.flush()
            second = ShardWriter(directory, "train", 300, EOT)
            second.restore(state)
            for part in parts[stop:]:
                second.write(part)
            second.finish()
            assert {f.name: f.read_bytes() for f in directory.iterdir()} == expected
