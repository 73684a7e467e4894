"""The corpora of the tokenization benchmark."""

import json

from benchmarks.corpus import repeated_plays, text_files, write_corpus


def test_each_content_of_a_directory_is_taken_once(tmp_path):
    for name, data in [("a.py", b"one"), ("b.md", b"one"), ("c.html", b"two"), ("d.txt", b"\xff"), ("e.so", b"three")]:
        (tmp_path / name).write_bytes(data)
    (tmp_path / "link.py").symlink_to(tmp_path / "c.html")
    assert list(text_files([str(tmp_path)])) == ["one", "two"]


def test_words_of_a_corpus_are_counted(tmp_path):
    assert write_corpus(iter(["a b a", " b\n"]), tmp_path / "c.jsonl") == (8 / 1e6, 4 / (8 / 1e6))
    assert [json.loads(line)["text"] for line in (tmp_path / "c.jsonl").open()] == ["a b a", " b\n"]
    assert sum(len(text.encode()) for text in repeated_plays(10**7)) >= 10**7
