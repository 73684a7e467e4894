"""The validation split of a single text: its end, from a border on, in every encoding and compression."""

import gzip

import pytest

from data.prepare.shakespeare import read_plays
from data.shards import read_meta

PARAGRAPH = "A paragraph of the text,\nin two lines of words.\n\n"


@pytest.mark.parametrize("form", ["plain", "gz", "crlf", "utf-16"])
def test_novel_is_divided_at_a_paragraph(run, read_documents, form, tmp_path, capsys):
    text = "\n".join(read_plays()[name] for name in ("hamlet", "othello", "macbeth"))
    raw = text.replace("\n", "\r\n") if form == "crlf" else text
    path = tmp_path / ("a.txt.gz" if form == "gz" else "a.txt")
    data = ("\ufeff" + raw).encode("utf-16-le") if form == "utf-16" else raw.encode()
    path.write_bytes(gzip.compress(data) if form == "gz" else data)
    for options, size in ((("--val-fraction", 0.1), len(text) / 10), ((), len(text) / 100)):
        out = tmp_path / f"out{len(options)}"
        run("text", path, "--out", out, *options, "--tokenizer", "char", "--shard-tokens", 30_000)
        (train,), (val,) = read_documents(out, "train"), read_documents(out, "val")
        assert train + val == text
        assert train.endswith("\n\n")
        assert size / 2 < len(val) < size * 2
        description = read_meta(out).validation
        assert description.startswith("the last ")
        assert description.endswith("bytes of the text, from the border of a paragraph")
        assert f"validation split: {description}" in capsys.readouterr().err


def test_size_in_tokens_is_about_what_was_asked_for(run, read_documents, read_all, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(read_plays()["hamlet"] + PARAGRAPH)
    for kind in ("gpt2", "char", "bpe:400"):
        run("text", path, "--out", tmp_path / kind, "--val-tokens", 2_000, "--tokenizer", kind)
        assert 1_000 < read_all(tmp_path / kind, "val").size < 4_000
        assert len(read_documents(tmp_path / kind, "train")) == len(read_documents(tmp_path / kind, "val")) == 1


def test_number_of_tokens_is_at_most_a_tenth_of_the_text(run, read_documents, tmp_path):
    (tmp_path / "a.txt").write_text(PARAGRAPH * 100)
    run("text", tmp_path / "a.txt", "--out", tmp_path / "o", "--val-tokens", 1_000_000, "--tokenizer", "char")
    assert read_documents(tmp_path / "o", "val") == [PARAGRAPH * 10]


@pytest.mark.parametrize(
    ("text", "val", "border"),
    [
        ("".join(f"line {i}\n" for i in range(10)), "line 9\n", "line"),
        ("".join(f"line {i}\r\n" for i in range(10)) + "\r\n\r\n", "line 9\n\n\n", "line"),
        (PARAGRAPH * 20, PARAGRAPH, "paragraph"),
        ("one word after another " * 100, None, "word"),
    ],
)
def test_smaller_borders_where_there_is_no_paragraph(run, read_documents, text, val, border, tmp_path):
    (tmp_path / "a.txt").write_bytes(text.encode())
    run("text", tmp_path / "a.txt", "--out", tmp_path / "o")
    (train,), (found,) = read_documents(tmp_path / "o", "train"), read_documents(tmp_path / "o", "val")
    assert train + found == text.replace("\r\n", "\n")
    assert val in (None, found)
    assert found.strip()
    assert read_meta(tmp_path / "o").validation.endswith(f"from the border of a {border}")


def test_few_files_are_divided_at_a_file_or_in_one(run, read_documents, tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(f"only {i}")
    run("text", tmp_path, "--out", tmp_path / "o", "--val-fraction", 0.2)
    assert read_documents(tmp_path / "o", "val") == ["only 8", "only 9"]
    assert read_documents(tmp_path / "o", "train") == [f"only {i}" for i in range(8)]
    (tmp_path / "9.txt").write_text(PARAGRAPH * 10)
    run("text", tmp_path, "--out", tmp_path / "p", "--val-fraction", 0.1)
    assert read_documents(tmp_path / "p", "val") == [PARAGRAPH]
    assert len(read_documents(tmp_path / "p", "train")) == 10


@pytest.mark.parametrize(
    ("options", "kept", "reason"),
    [(("--min-chars", 500), PARAGRAPH * 20, "too_short"), (("--max-chars", 900), PARAGRAPH * 10, "too_long")],
)
def test_filters_judge_a_text_before_its_end_is_held_out(run, read_documents, options, kept, reason, tmp_path):
    (tmp_path / "a.txt").write_text(PARAGRAPH * 20)
    (tmp_path / "b.txt").write_text(PARAGRAPH * 10)
    run("text", tmp_path, *options, "--tokenizer", "char", "--val-fraction", 0.1, "--out", tmp_path / "o")
    (train,), (val,) = read_documents(tmp_path / "o", "train"), read_documents(tmp_path / "o", "val")
    assert train + val == kept
    assert len(val) == len(kept) // 10
    assert read_meta(tmp_path / "o").skipped[reason] == 1


def test_filters_that_leave_nothing_are_named(refused, tmp_path):
    for name, text in (("a.txt", PARAGRAPH * 9), ("a.jsonl", '{"text": "short"}\n')):
        (tmp_path / name).write_text(text)
        message = refused(
            "text", tmp_path / name, "--min-chars", 10_000, "--tokenizer", "char", "--out", tmp_path / "o"
        )
        assert f"{name}: every document is empty or left out by the filters (at least 10000 characters)" in message


def test_a_longer_file_is_named_as_the_reason_for_another_split(run, refused, tmp_path):
    path, options = tmp_path / "a.txt", ("--out", tmp_path / "o", "--tokenizer", "char", "--val-fraction", 0.1)
    path.write_text(PARAGRAPH * 20)
    run("text", path, *options)
    path.write_text(PARAGRAPH * 21)
    assert "was prepared from another version: the source files have changed" in refused("text", path, *options)


def test_other_sources_are_divided_by_hash_as_before(run, tmp_path):
    (tmp_path / "many").mkdir()
    for i in range(20):
        (tmp_path / "many" / f"{i}.txt").write_text(f"document {i}")
    (tmp_path / "a.txt").write_text("|".join(f"document {i}" for i in range(50)))
    for name, path, options in [
        ("many", tmp_path / "many", ()),
        ("separated", tmp_path / "a.txt", ("--separator", "|")),
    ]:
        run("text", path, "--out", tmp_path / f"{name}-out", "--val-fraction", 0.3, *options)
        assert read_meta(tmp_path / f"{name}-out").validation == "0.3 of the documents by hash"
