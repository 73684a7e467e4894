"""Decoding with fixed shapes, as on CUDA: the same tokens as the plain loop, few waits, and a capture that may fail."""

from types import SimpleNamespace

import pytest
import torch
from torch import Generator
from torch.utils._python_dispatch import TorchDispatchMode

import generation.fixed_step
import generation.forward
from generation import generate, pack_weights, stream
from generation.forward import uses_fixed_step
from generation.options import GenerationOptions
from generation.sampling import STEPS_BETWEEN_CHECKS, draw_without_waiting, steps_between_checks
from model import GPT
from tests.generation.twins import SHAPES, ragged_batch, walk


@pytest.fixture
def fixed(monkeypatch):
    """`fixed()`: from now on decode as on CUDA, without the capture. The list that it returns counts its steps."""
    steps = []
    run = generation.fixed_step.FixedStep.__call__

    def count(self, tokens):
        steps.append(tokens)
        return run(self, tokens)

    def switch():
        monkeypatch.setattr(generation.fixed_step.FixedStep, "__call__", count)
        monkeypatch.setattr("generation.forward.uses_fixed_step", lambda model, options: True)
        monkeypatch.setattr("generation.sampling.steps_between_checks", lambda device, options: STEPS_BETWEEN_CHECKS)
        return steps

    return switch


def two_ways(fixed, run):
    """Return what `run` returns in the plain loop, and what it returns with fixed shapes."""
    plain = run()
    steps = fixed()
    found = run()
    assert len(steps) > 10
    return plain, found


SAMPLED = {"do_sample": True, "temperature": 1.5, "top_k": 100, "top_p": 0.95}


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[5], SHAPES[9]], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, SAMPLED, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}, {"num_beams": 3}],
    ids=["greedy", "sampled", "penalized", "beams"],
)
@pytest.mark.parametrize("padded", [True, False])
def test_the_tokens_equal_those_of_the_plain_loop(pair_of, fixed, shape, options, padded):
    model = pair_of(shape)[1]
    ids, mask = ragged_batch(shape[0])

    def run():
        generator = {"generator": Generator().manual_seed(5)} if "do_sample" in options else {}
        return generate(model, ids, attention_mask=mask if padded else None, **walk(shape[0]), **options, **generator)

    plain, found = two_ways(fixed, run)
    assert torch.equal(plain, found)
    assert len(plain[0].unique()) >= 15


def test_rows_that_end_early_have_the_same_result_as_with_a_check_at_every_step(pair, fixed):
    ids, mask = ragged_batch(257)
    options = {"max_new_tokens": 60, "min_new_tokens": 18, "eos_token_id": list(range(0, 257, 12))}
    options |= {"return_dict": True, "output_logits": True, "output_scores": True}

    def run():
        return generate(pair[1], ids, attention_mask=mask, **options)

    plain, found = two_ways(fixed, run)
    steps = int(plain.lengths.max())
    assert len(plain.lengths.unique()) > 1
    assert steps < 60
    assert steps % STEPS_BETWEEN_CHECKS, "the last check must come after the last token"
    assert plain.sequences.shape == (4, 9 + steps)
    for name in ("sequences", "lengths"):
        assert torch.equal(getattr(plain, name), getattr(found, name))
    for name in ("logprobs", "sequences_scores"):
        torch.testing.assert_close(getattr(found, name), getattr(plain, name), atol=1e-4, rtol=1e-4)
    for name in ("logits", "scores"):
        assert len(getattr(found, name)) == steps
        for mine, other in zip(getattr(found, name), getattr(plain, name), strict=True):
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_stop_strings_and_generators_of_their_own(pair_of, fixed, tokenizer):
    model = pair_of(SHAPES[9])[1]
    prompts = [[5, 6, 7], [8], [9, 10]]

    def run():
        generators = [Generator().manual_seed(i) for i in range(3)]
        options = {"do_sample": True, "stop_strings": [" the", "ing"], "tokenizer": tokenizer}
        return generate(model, prompts, max_new_tokens=60, generator=generators, eos_token_id=0, **options)

    plain, found = two_ways(fixed, run)
    assert torch.equal(plain, found)


def test_prompts_of_one_token_the_last_position_and_beyond(pair, fixed):
    def run():
        long = generate(pair[1], [[3]], max_new_tokens=96)
        return torch.cat([long, generate(pair[1], [[3] * 80], max_new_tokens=60, sliding=True)], dim=1)

    plain, found = two_ways(fixed, run)
    assert torch.equal(plain, found)


def test_a_stream_yields_no_token_after_the_end(pair_of, fixed, tokenizer):
    model = pair_of(SHAPES[9])[1]
    eos = [int(i) for i in generate(model, [[1, 2]], max_new_tokens=30)[0, 24:]]

    def run():
        return [step.token for step in stream(model, tokenizer, [1, 2], max_new_tokens=60, eos_token_id=eos)]

    plain, found = two_ways(fixed, run)
    assert plain == found
    assert len(plain) < 30


def test_packed_weights_and_autocast(pair, fixed, tmp_path):
    pair[1].save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    pack_weights(model, rows=2)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            scores = generate(pair[1], [[3, 4]], max_new_tokens=24, return_dict=True, output_logits=True).logits
        return generate(model, [[3, 4]], max_new_tokens=24), scores[:2]

    plain, found = two_ways(fixed, run)
    assert torch.equal(plain[0], found[0])
    for mine, other in zip(found[1], plain[1], strict=True):
        assert (mine - other).norm() <= 0.02 * other.norm()


class Waits(TorchDispatchMode):
    """Counts the operations for whose result the host would wait on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "masked_select")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.2, "min_new_tokens": 3}], ids=str)
def test_the_host_waits_once_in_sixteen_steps(pair, fixed, options):
    ids, mask = ragged_batch(257)
    counts = []
    for new in (1, 64):
        fixed()
        with Waits() as waits:
            generate(pair[1], ids, attention_mask=mask, max_new_tokens=new, eos_token_id=256, **options)
        counts.append(waits.count)
    assert counts[1] - counts[0] <= 64 // STEPS_BETWEEN_CHECKS


def test_draws_equal_those_of_multinomial():
    probabilities = torch.randn(50, 300).softmax(dim=-1)
    probabilities[:, 10:200] = 0
    for count in (1, 5):
        expected = torch.multinomial(probabilities, count, generator=Generator().manual_seed(count))
        found = draw_without_waiting(probabilities, count, Generator().manual_seed(count))
        assert torch.equal(found, expected)


def test_only_cuda_uses_fixed_shapes(pair, tokenizer):
    options = GenerationOptions(max_new_tokens=8)
    assert not uses_fixed_step(pair[1], options)
    assert steps_between_checks(torch.device("cpu"), options) == 1
    assert steps_between_checks(torch.device("cuda"), options) == STEPS_BETWEEN_CHECKS
    stops = GenerationOptions(max_new_tokens=8, stop_strings="the", tokenizer=tokenizer)
    assert steps_between_checks(torch.device("cuda"), stops) == 1

    weight = SimpleNamespace(is_cuda=True)
    model = SimpleNamespace(transformer=SimpleNamespace(wte=SimpleNamespace(weight=weight)), config=pair[1].config)
    assert uses_fixed_step(model, options)
    assert not uses_fixed_step(model, GenerationOptions(max_new_tokens=7))
    assert not uses_fixed_step(model, GenerationOptions(max_new_tokens=8, output_attentions=True))
    model.config = SimpleNamespace(attention="window")
    assert not uses_fixed_step(model, options)
    model.config = pair[1].config
    weight.full_tensor = None  # a method of weights that FSDP has sharded
    assert not uses_fixed_step(model, options)


class FakeGraph:
    """Stands in for a CUDA graph: replaying calls the captured function."""

    def __init__(self, run):
        self.replay = run


@pytest.fixture
def capturing(monkeypatch, fixed):
    """`capturing(graph_of)`: decode with capture=True on a CPU. The returned list has what happened, in order."""

    def switch(graph_of):
        fixed()
        happened = []

        def capture(run, device):
            happened.append("capture")
            graph = graph_of(run)
            replay = graph.replay
            graph.replay = lambda: (happened.append("replay"), replay())
            return graph

        monkeypatch.setattr(generation.fixed_step, "capture_graph", capture)
        monkeypatch.setattr(
            generation.fixed_step, "on_capture_stream", lambda run, device: (happened.append("warm up"), run())
        )
        init = generation.fixed_step.FixedStep.__init__
        monkeypatch.setattr(
            generation.fixed_step.FixedStep, "__init__", lambda self, *a, capture: init(self, *a, capture=True)
        )
        return happened

    return switch


def test_the_second_step_is_captured_and_the_later_ones_replay_it(pair, capturing):
    expected = generate(pair[1], [[1, 2, 3]], max_new_tokens=12)
    happened = capturing(FakeGraph)
    assert torch.equal(generate(pair[1], [[1, 2, 3]], max_new_tokens=12), expected)
    assert happened == ["warm up", "capture", *["replay"] * 10]  # the prompt's step chose the first token


def test_a_capture_that_fails_is_reported_once_and_decoding_goes_on(pair, capturing, capsys):
    def fail(run):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    expected = generate(pair[1], [[1, 2, 3]], max_new_tokens=12)
    happened = capturing(fail)
    assert torch.equal(generate(pair[1], [[1, 2, 3]], max_new_tokens=12), expected)
    assert happened == ["warm up", "capture"]
    warning = "decoding without a CUDA graph, which is slower: operation not permitted when stream is capturing\n"
    assert capsys.readouterr().err == warning
