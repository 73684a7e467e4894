"""The plan of a run: what is decided, and the reasons that are printed."""

import dataclasses

import pytest
import torch

from model import GPTConfig
from processes import Processes
from training.config import Config
from training.plan import make_plan, should_compile, should_shard

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ONE = Processes(rank=0, world_size=1, device=CPU, dtype=torch.float32)
SMALL = GPTConfig(vocab_size=64, block_size=8, n_layer=1, n_head=1, n_embd=8)
LARGE = GPTConfig()


@pytest.fixture
def config(tiny_run):
    return tiny_run()


def test_the_plan_of_a_small_run_on_a_cpu(config):
    plan = make_plan(config, SMALL, ONE, {})
    assert (plan.dtype, plan.sharded, plan.micro_batch, plan.compiled) == (torch.float32, False, 8, False)
    assert plan.describe(ONE, 32) == (
        "1 x cpu, float32 (as configured), micro-batches of 8 x 32 (as configured), "
        "not compiled (a small model on a CPU gains less than compiling takes)"
    )


def test_an_automatic_micro_batch_is_the_largest_that_fits(config, monkeypatch):
    config.data.micro_batch = "auto"
    assert make_plan(config, SMALL, ONE, {}).micro_batch == 8
    monkeypatch.setattr("training.plan.needed_memory", lambda config, model, rows, dtype, shards: {"all": rows * 2**60})
    with pytest.raises(ValueError, match=r"one window of 32 tokens needs about .* GiB, and .* GiB are free on cpu"):
        make_plan(config, SMALL, ONE, {})


@pytest.mark.parametrize(
    ("device", "model", "compiler", "expected"),
    [
        (CUDA, SMALL, None, (True, "on CUDA")),
        (CPU, SMALL, "g++", (False, "a small model on a CPU gains less than compiling takes")),
        (CPU, LARGE, "g++", (True, "a large model on a CPU")),
        (CPU, LARGE, None, (False, "no C++ compiler found")),
        (torch.device("mps"), LARGE, "g++", (False, "not tested on mps")),
    ],
)
def test_when_to_compile(monkeypatch, device, model, compiler, expected):
    monkeypatch.setattr("shutil.which", lambda name: compiler)
    assert should_compile(Config(), model, device) == expected


def test_when_to_shard(config, monkeypatch):
    two_gpus = dataclasses.replace(ONE, world_size=2, device=CUDA)
    config.system.parallel = "fsdp"
    assert should_shard(config, SMALL, ONE) == (False, "one process")
    assert should_shard(config, SMALL, two_gpus) == (True, "as configured")
    config.system.parallel = "auto"
    assert should_shard(config, SMALL, dataclasses.replace(ONE, world_size=2)) == (False, "not needed on cpu")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
    assert should_shard(config, SMALL, two_gpus)[0] is False
    assert should_shard(config, LARGE, two_gpus)[0] is True
