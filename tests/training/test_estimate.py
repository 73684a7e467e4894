"""What a run would take: the memory estimate against what processes took, and what --dry-run says."""

import json
import re

import pytest
import torch

from device import native_dtypes
from model import GPTConfig
from training.estimate import estimate_memory, flops_per_token

# Trains a model in a process of its own and prints the peak of its resident memory above that of the libraries. glibc
# is told to give back what is freed, so that the figure is of what is in use, and not of how the heap is fragmented.
MEASURE = """
import json, sys
from pathlib import Path
import torch
from model import GPT, GPTConfig
from training.config import Config
from training.optim import make_optimizers
from training.parallel import Processes, clip_gradients, distribute

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def train(shape, rows, length):
    model = GPT(shape).train()
    loss_function = distribute(model, config, processes, compiled=False, sharded=False)
    optimizers = make_optimizers(model, config.optim)
    for micro_step in range(4):
        ids = torch.randint(shape.vocab_size, (rows, length + 1))
        with processes.autocast():
            loss = loss_function(ids[:, :-1], ids[:, 1:])
        loss.backward()
        if micro_step % 2:  # every step has two micro-batches: the second finds the gradient of the first
            clip_gradients(model, 1.0).item()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

shape, rows, length, dtype, recompute = json.loads(sys.argv[1])
config = Config()
config.system.activation_checkpointing = recompute
processes = Processes(0, 1, torch.device("cpu"), getattr(torch, dtype))  # start_processes would keep what is freed
train(GPTConfig(vocab_size=64, block_size=8, n_layer=1, n_head=1, n_embd=8), 2, 8)  # loads what is loaded when used
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
train(GPTConfig(**shape), rows, length)
print(resident("VmHWM") - before)
"""
WIDE = {"vocab_size": 8192, "block_size": 256, "n_layer": 6, "n_head": 8, "n_embd": 512}
VOCABULARY = {"vocab_size": 50257, "block_size": 256, "n_layer": 4, "n_head": 4, "n_embd": 256}
DEEP = {"vocab_size": 4096, "block_size": 256, "n_layer": 12, "n_head": 4, "n_embd": 256}


def assert_estimate(python, shape, rows, length, dtype, recompute=False):
    arguments = json.dumps([shape, rows, length, dtype, recompute])
    measured = int(python("-c", MEASURE, arguments, MALLOC_MMAP_THRESHOLD_="65536").stdout)
    parts = estimate_memory(GPTConfig(**shape), rows, length, dtype=getattr(torch, dtype), recompute=recompute)
    assert sum(parts.values()) == pytest.approx(measured, rel=0.15), parts


@pytest.mark.parametrize(
    ("shape", "rows", "dtype", "recompute"),
    [
        pytest.param(WIDE, 8, "default", False, id="wide"),
        pytest.param(WIDE, 8, "float32", False, id="wide-float32", marks=pytest.mark.slow),
        pytest.param(WIDE, 2, "default", False, id="mostly-parameters", marks=pytest.mark.slow),
        pytest.param(VOCABULARY, 4, "float32", False, id="vocabulary-float32", marks=pytest.mark.slow),
        pytest.param(VOCABULARY, 4, "default", False, id="vocabulary", marks=pytest.mark.slow),
        pytest.param(DEEP, 16, "float32", False, id="deep-float32", marks=pytest.mark.slow),
        pytest.param(DEEP, 16, "default", True, id="recompute", marks=pytest.mark.slow),
    ],
)
def test_the_memory_estimate_is_within_15_percent_of_the_measured_peak(python, shape, rows, dtype, recompute):
    if dtype == "default":  # what this processor computes in: an emulated precision would take minutes
        dtype = str(native_dtypes(torch.device("cpu"))[0]).removeprefix("torch.")
    assert_estimate(python, shape, rows, 256, dtype, recompute)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_estimate_holds_for_every_precision_emulated_or_not(python, dtype):
    """On few tokens, as emulated products are slow: weights, their copies in `dtype` and the logits are most of it."""
    assert_estimate(python, WIDE, 1, 32, dtype)


def test_sharding_divides_weights_and_optimizer_state():
    one = estimate_memory(GPTConfig(), 4, 1024, dtype=torch.float32)
    eight = estimate_memory(GPTConfig(), 4, 1024, dtype=torch.float32, shards=8)
    assert one["optimizer"] == 8 * 124_439_808
    assert eight["optimizer"] == one["optimizer"] // 8
    assert eight["weights"] < one["weights"]
    assert eight["activations"] == one["activations"]


def test_dry_run_says_what_it_would_take_and_creates_nothing(python, tiny_run, write_config, tmp_path):
    config = tiny_run("dry", **{"data.micro_batch": "auto"})
    output = python("train.py", "--config", write_config(config), "--dry-run", "8xH100", "--mfu", "0.5").stdout
    assert "28,096 parameters" in output
    shape = config.model_config(json.loads((tmp_path / config.data.dir / "meta.json").read_text())["vocab_size"])
    flops = flops_per_token(shape, 28_096, 32)
    assert f"{flops / 1e6:,.1f} MFLOPs a token" in output
    assert "5,120 tokens, 20 steps of 256" in output
    assert re.search(r"ddp +1 .*\n", output)
    assert re.search(r"fsdp +1 .*\n", output)
    days = flops * 5120 / (0.5 * 989e12 * 8) / 86400
    assert f"{days:,.2f} days, assuming 50% of 989 TFLOP/s" in output
    assert not (tmp_path / "runs").exists()


def test_dry_run_checks_the_dataset_and_the_device(python, tiny_run, write_config, tmp_path):
    config = write_config(tiny_run("dry"))
    result = python("train.py", "--config", config, "--dry-run", "--data.dir", tmp_path / "gone", check=False)
    assert result.returncode == 2
    assert "no dataset at" in result.stderr
    result = python("train.py", "--config", config, "--dry-run", "8xAbacus", check=False)
    assert result.returncode == 2
    assert "--dry-run 8xAbacus: expected as 8xH100" in result.stderr
    assert "the peak of cpu is not known" in python("train.py", "--config", config, "--dry-run").stdout
