"""Processes: their reductions, and the end of a process group."""

import os
import socket
import sys
from datetime import timedelta

import pytest
import torch
import torch.testing._internal.distributed.fake_pg  # registers the backend "fake"

import processes
from processes import Processes, name_lost_processes, start_processes


def test_one_process_needs_no_process_group():
    one = Processes(rank=0, world_size=1, device=torch.device("cpu"), dtype=torch.float32)
    assert one.is_main
    assert one.all_reduce_sum(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    assert (one.all_reduce_min(3), one.broadcast((4, None))) == (3, (4, None))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_an_incomplete_environment_is_refused(monkeypatch, missing):
    """Without an address, the main process would wait for the others until JOIN_TIMEOUT."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(
        ValueError, match=f"WORLD_SIZE is 2, but {missing} is not set: start several processes with torchrun"
    ):
        start_processes("cpu", "float32")


@pytest.fixture
def alone(monkeypatch):
    """`alone(rank)`: this process is one of three, and the others do not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def set_environment(rank):
        for name, value in {"RANK": rank, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(processes, "JOIN_TIMEOUT", timedelta(seconds=0.5))

    return set_environment


def test_the_main_process_names_the_processes_that_do_not_join(alone):
    alone(0)
    with pytest.raises(
        TimeoutError, match=r"processes \[1, 2\] of 3 did not connect to 127.0.0.1:\d+ within 0.5 seconds"
    ):
        start_processes("cpu", "float32")


def test_the_others_name_the_main_process_and_its_address(alone):
    alone(1)
    with pytest.raises(
        TimeoutError, match=r"process 0 at 127.0.0.1:\d+ did not answer within 0.5 seconds: check whether"
    ):
        start_processes("cpu", "float32")


def test_several_processes_on_a_device_without_collective_operations_are_refused(alone, monkeypatch):
    alone(0)
    monkeypatch.setattr(processes, "find_device", lambda *_: torch.device("mps"))
    with pytest.raises(ValueError, match="3 processes cannot exchange tensors on mps: start one, or use the cpu"):
        start_processes("mps", "float32")


def test_processes_that_do_not_answer_after_a_failure_are_lost(monkeypatch):
    monkeypatch.setattr(processes, "ANSWER_TIMEOUT", timedelta(seconds=0.2))
    assert name_lost_processes() == "another process"
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("fake", store=store, rank=0, world_size=4)
    try:
        assert name_lost_processes() == "processes [1, 2, 3]"
        for other in (1, 3):
            torch.distributed.distributed_c10d._get_default_store().set(f"alive-{other}", "")
        assert name_lost_processes() == "process 2"
    finally:
        torch.distributed.destroy_process_group()


def test_deterministic_operators_are_selected_before_the_device_is_used(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(
        processes, "find_device", lambda *_: torch.device("cpu") if "CUBLAS_WORKSPACE_CONFIG" in os.environ else None
    )
    try:
        start_processes("cpu", "float32", deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        for name in ("CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_DETERMINISTIC"):
            os.environ.pop(name, None)


GROUP_THREADS = """
import os
import torch
import torch.distributed as dist
from processes import stop_processes

dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
import torch.distributed.nn.functional  # as evaluation and torch.compile do
dist.all_reduce(torch.ones(3))
stop_processes()
print([open(f"/proc/self/task/{thread}/comm").read().strip() for thread in os.listdir("/proc/self/task")])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_threads_of_a_process_group_end_with_it(python):
    """A thread that releases a tensor while Python exits would abort the process after its work is done."""
    threads = python("-c", GROUP_THREADS).stdout
    assert "python" in threads
    assert "gloo" not in threads
