"""Which precision each processor gets, and that nothing computes in another one."""

import os
import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import device
from device import find_dtype, gradient_scaler, native_dtypes, separate_compiled_code
from eval.hellaswag import hellaswag
from generation import generate
from kernels.loss import loss_and_gradients
from train import train_step, validate
from training.launch import StopSignal

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KERNELS = {"linear_cross_entropy_sum": loss_and_gradients}
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


@pytest.fixture
def cpu(monkeypatch):
    """`cpu("avx512_bf16", isa="AVX2")`: this machine's CPU has the features named, and oneDNN's limit."""

    def pretend(*features, isa=None, name="AMD EPYC"):
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
        if isa is not None:
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(features, True) | {"cpu_name": name})
        return native_dtypes(CPU)

    return pretend


@pytest.mark.parametrize(
    ("features", "isa", "expected"),
    [
        (["avx2"], None, [torch.float32]),
        (["avx512_f"], None, [torch.float32]),
        (["avx512_bf16"], None, [torch.bfloat16, torch.float32]),
        (["avx512_bf16"], "ALL", [torch.bfloat16, torch.float32]),
        (["avx512_bf16"], "avx2", [torch.float32]),
        (["avx512_bf16"], "AVX512_CORE_VNNI", [torch.float32]),
        (["avx512_bf16", "avx512_fp16"], None, [torch.bfloat16, torch.float16, torch.float32]),
        (["avx512_bf16", "avx512_fp16"], "AVX512_CORE_BF16", [torch.bfloat16, torch.float32]),
        (["amx_bf16"], None, [torch.bfloat16, torch.float32]),
        (["bf16"], None, [torch.bfloat16, torch.float32]),  # Arm
        (["neon"], None, [torch.float32]),
    ],
)
def test_a_cpu_has_the_precisions_of_its_effective_instruction_set(cpu, features, isa, expected):
    assert cpu(*features, isa=isa) == expected


@pytest.mark.parametrize(
    ("features", "isa", "expected"),
    [
        (["avx512_bf16", "avx512_fp16"], None, [torch.float32, torch.bfloat16, torch.float16]),
        (["avx512_bf16"], "avx2", [torch.float32]),
        (["avx512_bf16", "amx_bf16"], None, [torch.bfloat16, torch.float32]),
        (["avx512_bf16", "amx_bf16"], "AVX512_CORE_BF16", [torch.float32, torch.bfloat16]),
    ],
)
def test_intel_cpus_without_amx_prefer_float32(cpu, features, isa, expected):
    assert cpu(*features, isa=isa, name="Intel Xeon") == expected
    assert find_dtype("auto", CPU) == expected[0]
    native = [dtype for dtype in expected if dtype != torch.float32]
    assert find_dtype("auto", CPU, decoding=True) == (native or expected)[0]


@pytest.mark.parametrize(("ampere", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_on_cuda_is_bfloat16_from_ampere_on_and_float16_before(monkeypatch, ampere, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: ampere)
    assert find_dtype("auto", CUDA) == expected
    assert gradient_scaler(CPU, expected).is_enabled() == (expected == torch.float16)


def test_without_onednn_a_cpu_computes_in_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert native_dtypes(CPU) == [torch.float32]


def test_asking_for_an_emulated_precision_works_with_one_warning(cpu, capsys, monkeypatch):
    cpu("avx2")
    assert find_dtype("bfloat16", CPU) == torch.bfloat16
    warning = capsys.readouterr().err
    assert warning == "warning: this cpu emulates bfloat16, which is many times slower than float32\n"
    assert device.fast_dtype(torch.bfloat16, CPU) == torch.float32
    assert find_dtype("float32", CPU) == torch.float32
    monkeypatch.setenv("RANK", "1")
    assert find_dtype("float16", CPU) == torch.float16
    assert capsys.readouterr().err == ""


def test_an_effective_avx2_cpu_trains_in_float32(tiny_run, write_config, python):
    """The whole command in a process that the libraries' own variables limit to AVX2."""
    config = tiny_run("avx2", **{"system.dtype": "auto", "optim.name": "muon", "optim.steps": 3})
    output = python("train.py", "--config", write_config(config), **AVX2).stdout
    assert "1 x cpu, float32" in output
    assert "finished after step 3" in output


@pytest.mark.parametrize(
    ("given", "directory"),
    [
        ({}, None),
        ({"ATEN_CPU_CAPABILITY": "avx2"}, r".*/torchinductor_\d+_avx2"),
        ({"ATEN_CPU_CAPABILITY": "avx2", "TORCHINDUCTOR_CACHE_DIR": "mine"}, "mine"),
    ],
)
def test_code_that_is_compiled_for_a_limited_cpu_is_kept_apart(monkeypatch, given, directory):
    """In the same cache, PyTorch would load code for another instruction set, which gives wrong numbers or crashes."""
    monkeypatch.setattr("os.environ", dict(given))
    separate_compiled_code()
    found = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    assert found is None if directory is None else re.fullmatch(directory, found)


class ComputedDtypes(TorchDispatchMode):
    """Collects the operators that compute in a reduced precision, and the precision of operators by name."""

    def __init__(self):
        super().__init__()
        self.reduced, self.dtypes = set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in KERNELS:  # look inside our own operators, too
            with self:
                result = KERNELS[name](*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.dtypes.setdefault(name, set()).add(tensor.dtype)
                if tensor.dtype.itemsize < 4:
                    self.reduced.add(name)
        return result


@pytest.fixture
def use_everything(prepare):
    """`use_everything(config, record)`: one training step, a validation, decoding and HellaSwag under `record`."""

    def use(config, record):
        with prepare(config) as run, record:
            train_step(run, False, False)
            validate(run, StopSignal(announce=False))
            with run.processes.autocast():
                run.model.eval()
                generate(run.model, [[1, 2], [3]], max_new_tokens=3, do_sample=True)
                hellaswag(run.model, run.inputs.tokenizer, limit=2)
        return run

    return use


@pytest.fixture(scope="session")
def gpt2_verses(verses, tmp_path_factory):
    """The verses in GPT-2's tokens, which HellaSwag needs."""
    from tests.conftest import run_python

    out = tmp_path_factory.mktemp("gpt2-verses") / "dataset"
    run_python("-m", "data.prepare", "text", verses.parent / "verses.jsonl", "--out", out, "--val-fraction", "0.1")
    return out


@pytest.fixture
def small_run(tiny_run, gpt2_verses):
    """A run that validates and samples, in a precision and with an optimizer."""

    def configure(dtype, optimizer):
        changes = {"data.dir": str(gpt2_verses), "system.dtype": dtype, "optim.name": optimizer, "eval.every": 1}
        return tiny_run(f"{optimizer}-{dtype}", **changes | {"eval.samples": 1, "optim.steps": 3})

    return configure


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_float32_run_computes_nothing_in_a_reduced_precision(small_run, use_everything, optimizer):
    record = ComputedDtypes()
    use_everything(small_run("float32", optimizer), record)
    assert not record.reduced
    assert {"mm", "addmm", "native_layer_norm"} <= record.dtypes.keys()  # it looked


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_reduced_precision_keeps_in_float32_what_needs_it(small_run, use_everything, dtype):
    record = ComputedDtypes()
    run = use_everything(small_run(dtype, "muon"), record)
    reduced = getattr(torch, dtype)
    assert reduced in record.dtypes["addmm"]  # it computes in it
    assert record.reduced & {"native_layer_norm", "native_layer_norm_backward", "_fused_adamw_"} == set()
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    for optimizer in run.optimizers:
        states = [value for state in optimizer.state.values() for value in state.values()]
        assert {value.dtype for value in states} == {torch.float32}
    tokens = torch.randint(100, (2, 8))
    with run.processes.autocast():
        assert run.model(tokens, targets=tokens).loss.dtype == torch.float32


def test_deterministic_training_on_a_cpu_gives_the_bits_of_any_training(tiny_run, train, monkeypatch):
    """Every operator of training, validation and sampling has a deterministic form: otherwise it would raise."""
    changes = {"optim.name": "muon", "model.dropout": 0.1, "optim.steps": 5, "eval.every": 5, "eval.samples": 1}
    plain = train(tiny_run("plain", **changes))
    for name in ("CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_DETERMINISTIC"):
        monkeypatch.setenv(name, "")  # restored after the test
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    device.make_deterministic()
    try:
        again = train(tiny_run("again", **changes))
    finally:
        torch.use_deterministic_algorithms(False)
    files = ("checkpoints/step-000005/model.safetensors", "samples.txt")
    for name in files:
        assert (plain / name).read_bytes() == (again / name).read_bytes()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux")
def test_auto_agrees_with_what_the_kernel_says_of_this_cpu(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    flags = Path("/proc/cpuinfo").read_text().split()
    if "amx_bf16" in flags or ("avx512_bf16" in flags and "GenuineIntel" not in flags):
        assert find_dtype("auto", CPU) == torch.bfloat16
    elif "avx2" in flags:
        assert find_dtype("auto", CPU) == torch.float32
