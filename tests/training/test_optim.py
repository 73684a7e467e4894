"""Learning-rate schedules, weight decay and Muon."""

import dataclasses
import math

import pytest
import torch

from model import GPT, GPTConfig
from training.config import Optim
from training.optim import Muon, learning_rate_factor, make_optimizers, newton_schulz, set_learning_rate

SMALL = GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=8)


def test_the_cosine_schedule_follows_its_formula():
    config = Optim(warmup_steps=10, steps=110, min_lr_ratio=0.1)
    factors = [learning_rate_factor(step, config) for step in range(110)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == pytest.approx(1.0)
    assert factors[60] == pytest.approx(0.1 + 0.9 * 0.5)
    assert factors[109] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.99)))


def test_wsd_is_constant_then_decreases_linearly():
    config = Optim(schedule="wsd", warmup_steps=10, steps=100, min_lr_ratio=0.0, decay_fraction=0.2)
    factors = [learning_rate_factor(step, config) for step in range(100)]
    assert factors[9:81] == [1.0] * 72
    assert factors[80:] == pytest.approx([(100 - step) / 20 for step in range(80, 100)])


def test_constant_without_warmup():
    config = Optim(schedule="constant", warmup_steps=0, steps=5)
    assert [learning_rate_factor(step, config) for step in range(5)] == [1.0] * 5


def test_weight_decay_applies_to_matrices_and_embeddings_only():
    model = GPT(SMALL)
    (adamw,) = make_optimizers(model, Optim(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.3 if parameter.dim() >= 2 else 0.0), name
    assert all(group["fused"] for group in adamw.param_groups)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimizer_state_exists_before_the_first_step(name):
    """A run that has started has all its memory: a step adds no tensor."""
    model = GPT(SMALL)
    optimizers = make_optimizers(model, Optim(name=name))

    def shapes():
        return [{p: {k: v.shape for k, v in state.items()} for p, state in o.state.items()} for o in optimizers]

    before = shapes()
    assert sum(map(len, before)) == len(list(model.parameters()))
    assert not any(tensor.any() for o in optimizers for state in o.state.values() for tensor in state.values())
    model(torch.zeros(1, 8, dtype=torch.long), targets=torch.zeros(1, 8, dtype=torch.long)).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    assert shapes() == before


def test_muon_gets_the_matrices_of_the_blocks():
    model = GPT(SMALL)
    muon, adamw = make_optimizers(model, Optim(name="muon", muon_lr=0.05, lr=1e-3))
    names = {id(p): name for name, p in model.named_parameters()}
    of_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert of_muon == {f"transformer.h.{i}.{part}.weight" for i in range(2) for part in parts}
    of_adamw = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert of_adamw | of_muon == set(names.values())
    set_learning_rate([muon, adamw], 0.5)
    assert [muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"]] == [0.025, 5e-4]


def take_steps(optimizer, parameters, gradients):
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


def test_muon_equals_pytorchs_muon():
    torch.manual_seed(0)
    start = [torch.randn(64, 64), torch.randn(256, 64), torch.randn(64, 256)]
    gradients = [[torch.randn_like(p) for p in start] for _ in range(10)]
    ours, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    take_steps(Muon([], ours, lr=0.02, weight_decay=0.1, momentum=0.95, dtype=torch.bfloat16), ours, gradients)
    take_steps(torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95), theirs, gradients)
    for a, b, p in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 1e-3 * (b - p).norm()


def test_muon_treats_queries_keys_and_values_as_three_matrices():
    torch.manual_seed(0)
    start = torch.randn(192, 64)
    gradients = [torch.randn(192, 64) for _ in range(10)]
    fused = start.clone().requires_grad_()
    parts = [p.clone().requires_grad_() for p in start.split(64)]
    take_steps(
        Muon([fused], [], lr=0.02, weight_decay=0.1, momentum=0.95, dtype=torch.bfloat16),
        [fused],
        [[g] for g in gradients],
    )
    theirs = torch.optim.Muon(parts, lr=0.02, weight_decay=0.1, momentum=0.95)
    take_steps(theirs, parts, [g.split(64) for g in gradients])
    whole = torch.cat([p.detach() for p in parts])
    assert (fused - whole).norm() < 1e-3 * (whole - start).norm()


@pytest.mark.parametrize("batched", [False, True])
def test_cautious_decay_spares_the_elements_that_the_update_makes_larger(batched):
    """Compare with two steps without caution: one with the decay of all elements, one without any decay."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((48, 16), (64, 16), (16, 64))]
    gradients = [torch.randn(p.shape, generator=generator) for p in start]

    def moved(weight_decay, cautious):
        parameters = [p.clone().requires_grad_() for p in start]
        muon = Muon(parameters[:1], parameters[1:], 0.02, weight_decay, 0.95, cautious=cautious, batched=batched)
        take_steps(muon, parameters, [gradients])
        return [p.detach() for p in parameters]

    results = zip(start, moved(0.0, False), moved(0.3, False), moved(0.3, True), strict=True)
    for first, undecayed, decayed, cautious in results:
        smaller = (undecayed - first) * first < 0
        assert 0.3 < smaller.float().mean() < 0.7
        torch.testing.assert_close(cautious, torch.where(smaller, decayed, undecayed))


@pytest.mark.parametrize("scale", [1.0, 1e-8])  # the elements of a real gradient are this small
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(32, 96), (3, 64, 64), (96, 32)])
def test_newton_schulz_moves_singular_values_to_about_one(shape, dtype, scale):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        torch.logspace(-1, 1, shape[-1])
    )
    result = newton_schulz(scale * matrices, dtype)
    assert result.dtype == dtype
    values = torch.linalg.svdvals(result.float())
    assert values.max() < 1.3
    assert (values > 0.5).float().mean() > 0.9  # a value near zero stays small


def test_frozen_parameters_do_not_change():
    model = GPT(SMALL)
    model.freeze(1)
    optimizers = make_optimizers(model, Optim(lr=0.1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.randint(0, 11, (2, 8), generator=torch.Generator().manual_seed(0))
    model(ids, labels=ids).loss.backward()
    optimizers[0].step()
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("transformer.h.0.", "transformer.wte", "transformer.wpe"))
        assert torch.equal(parameter, before[name]) == frozen, name


def test_muon_divides_every_stack_of_square_matrices():
    model = GPT(dataclasses.replace(SMALL, cross_attention=True))
    stacked, single = make_optimizers(model, Optim(name="muon"))[0].param_groups
    C = SMALL.n_embd
    assert [tuple(p.shape) for p in stacked["params"]] == [(3 * C, C), (2 * C, C)] * SMALL.n_layer
    assert len(single["params"]) == 5 * SMALL.n_layer  # c_fc, three c_proj, the queries of the second attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_in_batches_of_equal_shapes_equals_one_matrix_at_a_time(dtype):
    """The form for a GPU, run on a CPU."""
    torch.manual_seed(0)
    start = [torch.randn(3 * 16, 16) for _ in range(3)], [torch.randn(*s) for s in [(64, 16), (16, 64), (16, 16)] * 3]
    gradients = [[torch.randn_like(p) for p in (*start[0], *start[1])] for _ in range(5)]
    results = []
    for batched in (False, True):
        stacked, others = ([p.clone().requires_grad_() for p in part] for part in start)
        muon = Muon(stacked, others, lr=0.02, weight_decay=0.1, momentum=0.95, dtype=dtype, batched=batched)
        take_steps(muon, [*stacked, *others], gradients)
        results.append([*stacked, *others])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for plain, batched, first in zip(*results, (*start[0], *start[1]), strict=True):
        assert (plain - batched).norm() <= tolerance * (plain - first).norm()


def test_muon_in_batches_skips_matrices_without_a_gradient():
    """As those of frozen blocks."""
    matrices = [torch.ones(4, 4, requires_grad=True) for _ in range(3)]
    matrices[1].grad = torch.eye(4)
    Muon([], matrices, lr=0.1, weight_decay=0.0, momentum=0.9, batched=True).step()
    assert [bool((p == 1).all()) for p in matrices] == [True, False, True]


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_muon_in_batches_gives_the_same_on_any_number_of_processes(python, processes):
    output = python("tests/training/muon_in_batches.py", processes=processes, PYTHONPATH=".").stdout
    differences = [float(number) for number in output.split()]
    assert len(differences) == 2 * processes
    assert max(differences) < 1e-5
