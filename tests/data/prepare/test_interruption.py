"""Interruptions: after kills, Ctrl-C and a full disk, the same command continues and ends with the same bytes."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data.prepare.shakespeare import read_plays
from data.shards import HEADER_BYTES, PROGRESS_FILE, open_split

COMMAND = [sys.executable, "-m", "data.prepare"]
ROOT = Path(__file__).resolve().parents[3]


def write_corpus(path: Path, megabytes: int) -> Path:
    """Write a .jsonl file of about this size from random speeches of the plays."""
    speeches = "\n\n".join(read_plays().values()).split("\n\n")
    chosen = random.Random(0)
    with open(path, "w") as file:
        while file.tell() < megabytes << 20:
            text = "\n\n".join(chosen.sample(speeches, chosen.randint(1, 60)))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def start(*arguments: object, **options: object) -> subprocess.Popen:
    """Start `data.prepare` in a process of its own."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]


def has_ended(process_group: int) -> bool:
    """Return whether every process of a group has ended or ends within 20 seconds."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(process_group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def interrupt(out: Path, number: int, times: int, wait: Callable[[], float], *arguments: object) -> int:
    """Start the command `times` times and send it signal `number`, `wait()` seconds after it has begun to write.

    Returns how many times a shard was incomplete when the command ended.
    """
    incomplete = 0
    for _ in range(times):
        running = start(*arguments, "--out", out, start_new_session=True)
        before = sizes(out)
        while sizes(out) == before and running.poll() is None:
            time.sleep(0.01)
        time.sleep(wait())
        running.send_signal(number)
        running.communicate()
        assert has_ended(running.pid), "worker processes were left behind"
        incomplete += any(size > HEADER_BYTES for name, size in sizes(out).items() if name.endswith(".bin.partial"))
    return incomplete


def sizes(directory: Path) -> dict[str, int]:
    """Return the sizes of the shards, complete or not, by name."""
    found = {}
    for path in directory.glob("*.bin*"):
        try:
            found[path.name] = path.stat().st_size
        except FileNotFoundError:  # it has been renamed in the meantime
            continue
    return found


def test_killed_and_repeated_run_ends_with_the_same_bytes(run, contents, tmp_path):
    corpus = write_corpus(tmp_path / "c.jsonl", 8)
    arguments = ("text", corpus, "--val-fraction", 0.05, "--shard-tokens", 100_000, "--workers", 2)
    run(*arguments, "--out", tmp_path / "expected")
    out = tmp_path / "out"
    incomplete = interrupt(out, signal.SIGKILL, 2, lambda: 0.02, *arguments)
    assert incomplete >= 1
    assert (out / PROGRESS_FILE).exists(), "it finished before the last kill"
    run(*arguments, "--out", out)
    assert contents(out) == contents(tmp_path / "expected")


@pytest.mark.slow
def test_ten_kills_at_random_moments(run, contents, tmp_path):
    corpus = write_corpus(tmp_path / "c.jsonl", 100)
    arguments = ("text", corpus, "--val-fraction", 0.05, "--shard-tokens", 500_000, "--workers", 2)
    run(*arguments, "--out", tmp_path / "expected")
    out = tmp_path / "out"
    moments = random.Random(1)
    incomplete = interrupt(out, signal.SIGKILL, 10, lambda: moments.uniform(0, 0.4), *arguments)
    assert (out / PROGRESS_FILE).exists(), "it finished before the last kill"
    assert incomplete >= 7
    run(*arguments, "--out", out)
    assert contents(out) == contents(tmp_path / "expected")
    open_split(out, "train").verify()


def test_control_c_stops_cleanly_and_leaves_no_process(tmp_path):
    corpus = write_corpus(tmp_path / "c.jsonl", 8)
    arguments = ("text", corpus, "--shard-tokens", 150_000, "--workers", 2, "--out", tmp_path / "out")
    running = start(*arguments, start_new_session=True)
    while not sizes(tmp_path / "out"):
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGINT)
    _, message = running.communicate(timeout=20)
    assert running.returncode == 130
    assert "stopped; run the same command again to continue" in message
    assert "Traceback" not in message
    assert has_ended(running.pid)


def test_full_disk_is_explained_and_nothing_is_lost(run, contents, tmp_path):
    corpus = write_corpus(tmp_path / "c.jsonl", 3)
    arguments = ("text", corpus, "--shard-tokens", 200_000, "--workers", 1)

    def limit() -> None:
        # Instead of filling a disk: beyond this size, writing to a file fails, here near the end of a shard.
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


def test_full_disk_is_explained_when_the_tokenizer_is_written(run, contents, tmp_path):
    corpus = write_corpus(tmp_path / "c.jsonl", 1)
    arguments = ("text", corpus, "--tokenizer", "bpe:400", "--val-fraction", 0)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.RLIM_INFINITY))

    running = start(*arguments, "--out", tmp_path / "out", preexec_fn=limit)
    _, message = running.communicate()
    assert running.returncode == 2
    assert "tokenizer.json: File too large; make room" in message
    assert "Traceback" not in message
    run(*arguments, "--out", tmp_path / "out")
    run(*arguments, "--out", tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
