"""Documents that Megatron-LM and datatrove have tokenized, and the directories of datasets.save_to_disk."""

import json
import struct

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data.prepare.tokens import move_end_of_text
from data.tokenizer import load_tokenizer

EOT = 50256


@pytest.fixture(scope="module")
def tokenized(documents):
    """The documents as token ids."""
    tokenizer = load_tokenizer("gpt2")
    return [tokenizer.encode(text) for text in documents[:200]]


def write_megatron(path, documents, dtype="<u2", end=True, per_document=1):
    """Write .bin and .idx as Megatron-LM's preprocess_data.py does, each document as `per_document` sequences."""
    ended = [[*tokens, EOT] if end else tokens for tokens in documents]
    path.with_suffix(".bin").write_bytes(b"".join(np.array(tokens, dtype).tobytes() for tokens in ended))
    sequences = [part.tolist() for tokens in ended for part in np.array_split(tokens, per_document)]
    code = {"<u2": 8, "<i4": 4}[dtype]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    pointers = (np.cumsum(lengths) - lengths).astype("<i8") * np.dtype(dtype).itemsize
    documents_at = np.arange(0, len(sequences) + 1, per_document, dtype="<i8")
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(documents_at))
    path.with_suffix(".idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + documents_at.tobytes())


def write_datatrove(path, documents, dtype="<u2"):
    """Write .ds and .ds.index as datatrove's DocumentTokenizer does with an end-of-text token."""
    path.write_bytes(b"".join(np.array([*tokens, EOT], dtype).tobytes() for tokens in documents))
    ends = np.cumsum([len(tokens) + 1 for tokens in documents]).astype("<u8")
    path.with_name(path.name + ".index").write_bytes(ends.tobytes())


@pytest.mark.parametrize(
    "write",
    [
        lambda folder, documents: write_megatron(folder / "a.bin", documents),
        lambda folder, documents: write_megatron(folder / "a.bin", documents, "<i4", per_document=3),
        lambda folder, documents: write_megatron(folder / "a.bin", documents, end=False),
        lambda folder, documents: write_datatrove(folder / "a.ds", documents),
        lambda folder, documents: write_datatrove(folder / "a.ds", documents, "<u4"),
    ],
    ids=["megatron", "megatron, int32, sequences", "megatron without end-of-text", "datatrove", "datatrove, uint32"],
)
def test_tokenized_documents_become_the_shards_of_their_text(run, read_all, tokenized, write, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder, tokenized)
    run("tokens", folder, "--out", tmp_path / "out", "--val-fraction", 0, "--shard-tokens", 5_000)
    assert read_all(tmp_path / "out", "train").tolist() == [i for tokens in tokenized for i in (EOT, *tokens)]


def test_files_of_both_kinds_are_split_and_counted_like_text(run, read_documents, documents, tokenized, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write_datatrove(folder / "b.ds", tokenized[100:])
    write_megatron(folder / "a.bin", [*tokenized[:100], []])
    run("tokens", folder / "a.idx", folder / "b.ds", "--out", tmp_path / "out", "--val-fraction", 0.1)
    found = {split: read_documents(tmp_path / "out", split) for split in ("train", "val")}
    assert sorted(found["train"] + found["val"]) == sorted(documents[:200])
    assert 8 < len(found["val"]) < 40
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["documents"] == {split: len(texts) for split, texts in found.items()}
    assert meta["text_bytes"] == {split: sum(len(t.encode()) for t in texts) for split, texts in found.items()}


def test_the_files_of_datatrove_itself_are_read(run, read_documents, documents, tmp_path):
    datatrove = pytest.importorskip("datatrove.pipeline.tokens.tokenizer")
    tokenizer = load_tokenizer("gpt2")
    (tmp_path / "in").mkdir()
    file = datatrove.TokenizedFile(str(tmp_path / "in"), "a.ds")
    for text in documents[:20]:
        file.write([*tokenizer.encode(text), EOT], None)
    file.close()
    run("tokens", tmp_path / "in", "--out", tmp_path / "out", "--val-fraction", 0)
    assert read_documents(tmp_path / "out", "train") == documents[:20]


def test_end_of_text_is_moved_and_empty_documents_are_omitted():
    bounds = np.array([0, 3, 3, 4, 6, 7])
    tokens = np.array([5, 6, 0, 0, 0, 7, 8])  # 5 6 <eot> | | <eot> | <eot> 7 | 8
    assert move_end_of_text(tokens, bounds, 0).tolist() == [0, 5, 6, 0, 7, 0, 8]


def test_damaged_or_foreign_files_are_refused_with_their_name(refused, tokenized, tmp_path):
    write_megatron(tmp_path / "a.bin", tokenized)
    write_datatrove(tmp_path / "b.ds", tokenized)
    out = ("--out", tmp_path / "out", "--val-fraction", 0)
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-2])
    message = refused("tokens", tmp_path / "a.bin", *out)
    assert "a.bin has " in message
    assert "and its index says" in message
    (tmp_path / "a.idx").write_bytes(b"something else")
    assert "a.idx is not an index of Megatron-LM that can be read" in refused("tokens", tmp_path / "a.bin", *out)
    (tmp_path / "b.ds").write_bytes(b"12345")
    assert "b.ds has 0 bytes for each token of its index" in refused("tokens", tmp_path / "b.ds", *out)
    (tmp_path / "a.idx").unlink()
    assert "a.idx" in refused("tokens", tmp_path / "a.bin", *out)
    assert "expected .bin with .idx" in refused("tokens", tmp_path / "c.txt", *out)
    (tmp_path / "empty").mkdir()
    assert "no tokens in" in refused("tokens", tmp_path / "empty", *out)
    write_datatrove(tmp_path / "d.ds", [[60_000]])
    message = refused("tokens", tmp_path / "d.ds", *out)
    assert "d.ds holds the tokens 50256 to 60000, and the tokenizer has 0 to 50256" in message
    message = refused("tokens", tmp_path / "d.ds", *out, "--tokenizer", "bpe:300")
    assert "give the directory of the tokenizer that made them" in message


def test_saved_datasets_are_read_with_their_splits(run, read_documents, tmp_path):
    texts = [f"document {n}: " + "words " * n for n in range(300)]
    rows = {"id": list(range(300)), "text": texts}
    saved = datasets.DatasetDict(
        train=datasets.Dataset.from_dict(rows).select(range(280)),
        validation=datasets.Dataset.from_dict(rows).select(range(299, 279, -1)),
    )
    saved.save_to_disk(tmp_path / "both", num_shards={"train": 3, "validation": 1})
    run("hf", tmp_path / "both", "--out", tmp_path / "out", "--shard-tokens", 5_000)
    assert read_documents(tmp_path / "out", "train") == texts[:280]
    assert read_documents(tmp_path / "out", "val") == texts[:279:-1]
    saved["train"].save_to_disk(tmp_path / "one")
    run("hf", tmp_path / "one", "--out", tmp_path / "out1", "--val-fraction", 0)
    assert read_documents(tmp_path / "out1", "train") == texts[:280]
    run("text", tmp_path / "one", "--out", tmp_path / "out2", "--val-fraction", 0)
    assert read_documents(tmp_path / "out2", "train") == texts[:280]


def test_damaged_saved_datasets_are_refused(refused, tmp_path):
    out = ("--out", tmp_path / "out")
    datasets.Dataset.from_dict({"words": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    assert "has no column 'text', only words: choose one with --text-key" in refused("hf", tmp_path / "saved", *out)
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(b"nothing")
    assert "is not a file in Arrow's stream format" in refused("hf", tmp_path / "saved", *out)
    (tmp_path / "saved" / "state.json").write_text("{}")
    assert "is not a complete directory of datasets.save_to_disk" in refused("hf", tmp_path / "saved", *out)


def test_parquet_shards_of_nanochat_are_read_in_order(run, read_documents, documents, tmp_path):
    """Files shard_NNNNN.parquet with a column "text" and small row groups."""
    folder = tmp_path / "base_data"
    folder.mkdir()
    for n in range(3):
        table = pyarrow.table({"text": documents[n * 100 : n * 100 + 100]})
        pyarrow.parquet.write_table(table, folder / f"shard_{n:05d}.parquet", row_group_size=32, compression="zstd")
    run("text", folder, "--out", tmp_path / "out", "--val-fraction", 0)
    assert read_documents(tmp_path / "out", "train") == documents[:300]
