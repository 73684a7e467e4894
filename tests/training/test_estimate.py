"""Estimates: the memory estimate against measured memory, and its parts on GPUs."""

import json

import pytest
import torch

from device import native_dtypes
from model import GPTConfig
from training.estimate import Hardware, Workload, count_parameters, flops_per_token, peak_flops

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


def estimate_memory(model, rows, length, hardware, *, windows=None, sharded=False, **options):
    """The memory of a step in which a process has `windows` windows, by default two micro-batches of them."""
    batch_tokens = (windows or 2 * rows) * length * hardware.count
    workload = Workload(model, count_parameters(model), hardware, batch_tokens, length, **options)
    return workload.memory(rows, sharded=sharded)


def assert_estimate(python, shape, rows, length, dtype, recompute=False):
    arguments = json.dumps([shape, rows, length, dtype, recompute])
    measured = int(python("-c", MEASURE, arguments, MALLOC_MMAP_THRESHOLD_="65536").stdout)
    parts = estimate_memory(GPTConfig(**shape), rows, length, Hardware(1, getattr(torch, dtype)), recompute=recompute)
    assert sum(parts.values()) == pytest.approx(measured, rel=0.15), parts


@pytest.mark.parametrize(
    ("shape", "rows", "dtype", "recompute"),
    [
        pytest.param(WIDE, 8, "default", False, id="wide", marks=pytest.mark.slow),
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


@pytest.mark.parametrize(
    "dtype", ["float32", *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("bfloat16", "float16"))]
)
def test_the_estimate_holds_for_every_precision_emulated_or_not(python, dtype):
    """With few tokens, because emulated products are slow; weights, their copies in `dtype` and logits dominate."""
    assert_estimate(python, WIDE, 1, 32, dtype)


def test_flops_of_a_token():
    assert count_parameters(GPTConfig()) == 124_439_808
    assert flops_per_token(GPTConfig(), 124_439_808, 512) == 6 * 124_439_808 + 12 * 12 * 768 * 512
    window = GPTConfig(attention="window", window_size=256)
    assert flops_per_token(window, 124_439_808, 512) == flops_per_token(GPTConfig(), 124_439_808, 256)


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


def test_sharding_divides_weights_and_optimizer_state():
    one = estimate_memory(GPTConfig(), 4, 1024, Hardware(1, torch.float32))
    eight = estimate_memory(GPTConfig(), 4, 1024, Hardware(8, torch.float32), sharded=True)
    assert one["optimizer"] == 8 * 124_439_808
    assert eight["optimizer"] == one["optimizer"] // 8
    assert eight["weights"] < one["weights"]
    assert eight["activations"] == one["activations"]


H100 = 80 * 2**30


def test_on_several_gpus_unaveraged_gradients_are_beside_the_buckets_of_ddp():
    def gradients(count, **options):
        return estimate_memory(GPTConfig(), 4, 1024, Hardware(count, torch.bfloat16, H100), **options)["gradients"]

    once = 4 * 124_439_808
    assert gradients(1) == once
    assert gradients(8) == 2 * once
    assert gradients(8, windows=4) == once
    assert gradients(8, sharded=True) == once


def test_the_loss_on_a_gpu_needs_more_logits_and_products_in_float32():
    def logits(gib):
        return estimate_memory(GPTConfig(), 64, 1024, Hardware(1, torch.bfloat16, gib * 2**30))["logits"]

    padded, width = 50304, 768
    fixed = 4 * padded * width + 4 * 64 * 1024 * width + 4 * 50257 * width
    assert logits(80) == 8192 * padded * 2 + fixed
    assert logits(24) == 2048 * padded * 2 + fixed


def test_muon_keeps_one_state_of_a_matrix_and_needs_memory_in_its_step():
    large = GPTConfig.preset("gpt2-xl")
    matrices = 12 * 1600**2 * 48

    def parts(count, muon, **options):
        return estimate_memory(large, 1, 1024, Hardware(count, torch.bfloat16, H100), muon=muon, **options)

    adamw, muon = parts(8, False), parts(8, True)
    assert adamw["optimizer"] - muon["optimizer"] == 4 * matrices
    results = 2 * 2 * matrices // 3  # of the largest group of equal shapes and the one before
    needed = muon["activations"] + muon["logits"]
    assert results < needed < results * 2.5
    assert parts(1, True)["activations"] > muon["activations"]
    assert parts(8, True, sharded=True)["activations"] < muon["activations"]
