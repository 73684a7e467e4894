"""The plan of a run: what is decided, and the reasons that are printed."""

import dataclasses

import pytest
import torch

from model import GPTConfig
from processes import Processes
from train import train_step
from training.config import Config
from training.estimate import Hardware, Workload, count_parameters, largest_micro_batch
from training.plan import make_plan, should_compile, should_shard

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ONE = Processes(rank=0, world_size=1, device=CPU, dtype=torch.float32)
SMALL = GPTConfig(vocab_size=64, block_size=8, n_layer=1, n_head=1, n_embd=8)
LARGE = GPTConfig()


def workload(config, model=SMALL, count=1, gpu_memory=None):
    hardware = Hardware(count, torch.float32, gpu_memory)
    return Workload.of(config, model, count_parameters(model), hardware)


@pytest.fixture
def config(tiny_run):
    return tiny_run()


def test_the_plan_of_a_small_run_on_a_cpu(config):
    plan = make_plan(config, workload(config), ONE, {})
    assert (plan.dtype, plan.sharded, plan.micro_batch, plan.compiled) == (torch.float32, False, 8, False)
    assert plan.describe(ONE, 32) == (
        "1 x cpu, float32 (as configured), micro-batches of 8 x 32 (as configured), "
        "not compiled (a small model on a CPU gains less than compiling takes)"
    )


def test_an_automatic_micro_batch_is_the_largest_that_fits(config, monkeypatch):
    config.data.micro_batch = "auto"
    assert make_plan(config, workload(config), ONE, {}).micro_batch == 8
    monkeypatch.setattr(Workload, "memory", lambda self, rows, sharded: {"all": rows * 2**60})
    with pytest.raises(ValueError, match=r"one window of 32 tokens needs about .* GiB, and .* GiB are free on cpu"):
        make_plan(config, workload(config), ONE, {})


@pytest.mark.parametrize(
    ("windows", "limit", "expected"),
    [
        (512, 600, 512),
        (128, 90, 64),
        (105, 60, 35),  # 53 and 52 would be two shapes
        (103, 60, 52),  # a prime: two shapes are better than 103 passes
        (78, 41, 39),
        (8, 1, 1),
        (8, 0, None),
    ],
)
def test_a_micro_batch_divides_the_windows_where_it_can(windows, limit, expected):
    assert largest_micro_batch(windows, lambda rows: rows <= limit) == expected


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
@pytest.mark.parametrize(
    ("too_many", "advice"),
    [
        (8, ": set data.micro_batch to 4, which is estimated to fit"),
        (1, ", and by the estimate no smaller micro-batch fits either: use a shorter data.sequence_length"),
    ],
)
def test_exhausted_memory_ends_in_a_sentence_that_says_what_would_fit(
    config, prepare, monkeypatch, too_many, advice, error
):
    def needed(self, rows, sharded):
        return {"all": 0 if rows < too_many else 2**60}

    def exhausted(*arguments):
        raise error

    monkeypatch.setattr(Workload, "memory", needed)
    expected = f"out of memory on cpu with micro-batches of 8 windows{advice}"
    with pytest.raises(ValueError, match=expected), prepare(config) as run:
        run.loss_function.forward = exhausted
        train_step(run, False, False)


def test_exhausted_memory_before_the_first_step_ends_in_a_sentence(config, prepare, monkeypatch):
    def exhausted(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("training.setup.prepare_model", exhausted)
    with pytest.raises(ValueError, match="out of memory on cpu: the weights and the optimizer do not fit"):
        prepare(config)


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
    assert should_compile(Config(), count_parameters(model), device) == expected


def test_when_to_shard(config, monkeypatch):
    two_gpus = dataclasses.replace(ONE, world_size=2, device=CUDA)
    small, large = (workload(config, model, 2, 2**30) for model in (SMALL, LARGE))
    config.system.parallel = "fsdp"
    assert should_shard(config, small, ONE) == (False, "one process")
    assert should_shard(config, small, two_gpus) == (True, "as configured")
    config.system.parallel = "auto"
    assert should_shard(config, small, dataclasses.replace(ONE, world_size=2)) == (False, "not needed on cpu")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
    assert should_shard(config, small, two_gpus)[0] is False
    assert should_shard(config, large, two_gpus)[0] is True
