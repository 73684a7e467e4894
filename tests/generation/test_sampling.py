"""Test sampling: the distribution of the tokens, independent rows, and samples with a gradient."""

import pytest
import torch
from torch import Generator
from torch.nn import functional as F

from generation import generate, gumbel_softmax
from model import GPT
from tests.generation.twins import SHAPES, their_filter


def chi_square(counts, probabilities):
    """Return Pearson's chi-square statistic minus its expectation, in standard deviations."""
    expected = probabilities * counts.sum()
    kept = expected >= 5  # the others are counted together
    counts = torch.cat((counts[kept], counts[~kept].sum()[None]))
    expected = torch.cat((expected[kept], expected[~kept].sum()[None])).clamp(min=1e-9)
    statistic = ((counts - expected) ** 2 / expected)[expected > 1e-6].sum()
    degrees = int((expected > 1e-6).sum()) - 1
    return (statistic - degrees) / (2 * degrees) ** 0.5


@pytest.mark.parametrize("gumbel", [False, True])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "top_k": 20, "top_p": 0.9}], ids=str)
def test_100_000_draws_follow_the_distribution(uncertain, gumbel, options):
    drawn = generate(
        uncertain,
        [[1, 2, 3]],
        max_new_tokens=1,
        do_sample=True,
        gumbel=gumbel,
        num_return_sequences=100_000,
        generator=Generator().manual_seed(11),
        **options,
    )
    logits = uncertain(torch.tensor([[1, 2, 3]])).logits[:, -1].detach()
    probabilities = their_filter(**options)(None, logits).softmax(dim=-1)[0]
    counts = torch.bincount(drawn[:, -1], minlength=40).float()
    assert counts[probabilities == 0].sum() == 0
    assert abs(chi_square(counts, probabilities)) < 4
    uniform = torch.full((40,), 1 / 40)
    assert chi_square(counts, uniform) > 100, "the test cannot distinguish distributions"


def test_beam_sampling_is_without_replacement(uncertain):
    sequences = generate(
        uncertain, [[1, 2]] * 50, max_new_tokens=1, num_beams=3, num_return_sequences=3, do_sample=True,
        generator=Generator().manual_seed(0),
    )  # fmt: skip
    drawn = sequences[:, -1].view(50, 3).tolist()
    assert all(len(set(three)) == 3 for three in drawn)
    assert len({tuple(sorted(three)) for three in drawn}) > 25


@pytest.mark.parametrize("gumbel", [False, True])
def test_a_row_with_its_own_generator_does_not_depend_on_the_other_rows(pair_of, gumbel):
    model = pair_of(SHAPES[2])[1]
    lengths = (1, 12, 3, 7, 30, 2, 5, 9)
    prompts = [torch.randint(500, (n,), generator=Generator().manual_seed(n)).tolist() for n in lengths]
    options = {"max_new_tokens": 60, "do_sample": True, "temperature": 2.0, "top_p": 0.95, "gumbel": gumbel}
    options |= {"no_repeat_ngram_size": 2, "repetition_penalty": 1.1}
    together = generate(model, prompts, generator=[Generator().manual_seed(i) for i in range(8)], **options)
    assert len({tuple(row[-60:].tolist()) for row in together}) == 8
    for i, prompt in enumerate(prompts):
        alone = generate(model, [prompt], generator=Generator().manual_seed(i), **options)
        assert alone[0].tolist() == together[i, -len(prompt) - 60 :].tolist()
        assert len(set(alone[0].tolist())) >= 20


def test_all_tokens_of_a_row_that_has_ended_may_be_banned(pair):
    prompts = torch.tensor([[1, 2], [3, 4]])
    free = generate(pair[1], prompts, max_new_tokens=1)[:, -1]
    eos = int(free[0])
    assert eos != int(free[1])

    def process(ids, scores):
        scores = torch.where(torch.arange(257) == free[:, None], scores + 1e4, scores) if ids.size(1) == 2 else scores
        return scores.masked_fill((ids[:, -1:] == eos) & (ids.size(1) > 2), float("-inf"))

    out = generate(pair[1], prompts, max_new_tokens=4, do_sample=True, eos_token_id=eos, logits_processor=process)
    assert (out[0, 2:] == eos).all()


def test_gumbel_softmax_has_gradients_and_its_hard_samples_equal_gumbel_max(uncertain):
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    uncertain.zero_grad()
    soft = gumbel_softmax(uncertain, prompt, max_new_tokens=4, temperature=0.7, generator=Generator().manual_seed(0))
    assert soft.shape == (2, 4, 40)
    torch.testing.assert_close(soft.sum(dim=-1), torch.ones(2, 4))
    soft[:, 3, 7].sum().backward()  # the last sample depends on the embeddings of all samples before it
    assert uncertain.transformer.h[0].attn.c_attn.weight.grad.abs().sum() > 0
    assert uncertain.transformer.wpe.weight.grad[4].abs().sum() > 0  # the position of the second sample

    rows = lambda: [Generator().manual_seed(i) for i in range(2)]  # noqa: E731
    hard = gumbel_softmax(uncertain, prompt, max_new_tokens=8, hard=True, generator=rows())
    assert torch.equal(hard.detach().round(), F.one_hot(hard.argmax(dim=-1), 40).float())
    drawn = generate(uncertain, prompt, max_new_tokens=8, do_sample=True, gumbel=True, generator=rows())
    assert torch.equal(hard.argmax(dim=-1), drawn[:, 3:])


def test_gumbel_softmax_gradient_equals_finite_differences(uncertain):
    model = GPT(uncertain.config).double().eval()
    model.load_state_dict(uncertain.state_dict())
    prompt = torch.tensor([[1, 2]])
    weight = model.transformer.h[0].mlp.c_fc.bias

    def last_sample():  # gumbel_softmax computes in float32
        return gumbel_softmax(model, prompt, max_new_tokens=3, generator=Generator().manual_seed(3))[0, 2, 5]

    (gradient,) = torch.autograd.grad(last_sample(), weight)
    index = int(gradient.abs().argmax())
    with torch.no_grad():
        weight[index] += 0.05
        high = last_sample()
        weight[index] -= 0.1
        low = last_sample()
    torch.testing.assert_close((high - low) / 0.1, gradient[index].to(high), atol=1e-5, rtol=2e-2)
