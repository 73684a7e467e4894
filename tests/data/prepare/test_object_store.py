"""Files in an object store, which fsspec's memory file system stands for."""

import gzip
import json

import fsspec
import pyarrow
import pyarrow.parquet
import pytest


@pytest.fixture
def store(documents):
    """memory://bucket with the documents in files of several kinds, and something that is no text."""
    system = fsspec.filesystem("memory")
    lines = ["".join(json.dumps({"text": text}) + "\n" for text in documents[n::3]) for n in range(3)]
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": documents[2::3]}), sink, row_group_size=64)
    files = {
        "a/0.jsonl": lines[0].encode(),
        "a/1.jsonl.gz": gzip.compress(lines[1].encode()),
        "a/b/2.parquet": sink.getvalue().to_pybytes(),
        "a/README.md": b"nothing",
    }
    for name, data in files.items():
        system.pipe(f"/bucket/{name}", data)
    yield system
    system.rm("/bucket", recursive=True)


@pytest.mark.parametrize("pattern", ["memory://bucket/a", "memory://bucket/a/**/*.[jp]*"])
def test_directories_and_patterns_give_the_dataset_of_the_same_local_files(
    run, contents, store, pattern, tmp_path, read_documents, documents
):
    run("text", pattern, "--out", tmp_path / "far", "--val-fraction", 0.1, "--workers", 1)
    (tmp_path / "near").mkdir()
    for name in ("a/0.jsonl", "a/1.jsonl.gz", "a/b/2.parquet"):
        path = tmp_path / "near" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.cat(f"/bucket/{name}"))
    run("text", tmp_path / "near" / "a", "--out", tmp_path / "here", "--val-fraction", 0.1)
    assert contents(tmp_path / "far", meta=False) == contents(tmp_path / "here", meta=False)
    found = read_documents(tmp_path / "far", "train") + read_documents(tmp_path / "far", "val")
    assert sorted(found) == sorted(documents)


def test_a_single_text_is_read_and_its_end_held_out(run, read_documents, store, tmp_path):
    text = "\n\n".join(f"Paragraph {n} of the only text." for n in range(400))
    store.pipe("/bucket/one.txt", text.encode())
    run("text", "memory://bucket/one.txt", "--out", tmp_path / "out", "--val-fraction", 0.1)
    assert "".join(read_documents(tmp_path / "out", "train") + read_documents(tmp_path / "out", "val")) == text


def test_a_file_that_changes_is_noticed(run, refused, store, tmp_path):
    run("text", "memory://bucket/a/0.jsonl", "--out", tmp_path / "out", "--val-fraction", 0)
    store.pipe("/bucket/a/0.jsonl", b'{"text": "other"}\n')
    message = refused("text", "memory://bucket/a/0.jsonl", "--out", tmp_path / "out", "--val-fraction", 0)
    assert "the source files have changed" in message


def test_missing_files_stores_and_packages_are_named(refused, store, tmp_path):
    out = ("--out", tmp_path / "out")
    assert "no such file, directory with text, or pattern: memory://bucket/x" in refused(
        "text", "memory://bucket/x", *out
    )
    assert "README.md has an unknown type" in refused("text", "memory://bucket/a/README.md", *out)
    message = refused("text", "nonsense://bucket/x", *out)
    assert "nonsense://bucket/x cannot be opened: " in message
    try:
        import s3fs  # noqa: F401
    except ImportError:
        assert "Install s3fs to access S3" in refused("text", "s3://bucket/x", *out)


def test_a_read_that_fails_is_a_sentence_and_the_next_call_continues(
    run, refused, contents, store, tmp_path, monkeypatch
):
    from fsspec.implementations.memory import MemoryFileSystem

    options = ("text", "memory://bucket/a", "--val-fraction", 0.1, "--shard-tokens", 5_000, "--workers", 1)
    run(*options, "--out", tmp_path / "whole")
    right = MemoryFileSystem.open

    def broken(self, path, *arguments, **named):
        if "1.jsonl" in path:
            raise ConnectionError("connection reset")
        return right(self, path, *arguments, **named)

    monkeypatch.setattr(MemoryFileSystem, "open", broken)
    message = refused(*options, "--out", tmp_path / "out")
    assert (
        "memory://bucket/a/1.jsonl.gz could not be read (connection reset): run the same command again"
        in message.replace("memory:///", "memory://")
    )
    monkeypatch.setattr(MemoryFileSystem, "open", right)
    run(*options, "--out", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
