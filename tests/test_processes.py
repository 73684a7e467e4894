"""Processes: their reductions, and the end of a process group."""

import sys

import pytest
import torch

from processes import Processes, start_processes


def test_one_process_needs_no_process_group():
    processes = Processes(rank=0, world_size=1, device=torch.device("cpu"), dtype=torch.float32)
    assert processes.is_main
    assert processes.all_reduce_sum(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    assert (processes.all_reduce_min(3), processes.broadcast(4)) == (3, 4)
    assert not torch.distributed.is_initialized()


def test_an_environment_without_a_rank_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(
        ValueError, match=r"WORLD_SIZE is 2, but RANK is not set: start several processes with torchrun"
    ):
        start_processes("cpu", "float32")


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
