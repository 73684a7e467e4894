"""Estimates: the memory estimate against measured memory, and the output of --dry-run."""

import json
import re

import pytest
import torch

from device import native_dtypes
from model import GPTConfig
from processes import start_processes
from training.config import Flags
from training.estimate import count_parameters, estimate_memory, flops_per_token, peak_flops
from training.setup import dry_run

# Trains a model in a process of its own and prints the peak of its resident memory without that of the libraries. glibc
# returns freed memory to the system here, so that the result does not include the fragmentation of the heap.
MEASURE = """
import json, sys
from pathlib import Path
import torch
from model import GPT, GPTConfig
from training.config import Config
from training.optim import make_optimizers
from processes import Processes
from training.distributed import clip_gradients, distribute

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def train(shape, rows, length):
    model = GPT(shape).train()
    loss_function = distribute(
        model, processes, compiled=False, sharded=False, sequence_length=length, activation_checkpointing=recompute
    )
    optimizers = make_optimizers(model, config.optim)
    for micro_step in range(4):
        ids = torch.randint(shape.vocab_size, (rows, length + 1))
        with processes.autocast():
            loss = loss_function(ids[:, :-1], ids[:, 1:])
        loss.backward()
        if micro_step % 2:  # every step has two micro-batches: during the second, gradients exist
            clip_gradients(model, 1.0).item()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

shape, rows, length, dtype, recompute = json.loads(sys.argv[1])
config = Config()
processes = Processes(0, 1, torch.device("cpu"), getattr(torch, dtype))  # start_processes would keep freed memory
train(GPTConfig(vocab_size=64, block_size=8, n_layer=1, n_head=1, n_embd=8), 2, 8)  # loads libraries
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # reset the peak
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
    if dtype == "default":  # native to this processor: an emulated precision would take minutes
        dtype = str(native_dtypes(torch.device("cpu"))[0]).removeprefix("torch.")
    assert_estimate(python, shape, rows, 256, dtype, recompute)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_estimate_holds_for_every_precision_emulated_or_not(python, dtype):
    """With few tokens, because emulated products are slow; weights, their copies in `dtype` and logits dominate."""
    assert_estimate(python, WIDE, 1, 32, dtype)


def test_flops_of_a_token():
    assert count_parameters(GPTConfig()) == 124_439_808
    assert flops_per_token(GPTConfig(), 124_439_808, 512) == 6 * 124_439_808 + 12 * 12 * 768 * 512


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA H100 NVL", 835e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("Tesla T4", 65e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("Tesla P4", None),
    ],
)
def test_peaks_by_device_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("1xA100", "auto", ["1 x A100, bfloat16", "40% of 312 TFLOP/s"]),
        ("2xT4", "auto", ["2 x T4, float16", "40% of 65 TFLOP/s"]),  # no bfloat16 before Ampere
        ("1xA100", "float16", ["1 x A100, float16", "40% of 312 TFLOP/s"]),
        ("1xV100", "float32", ["1 x V100, float32", "the peak of V100 in float32 is not known"]),
        ("1xV100", "bfloat16", ["1 x V100, bfloat16", "the peak of V100 in bfloat16 is not known"]),
    ],
)
def test_dry_run_knows_the_precision_of_each_card(tiny_run, device, dtype, expected):
    config = tiny_run("dry", **{"system.dtype": dtype})
    report = dry_run(config, start_processes("cpu", "float32"), Flags(dry_run=device))
    assert all(words in report for words in expected), report


def test_sharding_divides_weights_and_optimizer_state():
    one = estimate_memory(GPTConfig(), 4, 1024, dtype=torch.float32)
    eight = estimate_memory(GPTConfig(), 4, 1024, dtype=torch.float32, shards=8)
    assert one["optimizer"] == 8 * 124_439_808
    assert eight["optimizer"] == one["optimizer"] // 8
    assert eight["weights"] < one["weights"]
    assert eight["activations"] == one["activations"]


def test_dry_run_prints_the_estimates_and_creates_nothing(python, tiny_run, write_config, tmp_path):
    config = tiny_run("dry", **{"data.micro_batch": "auto", "system.dtype": "auto"})
    output = python("train.py", "--config", write_config(config), "--dry-run", "8xH100", "--mfu", "0.5").stdout
    assert "28,096 parameters" in output
    shape = config.model_config(json.loads((tmp_path / config.data.dir / "meta.json").read_text())["vocab_size"])
    flops = flops_per_token(shape, 28_096, 32)
    assert f"{flops / 1e6:,.1f} MFLOPs per token" in output
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
    assert "--dry-run 8xAbacus: expected a number and a device such as 8xH100" in result.stderr
    assert "the peak of cpu in float32 is not known" in python("train.py", "--config", config, "--dry-run").stdout
