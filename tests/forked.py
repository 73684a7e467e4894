"""Run Python commands in forks of one process: the tests start many, and importing PyTorch takes seconds each time.

    run(["train.py", "--help"], environment, timeout)

does what `python train.py --help` does. Each process of pytest has a server, which forks for every command. The server
imports large packages and nothing of this repository.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

PACKAGES = [
    "torch",
    "jsonargparse",
    "safetensors.torch",
    "matplotlib.figure",
    "torch._dynamo",  # PyTorch's optimizers import it
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
]
ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, __file__],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    atexit.register(server.kill)
    return server


def run(
    arguments: Sequence[str], environment: Mapping[str, str], timeout: float, processes: int = 1
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` in the repository's directory and capture its output.

    Several processes run the same command, with the environment variables by which they find each other.
    The exit status is that of the first process that fails, whose failure ends the others.

    Args:
        arguments: a script, or -m and a module, and their arguments.
        environment: all environment variables of the process. Those that PyTorch reads when it is imported have no
            effect.
        timeout: in seconds.
        processes: number of processes.

    Raises subprocess.TimeoutExpired.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as directory:
        output, errors = Path(directory) / "output", Path(directory) / "errors"
        ranks = rank_variables(processes) if processes > 1 else [{}]
        environments = [{**environment, **variables} for variables in ranks]
        print(json.dumps([list(arguments), environments, str(output), str(errors)]), file=server.stdin, flush=True)
        if not select.select([server.stdout], [], [], timeout)[0]:
            os.killpg(server.pid, 9)
            _server.cache_clear()
            raise subprocess.TimeoutExpired(list(arguments), timeout)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(list(arguments), status, output.read_text(), errors.read_text())


def rank_variables(processes: int) -> list[dict[str, str]]:
    """Return, for each process, the environment variables by which the processes find each other."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    count = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **count, **address} for rank in range(processes)]


def wait(pids: set[int]) -> int:
    """Wait for child processes. Return 0, or the exit status of the first that fails, and then end the others."""
    status = 0
    while pids:
        pid, code = os.wait()
        pids.discard(pid)
        if code and not status:
            status = os.waitstatus_to_exitcode(code)
            for other in pids:
                os.kill(other, signal.SIGKILL)
    return status


def serve() -> list[str]:
    """Fork for each line of standard input, once for each process. In a fork, return the arguments of its command."""
    for package in PACKAGES:
        importlib.import_module(package)
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        arguments, environments, output, errors = json.loads(line)
        pids = set()
        for environment in environments:
            pid = os.fork()
            if pid == 0:
                os.environ.clear()
                os.environ.update(environment)
                for fd, path, mode in ((0, os.devnull, "r"), (1, output, "a"), (2, errors, "a")):
                    with open(path, mode) as file:
                        os.dup2(file.fileno(), fd)
                sys.stdin = open(0)  # noqa: SIM115
                return list(arguments)
            pids.add(pid)
        print(wait(pids), file=replies, flush=True)
    sys.exit()


def become(arguments: list[str]) -> None:
    """Do what `python ARGUMENTS` does."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path[0] = str(ROOT)
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[:1] = [
            str(Path(arguments[0]).resolve().parent),
            *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)),
        ]
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    become(serve())
