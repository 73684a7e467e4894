"""Tasks that datatrove's executors run: the same bytes as one process, however often tasks are killed."""

import importlib.util
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from data.prepare import executors
from data.prepare.executors import ATTEMPTS, RunCommand, run_tasks

ROOT = Path(__file__).resolve().parents[3]
needs_datatrove = pytest.mark.skipif(importlib.util.find_spec("datatrove") is None, reason="datatrove is not installed")
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


@pytest.fixture
def corpus(documents, tmp_path):
    """The documents in eight files."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for n in range(8):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in documents[n::8])
        (folder / f"{n}.jsonl").write_text(rows)
    return folder


def kill_tasks(main: subprocess.Popen, times: int) -> list[str]:
    """Send SIGKILL to `times` different tasks of a running command, once to each. Returns the parts they prepared."""
    killed: list[str] = []
    chosen = random.Random(0)
    while main.poll() is None and len(killed) < times:
        for child in psutil.Process(main.pid).children(recursive=True):
            try:
                _, option, part = " ".join(child.cmdline()).partition("--part ")
                if option and part not in killed and len(killed) < times and chosen.random() < 0.3:
                    child.send_signal(signal.SIGKILL)
                    killed.append(part)
            except psutil.Error:  # it has ended
                continue
        time.sleep(0.1)
    return killed


def test_a_command_that_is_killed_is_repeated_and_one_that_fails_is_reported(tmp_path):
    count = tmp_path / "count"
    code = (
        f"import os, sys; path = {str(count)!r}; n = os.path.getsize(path) if os.path.exists(path) else 0;"
        "open(path, 'a').write('x'); print('part', sys.argv[1], 'attempt', n + 1);"
        "n < {limit} and os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", code.replace("{limit}", str(ATTEMPTS - 1)), "{part}"]
    RunCommand(command, tmp_path)(None, 2, 8)
    assert count.stat().st_size == ATTEMPTS
    assert (tmp_path / "part-003.txt").read_text().splitlines()[-1] == f"part 3/8 attempt {ATTEMPTS}"
    failing = [sys.executable, "-c", "import sys; sys.exit('no space left')"]
    with pytest.raises(RuntimeError, match=r"task 1 of 2 failed 3 times: no space left \(see .*part-001\.txt\)"):
        RunCommand(failing, tmp_path)(None, 0, 2)


def test_missing_packages_and_options_are_named(refused, corpus, tmp_path, monkeypatch):
    out = ("--out", tmp_path / "out")
    assert "--executor and --tasks N belong together: give both" in refused("text", corpus, *out, "--executor", "local")
    message = refused("text", corpus, *out, "--executor", "local", "--tasks", 9)
    assert "8 files cannot make 9 parts" in message
    monkeypatch.setattr(executors.importlib.util, "find_spec", lambda name: None)
    message = refused("text", corpus, *out, "--executor", "ray", "--tasks", 4)
    assert "--executor ray needs the package datatrove: pip install datatrove" in message
    monkeypatch.setattr(executors.importlib.util, "find_spec", lambda name: name == "datatrove" or None)
    message = refused("text", corpus, *out, "--executor", "ray", "--tasks", 4)
    assert "--executor ray needs the package ray: pip install ray" in message
    message = refused("text", corpus, *out, "--executor", "slurm", "--tasks", 4)
    assert "--executor slurm needs the name of a partition: --slurm-partition NAME" in message


def run_with_kills(arguments: list[object], kills: int) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    command = [sys.executable, "-m", "data.prepare", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    killed: list[str] = []
    thread = threading.Thread(target=lambda: killed.extend(kill_tasks(process, kills)))
    thread.start()
    output, _ = process.communicate()
    thread.join()
    return subprocess.CompletedProcess(command, process.returncode, output, ""), killed


@pytest.mark.slow
@needs_datatrove
def test_eight_tasks_of_which_three_are_killed_give_the_bytes_of_one_process(run, contents, corpus, tmp_path):
    options = ["--val-fraction", 0.1, "--shard-tokens", 20_000]
    run("text", corpus, "--out", tmp_path / "one", *options)
    arguments = ["text", corpus, "--out", tmp_path / "many", *options, "--executor", "local", "--tasks", 8]
    done, killed = run_with_kills(arguments, kills=3)
    assert done.returncode == 0, done.stdout
    assert len(killed) == 3
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


@pytest.mark.slow
@needs_datatrove
def test_a_task_that_never_succeeds_is_a_sentence_and_the_next_call_completes(run, contents, corpus, tmp_path):
    """A full disk, simulated by a file that cannot be replaced by the directory of a part."""
    options = ["--val-fraction", 0.1, "--executor", "local", "--tasks", 3]
    out = tmp_path / "out"
    out.mkdir()
    (out / "part-002-of-003").write_text("in the way")
    done, _ = run_with_kills(["text", corpus, "--out", out, *options], kills=0)
    assert done.returncode == 2
    assert "task 2 of 3 failed 3 times: " in done.stdout.splitlines()[-1]
    assert "run the same command again to continue" in done.stdout.splitlines()[-1]
    (out / "part-002-of-003").unlink()
    done, _ = run_with_kills(["text", corpus, "--out", out, *options], kills=0)
    assert done.returncode == 0, done.stdout
    run("text", corpus, "--out", tmp_path / "one", "--val-fraction", 0.1)
    assert contents(out) == contents(tmp_path / "one")


@pytest.mark.slow
@needs_datatrove
def test_slurm_gets_an_array_of_tasks_and_then_merges(run, contents, corpus, tmp_path, monkeypatch):
    """With a sbatch that runs each job at once, one task after the other."""
    tools = tmp_path / "bin"
    tools.mkdir()
    scripts = {
        "sbatch": "#!/bin/bash\nfor script; do :; done\nlast=$(grep -oP '(?<=array=0-)\\d+' $script)\n"
        f"echo $script $(grep -v '^$' $script | tr '\\n' ';') \"$@\" >> {tmp_path}/jobs\n"
        "if grep -q merge_stats $script; then echo 2; exit; fi\n"
        "for i in $(seq 0 $last); do SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=n bash $script >&2 || exit 1; done\n"
        "echo 1\n",
        "srun": '#!/bin/bash\nwhile [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done\nexec "$@"\n',
        "scontrol": "#!/bin/bash\necho localhost\n",
        # The command that datatrove installs.
        "launch_pickled_pipeline": f"#!/bin/bash\n{sys.executable} -m datatrove.tools.launch_pickled_pipeline $1\n",
    }
    for name, text in scripts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    options = ["--val-fraction", 0.1]
    slurm = ["--executor", "slurm", "--tasks", 2, "--slurm-partition", "cpu", "--slurm-time", "01:00:00"]
    done, _ = run_with_kills(["text", corpus, "--out", tmp_path / "out", *options, *slurm], kills=0)
    assert done.returncode == 0, done.stdout
    run("text", corpus, "--out", tmp_path / "one", *options)
    assert contents(tmp_path / "out") == contents(tmp_path / "one"), done.stdout
    jobs = (tmp_path / "jobs").read_text().splitlines()
    assert all(word in jobs[0] for word in ("--partition=cpu", "--time=01:00:00", "--array=0-1", "--requeue"))
    assert any("--job-name=merge" in job and "--dependency=afterok:1" in job for job in jobs)


@pytest.mark.slow
@needs_datatrove
@needs_ray
def test_ray_gives_the_bytes_of_one_process(run, contents, corpus, tmp_path):
    options = ["--val-fraction", 0.1]
    run("text", corpus, "--out", tmp_path / "one", *options)
    arguments = ["text", corpus, "--out", tmp_path / "ray", *options, "--executor", "ray", "--tasks", 3]
    done, _ = run_with_kills(arguments, kills=0)
    assert done.returncode == 0, done.stdout
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")


def test_tasks_of_this_machine_are_planned_from_its_cores(monkeypatch, tmp_path):
    planned = []
    monkeypatch.setattr(executors.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(executors, "available_cores", lambda: 8)
    monkeypatch.setitem(
        sys.modules,
        "datatrove.executor",
        type(
            "module",
            (),
            {"LocalPipelineExecutor": lambda *a, **k: planned.append(a) or type("E", (), {"run": print})()},
        ),
    )
    run_tasks("local", ["text", "a"], tmp_path, 64, 3, executors.SlurmOptions(None, "1:00:00"))
    ((step,), tasks, at_once, logs) = planned[0]
    assert (tasks, at_once, logs) == (64, 2, str(tmp_path / "logs"))
    assert step.command[1:] == ["-m", "data.prepare", "text", "a", "--part", "{part}"]
