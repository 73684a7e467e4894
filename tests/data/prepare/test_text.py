"""Text files of every format: the same shards from each, and chunks that do not change the tokens."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data.prepare.shakespeare import read_plays
from data.prepare.source import ParseOptions, SourceFile
from data.prepare.text import read_chunks
from data.shards import read_meta
from data.tokenizer import load_tokenizer


def test_every_format_gives_the_same_shards(run, contents, jsonl, documents, tmp_path):
    def lines(path: Path) -> bytes:
        return "".join(json.dumps({"body": t, "n": 1}, ensure_ascii=False) + "\r\n" for t in documents).encode()

    def parquet(path: Path, **options: object) -> bytes:
        plain = path.with_suffix(".tmp")
        pyarrow.parquet.write_table(pyarrow.table({"n": range(len(documents)), "body": documents}), plain, **options)
        return plain.read_bytes()

    half = len(lines(tmp_path)) // 2
    made: dict[str, Callable[[Path], bytes]] = {
        "a.jsonl": lines,
        "a.jsonl.gz": lambda p: gzip.compress(lines(p)[:half]) + gzip.compress(lines(p)[half:]),
        "a.jsonl.zst": lambda p: zstandard.compress(lines(p)[:half]) + zstandard.compress(lines(p)[half:]),
        "a.parquet": lambda p: parquet(p, row_group_size=100),
        "b.parquet": lambda p: parquet(p, row_group_size=10_000, compression="zstd"),
        "a.parquet.gz": lambda p: gzip.compress(parquet(p, row_group_size=77)),
    }
    # The kind of tokenizer does not matter here; "char" is the fastest to make.
    options = ("--val-fraction", 0.1, "--shard-tokens", 60_000, "--tokenizer", "char", "--text-key", "body")
    run("text", jsonl, "--out", tmp_path / "expected", *options[:-2])
    expected = contents(tmp_path / "expected", meta=False)
    for name, make in made.items():
        path = tmp_path / name
        path.write_bytes(make(path))
        run("text", path, "--out", tmp_path / f"{name}-out", *options)
        assert contents(tmp_path / f"{name}-out", meta=False) == expected, name

    for suffix, compress in ((".txt", bytes), (".txt.gz", gzip.compress), (".txt.zst", zstandard.compress)):
        directory = tmp_path / f"files{suffix}"
        directory.mkdir()
        for i, text in enumerate(documents):
            (directory / f"{i:05d}{suffix}").write_bytes(compress(text.encode()))
        for which, pattern in (("dir", directory), ("glob", directory / f"*{suffix}")):
            out = tmp_path / f"{suffix}-{which}"
            run("text", pattern, "--out", out, *options[:-2])
            assert contents(out, meta=False) == expected, suffix


def test_large_row_groups_are_cut_into_chunks(run, contents, jsonl, documents, tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), path)
    options = ("--val-fraction", 0.1, "--shard-tokens", 20_000)
    run("text", path, "--out", tmp_path / "whole", *options)
    monkeypatch.setattr("data.prepare.text.ROW_GROUP_BYTES", 10_000)
    run("text", path, "--out", tmp_path / "chunks", *options)
    assert contents(tmp_path / "chunks") == contents(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["gpt2", "bpe:300", "char"])
def test_cutting_a_long_document_does_not_change_its_tokens(run, read_all, kind, tmp_path, capsys):
    plays = read_plays()
    text = "\n".join(plays[name] for name in ("hamlet", "othello")) + " " * 7_000 + "\n\n \t\nend"
    for i, document in enumerate((text, plays["cymbeline"])):
        (tmp_path / f"{i}.txt").write_text(document)
    out = tmp_path / "out"
    # Small shards make small chunks.
    run("text", tmp_path, "--out", out, "--tokenizer", kind, "--shard-tokens", 30_000, "--val-fraction", 0)
    tokenizer = load_tokenizer(out)
    expected = [tokenizer.eot, *tokenizer.encode(text), tokenizer.eot, *tokenizer.encode(plays["cymbeline"])]
    assert read_all(out, "train").tolist() == expected
    meta = read_meta(out)
    assert meta is not None
    assert meta.documents["train"] == 2
    assert meta.skipped["longer_than_shard"] == 2
    message = "documents longer than a shard, which continue in the next one (to avoid this, raise --shard-tokens): 2"
    assert capsys.readouterr().out.count(message) == 1


@pytest.mark.parametrize("text", ["A paragraph in a line.\n\n", "Абзац в одну строку.\n", "一行文字\r\n\r\n"])
def test_text_of_any_script_can_be_cut(run, read_all, text, tmp_path):
    text = text * (400_000 // len(text.encode())) + "end"
    (tmp_path / "a.txt").write_bytes(text.encode())
    file = SourceFile(str(tmp_path / "a.txt"), (tmp_path / "a.txt").stat().st_size)
    assert len(list(read_chunks(file, 60_000, ParseOptions()))) >= 6
    run("text", tmp_path / "a.txt", "--out", tmp_path / "o", "--shard-tokens", 30_000, "--val-fraction", 0)
    tokenizer = load_tokenizer(tmp_path / "o")
    assert read_all(tmp_path / "o", "train").tolist() == [tokenizer.eot, *tokenizer.encode(text)]


def test_zstd_frames_with_a_long_window_are_read(run, contents, jsonl, tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=28, compression_level=1)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(jsonl.read_bytes()) + compressor.flush())
    for name, path in (("expected", jsonl), ("long", tmp_path / "a.jsonl.zst")):
        run("text", path, "--out", tmp_path / name, "--tokenizer", "char", "--val-fraction", 0)
    assert contents(tmp_path / "long", meta=False) == contents(tmp_path / "expected", meta=False)


def test_separated_text(run, read_documents, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\n\nlines\n<|endoftext|>\n\n<|endoftext|>three\n")
    run("text", tmp_path / "a.txt", "--out", tmp_path / "o", "--separator", "<|endoftext|>", "--val-fraction", 0)
    assert read_documents(tmp_path / "o", "train") == ["one", "two\n\nlines", "three"]
    assert "empty documents skipped: 1" in capsys.readouterr().out
