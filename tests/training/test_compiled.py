"""The compiled loss under DDP and FSDP: gradients, graph breaks, collective operations, products, synchronizations."""

import functools
import shutil
import sys
import threading
from collections import Counter

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from checks import check_ids
from kernels.compiled import Compiled
from model import GPT, GPTConfig
from processes import Processes
from train import train_step
from training.distributed import Loss, distribute

CPU = torch.device("cpu")


@pytest.fixture
def group():
    """`group("gloo", 1)`: join a process group in this process. In a "fake" one, the other processes do not exist."""

    def join(backend, world_size):
        store = FakeStore() if backend == "fake" else dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=world_size)

    yield join
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()


def compile_with(monkeypatch, backend):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))


def small(**fields):
    torch.manual_seed(0)
    shape = {"vocab_size": 101, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16} | fields
    return GPT(GPTConfig(**shape)).train()


def gradients(model):
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


def both_losses(processes, ids, **options):
    """Return a loss as training uses it, and the plain one, both after a backward pass, with their models."""
    model, plain_model = small(), small()
    loss = distribute(model, processes, compiled=True, sequence_length=ids.size(1), **options)
    plain = Loss(plain_model)
    results = []
    for function in (loss, plain):
        value = function(ids, ids.flip(0))
        value.backward()
        results.append(value)
    torch.testing.assert_close(results[0], results[1])
    for (name, ours), other in zip(gradients(model).items(), gradients(plain_model).values(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6, msg=name)
    return model, loss


COMPILER = pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="no C++ compiler")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, COMPILER])])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_distributed_and_compiled_gradients_are_the_plain_ones(monkeypatch, group, backend, sharded, recompute):
    """All blocks share one graph without breaks. Evaluation, with other shapes, does not compile anything."""
    compile_with(monkeypatch, backend)
    group("gloo", 1)
    ids = torch.randint(101, (3, 16), generator=torch.Generator().manual_seed(0))
    two = Processes(0, 2, CPU, torch.float32)  # although the group has one, so that nothing needs another process
    options = {"sharded": sharded, "activation_checkpointing": recompute}
    model, loss = both_losses(two, ids, **options)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    model.eval()
    for length in (3, 5):
        model(ids[:, :length])
    model.train()
    loss(ids, ids).backward()
    assert counters["stats"]["unique_graphs"] == 1


class Collectives(TorchDispatchMode):
    """Counts collective operations by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.counts[func.overloadpacket.__name__.strip("_")] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("world_size", [8, 64])
def test_fsdp_gathers_each_block_twice_and_everything_else_once(group, world_size):
    group("fake", world_size)
    model, processes = small(n_layer=12), Processes(0, world_size, CPU, torch.bfloat16)
    loss = distribute(model, processes, compiled=False, sharded=True, sequence_length=16)
    ids = torch.randint(101, (2, 16))
    for _ in range(2):
        with Collectives() as collectives, processes.autocast():
            loss(ids, ids).backward()
    assert collectives.counts == {"allgather_base": 25, "reduce_scatter_base": 13}


def test_a_backward_pass_that_cannot_be_compiled_falls_back_at_the_first_call(monkeypatch, capsys):
    def fail(graph, inputs):
        raise RuntimeError("no registers left")

    compile_with(monkeypatch, aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=fail))
    model, plain = small(), small()
    ids = torch.randint(101, (2, 16))
    compiled = Compiled(Loss(model), "the loss")
    for function in (compiled, Loss(plain)):
        function(ids, ids).backward()
    for ours, other in zip(gradients(model).values(), gradients(plain).values(), strict=True):
        assert torch.equal(ours, other)
    assert "compiling the loss failed" in (errors := capsys.readouterr().err)
    assert "no registers left" in errors


def test_the_backward_pass_has_two_products_for_each_linear_layer(monkeypatch):
    """Nothing is computed twice but GELU: neither a product nor attention. The head's products are in the loss."""
    graphs = []

    def record(graph, inputs):
        graphs.append(
            Counter(node.target.__name__.split(".")[0] for node in graph.graph.nodes if node.op == "call_function")
        )
        return graph

    backend = aot_autograd(fw_compiler=record, bw_compiler=record, partition_fn=min_cut_rematerialization_partition)
    compile_with(monkeypatch, backend)
    ids = torch.randint(101, (2, 16))
    Compiled(Loss(small(n_layer=3)), "the loss")(ids, ids).backward()
    forward, backward = graphs
    products = ("mm", "addmm", "bmm", "baddbmm")
    assert sum(forward[name] for name in products) == 3 * 4
    assert sum(backward[name] for name in products) == 3 * 4 * 2
    assert [graph["linear_cross_entropy_sum"] for graph in graphs] == [1, 0]
    assert not any("attention" in name and "backward" not in name for name in backward)


def test_ids_on_a_gpu_are_not_read():
    """Neither in training nor in evaluation, where the host would wait for the device at every token."""
    with FakeTensorMode():  # has no values: reading one raises an error
        ids = torch.empty(2, 3, dtype=torch.long, device="cuda")
        check_ids("input_ids", ids, 101, "vocab_size")


class Reads(TorchDispatchMode):
    """Counts operations whose results the host needs."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select"):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [{}, {"system.dtype": "float16"}, {"optim.name": "muon"}, {"model.dropout": 0.1}])
def test_a_step_synchronizes_host_and_device_once(tiny_run, prepare, monkeypatch, changes):
    """The host reads the numbers of a step once. All copies to the device are of pinned memory, and do not wait."""
    config = tiny_run("once", **changes, **{"data.micro_batch": 3})
    monkeypatch.setattr("checks.check_ids", lambda *arguments: None)  # skipped in training on a GPU
    with prepare(config) as run:
        train_step(run, False, False)
        reads = Reads()

        def counted(name, function):
            def call(*arguments, **options):
                # The loader's thread makes tensors, too, but the host does not wait for it.
                here = threading.current_thread() is threading.main_thread()
                # PyTorch's own functions call `to` for tensors that are on the device already.
                ours = "site-packages" not in sys._getframe(1).f_code.co_filename
                copies = name != "to" or (ours and any(isinstance(a, torch.device) for a in arguments))
                if here and copies and not options.get("non_blocking"):
                    reads.counts[name] += 1
                return function(*arguments, **options)

            return call

        for name in ("tolist", "cpu", "numpy", "to"):
            monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
        for name in ("tensor", "as_tensor", "from_numpy"):
            monkeypatch.setattr(torch, name, counted(name, getattr(torch, name)))
        with reads:
            train_step(run, False, False)
        monkeypatch.undo()
    assert reads.counts == {"tolist": 1}
