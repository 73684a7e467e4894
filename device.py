"""Device and precision: this module decides which device computes, and in which precision.

In training, weights, gradients, optimizer state and the loss are always float32. Only the precision of the matrix
products varies (autocast). Compared with float32, a precision of 16 bits is two to sixteen times faster on a processor
with matrix units for it (tensor cores, AMX), and ten times slower on a processor that has to emulate it.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Values of the environment variable ONEDNN_MAX_CPU_ISA with which oneDNN does not use the CPU's instructions for
# bfloat16, for float16, or for matrices (AMX).
ISA_WITHOUT_BFLOAT16 = {"sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni"}
ISA_WITHOUT_FLOAT16 = ISA_WITHOUT_BFLOAT16 | {"avx512_core_bf16"}
ISA_WITHOUT_AMX = ISA_WITHOUT_FLOAT16 | {"avx512_core_fp16"}


def separate_compiled_code() -> None:
    """Give torch.compile a cache of its own if ATEN_CPU_CAPABILITY limits the CPU's instruction set.

    In PyTorch 2.13, the keys of the cache do not include this variable. So a process with the limit would load code
    that was compiled without the limit, and this code could compute wrong numbers or crash.
    """
    if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
        directory = f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}_{capability}"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", directory)


separate_compiled_code()  # on import, which is before the compiler reads TORCHINDUCTOR_CACHE_DIR


class Card(NamedTuple):
    """A GPU as its vendor's data sheet describes it."""

    dtype: torch.dtype  # the precision that `auto` selects on this card
    peak_flops: float  # peak rate of dense matrix products in that precision, in FLOP/s
    memory: int  # in GiB
    bandwidth: float  # of the memory, in bytes/s
    link: float  # bandwidth to the other GPUs (NVLink, Infinity Fabric, otherwise PCIe), in bytes/s per direction

    def peak_in(self, dtype: torch.dtype) -> float | None:
        """Return the peak FLOP/s in `dtype`, None if unknown. On cards with bfloat16, float16 is equally fast."""
        return self.peak_flops if dtype in (self.dtype, torch.float16) else None


# The keys are words in the names of devices. `find_card` takes the first match, so "H100 NVL" comes before "H100".
CARDS = {
    "B200": Card(torch.bfloat16, 2250e12, 180, 8.0e12, 900e9),
    "H200": Card(torch.bfloat16, 989e12, 141, 4.8e12, 450e9),
    "H100 NVL": Card(torch.bfloat16, 835e12, 94, 3.9e12, 300e9),
    "H100 PCIe": Card(torch.bfloat16, 756e12, 80, 2.0e12, 64e9),
    "H100": Card(torch.bfloat16, 989e12, 80, 3.35e12, 450e9),
    "A100-SXM4-40GB": Card(torch.bfloat16, 312e12, 40, 1.56e12, 300e9),
    "A100-PCIE-40GB": Card(torch.bfloat16, 312e12, 40, 1.56e12, 32e9),
    "A100": Card(torch.bfloat16, 312e12, 80, 2.0e12, 300e9),
    "A10": Card(torch.bfloat16, 125e12, 24, 0.60e12, 32e9),
    "L40S": Card(torch.bfloat16, 362e12, 48, 0.86e12, 32e9),
    "L4": Card(torch.bfloat16, 121e12, 24, 0.30e12, 32e9),
    "RTX 5090": Card(torch.bfloat16, 209e12, 32, 1.79e12, 64e9),
    "RTX 4090": Card(torch.bfloat16, 165e12, 24, 1.01e12, 32e9),
    "RTX 3090": Card(torch.bfloat16, 71e12, 24, 0.94e12, 32e9),
    "MI300X": Card(torch.bfloat16, 1307e12, 192, 5.3e12, 448e9),
    "V100": Card(torch.float16, 125e12, 16, 0.90e12, 150e9),
    "T4": Card(torch.float16, 65e12, 16, 0.32e12, 16e9),
}
# `find_card` appends this regular expression to a key of CARDS to exclude other devices: "RTX 3090 Ti" is another card,
# and "MIG" in a name means a part of a card.
OTHER_MODEL = r"(?! (Ti|D|NVL|Laptop)\b)(?!.*\bMIG\b)"


def find_card(name: str) -> Card | None:
    """Return the entry of `CARDS` for a device name such as "NVIDIA H100 80GB HBM3", or None if there is none."""
    return next((card for words, card in CARDS.items() if re.search(rf"\b{words}\b{OTHER_MODEL}", name)), None)


def find_device(name: str, option: str) -> torch.device:
    """Return the device for `auto`, for `cuda` (under torchrun, the GPU of this process) or for a PyTorch device name.

    `auto` is the first available device of cuda, mps and cpu.

    Raises ValueError if the device cannot be used. The message names `option`, the setting that selected the device.
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


def native_dtypes(device: torch.device) -> list[torch.dtype]:
    """Return the precisions that a device computes matrix products in without emulation, the preferred one first.

    bfloat16 comes before float16 because it has the range of float32, so training with it needs no gradient scaler.
    float32 comes first on devices where products in 16 bits are not faster, or where their speed is not known.
    """
    if device.type == "cuda":
        # Ampere (2020) and later have bfloat16. Volta and Turing (V100, T4) have tensor cores for float16 only.
        bfloat16 = [torch.bfloat16] if torch.cuda.is_bf16_supported(including_emulation=False) else []
        return [*bfloat16, torch.float16, torch.float32]
    if device.type == "mps":
        return [torch.float32, torch.float16]  # MPS has float16, but we have not measured its speed
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return [torch.float32]  # without oneDNN (as on macOS), PyTorch's 16-bit products on a CPU are slow
    has = torch.cpu.get_capabilities()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "all")).lower()
    reduced = []
    if limit not in ISA_WITHOUT_BFLOAT16 and any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
        reduced.append(torch.bfloat16)
    if limit not in ISA_WITHOUT_FLOAT16 and any(has.get(name) for name in ("avx512_fp16", "amx_fp16")):
        reduced.append(torch.float16)
    # On Intel CPUs, only AMX units multiply 16-bit numbers faster than float32. A Xeon without AMX reaches 323 GFLOP/s
    # in float32, 316 in float16 and 170 in bfloat16.
    has_amx = limit not in ISA_WITHOUT_AMX and any(has.get(name) for name in ("amx_bf16", "amx_fp16"))
    if is_intel_cpu() and not has_amx:
        return [torch.float32, *reduced]
    return [*reduced, torch.float32]


def is_intel_cpu() -> bool:
    """Return whether this computer has a CPU by Intel."""
    return torch.cpu.get_capabilities().get("cpu_name", "").startswith("Intel")


def packing_is_faster(weight: torch.Tensor) -> bool:
    """Return whether decoding is faster if oneDNN stores this weight packed, in the layout that its kernels read."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.float32:
        # F.linear uses Intel's MKL; packed weights need oneDNN. On an Intel Xeon, with a batch of one row, MKL decoded
        # 40 tokens/s and oneDNN 34.
        return not is_intel_cpu()
    return weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def find_dtype(name: str, device: torch.device, *, decoding: bool = False) -> torch.dtype:
    """Return the precision that `auto`, `float32`, `bfloat16` or `float16` means on a device.

    `auto` is the first of `native_dtypes`. With `decoding` on a CPU, `auto` is a native precision of 16 bits, if there
    is one: the model reads all its weights from memory for each new token, and 16-bit weights have half as many bytes.

    If the processor has to emulate the requested precision, the function warns on stderr, but returns this precision.
    """
    native = native_dtypes(device)
    if name == "auto":
        return min(native, key=lambda dtype: dtype.itemsize) if decoding and device.type == "cpu" else native[0]
    dtype = DTYPES[name]
    if dtype not in native and os.environ.get("RANK", "0") == "0":  # warn once, not once per process
        others = " or ".join(str(other).removeprefix("torch.") for other in native)
        print(f"warning: this {device.type} emulates {name}, which is many times slower than {others}", file=sys.stderr)
    return dtype


def fast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return `dtype` if the device computes matrix products in `dtype` without emulation, otherwise float32.

    Use this function where speed matters more than precision, as in Muon's iteration.
    """
    return dtype if dtype in native_dtypes(device) else torch.float32


def make_deterministic() -> None:
    """Make every operator give the same bits in every run on the same hardware. Call it before the first use of a GPU.

    On a GPU, some operators add numbers in the order in which threads finish, which varies. Their deterministic forms
    are slower. An operator without a deterministic form raises RuntimeError. The compiler no longer chooses the kernel
    that is fastest in a measurement, because this choice varies between runs.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its initialization
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
    torch.use_deterministic_algorithms(True)
    # The call above also fills new memory with NaN. This only costs time: all memory is written before it is read.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Return a context in which matrix products run in `dtype`, and operations that need float32 run in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def gradient_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """Return the scaler that keeps small gradients of float16 products from becoming zero.

    The smallest positive float16 is 6e-8; gradients are often smaller. So the loss is multiplied by a scale, a power of
    two, before the backward pass. The scale is halved after an overflow and doubled after 2,000 steps without one
    (Micikevicius et al. 2018, "Mixed precision training"). For other precisions the scaler is disabled.
    """
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def cpu_instruction_set() -> str:
    """Return the widest instruction set that matrix products on this CPU use, such as "AVX2" or "AVX-512, bfloat16"."""
    has = torch.cpu.get_capabilities()
    if has.get("architecture") != "x86_64":
        name = "SVE" if has.get("sve") else "NEON"
    else:
        # Environment variables can limit the instruction set. `get_cpu_capability` reads ATEN_CPU_CAPABILITY, and
        # `native_dtypes` reads ONEDNN_MAX_CPU_ISA.
        name = {"AVX512": "AVX-512"}.get(torch.backends.cpu.get_cpu_capability(), "AVX2")
    native = [str(dtype).removeprefix("torch.") for dtype in native_dtypes(torch.device("cpu"))]
    return ", ".join([name, *(dtype for dtype in native if dtype != "float32")])


def keep_freed_memory() -> None:
    """Make the C library keep freed memory and use it again in the next step, as PyTorch's CUDA allocator does.

    By default, glibc returns the memory of every large tensor to the operating system. At the next allocation, the
    system fills the memory with zeros, which takes about a tenth of a training step on a CPU.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
