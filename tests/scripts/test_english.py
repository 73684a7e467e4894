"""Test the corpus for experiments."""

import json

from data.prepare.shakespeare import read_plays


def test_the_corpus_has_no_duplicates_and_contains_whole_plays(python, tmp_path):
    corpus = tmp_path / "made" / "english.jsonl"
    python("-m", "scripts.english", corpus)
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    assert len(set(texts)) == len(texts)
    assert 9e6 < sum(map(len, texts)) < 11e6
    everything = "".join(texts)
    assert all(play.strip() in everything for play in read_plays().values())
    assert python("-m", "scripts.english", tmp_path, check=False).returncode == 2  # the path is a directory
