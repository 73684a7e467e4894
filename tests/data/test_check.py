"""`data.check`: the counts are right, duplicates are found, damaged shards are named."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data import check
from data.prepare.__main__ import main as prepare
from data.shards import open_split
from data.tokenizer import load_tokenizer

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
