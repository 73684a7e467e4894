"""The corpus for experiments: every text once, of three kinds."""

import json

from data.prepare.shakespeare import read_plays


def test_every_text_stands_once_and_the_plays_are_whole(python, tmp_path):
    made = tmp_path / "made" / "english.jsonl"
    python("-m", "scripts.english", made)
    texts = [json.loads(line)["text"] for line in made.read_text(encoding="utf-8").splitlines()]
    assert len(set(texts)) == len(texts)
    assert 9e6 < sum(map(len, texts)) < 11e6
    everything = "".join(texts)
    assert all(play.strip() in everything for play in read_plays().values())
    assert python("-m", "scripts.english", tmp_path, check=False).returncode == 2  # a directory stands there
