"""Unusable documents and damaged files: errors name the file and the line, document or row."""

import gzip
import json
import os
import random
import re

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data.tokenizer import train_tokenizer

BAD_INPUT = {
    "key.jsonl": (b'{"text": "a"}\n{"body": "b"}\n', "key.jsonl, line 2: no key 'text', only body"),
    "json.jsonl": (b'{"text": "a"}\n\n{"text": "b"\n', "json.jsonl, line 3: not JSON"),
    "type.jsonl": (b'{"text": 5}\n', "type.jsonl, line 1: 'text' is of type int, expected str"),
    "list.jsonl": (b"[1]\n", "list.jsonl, line 1: found a list, expected a JSON object"),
    "deep.jsonl": (b'{"text": ' + b"[" * 100_000 + b"\n", "deep.jsonl, line 1: the JSON is nested too deeply"),
    "number.jsonl": (b'{"text": ' + b"1" * 5_000 + b"}\n", "number.jsonl, line 1: not JSON"),
    "nul.txt": (b"x" * 10_000 + b"\0", "nul.txt is not a text file: it holds NUL bytes"),
    "utf16.txt": ("no mark".encode("utf-16-le"), "utf16.txt is not a text file: .* UTF-16"),
    "cut16.txt": ("\ufeffodd".encode("utf-16-le")[:-1], "cut16.txt is not valid UTF-16-LE"),
    "zip.txt": (b"PK\x03\x04\x14" + b"z" * 99, "zip.txt is not a text file: it is a zip archive"),
    "nul.csv": (b"text\na\0b\n", "nul.csv is not a text file"),
    "ragged.csv": (b"text,n\nA calm, good trip,1\n", "ragged.csv, row 1 has 3 fields, the header has 2: quote the"),
    "short.csv": (b"text,n\na,1\n\nb\n", "short.csv, row 2 has 1 field, the header has 2: quote the text"),
    "open.csv": (b'text,n\n"a,1\nb,2\n', "open.csv, row 1 cannot be read: unexpected end of data. Close its quotes"),
    "twice.csv": (b"text,text\na,b\n", "twice.csv has two columns named 'text'"),
    "empty.txt": (b"", "no text in .*empty.txt"),
    "cut.txt.gz": (gzip.compress(os.urandom(5000).hex().encode())[:-900], "cut.txt.gz is not a complete gzip file"),
    "not.txt.gz": (b"not gzip", "not.txt.gz is not a complete gzip file"),
    "cut.txt.zst": (
        zstandard.compress(os.urandom(5000).hex().encode())[:-90],
        "cut.txt.zst is not a complete zstd file",
    ),
    "not.jsonl.zst": (b"not zstd", "not.jsonl.zst is not a complete zstd file"),
    "not.parquet": (b"PAR1 but no more", "not.parquet is not a complete parquet file"),
    "table.tsv": (b"text\na\n", "table.tsv has an unknown type"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_named_in_the_error(refused, name, tmp_path):
    content, message = BAD_INPUT[name]
    (tmp_path / name).write_bytes(content)
    assert re.search(message, refused("text", tmp_path / name, "--out", tmp_path / "out"))


def test_bad_parquet_columns_and_damaged_pages(refused, tmp_path):
    path = tmp_path / "a.parquet"
    texts = [random.Random(i).randbytes(400).hex() for i in range(300)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": range(300)}), path, compression="none")
    out = ("--out", tmp_path / "out")
    assert "column 'n' is int64, expected string" in refused("text", path, *out, "--text-key", "n")
    assert "no column 'body', only text, n" in refused("text", path, *out, "--text-key", "body")
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396
    path.write_bytes(data)
    assert "a.parquet, from row 1: cannot be read" in refused("text", path, *out)


def test_invalid_utf8_and_empty_documents(run, refused, read_documents, tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xff\xfe three\n")
    (tmp_path / "b.jsonl").write_bytes(
        b'{"text": ""}\n{"text": "bad \xff"}\n{"text": "lone \\ud83d"}\n{"text": "ok"}\n'
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None, ""]}), tmp_path / "c.parquet")
    run("text", tmp_path, "--out", tmp_path / "out", "--val-fraction", 0)
    printed = capsys.readouterr().out
    assert "empty documents skipped: 3" in printed
    assert "documents in which invalid UTF-8 was replaced with U+FFFD: 3" in printed
    texts = ["one\ntwo \ufffd\ufffd three\n", "bad \ufffd", "lone \ufffd", "ok", "x"]
    assert read_documents(tmp_path / "out", "train") == texts
    for name, message in [
        ("a.txt", "a.txt, line 2: invalid UTF-8"),
        ("b.jsonl", "b.jsonl, line 1: the document is empty"),
        ("c.parquet", "c.parquet, row 2: the document is empty"),
    ]:
        assert message in refused("text", tmp_path / name, "--out", tmp_path / "strict", "--strict")


def test_line_numbers_are_right_far_into_a_file(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("data.prepare.text.LONGEST_PIECE", 1 << 16)
    line = json.dumps({"text": "x" * 1000}) + "\n"
    (tmp_path / "a.jsonl").write_text(line * 500 + "[]\n" + line)
    (tmp_path / "b.txt").write_bytes(b"y\n|\n" * 100_000 + b"\xff")
    for compress, suffix in ((bytes, ""), (gzip.compress, ".gz")):
        for name, options, message in [
            ("a.jsonl", (), f"a.jsonl{suffix}, line 501: found a list"),
            ("b.txt", (), f"b.txt{suffix}, line 200001: invalid UTF-8"),
            ("b.txt", ("--separator", "|"), f"b.txt{suffix}, document 100001: invalid UTF-8"),
        ]:
            path = tmp_path / f"{name}{suffix}"
            path.write_bytes(compress((tmp_path / name).read_bytes()))
            # Small shards make small chunks of lines and separated documents.
            out = ("--out", tmp_path / f"{path.name}{len(options)}", "--shard-tokens", 1000, "--strict")
            assert message in refused("text", path, *out, *options)


def test_a_character_that_the_given_tokenizer_lacks_is_named_with_its_place(refused, tmp_path):
    train_tokenizer("char", ["abc\n"]).save(tmp_path / "abc")
    (tmp_path / "a.txt").write_text("a\n" * 700 + "ab\nbZ\nc\n")
    (tmp_path / "b.txt").write_text("a\n===\nb\n===\ncZ\n")
    (tmp_path / "c.jsonl").write_text('{"text": "abc"}\n\n{"text": "aZ"}\n')
    options = ("--tokenizer", tmp_path / "abc", "--out", tmp_path / "out", "--separator", "===\n")
    for name, given, place in (
        ("a.txt", options[:-2], "a.txt, line 702"),
        ("b.txt", options, "b.txt, document 3"),
        ("c.jsonl", options[:-2], "c.jsonl, line 3"),
    ):
        message = refused("text", tmp_path / name, *given, "--val-fraction", 0)
        assert f"{place}: character 'Z' (U+005A, at " in message
