"""Parts of a dataset: merged, they have the same bytes as a single run; parts that do not fit are refused."""

import json

from data.shards import PROGRESS_FILE


def test_three_parts_merged_equal_one_run(run, contents, documents, tmp_path, monkeypatch):
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
    # A merge that was killed before it deleted the progress file is completed.
    (out / PROGRESS_FILE).write_text('{"settings": {"parts": 3}}')
    run("merge", out)
    assert contents(out) == contents(tmp_path / "one")


def test_merge_refuses_missing_different_and_damaged_parts(run, refused, contents, documents, tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents[i:200:4]))
    out = tmp_path / "out"
    files = [tmp_path / f"{i}.jsonl" for i in range(4)]
    run("text", *files, "--out", out, "--val-fraction", 0.1, "--part", "1/2")
    assert "part-002-of-002" in refused("merge", out)
    run("text", *files, "--out", out, "--val-fraction", 0.1, "--part", "2/2", "--tokenizer", "char")
    assert "differs from" in refused("merge", out)
    for name in contents(out / "part-002-of-002"):
        (out / "part-002-of-002" / name).unlink()
    run("text", *files, "--out", out, "--val-fraction", 0.1, "--part", "2/2")
    shard = out / "part-002-of-002" / "train_000000.bin"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert f"shard {shard} is damaged" in refused("merge", out)
    data[-1] ^= 1
    shard.write_bytes(data)
    (out / "train_000000.bin").unlink(missing_ok=True)
    (out / "train_000000.bin").symlink_to(shard)
    assert "train_000000.bin is a link, which would be written through" in refused("merge", out)
    (out / "train_000000.bin").unlink()
    (out / "part-002-of-002").rename(tmp_path / "elsewhere")
    (out / "part-002-of-002").symlink_to(tmp_path / "elsewhere")
    run("merge", out)
    run("text", *files, "--out", tmp_path / "one", "--val-fraction", 0.1)
    assert contents(out) == contents(tmp_path / "one")


def test_parts_of_a_few_texts_hold_out_the_end_like_one_run(run, refused, contents, tmp_path):
    texts, rows = tmp_path / "texts", tmp_path / "rows"
    texts.mkdir()
    rows.mkdir()
    for i in range(4):
        (texts / f"{i}.txt").write_text("".join(f"Line {n} of text {i}.\n\n" for n in range(40)))
    for i in range(2):
        (rows / f"{i}.jsonl").write_text("".join(f'{{"text": "{i} {n}"}}\n' for n in range(6)))
    char = ("--tokenizer", "char")
    run("text", texts, "--out", tmp_path / "one", *char)
    assert "none of 12 documents is in the val split" in refused("text", rows, "--out", tmp_path / "no", *char)
    for source in (texts, rows):
        for part in ("1/2", "2/2"):
            run("text", source, *char, "--out", tmp_path / f"{source.stem}-parts", "--part", part)
    run("merge", tmp_path / "texts-parts")
    assert contents(tmp_path / "texts-parts") == contents(tmp_path / "one")
    message = refused("merge", tmp_path / "rows-parts")
    assert "none of the documents of the 2 parts is in the val split (0.01 of the documents by hash)" in message


def test_merge_does_not_replace_another_dataset(run, refused, contents, tmp_path):
    files = [tmp_path / "0.jsonl", tmp_path / "1.jsonl"]
    options = ("--tokenizer", "char", "--val-fraction", 0)
    for path in files:
        path.write_text('{"text": "old"}\n')
    for out in ("single", "without meta.json"):
        run("text", *files, "--out", tmp_path / out, *options)
    (tmp_path / "without meta.json" / "meta.json").unlink()
    for path in files:
        path.write_text('{"text": "newer"}\n')
    for out, reason in (
        ("single", "single was prepared from another version: the source files have changed"),
        ("without meta.json", "has shards that this command did not write"),
    ):
        before = contents(tmp_path / out)
        for part in ("1/2", "2/2"):
            run("text", *files, "--out", tmp_path / out, *options, "--part", part)
        assert reason in refused("merge", tmp_path / out)
        assert contents(tmp_path / out) == before
    executor = ("--executor", "local", "--tasks", 2)
    assert "the source files have changed" in refused("text", *files, "--out", tmp_path / "single", *options, *executor)
