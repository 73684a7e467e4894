"""`data.check`: the counts are right, duplicates are found, damaged shards are named."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data import check
from data.prepare.__main__ import main as prepare
from data.shards import open_split
from data.tokenizer import load_tokenizer, train_tokenizer
from files import file_sha256

TEXTS = [f"document number {i}, " + "word " * (i % 7) for i in range(200)]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    texts = [*TEXTS, TEXTS[3], TEXTS[3], TEXTS[10]]
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(["text", str(corpus), "--out", str(tmp_path / "d"), "--val-fraction", "0.2", "--shard-tokens", "500"])
    return tmp_path / "d"


def test_counts_duplicates_histogram_and_epochs(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Documents then continue across reads as well as across shards.
    monkeypatch.setattr(check, "READ_TOKENS", 101)
    config = tmp_path / "c.yaml"
    config.write_text("optim: {steps: 50}\ndata: {batch_tokens: 100}\n")
    capsys.readouterr()
    check.main([str(dataset), "--documents", "1", "--config", str(config)])
    printed = capsys.readouterr().out
    train = open_split(dataset, "train")
    assert f"train: {train.n_tokens:,} tokens in" in printed
    assert "sha256 verified" in printed
    assert f"{5000 / train.n_tokens:.2f} epochs of train" in printed
    assert "0 documents of val are also in train" in printed
    repeated = [int(line.split()[0]) for line in printed.splitlines() if "repeat an earlier one" in line]
    assert sum(repeated) == 3
    assert "document number 0," in printed
    png = dataset / "tokens-per-document.png"
    assert png.read_bytes().startswith(b"\x89PNG")

    lengths = np.concatenate(
        [check.measure_documents(open_split(dataset, split), 50256).lengths for split in ("train", "val")]
    )
    gpt2 = load_tokenizer("gpt2")
    expected = [len(gpt2.encode(text)) for text in [*TEXTS, TEXTS[3], TEXTS[3], TEXTS[10]]]
    assert sorted(lengths.tolist()) == sorted(expected)


def test_shards_without_meta_are_described_as_gpt2(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("meta.json", "tokenizer.json", "tokenizer_config.json"):
        (dataset / name).unlink()
    check.main([str(dataset), "--histogram", str(tmp_path / "h.png")])
    printed = capsys.readouterr().out
    assert "no meta.json" in printed
    assert "document number 0," in printed
    assert (tmp_path / "h.png").exists()


def test_damage_and_wrong_arguments_are_explained(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("optim: {lr: 1}\n")

    def refused(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            check.main([str(argument) for argument in arguments])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert "does not set optim.steps and data.batch_tokens" in refused(dataset, "--config", config)
    assert "No such file" in refused(dataset, "--config", tmp_path / "none.yaml")
    assert "no dataset at" in refused(tmp_path / "nowhere")
    assert "has no shards" in refused(tmp_path)
    shard = dataset / "train_000001.bin"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert "train_000001.bin is damaged" in refused(dataset)


def test_first_document_longer_than_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "READ_TOKENS", 10)
    tokens = np.ones(50, np.uint16)
    tokens[45] = 0
    split = SimpleNamespace(n_tokens=50, read=lambda start, out: np.copyto(out, tokens[start : start + len(out)]))
    assert check.measure_documents(split, end_of_text=0).lengths.tolist() == [45, 4]


def test_everything_that_meta_states_is_compared(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = dataset / "meta.json"
    stated = json.loads(path.read_text())

    def refused(change: Callable[[dict[str, Any]], object]) -> str:
        meta = copy.deepcopy(stated)
        change(meta)
        path.write_text(json.dumps(meta))
        with pytest.raises(SystemExit):
            check.main([str(dataset)])
        path.write_text(json.dumps(stated))
        return capsys.readouterr().err

    def move(meta: dict[str, Any]) -> None:
        meta["shards"]["train"][0]["documents"] += 1

    assert "tokenizer_sha256 is" in refused(lambda meta: meta.update(tokenizer_sha256="0" * 64))
    assert "vocab_size is 50257, meta.json says 50304" in refused(lambda meta: meta.update(vocab_size=50304))
    assert "tokenizer is gpt2, meta.json says char" in refused(lambda meta: meta.update(tokenizer="char"))
    assert "val: tokens is" in refused(lambda meta: meta["tokens"].update(val=1))
    assert "train: documents is" in refused(lambda meta: meta["documents"].update(train=1))
    assert "train: text_bytes is" in refused(lambda meta: meta["text_bytes"].update(train=1))
    assert "train_000000.bin: documents is" in refused(move)
    train_tokenizer("char", ["abc"]).save(dataset)
    assert "tokenizer_sha256 is" in refused(lambda meta: None)


def test_a_downloaded_train_split_may_begin_inside_a_document(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The train split of llm.c's shards continues the last document of the validation split."""
    path = dataset / "train_000000.bin"
    data = np.fromfile(path, "<u2")
    data[512] = 262  # the first token after the header
    data.tofile(path)
    meta = json.loads((dataset / "meta.json").read_text())
    meta["shards"]["train"][0]["sha256"] = file_sha256(path)
    meta["shards"]["train"][0]["documents"] -= 1
    meta["documents"]["train"] -= 1
    (dataset / "meta.json").write_text(json.dumps(meta | {"text_bytes": {}}))
    check.main([str(dataset)])
    assert f" tokens in {meta['documents']['train'] + 1} documents" in capsys.readouterr().out


def test_control_sequences_of_a_text_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("\x1b[31mred\n\ttab\x9b")
    prepare(["text", str(tmp_path / "a.txt"), "--out", str(tmp_path / "d"), "--val-fraction", "0"])
    check.main([str(tmp_path / "d")])
    assert "\n\\x1b[31mred\n\ttab\\x9b\n" in capsys.readouterr().out
