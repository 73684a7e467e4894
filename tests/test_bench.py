"""The benchmark command: contestants that exist and agree on the tokens, what it prints, and its errors."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import bench
import benchmarks.ours.tokenize
import benchmarks.peers.tiktoken
from benchmarks.corpus import repeated_plays, write_corpus
from data.shards import open_split, read_meta


def test_both_tokenizers_write_the_same_shard(tmp_path):
    corpus = tmp_path / "c.jsonl"
    write_corpus(repeated_plays(200_000), corpus)
    benchmarks.ours.tokenize.tokenize(corpus)()
    benchmarks.peers.tiktoken.tokenize(corpus)()
    bench.check_shards(tmp_path)
    ours, theirs = sorted((path for path in tmp_path.iterdir() if path.is_dir()), key=lambda p: read_meta(p) is None)
    assert open_split(ours, "train").n_tokens > 50_000
    with open(theirs / "train_000000.bin", "r+b") as file:
        file.seek(2000)
        file.write(b"\1")
    with pytest.raises(ValueError, match="different tokens"):
        bench.check_shards(tmp_path)


def test_a_table_has_rates_and_ratios(capsys):
    seconds = {"ours": 2.0, "other": 3.0}
    results = {
        name: {"seconds": value, "lowest": value, "highest": value * 1.5, "peak_memory": 2**20 * value}
        for name, value in seconds.items()
    }
    table = bench.report("sleeping", "naps", 6, results)
    assert table["results"]["other"]["ours_is"] == 1.5
    assert [result["rate"] for result in table["results"].values()] == [3, 2]
    assert capsys.readouterr().out.splitlines() == [
        "",
        "sleeping",
        "                      naps/s   spread  peak MiB   ours is",
        "  ours                   3.0      50%         2",
        "  other                  2.0      50%         3     1.50x",
    ]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_contestant_names_a_function_and_its_arguments(monkeypatch, capsys, device):
    """Reads the modules and does not import them: some need packages that are not installed."""
    calls = []

    def compare(contestants, runs, warm_up=2):
        calls.extend(contestants.values())
        return {name: dict.fromkeys(("seconds", "lowest", "highest", "peak_memory"), 1.0) for name in contestants}

    def call_in_process(module, function, *arguments):
        calls.append((module, function, arguments))
        return {"native_dtypes": (["bfloat16", "float32"], "AVX-512")}.get(
            function, (1.0, 1.0) if "corpus" in module else 1.0
        )

    monkeypatch.setattr("bench.compare", compare)
    monkeypatch.setattr("bench.call_in_process", call_in_process)
    monkeypatch.setattr("bench.check_shards", lambda directory: None)
    peers = {"transformers": "", "ctranslate2": "", "nanogpt": "n", "build-nanogpt": "b"}
    benches = bench.BENCHES if device == "cpu" else bench.ON_A_GPU
    for name in benches:
        bench.BENCHES[name](peers, 1, device)
    for module, function, arguments in calls:
        tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8"))
        found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
        assert [len(node.args.args) for node in found] == [len(arguments)], (module, function)
        on_cpu_alone = module in ("benchmarks.ours.attention", "benchmarks.peers.ctranslate2")
        if module.count(".") == 2 and (device == "cuda" or function not in ("tokenize", "load")):
            assert device in arguments or on_cpu_alone
    # every module of a contestant is used
    contestants = {f"benchmarks.{room}.{file.stem}" for room in ("ours", "peers") for file in find_modules(room)}
    only_cpu = {
        f"benchmarks.{name}"
        for name in ("ours.attention", "ours.loader", "ours.tokenize", "peers.ctranslate2", "peers.tiktoken")
    }
    if device == "cuda":
        contestants -= only_cpu
        assert "ctranslate2 is left out: it is compared on a CPU only" in capsys.readouterr().out
    assert contestants == {module for module, _, _ in calls if module.count(".") == 2}


def test_work_of_the_cpu_is_left_out_on_a_gpu_and_named(monkeypatch, capsys, tmp_path):
    ran = []
    for name in list(bench.BENCHES):
        monkeypatch.setitem(
            bench.BENCHES, name, lambda peers, runs, device, name=name: ran.append((name, device)) or []
        )
    monkeypatch.setattr("bench.call_in_process", lambda *call: ({"gpus": ["a card"]}, 1e9))
    monkeypatch.setattr("sys.argv", ["bench.py", "all", "--device", "cuda", "--json", str(tmp_path / "b.json")])
    bench.main()
    assert ran == [("train", "cuda"), ("decode", "cuda"), ("hellaswag", "cuda")]
    out = capsys.readouterr().out
    for name in ("tokenize", "loader", "startup"):
        assert f"{name} is left out: it measures work of the CPU. Run bench.py {name} without --device" in out
    assert json.loads((tmp_path / "b.json").read_text())["device"] == "cuda"


def find_modules(room):
    files = (Path(bench.__file__).parent / "benchmarks" / room).glob("*.py")
    return [file for file in files if file.stem not in ("__init__", "repository")]


def test_the_command_loads_no_library_of_a_contestant():
    libraries = ("torch", "numpy", "transformers", "ctranslate2", "tiktoken", "regex")
    code = f"import bench, sys; print([name for name in {libraries} if name in sys.modules])"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=bench.HERE).stdout.strip() == "[]"


def test_invalid_arguments_are_reported(monkeypatch, capsys, tmp_path):
    for arguments, message in [
        (["train", "--peer", "megatron"], "unknown peer 'megatron'"),
        (["hellaswag", "--peer", f"build-nanogpt={tmp_path}"], f"no hellaswag.py in {tmp_path}"),
        (["tokenize", "--corpus", f"{tmp_path}/none"], "is not a directory"),
        (["startup", "--runs", "0"], "--runs must be at least 1, got 0"),
        (["startup", "--json", f"{tmp_path}/none/b.json"], f"there is no directory {tmp_path}/none"),
    ]:
        monkeypatch.setattr("sys.argv", ["bench.py", *arguments])
        with pytest.raises(SystemExit):
            bench.main()
        assert message in capsys.readouterr().err


def test_rows_in_a_precision_that_the_cpu_emulates_are_left_out_and_named(monkeypatch, capsys):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # the process that is asked inherits it
    assert bench.native_dtypes("cpu") == ["float32"]
    assert "no rows in bfloat16: this CPU" in capsys.readouterr().out
    monkeypatch.setattr("bench.call_in_process", lambda *call: (["bfloat16", "float32"], "AVX-512, bfloat16"))
    assert bench.native_dtypes("cpu") == ["bfloat16", "float32"]
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("bench.call_in_process", lambda *call: (["float16", "float32"], "Tesla T4"))
    assert bench.native_dtypes("cuda") == ["float16", "float32"]
    assert "no rows in bfloat16: this card (Tesla T4)" in capsys.readouterr().out


def test_a_peer_that_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["bench.py", "decode", "--peer", "ctranslate2"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "--peer ctranslate2: the package is not installed, run: pip install ctranslate2" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "status"), [(ValueError("other tokens"), 2), (KeyboardInterrupt(), 130)])
def test_an_error_ends_the_command_without_a_traceback(monkeypatch, capsys, error, status):
    def fail(peers, runs, device):
        raise error

    monkeypatch.setattr("bench.BENCHES", {"loader": fail})
    monkeypatch.setattr("bench.call_in_process", lambda *call: ({}, 0.0))
    monkeypatch.setattr("sys.argv", ["bench.py", "loader"])
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert stopped.value.code == status
    assert str(error) in capsys.readouterr().err
