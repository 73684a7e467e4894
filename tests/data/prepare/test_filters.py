"""Filters: what is left out and counted, the same bytes after kills and from parts, and memory that does not grow."""

import json
import random
import resource
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from data.prepare import filters
from data.prepare.filters import SEEN_FILE, Filters, SeenDocuments
from data.shards import read_meta
from tests.data.prepare.test_interruption import interrupt


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def repeated(documents):
    """700 documents, of which each third one repeats an earlier one: (all, those that are left)."""
    chosen, texts = random.Random(0), []
    for n, text in enumerate(documents[:700]):
        texts.append(chosen.choice(texts) if n % 3 == 2 else text)
    return texts, list(dict.fromkeys(texts))


def test_documents_are_kept_once_in_their_first_place(run, read_documents, repeated, tmp_path):
    texts, once = repeated
    out = tmp_path / "out"
    options = ("--val-fraction", 0.1, "--deduplicate")
    run("text", write(tmp_path / "a.jsonl", texts), "--out", out, *options)
    found = {split: read_documents(out, split) for split in ("train", "val")}
    for split in found:
        assert found[split] == [text for text in once if text in set(found[split])]
    assert sorted(found["train"] + found["val"]) == sorted(once)
    meta = read_meta(out)
    assert meta.skipped["duplicate"] == len(texts) - len(once)
    assert meta.filter == "without duplicates"
    assert meta.text_bytes == {split: sum(len(text.encode()) for text in found[split]) for split in found}
    assert not (out / SEEN_FILE).exists()


def test_parts_give_the_bytes_of_one_process_without_duplicates_across_parts(run, contents, repeated, tmp_path):
    texts, _ = repeated
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(3):
        write(folder / f"{n}.jsonl", texts[n * 240 : n * 240 + 240])
    options = ("--val-fraction", 0.1, "--deduplicate", "--shard-tokens", 9_000)
    run("text", folder, "--out", tmp_path / "one", *options)
    for part in ("1/3", "2/3", "3/3"):
        run("text", folder, "--out", tmp_path / "parts", *options, "--part", part)
    run("merge", tmp_path / "parts")
    assert contents(tmp_path / "parts") == contents(tmp_path / "one")


@pytest.mark.slow
def test_killed_run_without_duplicates_ends_with_the_same_bytes(run, contents, documents, tmp_path):
    chosen = random.Random(1)
    words = [text for text in documents if len(text) > 30]
    texts = ["\n".join(chosen.sample(words, 9)) for _ in range(9_000)]
    corpus = write(tmp_path / "a.jsonl", [chosen.choice(texts[: n + 1]) if n % 3 else texts[n] for n in range(9_000)])
    arguments = ("text", corpus, "--val-fraction", 0.05, "--shard-tokens", 50_000, "--deduplicate")
    run(*arguments, "--out", tmp_path / "expected")
    out = tmp_path / "out"
    moments = random.Random(2)
    interrupt(out, signal.SIGKILL, 2, lambda: moments.uniform(0.1, 0.5), *arguments)
    run(*arguments, "--out", out)
    assert contents(out) == contents(tmp_path / "expected")


def test_length_is_counted_in_characters(run, read_documents, tmp_path):
    texts = ["é" * n for n in (3, 4, 9, 10, 11)] + [" "]
    out = tmp_path / "out"
    run(
        "text",
        write(tmp_path / "a.jsonl", texts),
        "--out",
        out,
        "--val-fraction",
        0,
        "--min-chars",
        4,
        "--max-chars",
        10,
    )
    assert read_documents(out, "train") == texts[1:4]
    meta = read_meta(out)
    assert (meta.skipped["too_short"], meta.skipped["too_long"]) == (2, 1)
    assert meta.filter == "at least 4 characters; at most 10 characters"


def test_small_shards_do_not_change_what_happens_to_a_text_file(run, tmp_path):
    """A text of more bytes than a small chunk of other formats is still filtered, compared and counted as a whole."""
    for i in range(30):
        (tmp_path / f"{i:02d}.txt").write_text(f"Text {i}.\n" + "All of them are long.\n" * 3_500)
    write(tmp_path / "a.jsonl", ["short", "short too"])
    (tmp_path / "repeated.txt").write_bytes((tmp_path / "07.txt").read_bytes())
    (tmp_path / "too long.txt").write_text("All of them are long.\n" * 4_000)
    options = ("--tokenizer", "char", "--deduplicate", "--max-chars", 80_000, "--val-tokens", 225_000)
    skipped = []
    for size in (1_000_000, 200_000):
        run("text", tmp_path, "--out", tmp_path / f"{size}", *options, "--shard-tokens", size)
        meta = read_meta(tmp_path / f"{size}")
        assert meta.tokens["val"] <= 225_000
        skipped.append((meta.tokens, meta.skipped))
    assert skipped[0] == skipped[1]
    assert (meta.skipped["duplicate"], meta.skipped["too_long"]) == (1, 1)


def test_language_is_that_of_the_beginning(run, read_documents, tmp_path, monkeypatch, capsys):
    def classify(text):
        return ("de" if "der" in text else "en"), 1.0

    monkeypatch.setattr(filters, "languages", lambda: SimpleNamespace(classify=classify))
    monkeypatch.setattr("data.prepare.__main__.check_languages", lambda codes: None)
    texts = ["the first", "der zweite", "the third " * 600 + "der"]
    out = tmp_path / "out"
    run("text", write(tmp_path / "a.jsonl", texts), "--out", out, "--val-fraction", 0, "--language", "en")
    assert read_documents(out, "train") == [texts[0], texts[2]]
    assert read_meta(out).skipped["other_language"] == 1
    assert "documents in other languages left out: 1" in capsys.readouterr().out
    assert read_meta(out).filter == "language en"


def test_languages_with_py3langid(refused, tmp_path):
    pytest.importorskip("py3langid")
    english = "It was the best of times, it was the worst of times, it was the age of wisdom."
    german = "Der Wald ist so weit, und die Könige sind nicht in der Stadt geblieben."
    both = [Filters(languages=("en",)).reject(text.encode()) for text in (english, german)]
    assert both == [None, "other_language"]
    text = write(tmp_path / "a.jsonl", [english])
    message = refused("text", text, "--out", tmp_path / "out", "--language", "english")
    assert "--language english is not known: expected ace, af, " in message


def test_missing_package_and_impossible_filters_are_named(refused, tmp_path, monkeypatch):
    text = write(tmp_path / "a.jsonl", ["a"])
    monkeypatch.setitem(sys.modules, "py3langid", None)
    message = refused("text", text, "--out", tmp_path / "out", "--language", "en")
    assert "--language needs the package py3langid: pip install py3langid" in message
    (tmp_path / "a.ds").write_bytes(b"12")
    message = refused("tokens", tmp_path / "a.ds", "--out", tmp_path / "out", "--min-chars", 5)
    assert "--min-chars, --max-chars and --language need text" in message


def test_a_finished_dataset_is_not_continued_with_other_filters(run, refused, tmp_path):
    text = write(tmp_path / "a.jsonl", ["one", "two"])
    run("text", text, "--out", tmp_path / "out", "--val-fraction", 0)
    message = refused("text", text, "--out", tmp_path / "out", "--val-fraction", 0, "--deduplicate")
    assert "prepared with other options (filter '', now 'without duplicates')" in message


def test_documents_are_numbered_so_that_a_repetition_of_the_run_finds_no_duplicates(tmp_path):
    tokens, lengths = np.array([1, 2, 1, 2, 1], np.uint16), np.array([2, 2, 1])
    for _ in range(2):
        seen = SeenDocuments(tmp_path)
        assert seen.find_new(tokens, lengths, 10).tolist() == [True, False, True]
        seen.flush()
    assert seen.find_new(tokens, lengths, 13).tolist() == [False] * 3
    seen.clear()
    assert seen.find_new(tokens, lengths, 16).tolist() == [True, False, True]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_documents(tmp_path):
    seen = SeenDocuments(tmp_path)
    tokens, lengths = np.arange(40_000, dtype=np.uint32).view(np.uint16), np.full(40_000, 2)

    def add(first):
        for n in range(first, first + 10):
            seen.find_new((tokens.view(np.uint32) + n * 40_000).view(np.uint16), lengths, n * 40_000)
            seen.flush()

    add(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    add(10)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8_000  # KiB on Linux
