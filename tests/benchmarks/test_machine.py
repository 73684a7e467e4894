"""The precisions that the benchmarks run in, and the rates that they are compared with."""

import torch

import benchmarks.machine
from benchmarks.machine import matmul_rate, memory_bandwidth, native_dtypes, read_bandwidth


def test_only_precisions_that_the_cpu_computes_in_are_native(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert native_dtypes("cpu")[0] == ["float32"]
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True})
    assert native_dtypes("cpu")[0] == ["bfloat16", "float32"]
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Tesla T4")
    assert native_dtypes("cuda") == (["float16", "float32"], "Tesla T4")


def test_rates_are_work_divided_by_time(monkeypatch):
    """With a clock on which each piece of work takes a second."""
    done = []

    def second(work):
        done.append(work())
        return 1.0

    monkeypatch.setattr(benchmarks.machine, "seconds", second)
    monkeypatch.setattr(benchmarks.machine, "BATCH", {"cpu": (1, 2)})
    real = torch.ones
    monkeypatch.setattr("torch.ones", lambda n, device: real(1000, device=device))
    monkeypatch.setattr("torch.zeros", lambda n, device: real(1000, device=device))
    assert (memory_bandwidth("cpu"), read_bandwidth("cpu")) == (8000.0, 4000.0)
    assert matmul_rate("float32", "cpu") == 2 * 2 * 768 * 50257
    assert {tuple(product.shape) for product in done[10:]} >= {(2, 50257), (2, 768), (50257, 768)}
