"""What to compute on: the device, the precision of its matrix products, the memory of a CPU."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import AbstractContextManager

import torch


def find_device(name: str, option: str) -> torch.device:
    """The device that `auto`, `cuda` (this process' own under torchrun) or another of PyTorch's names stands for here.

    Raises ValueError, which names the `option` that asked for it, where there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"{option} is cuda, but PyTorch finds no such device: use cpu, or a CUDA build")
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{option} {name} cannot be used: {str(error).splitlines()[0]}") from None


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision that `auto`, `bfloat16` or `float32` stands for on a device: bfloat16 where it is fast."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = torch.cpu.get_capabilities()
        fast = device.type == "cpu" and any(cpu.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Matrix products in `dtype`, what needs the range or the precision in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def keep_freed_memory() -> None:
    """Have the C library keep what a step frees for the next one, as CUDA's allocator does.

    By default it gives every large tensor back to the system, which fills its pages with zeros again at the next
    allocation: about a tenth of a training step on a CPU. Only glibc (Linux) has this setting; others do without.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
