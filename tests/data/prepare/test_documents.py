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

BAD_INPUT = {
    "key.jsonl": (b'{"text": "a"}\n{"body": "b"}\n', "key.jsonl, line 2: no key 'text', only body"),
    "json.jsonl": (b'{"text": "a"}\n\n{"text": "b"\n', "json.jsonl, line 3: not JSON"),
    "type.jsonl": (b'{"text": 5}\n', "type.jsonl, line 1: 'text' is of type int, expected str"),
    "list.jsonl": (b"[1]\n", "list.jsonl, line 1: found a list, expected an object with the key 'text'"),
    "empty.txt": (b"", "no text in .*empty.txt"),
    "cut.txt.gz": (gzip.compress(os.urandom(5000))[:-900], "cut.txt.gz is not a complete gzip file"),
    "not.txt.gz": (b"not gzip", "not.txt.gz is not a complete gzip file"),
    "cut.txt.zst": (zstandard.compress(os.urandom(5000))[:-90], "cut.txt.zst is not a complete zstd file"),
    "not.jsonl.zst": (b"not zstd", "not.jsonl.zst is not a complete zstd file"),
    "not.parquet": (b"PAR1 but no more", "not.parquet is not a complete parquet file"),
    "table.csv": (b"text\na\n", "table.csv has an unknown type"),
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


def test_line_numbers_are_right_far_into_a_file(refused, tmp_path):
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
            # Small shards make small chunks.
            out = ("--out", tmp_path / f"{path.name}{len(options)}", "--shard-tokens", 1000, "--strict")
            assert message in refused("text", path, *out, *options)
