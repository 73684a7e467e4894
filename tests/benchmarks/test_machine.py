"""The precisions that the benchmarks run in."""

from benchmarks.machine import native_dtypes


def test_only_precisions_that_the_cpu_computes_in_are_native(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert native_dtypes()[0] == ["float32"]
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True})
    assert native_dtypes()[0] == ["bfloat16", "float32"]
