"""Text files of every format: the same shards from each, and chunks that do not change the tokens."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data.prepare.documents import Documents, parse
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

    # A text file holds no NUL bytes, and its line ends become \n: leave out the document that has both.
    plain = [text for text in documents if "\0" not in text]
    lines_of_plain = tmp_path / "plain.jsonl"
    lines_of_plain.write_text("".join(json.dumps({"text": text}) + "\n" for text in plain))
    run("text", lines_of_plain, "--out", tmp_path / "expected-plain", *options[:-2])
    expected = contents(tmp_path / "expected-plain", meta=False)
    for suffix, compress in ((".txt", bytes), (".txt.gz", gzip.compress), (".txt.zst", zstandard.compress)):
        directory = tmp_path / f"files{suffix}"
        directory.mkdir()
        for i, text in enumerate(plain):
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
def test_cutting_a_long_document_does_not_change_its_tokens(run, read_all, kind, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data.prepare.text.LONGEST_PIECE", 1 << 16)
    plays = read_plays()
    text = "\n".join(plays[name] for name in ("hamlet", "othello")) + " " * 7_000 + "\n\n \t\nend"
    for i, document in enumerate((text, plays["cymbeline"])):
        (tmp_path / f"{i}.txt").write_text(document)
    out = tmp_path / "out"
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


@pytest.mark.parametrize(
    "text",
    [
        "A paragraph in a line.\n\n",
        "Абзац в одну строку.\n",
        "一行文字\r\n\r\n",
        "हिन्दी\n",
        "ქართული\n\n",
        "ひらがな\r\n",
        "\u3000\u2003 \u2028x\u00a0y\nz\n \u3000",
        "words on one line ",
        "base64/of+nothing8",
        "没有换行，没有空格。",
    ],
)
def test_text_of_any_script_can_be_cut(run, read_all, text, tmp_path, monkeypatch):
    monkeypatch.setattr("data.prepare.text.LONGEST_PIECE", 60_000)
    text = text * (400_000 // len(text.encode())) + "end"
    (tmp_path / "a.txt").write_bytes(text.encode())
    file = SourceFile(str(tmp_path / "a.txt"), (tmp_path / "a.txt").stat().st_size)
    assert len(list(read_chunks(file, 60_000, ParseOptions()))) >= 6
    run("text", tmp_path / "a.txt", "--out", tmp_path / "o", "--shard-tokens", 30_000, "--val-fraction", 0)
    tokenizer = load_tokenizer(tmp_path / "o")
    assert read_all(tmp_path / "o", "train").tolist() == [tokenizer.eot, *tokenizer.encode(text.replace("\r\n", "\n"))]


@pytest.mark.parametrize("text", ["a" * 1_000_000, "文" * 300_000, "\r\n" * 500_000, "ქართული" * 50_000])
def test_text_without_a_place_to_cut_is_cut_anyway(run, read_all, text, tmp_path, monkeypatch):
    monkeypatch.setattr("data.prepare.text.LONGEST_PIECE", 100_000)
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    for name, largest in (("a.txt", 100_000), ("b.txt.gz", 100_000 + (1 << 20))):
        file = SourceFile(str(tmp_path / name), (tmp_path / name).stat().st_size)
        chunks = list(read_chunks(file, 50_000, ParseOptions()))
        assert max(chunk.size for chunk in chunks) <= largest
        assert b"".join(chunk.read() for chunk in chunks) == text.encode()
    run("text", tmp_path / "a.txt", "--out", tmp_path / "o", "--shard-tokens", 200_000, "--val-fraction", 0)
    tokenizer = load_tokenizer(tmp_path / "o")
    assert tokenizer.decode(read_all(tmp_path / "o", "train")[1:].tolist()) == text.replace("\r\n", "\n")


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


WINDOWS = {
    "utf-8": "\ufeffThe tide was out.\r\n\r\nThe boats lay still.\r\n".encode(),
    "carriage returns": b"The tide was out.\r\rThe boats lay still.\r",
    **{
        name: ("\ufeffThe tide was out.\r\n\r\nThe boats lay still.\r\n").encode(name)
        for name in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
    },
}


@pytest.mark.parametrize("name", WINDOWS)
def test_text_of_windows_gives_the_tokens_of_plain_text(run, read_documents, name, tmp_path, capsys):
    files = [(".txt", bytes)] + ([(".TXT.GZ", gzip.compress)] if name in ("utf-8", "utf-16-le") else [])
    for suffix, compress in files:
        path, out = tmp_path / f"a{suffix}", tmp_path / f"out{suffix}"
        path.write_bytes(compress(WINDOWS[name]))
        run("text", path, "--out", out, "--val-fraction", 0)
        assert read_documents(out, "train") == ["The tide was out.\n\nThe boats lay still.\n"]
        printed = capsys.readouterr().out
        assert f"line ends changed from \\r\\n or \\r to \\n: {3}" in printed
        run("text", path, "--out", tmp_path / f"separated{suffix}", "--separator", r"\n\n", "--val-fraction", 0)
        assert read_documents(tmp_path / f"separated{suffix}", "train") == ["The tide was out.", "The boats lay still."]


def test_carriage_returns_are_in_meta_only_where_there_were_some(run, tmp_path):
    for name, text in (("a", b"x\r\ny\r\n"), ("b", b"x\ny\n")):
        (tmp_path / f"{name}.txt").write_bytes(text)
        run("text", tmp_path / f"{name}.txt", "--out", tmp_path / name, "--val-fraction", 0)
    plain, windows = read_meta(tmp_path / "b"), read_meta(tmp_path / "a")
    assert plain.skipped == {"empty": 0, "invalid_utf8": 0, "longer_than_shard": 0}
    assert windows.skipped == {**plain.skipped, "carriage_returns": 2}


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_separators_are_found_wherever_a_file_is_cut(run, read_documents, end, tmp_path):
    documents = [f"Document {i}" + " of many words" * (i % 50) for i in range(2_000)]
    (tmp_path / "a.txt").write_bytes((end * 2).join(text.encode() for text in documents))
    out = tmp_path / "out"
    # Small shards make small chunks.
    options = ("--separator", r"\n\n", "--val-fraction", 0, "--shard-tokens", 5_000)
    run("text", tmp_path / "a.txt", "--out", out, *options)
    assert len(list((out).glob("train*"))) > 10
    assert read_documents(out, "train") == documents


@pytest.mark.parametrize("separator", ["\n---\n", "\n\n", "aba"])
def test_overlapping_separators_give_the_same_documents_wherever_a_file_is_cut(separator, tmp_path, monkeypatch):
    monkeypatch.setattr("data.prepare.text.SEARCH_BYTES", 30)
    monkeypatch.setattr("data.prepare.text.BLOCK_BYTES", 20)
    chosen = random.Random(0)
    overlapping = [separator[:n] for n in range(1, len(separator) + 1) if separator.endswith(separator[:n])]
    parts = [separator, *(separator[len(part) :] for part in overlapping), "\r\n", "text", "x" * 40]
    for _ in range(60):
        text = "".join(chosen.choices(parts, k=30))
        expected = text.replace("\r\n", "\n").split(separator)
        for name, compress in (("a.txt", bytes), ("a.txt.gz", gzip.compress)):
            (tmp_path / name).write_bytes(compress(text.encode()))
            file, options = (
                SourceFile(str(tmp_path / name), (tmp_path / name).stat().st_size),
                ParseOptions("", separator),
            )
            for limit in (1, 10, 50, 200):
                documents = Documents()
                for chunk in read_chunks(file, limit, options):
                    parse(chunk, options, documents)
                assert documents.texts == [part.strip("\n").encode() for part in expected if part.strip("\n")]
                assert documents.separators == len(expected) - 1


def test_marks_of_jsonl_and_utf16_jsonl(run, read_documents, tmp_path):
    text = '\ufeff{"text": "The tide was out.\\r\\n"}\r\n\r\n{"text": null}\n{"text": "Ebb"}\n'
    for name in ("utf-8", "utf-16-le"):
        (tmp_path / f"{name}.jsonl").write_bytes(text.encode(name))
        run("text", tmp_path / f"{name}.jsonl", "--out", tmp_path / name, "--val-fraction", 0)
        assert read_documents(tmp_path / name, "train") == ["The tide was out.\r\n", "Ebb"]
        assert read_meta(tmp_path / name).skipped["empty"] == 1


def test_separator_that_does_not_occur_is_reported(run, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one ===\ntwo")
    options = ("--val-fraction", 0, "--separator")
    run("text", tmp_path / "a.txt", "--out", tmp_path / "no", *options, r"\n===\n")
    assert r"the separator '\n===\n' does not occur: each text file is one document" in capsys.readouterr().err
    run("text", tmp_path / "a.txt", "--out", tmp_path / "yes", *options, r"===\n")
    assert "does not occur" not in capsys.readouterr().err


def test_csv_is_read_as_training_text(run, refused, read_documents, tmp_path):
    path = tmp_path / "a.csv"
    long = "word " * 40_000
    path.write_bytes(f'\ufefftext,label\r\n"A calm, ""pleasant""\ntrip",pos\r\n\r\n,neg\r\n{long},x\r\n'.encode())
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    for name in ("a.csv", "b.csv.gz"):
        options = ("--val-fraction", 0, "--shard-tokens", 1_000)
        run("text", tmp_path / name, "--out", tmp_path / f"{name}-out", *options)
        assert read_documents(tmp_path / f"{name}-out", "train") == ['A calm, "pleasant"\ntrip', long]
        assert read_meta(tmp_path / f"{name}-out").skipped["empty"] == 1
        run("text", tmp_path / name, "--out", tmp_path / f"{name}-label", *options, "--text-key", "label")
        assert read_documents(tmp_path / f"{name}-label", "train") == ["pos", "neg", "x"]
    assert "a.csv has no column 'body', only text, label" in refused(
        "text", path, "--out", tmp_path / "no", "--text-key", "body"
    )


def test_parquet_categories_are_text_and_a_name_is_used_once(run, refused, read_documents, tmp_path):
    column = pyarrow.array(["one", None, "two", "one"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    run("text", tmp_path / "a.parquet", "--out", tmp_path / "a", "--val-fraction", 0)
    assert read_documents(tmp_path / "a", "train") == ["one", "two", "one"]
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "b.parquet")
    assert "b.parquet has 2 columns named 'text': rename all but one" in refused(
        "text", tmp_path / "b.parquet", "--out", tmp_path / "b"
    )


def test_a_literal_end_of_text_without_a_separator_is_noticed(run, capsys, tmp_path):
    text = "one\n<|endoftext|>\ntwo\n"
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    options = ("--val-fraction", 0, "--tokenizer", "char")
    run("text", tmp_path / "a.txt.gz", "--out", tmp_path / "a", *options)
    assert "a.txt.gz contains <|endoftext|>, which is read as ordinary text" in capsys.readouterr().err
    run("text", tmp_path / "a.txt.gz", "--out", tmp_path / "b", *options, "--separator", "<|endoftext|>")
    run("text", tmp_path / "a.jsonl", "--out", tmp_path / "c", *options)
    assert "notice" not in capsys.readouterr().err
