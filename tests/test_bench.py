"""The bench: corpora that repeat nothing, peers that give the same tokens and choices, and what it prints."""

import json
from functools import partial

import pytest

import bench
from data.shards import open_split, read_meta


def test_each_content_of_a_directory_is_taken_once(tmp_path):
    for name, data in [("a.py", b"one"), ("b.md", b"one"), ("c.html", b"two"), ("d.txt", b"\xff"), ("e.so", b"three")]:
        (tmp_path / name).write_bytes(data)
    (tmp_path / "link.py").symlink_to(tmp_path / "c.html")
    assert list(bench.text_files([str(tmp_path)])) == ["one", "two"]


def test_words_of_a_corpus_are_counted(tmp_path):
    assert bench.write_corpus(iter(["a b a", " b\n"]), tmp_path / "c.jsonl") == (8 / 1e6, 4 / (8 / 1e6))
    assert [json.loads(line)["text"] for line in (tmp_path / "c.jsonl").open()] == ["a b a", " b\n"]
    assert sum(len(text.encode()) for text in bench.repeated_plays(10**7)) >= 10**7


def test_both_tokenizers_write_the_same_shard(tmp_path):
    corpus = tmp_path / "c.jsonl"
    bench.write_corpus(bench.repeated_plays(200_000), corpus)
    bench.tokenize_ours(corpus)()
    bench.tokenize_tiktoken(corpus)()
    bench.check_shards(tmp_path)
    ours, theirs = sorted((path for path in tmp_path.iterdir() if path.is_dir()), key=lambda p: read_meta(p) is None)
    assert open_split(ours, "train").n_tokens > 50_000
    with open(theirs / "train_000000.bin", "r+b") as file:
        file.seek(2000)
        file.write(b"\1")
    with pytest.raises(ValueError, match="different tokens"):
        bench.check_shards(tmp_path)


def test_contestants_are_timed_in_turn_and_their_memory_is_their_own(capsys):
    results = bench.compare({"ours": partial(make_sleeper, 0.01, 1), "other": partial(make_sleeper, 0.03, 300)}, runs=3)
    table = bench.report("sleeping", "naps", 1, results)
    assert table["results"]["other"]["ours_is"] == pytest.approx(3, rel=0.5)
    assert results["other"]["peak_memory"] - results["ours"]["peak_memory"] > 250e6
    assert "sleeping" in capsys.readouterr().out


def make_sleeper(seconds, megabytes):
    import time

    held = bytearray(megabytes * 10**6)
    for i in range(0, len(held), 4096):
        held[i] = 1
    return lambda: time.sleep(seconds + 0 * len(held))


def test_what_is_missing_is_said(monkeypatch, capsys, tmp_path):
    for arguments, message in [
        (["train", "--peer", "megatron"], "unknown peer 'megatron'"),
        (["hellaswag", "--peer", f"build-nanogpt={tmp_path}"], f"no hellaswag.py in {tmp_path}"),
        (["tokenize", "--corpus", f"{tmp_path}/none"], "is no directory"),
        (["startup", "--runs", "0"], "--runs must be at least 1, got 0"),
        (["startup", "--json", f"{tmp_path}/none/b.json"], f"there is no directory {tmp_path}/none"),
    ]:
        monkeypatch.setattr("sys.argv", ["bench.py", *arguments])
        with pytest.raises(SystemExit):
            bench.main()
        assert message in capsys.readouterr().err


def test_rows_in_a_precision_that_the_cpu_emulates_are_left_out_and_named(monkeypatch, capsys):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert bench.native_dtypes() == ["float32"]
    assert "no rows in bfloat16: this CPU" in capsys.readouterr().out
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True})
    assert bench.native_dtypes() == ["bfloat16", "float32"]
    assert capsys.readouterr().out == ""


def test_a_peer_that_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["bench.py", "decode", "--peer", "ctranslate2"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "--peer ctranslate2: the package is not installed, run: pip install ctranslate2" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "status"), [(ValueError("other tokens"), 2), (KeyboardInterrupt(), 130)])
def test_what_ends_it_is_no_traceback(monkeypatch, capsys, error, status):
    def fail(peers, runs):
        raise error

    monkeypatch.setattr("bench.BENCHES", {"loader": fail})
    monkeypatch.setattr("bench.memory_bandwidth", lambda: 0.0)
    monkeypatch.setattr("sys.argv", ["bench.py", "loader"])
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert stopped.value.code == status
    assert str(error) in capsys.readouterr().err
