"""Time contestants (implementations to compare) and measure their memory, each in a process of its own."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import psutil

Run = Callable[[], object]  # a function whose calls are timed


class Call(NamedTuple):
    """A function call. Module and function are given by their names.

    So a process can send the call to another process without importing the module.
    """

    module: str  # such as "benchmarks.ours.decode"
    function: str
    arguments: tuple = ()

    def __call__(self) -> Any:
        # The import is dynamic, so that each process loads only the libraries of its own contestant.
        return getattr(importlib.import_module(self.module), self.function)(*self.arguments)


def call_in_process(module: str, function: str, *arguments: Any) -> Any:
    """Call a function in a new process, and return its result. The caller does not load the function's libraries.

    Raises the exception of the function, or ChildProcessError if the new process ends without a result.
    """
    process, pipe = start_process(answer, Call(module, function, arguments))
    try:
        return receive(pipe)
    except KeyboardInterrupt:
        process.terminate()  # otherwise join() would wait until the function returns
        raise
    finally:
        process.join()


def compare(contestants: Mapping[str, Call], runs: int, warm_up: int = 2) -> dict[str, dict[str, float]]:
    """Time the contestants. Each contestant runs `warm_up` times without timing, and then `runs` times with timing.

    The timed runs are made in turns. In one turn, each contestant runs once. Every second turn has the reversed order,
    so that a contestant does not always run after the same other contestant.

    Each contestant has a new process, in which its `Call` sets up the work and returns the function to time. Returns
    for each contestant "seconds" (the median), "lowest" and "highest" in seconds, and "peak_memory" in bytes: that of
    the tensors on the GPU if the contestant uses a GPU, otherwise that of its process and its descendants. Raises the
    exception of a contestant that fails.
    """
    processes: list[BaseProcess] = []
    pipes: dict[str, Connection] = {}
    durations: dict[str, list[float]] = {name: [] for name in contestants}
    for name, setup in contestants.items():
        process, pipes[name] = start_process(serve, setup, warm_up)
        processes.append(process)
        receive(pipes[name])  # wait for its warm-up to end before the next contestant starts
    for turn in range(runs):
        for name in list(pipes)[:: -1 if turn % 2 else 1]:
            pipes[name].send(True)
            durations[name].append(receive(pipes[name]))
    results = {}
    for name, pipe in pipes.items():
        pipe.send(False)
        results[name] = {
            "seconds": statistics.median(durations[name]),
            "lowest": min(durations[name]),
            "highest": max(durations[name]),
            "peak_memory": receive(pipe),
        }
    for process in processes:
        process.join()
    return results


def start_process(target: Callable[..., None], *arguments: Any) -> tuple[BaseProcess, Connection]:
    """Start `target(*arguments, pipe)` in a new process. Return the new process and the caller's end of the pipe.

    After the new process has sent its last result, the caller must join it (wait until it has ended). Until then, it
    uses a core to release its memory, which would slow down the next contestant.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(*arguments, there), daemon=True)
    process.start()
    there.close()  # otherwise receive() would wait forever for a process that was killed
    return process, here


def receive(pipe: Connection) -> Any:
    """Return the value that the other process sends, or raise the exception that it sends.

    Raises ChildProcessError if the other process ended without sending a value.
    """
    try:
        value = pipe.recv()
    except EOFError:
        raise ChildProcessError("a process of the benchmark ended without a result: was its memory full?") from None
    if isinstance(value, Exception):
        raise value
    return value


def answer(call: Call, pipe: Connection) -> None:
    """Make the call and send its result or its exception. Runs in the process that `call_in_process` starts."""
    try:
        pipe.send(call())
    except Exception as error:
        send_error(error, pipe)
    except KeyboardInterrupt:
        pass  # the parent process is interrupted too, and reports it


def serve(setup: Call, warm_up: int, pipe: Connection) -> None:
    """Set up, warm up, and time one run for each True that the pipe delivers. Runs in the process of a contestant.

    Send None after the warm-up, and the duration in seconds after each timed run. When the pipe delivers False, send
    the peak memory in bytes and end. If an exception occurs, send the exception and end.
    """
    peak, running = [0], threading.Event()
    threading.Thread(target=watch_memory, args=(peak, running), daemon=True).start()
    try:
        run: Run = setup()
        for _ in range(warm_up):
            run()
        pipe.send(None)
        while pipe.recv():
            running.set()
            duration = seconds(run)
            running.clear()
            pipe.send(duration)
        gpu = used_gpu()
        pipe.send(max(own_peak(), peak[0]) if gpu is None else gpu.max_memory_allocated())
    except Exception as error:
        # Send a ValueError instead of torch's error: to receive that error, the parent would have to import torch.
        if type(error).__name__ == "OutOfMemoryError":
            error = ValueError("the GPU's memory is full: all contestants hold theirs at once, so compare fewer peers")
        send_error(error, pipe)
    except KeyboardInterrupt:
        pass  # the parent process is interrupted too, and reports it


def send_error(error: Exception, pipe: Connection) -> None:
    """Send an exception to the parent process. If that process was killed, nobody needs the exception."""
    with contextlib.suppress(BrokenPipeError):
        pipe.send(error)


def seconds(run: Run) -> float:
    """Return how many seconds one call of `run` takes, including the work that the call queues on a GPU."""
    synchronize()
    began = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - began


def used_gpu() -> Any:
    """Return torch.cuda if this process has used a GPU. Otherwise, or if it has not imported torch, return None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def synchronize() -> None:
    """If this process uses a GPU, wait until the GPU has finished all queued work."""
    if gpu := used_gpu():
        gpu.synchronize()


def own_peak() -> int:
    """Return the peak memory of this process in bytes."""
    if sys.platform == "linux":  # on Linux, getrusage() would include the parent's peak
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def watch_memory(peak: list[int], running: threading.Event) -> None:
    """While `running` is set, measure memory twice a second, and keep the highest value in peak[0], in bytes.

    A value is the memory of this process plus that of its descendants. Memory that several processes share is counted
    once for each of them.
    """
    this = psutil.Process()
    while running.wait():
        held = 0
        for process in (this, *this.children(recursive=True)):
            try:
                held += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        peak[0] = max(peak[0], held)
        time.sleep(0.5)
