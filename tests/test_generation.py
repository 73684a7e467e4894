"""Decoding against transformers' generate: the same weights, in fp32, token for token."""

import copy
import inspect
import itertools
from collections import Counter

import pytest
import torch
import transformers
from torch import Generator
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation import logits_process as hf_processors

import generation
from generation import generate, generate_text, gumbel_softmax, pack_weights, stream
from model import GPT, GPTConfig

transformers.logging.set_verbosity_error()

# (vocab_size, block_size, n_layer, n_head, n_embd)
SHAPES = [
    (701, 96, 1, 1, 16),
    (257, 96, 2, 2, 32),
    (500, 128, 3, 4, 32),
    (1000, 80, 2, 3, 48),
    (613, 96, 4, 2, 64),
    (397, 80, 6, 4, 32),
    (2048, 96, 1, 8, 64),
    (777, 96, 2, 5, 40),
    (450, 96, 5, 1, 24),
    (4096, 96, 2, 4, 64),
]
GPT2_124M = (50257, 1024, 12, 12, 768)
PADDING = (0, 3, 5, 8)  # of four prompts of 9 tokens, so that they hold 9, 6, 4 and 1
BEAM_SETTINGS = list(itertools.product((0.6, 1.0, 2.0), (False, True)))  # length penalty, early stopping


def make_pair(shape, directory, seed=0):
    """A transformers GPT-2 with wide weights, whose choices wander instead of repeating, and our reading of it."""
    vocab_size, block_size, n_layer, n_head, n_embd = shape
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=block_size,
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        initializer_range=0.6 if n_embd < 100 else 0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs = GPT2LMHeadModel(config).eval()
    theirs.transformer.wpe.weight.data *= 3
    theirs.save_pretrained(directory)
    return theirs, GPT.from_pretrained(directory)


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    made = {}

    def get(shape):
        if shape not in made:
            made[shape] = make_pair(shape, tmp_path_factory.mktemp("gpt2"), seed=[*SHAPES, GPT2_124M].index(shape))
        return made[shape]

    return get


@pytest.fixture(scope="module")
def pair(pair_of):
    return pair_of(SHAPES[1])


def ragged_batch(vocab_size, seed=0):
    ids = torch.randint(vocab_size, (4, 9), generator=Generator().manual_seed(seed))
    mask = (torch.arange(9) >= torch.tensor(PADDING)[:, None]).long()
    return ids * mask, mask


def both(pair, ids, mask, **options):
    """(ours, theirs): sequences of the same call."""
    theirs, ours = pair
    eos = options.get("eos_token_id", 0)
    pad = eos if isinstance(eos, int) else eos[0]
    expected = theirs.generate(ids, attention_mask=mask, pad_token_id=pad, **{"do_sample": False, **options})
    return generate(ours, ids, attention_mask=mask, **options), expected


def walk(vocab_size):
    """Long enough for 20 different tokens, then ended by any of many tokens, so that rows end at different lengths."""
    return {"max_new_tokens": 64, "min_new_tokens": 40, "eos_token_id": list(range(0, vocab_size, 12))[:30]}


def assert_varied(sequences):
    for row, padding in zip(sequences, itertools.cycle(PADDING), strict=False):
        assert len(set(row[padding:].tolist())) >= 20


# ---------------------------------------------------------------------------------------------------------------------
# Token for token


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}], ids=str)
def test_greedy_equals_transformers(pair_of, shape, options):
    ids, mask = ragged_batch(shape[0])
    ours, theirs = both(pair_of(shape), ids, mask, **walk(shape[0]), **options)
    assert torch.equal(ours, theirs)
    assert_varied(ours)


def check_beams(pair, vocab_size, num_beams, length_penalty, early_stopping):
    ids, mask = ragged_batch(vocab_size)
    options = walk(vocab_size) | {"num_beams": num_beams, "length_penalty": length_penalty}
    ours, theirs = both(pair, ids, mask, **options, early_stopping=early_stopping)
    assert torch.equal(ours, theirs)
    assert_varied(ours)
    greedy = generate(pair[1], ids, attention_mask=mask, **walk(vocab_size))
    width = min(ours.size(1), greedy.size(1))
    assert (ours[:, :width] != greedy[:, :width]).any(dim=1).sum() >= 2, "beams found what greedy finds"


@pytest.mark.parametrize("num_beams", [2, 4, 8])
@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_beams_equal_transformers(pair_of, number, num_beams):
    shape = SHAPES[number]
    setting = BEAM_SETTINGS[(number + num_beams) % len(BEAM_SETTINGS)]  # all of them in the slow test below
    check_beams(pair_of(shape), shape[0], num_beams, *setting)


@pytest.mark.slow
@pytest.mark.parametrize("num_beams", [2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_beams_equal_transformers_in_every_setting(pair_of, shape, num_beams):
    for setting in BEAM_SETTINGS:
        check_beams(pair_of(shape), shape[0], num_beams, *setting)


@pytest.mark.slow
def test_124m_equals_transformers(pair_of):
    pair = pair_of(GPT2_124M)
    ids, mask = ragged_batch(50257)
    for options in ({}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}):
        ours, theirs = both(pair, ids, mask, max_new_tokens=28, **options)
        assert torch.equal(ours, theirs)
        assert_varied(ours)
    greedy = generate(pair[1], ids, attention_mask=mask, max_new_tokens=28)
    for num_beams, length_penalty, early_stopping in ((2, 0.6, False), (4, 1.0, True), (8, 2.0, False)):
        options = {"num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": early_stopping}
        ours, theirs = both(pair, ids, mask, max_new_tokens=28, eos_token_id=11, **options)
        assert torch.equal(ours, theirs)
        assert_varied(ours)
        assert (ours != greedy[:, : ours.size(1)]).any(dim=1).sum() >= 2


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 2.0])
def test_beams_that_end_early(pair, length_penalty, early_stopping):
    """Many ends of all lengths, several results, and scores."""
    theirs, ours = pair
    ids, mask = ragged_batch(257)
    options = {
        "attention_mask": mask,
        "max_new_tokens": 20,
        "eos_token_id": list(range(0, 257, 5)),
        "num_beams": 4,
        "num_return_sequences": 3,
        "length_penalty": length_penalty,
        "early_stopping": early_stopping,
        "output_scores": True,
    }
    expected = theirs.generate(ids, pad_token_id=0, return_dict_in_generate=True, do_sample=False, **options)
    output = generate(ours, ids, return_dict=True, **options)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(output.sequences_scores, expected.sequences_scores)
    assert torch.equal(output.beam_indices, expected.beam_indices.long())
    transitions = theirs.compute_transition_scores(expected.sequences, expected.scores, expected.beam_indices)
    torch.testing.assert_close(output.logprobs, transitions, atol=1e-4, rtol=1e-4)
    assert output.lengths.tolist() == (expected.beam_indices >= 0).sum(dim=1).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"bad_words_ids": [[3], [9, 5], [200, 201, 7]]},
        {"repetition_penalty": 0.7},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 3, "repetition_penalty": 1.2, "num_beams": 3},
        {"bad_words_ids": [[k] for k in range(100)], "num_beams": 2},
        {"eos_token_id": list(range(0, 257, 12)), "min_new_tokens": 10},
    ],
    ids=str,
)
def test_controls_equal_transformers(pair, options):
    ids, mask = ragged_batch(257)
    ours, theirs = both(pair, ids, mask, max_new_tokens=40, **options)
    assert torch.equal(ours, theirs)
    free = generate(pair[1], ids, attention_mask=mask, max_new_tokens=40)
    assert not torch.equal(ours, free[:, : ours.size(1)]), "the control controlled nothing"


def test_outputs_equal_transformers(pair):
    theirs, ours = pair
    ids, mask = ragged_batch(257)
    outputs = dict.fromkeys(("output_logits", "output_scores", "output_hidden_states", "output_attentions"), True)
    options = {"attention_mask": mask, "max_new_tokens": 6, "repetition_penalty": 1.5} | outputs
    theirs.set_attn_implementation("eager")
    expected = theirs.generate(ids, pad_token_id=0, return_dict_in_generate=True, do_sample=False, **options)
    theirs.set_attn_implementation("sdpa")
    output = generate(ours, ids, return_dict=True, **options)
    assert torch.equal(output.sequences, expected.sequences)
    assert not torch.equal(output.logits[1], output.scores[1])
    for name in ("logits", "scores"):
        for mine, other in zip(getattr(output, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-5)
    for name in ("hidden_states", "attentions"):
        for step, other_step in zip(getattr(output, name), getattr(expected, name), strict=True):
            for mine, other in zip(step, other_step, strict=True):
                if mine.size(-2) > 1:  # of the prompt, what stands at padding is arbitrary
                    mine, other = mine[..., -1:, :], other[..., -1:, :]
                torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
    expected_logprobs = torch.stack([logits.log_softmax(-1) for logits in expected.logits], dim=1)
    chosen = expected_logprobs.gather(2, expected.sequences[:, 9:, None])[:, :, 0]
    torch.testing.assert_close(output.logprobs, chosen, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.sequences_scores, chosen.mean(dim=1), atol=1e-4, rtol=1e-4)


def test_outputs_not_asked_for_are_not_kept(pair):
    output = generate(pair[1], [[1, 2]], max_new_tokens=3, return_dict=True)
    assert (output.logits, output.scores, output.hidden_states, output.attentions) == (None,) * 4


def test_greedy_equals_reading_all_again_for_each_token(pair):
    model = pair[1]
    ids = torch.tensor([[7, 8, 9], [30, 20, 10]])
    expected = ids
    for _ in range(40):
        expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(dim=-1)), dim=1)
    assert torch.equal(generate(model, ids, max_new_tokens=40), expected)


def test_past_block_size_the_model_sees_the_last_block(pair):
    model = pair[1]
    expected = torch.randint(257, (2, 90), generator=Generator().manual_seed(1))
    prompt = expected
    for _ in range(20):
        seen = expected[:, -model.config.block_size :]
        expected = torch.cat((expected, model(seen).logits[:, -1:].argmax(dim=-1)), dim=1)
    assert torch.equal(generate(model, prompt, max_new_tokens=20, sliding=True), expected)
    with pytest.raises(ValueError, match=r"90 prompt tokens \+ 20 new > block_size 96"):
        generate(model, prompt, max_new_tokens=20)


def test_packed_weights_choose_the_same_tokens(tmp_path):
    _, model = make_pair(SHAPES[2], tmp_path)
    ids, mask = ragged_batch(500)
    expected = generate(model, ids, attention_mask=mask, max_new_tokens=40, return_dict=True, output_logits=True)
    pack_weights(model)
    output = generate(model, ids, attention_mask=mask, max_new_tokens=40, return_dict=True, output_logits=True)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(output.logits[-1], expected.logits[-1], atol=1e-3, rtol=1e-4)


def test_logits_with_a_number_in_common_are_exact_in_bfloat16():
    """As GPT-2's are, near -80, where bfloat16 has steps of 0.5: those of float32 on the same weights are the truth."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=64)).eval()
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(4.0)
        model.transformer.wte.weight.sub_(80 / (4.0 * model.config.n_embd))
    model.bfloat16()
    ids = torch.randint(257, (3, 9), generator=Generator().manual_seed(0))

    def logits(model):
        options = {"max_new_tokens": 1, "return_dict": True, "output_logits": True}
        return generate(model, ids, **options).logits[0]

    plain, exact = logits(model), logits(copy.deepcopy(model).float())
    pack_weights(model)
    packed = logits(model)
    assert -90 < exact.min() < exact.max() < -70
    torch.testing.assert_close(packed, exact, atol=0.2, rtol=0)  # itself, with what the hidden state is rounded by
    plain_error, error = (a.log_softmax(-1) - exact.log_softmax(-1) for a in (plain, packed))
    assert error.abs().max() < 0.03 < 0.2 < plain_error.abs().max()


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_damaged_model_is_named(tmp_path, num_beams):
    _, model = make_pair(SHAPES[2], tmp_path)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float("nan")
    with pytest.raises(ValueError, match="weights are damaged"):
        generate(model, [[1, 2]], max_new_tokens=3, num_beams=num_beams)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling

FILTERS = [
    {"top_k": 5},
    {"top_k": 1},
    {"top_p": 0.7},
    {"top_p": 0.01},
    {"min_p": 0.1},
    {"temperature": 0.5, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.7, "top_p": 0.95},
]


def their_filter(temperature=1.0, top_k=None, top_p=None, min_p=None):
    warpers = hf_processors.LogitsProcessorList()
    if temperature != 1:
        warpers.append(hf_processors.TemperatureLogitsWarper(temperature))
    if top_k:
        warpers.append(hf_processors.TopKLogitsWarper(top_k))
    if top_p:
        warpers.append(hf_processors.TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(hf_processors.MinPLogitsWarper(min_p))
    return warpers


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_filtered_scores_equal_transformers_processors(pair, options):
    ids, mask = ragged_batch(257)
    output = generate(
        pair[1],
        ids,
        attention_mask=mask,
        max_new_tokens=12,
        do_sample=True,
        generator=Generator().manual_seed(0),
        return_dict=True,
        output_logits=True,
        output_scores=True,
        **options,
    )
    for logits, scores, tokens in zip(output.logits, output.scores, output.sequences[:, 9:].T, strict=True):
        expected = their_filter(**options)(None, logits)
        assert torch.equal(scores.isinf(), expected.isinf())
        torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)
        assert scores.gather(1, tokens[:, None]).isfinite().all()
        if options == {"top_p": 0.01} or options == {"top_k": 1}:  # the token that crosses p is kept
            assert torch.equal(tokens, logits.argmax(dim=-1))


def test_top_k_of_none_or_zero_is_off(pair):
    options = {"max_new_tokens": 20, "do_sample": True}
    for top_k in (None, 0):
        drawn = generate(pair[1], [[1, 2]], top_k=top_k, generator=Generator().manual_seed(5), **options)
        assert torch.equal(drawn, generate(pair[1], [[1, 2]], generator=Generator().manual_seed(5), **options))


def chi_square(counts, probabilities):
    """Pearson's statistic, and how far above what chance gives it is, in standard deviations."""
    expected = probabilities * counts.sum()
    kept = expected >= 5  # the rest go into one cell
    counts = torch.cat((counts[kept], counts[~kept].sum()[None]))
    expected = torch.cat((expected[kept], expected[~kept].sum()[None])).clamp(min=1e-9)
    statistic = ((counts - expected) ** 2 / expected)[expected > 1e-6].sum()
    degrees = int((expected > 1e-6).sum()) - 1
    return (statistic - degrees) / (2 * degrees) ** 0.5


@pytest.fixture(scope="module")
def blunt():
    """A small model whose next token is open: 40 tokens, none sure."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=40, block_size=16, n_layer=1, n_head=1, n_embd=8)).eval()
    torch.nn.init.normal_(model.transformer.wte.weight, std=0.3)
    return model


@pytest.mark.parametrize("gumbel", [False, True])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "top_k": 20, "top_p": 0.9}], ids=str)
def test_100_000_draws_follow_the_distribution(blunt, gumbel, options):
    drawn = generate(
        blunt,
        [[1, 2, 3]],
        max_new_tokens=1,
        do_sample=True,
        gumbel=gumbel,
        num_return_sequences=100_000,
        generator=Generator().manual_seed(11),
        **options,
    )
    logits = blunt(torch.tensor([[1, 2, 3]])).logits[:, -1].detach()
    probabilities = their_filter(**options)(None, logits).softmax(dim=-1)[0]
    counts = torch.bincount(drawn[:, -1], minlength=40).float()
    assert counts[probabilities == 0].sum() == 0
    assert abs(chi_square(counts, probabilities)) < 4
    uniform = torch.full((40,), 1 / 40)
    assert chi_square(counts, uniform) > 100, "the test cannot tell distributions apart"


def test_beam_sampling_is_without_replacement(blunt):
    sequences = generate(
        blunt, [[1, 2]] * 50, max_new_tokens=1, num_beams=3, num_return_sequences=3, do_sample=True,
        generator=Generator().manual_seed(0),
    )  # fmt: skip
    drawn = sequences[:, -1].view(50, 3).tolist()
    assert all(len(set(three)) == 3 for three in drawn)
    assert len({tuple(sorted(three)) for three in drawn}) > 25


@pytest.mark.parametrize("gumbel", [False, True])
def test_a_row_with_its_generator_does_not_depend_on_its_neighbours(pair_of, gumbel):
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


def test_a_logits_processor_is_called_as_in_transformers(pair):
    class Odd(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            assert input_ids.shape == (2, next(lengths))
            return scores.index_fill(1, torch.arange(0, 257, 2), float("-inf"))

    lengths = itertools.chain(range(3, 13), range(3, 13))
    options = {"max_new_tokens": 10, "logits_processor": transformers.LogitsProcessorList([Odd()])}
    ours, theirs = both(pair, torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.ones(2, 3, dtype=torch.long), **options)
    assert torch.equal(ours, theirs)
    assert (ours[:, 3:] % 2 == 1).all()


# ---------------------------------------------------------------------------------------------------------------------
# Relaxed samples


def test_gumbel_softmax_is_differentiable_and_cold_samples_are_gumbel_max(blunt):
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    blunt.zero_grad()
    soft = gumbel_softmax(blunt, prompt, max_new_tokens=4, temperature=0.7, generator=Generator().manual_seed(0))
    assert soft.shape == (2, 4, 40)
    torch.testing.assert_close(soft.sum(dim=-1), torch.ones(2, 4))
    soft[:, 3, 7].sum().backward()  # the last sample depends on all before it, through their embeddings
    assert blunt.transformer.h[0].attn.c_attn.weight.grad.abs().sum() > 0
    assert blunt.transformer.wpe.weight.grad[4].abs().sum() > 0  # where the second sample was fed back

    rows = lambda: [Generator().manual_seed(i) for i in range(2)]  # noqa: E731
    hard = gumbel_softmax(blunt, prompt, max_new_tokens=8, hard=True, generator=rows())
    assert torch.equal(hard.detach().round(), F.one_hot(hard.argmax(dim=-1), 40).float())
    drawn = generate(blunt, prompt, max_new_tokens=8, do_sample=True, gumbel=True, generator=rows())
    assert torch.equal(hard.argmax(dim=-1), drawn[:, 3:])


def test_gumbel_softmax_gradient_equals_finite_differences(blunt):
    model = GPT(blunt.config).double().eval()
    model.load_state_dict(blunt.state_dict())
    prompt = torch.tensor([[1, 2]])
    weight = model.transformer.h[0].mlp.c_fc.bias

    def last_sample():  # .float() inside limits the precision to single
        return gumbel_softmax(model, prompt, max_new_tokens=3, generator=Generator().manual_seed(3))[0, 2, 5]

    (gradient,) = torch.autograd.grad(last_sample(), weight)
    index = int(gradient.abs().argmax())
    with torch.no_grad():
        weight[index] += 0.05
        high = last_sample()
        weight[index] -= 0.1
        low = last_sample()
    torch.testing.assert_close((high - low) / 0.1, gradient[index].to(high), atol=1e-5, rtol=2e-2)


# ---------------------------------------------------------------------------------------------------------------------
# Text


class Bytes:
    """A tokenizer of UTF-8 bytes, with end-of-text after them."""

    eot = 256

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return b"".join(b"<eot>" if i == 256 else bytes([i]) for i in ids).decode("utf-8", errors="replace")


def force(text):
    """A logits processor that leaves only the bytes of `text`, one after the other, then end-of-text."""
    tokens, start = [*text.encode(), 256], []

    def processor(ids, scores):
        start.append(ids.size(1))
        return torch.full_like(scores, -50.0).index_fill(1, torch.tensor(tokens[ids.size(1) - start[0]]), 0.0)

    return processor


@pytest.mark.parametrize("text", ["Grüße, 世界 🙂!", "plain", "🙂", ""])
def test_a_stream_never_cuts_a_character(pair, text):
    pieces = list(stream(pair[1], Bytes(), "Hi", max_new_tokens=40, eos_token_id=256, logits_processor=force(text)))
    assert [piece.token for piece in pieces] == [*text.encode(), 256]
    assert [piece.text for piece in pieces if piece.text] == list(text)


def test_a_stream_ends_with_what_is_incomplete(pair):
    pieces = list(stream(pair[1], Bytes(), "Hi", max_new_tokens=3, logits_processor=force("a🙂")))
    assert [piece.text for piece in pieces] == ["a", "", "\ufffd"]


def test_a_stream_is_what_generate_gives(pair):
    options = {"max_new_tokens": 50, "do_sample": True}
    pieces = list(stream(pair[1], Bytes(), "abc", generator=Generator().manual_seed(4), **options))
    expected = generate(pair[1], [[97, 98, 99]], generator=Generator().manual_seed(4), **options)[0, 3:].tolist()
    assert [piece.token for piece in pieces] == expected
    assert "".join(piece.text for piece in pieces) == Bytes().decode(expected)


def test_a_stream_comes_token_by_token(pair):
    calls = []
    pieces = stream(
        pair[1], Bytes(), "abc", max_new_tokens=50, logits_processor=lambda ids, scores: calls.append(1) or scores
    )
    next(pieces)
    next(pieces)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("written", "stop_strings", "expected"),
    [
        ("one, two. three", ". ", "one, two. "),
        ("one, two. three", ["zzz", ","], "one,"),
        ("Grüße an alle", ["üß"], "Grüß"),
        ("without it", "x", "without it"),
    ],
)
def test_stop_strings(pair, written, stop_strings, expected):
    options = {"max_new_tokens": 40, "logits_processor": force(written), "stop_strings": stop_strings}
    (completion,) = generate_text(pair[1], Bytes(), ["a, prompt. with stop strings in it"], **options)
    assert completion.text == expected
    assert completion.tokens == list(expected.encode())
    assert completion.finish_reason == "stop"


def test_a_stop_string_begun_in_the_prompt(pair):
    (completion,) = generate_text(
        pair[1], Bytes(), ["the st"], max_new_tokens=9, logits_processor=force("opped"), stop_strings="stop"
    )
    assert completion.text == "op"


def test_generate_text_keeps_the_order_whatever_the_batch(pair):
    prompts = ["a long prompt of many bytes", "b", "", "some words", "b", "third", "xyz" * 8]
    options = {"max_new_tokens": 30, "do_sample": True, "seed": 7}
    progress = []
    batched = generate_text(pair[1], Bytes(), prompts, batch_size=3, progress=progress.append, **options)
    assert progress == [3, 3, 1]
    assert [completion.prompt for completion in batched] == prompts
    assert batched[1].tokens != batched[4].tokens
    for i, (prompt, completion) in enumerate(zip(prompts, batched, strict=True)):
        (alone,) = generate_text(pair[1], Bytes(), [prompt], **options | {"seed": 7 + i})
        assert alone.tokens == completion.tokens
        assert alone.text == completion.text == Bytes().decode(completion.tokens)
        assert completion.logprobs == pytest.approx(alone.logprobs, abs=1e-3)
        assert len(completion.tokens) == len(completion.logprobs)
        assert completion.finish_reason == ("length" if len(completion.tokens) == 30 else "stop")


def test_generate_text_returns_several_sequences_next_to_each_other(pair):
    prompts = ["one", "and two"]
    sampled = generate_text(pair[1], Bytes(), prompts, max_new_tokens=9, do_sample=True, seed=0, num_return_sequences=3)
    assert [completion.prompt for completion in sampled] == ["one"] * 3 + ["and two"] * 3
    assert len({completion.text for completion in sampled}) == 6
    beams = generate_text(pair[1], Bytes(), prompts, max_new_tokens=9, num_beams=3, num_return_sequences=2)
    ids = torch.tensor([Bytes().encode("and two")])
    expected = pair[0].generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, num_beams=3, num_return_sequences=2,
        do_sample=False, eos_token_id=256, pad_token_id=256,
    )  # fmt: skip
    found = [completion.tokens for completion in beams[2:]]
    assert found == [[token for token in row if token != 256] for row in expected[:, 7:].tolist()]


def test_an_empty_prompt_begins_from_end_of_text(pair):
    (completion,) = generate_text(pair[1], Bytes(), [""], max_new_tokens=20)
    expected = generate(pair[1], [[256]], max_new_tokens=20, eos_token_id=256)[0, 1:].tolist()
    assert completion.tokens == [token for token in expected if token != 256]


def test_rows_that_have_ended_hold_eos(pair):
    ids = torch.arange(40)[:, None] + 100
    output = generate(pair[1], ids, max_new_tokens=30, eos_token_id=[17, 3, 99], return_dict=True)
    assert len(Counter(output.lengths.tolist())) > 3, "rows should end at different lengths"
    for row, length, logprobs in zip(output.sequences[:, 1:].tolist(), output.lengths, output.logprobs, strict=True):
        assert not {17, 3, 99} & set(row[: length - 1])
        assert set(row[length:]) <= {17}
        assert (logprobs[:length] < 0).all()
        assert (logprobs[length:] == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True, "temperature": 0.0}, r"temperature must be above 0.*got 0\.0"),
        ({"do_sample": True, "temperature": -1.0}, r"temperature.*got -1"),
        ({"do_sample": True, "temperature": float("nan")}, r"temperature.*got nan"),
        ({"do_sample": True, "top_p": 0.0}, r"top_p must be in \(0, 1\], got 0"),
        ({"do_sample": True, "top_p": 1.1}, r"top_p.*got 1\.1"),
        ({"do_sample": True, "temperature": 1e-40}, r"temperature.*got 1e-40"),
        ({"do_sample": True, "top_k": -1}, r"top_k must not be negative, got -1"),
        ({"do_sample": True, "min_p": 2.0}, "min_p"),
        ({"top_k": 5}, "set do_sample=True"),
        ({"gumbel": True}, "set do_sample=True"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 96}, r"2 prompt tokens \+ 96 new > block_size 96"),
        ({"num_return_sequences": 2}, "greedy decoding has one result"),
        ({"num_beams": 2, "num_return_sequences": 3}, r"num_return_sequences \(3\) exceeds num_beams \(2\)"),
        ({"num_beams": 0}, "num_beams must be at least 1"),
        ({"early_stopping": "soon"}, "early_stopping"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"bad_words_ids": [[257]]}, r"0\.\.256"),
        ({"bad_words_ids": [[]]}, "no word be empty"),
        ({"eos_token_id": 300}, r"0\.\.256"),
        ({"stop_strings": "x"}, "tokenizer"),
        ({"attention_mask": torch.ones(1, 3)}, r"\(1, 3\), input_ids \(1, 2\)"),
        ({"attention_mask": torch.tensor([[1, 0]])}, "padded on the left"),
        ({"generator": [Generator()] * 2}, "got 2 generators: give one, or 1"),
        ({"bad_words_ids": [[k] for k in range(257)]}, "no token is left to choose at position 2"),
        ({"bad_words_ids": [[k] for k in range(257)], "num_beams": 2}, "fewer than 1 continuations"),
        # one is left, so that all beams but the first are dead from the first token on
        ({"bad_words_ids": [[k] for k in range(256)], "num_beams": 2, "num_return_sequences": 2}, "fewer than 2"),
        ({"stop_strings": ["x", ""], "tokenizer": object()}, "stop_strings hold an empty one"),
    ],
)
def test_impossible_options_are_refused(pair, options, message):
    with pytest.raises(ValueError, match=message):
        generate(pair[1], torch.tensor([[1, 2]]), **{"max_new_tokens": 4, **options})


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[1, 257]]), r"hold 257, outside 0\.\.256"),
        (torch.tensor([[-1, 1]]), "hold -1"),
        (torch.tensor([1, 2]), r"shape \(2,\)"),
        ([[1], []], "at least one token"),
        ([], "at least one token"),
    ],
    ids=str,
)
def test_impossible_ids_are_refused(pair, ids, message):
    with pytest.raises(ValueError, match=message):
        generate(pair[1], ids, max_new_tokens=4)


def test_a_stream_refuses_at_once(pair):
    with pytest.raises(ValueError, match="temperature"):
        stream(pair[1], Bytes(), "a", max_new_tokens=4, do_sample=True, temperature=0.0)
    with pytest.raises(ValueError, match="only one sequence"):
        stream(pair[1], Bytes(), "a", max_new_tokens=4, num_beams=2)


def test_text_that_does_not_fit_fails_before_anything_is_generated(pair):
    progress = []
    with pytest.raises(ValueError, match="block_size"):
        generate_text(pair[1], Bytes(), ["a"] * 20 + ["b" * 90], max_new_tokens=10, progress=progress.append)
    assert progress == []


def test_generate_leaves_gradients_and_mode_alone(pair):
    assert generate(pair[1], [[1]], max_new_tokens=2).is_inference() is False
    assert torch.is_grad_enabled()
    assert list(inspect.signature(generation.generate).parameters)[:2] == ["model", "input_ids"]


def test_a_flat_list_and_a_single_string_are_refused(pair):
    with pytest.raises(ValueError, match="expected a list of such lists"):
        generate(pair[1], [1, 2], max_new_tokens=1)
    with pytest.raises(ValueError, match="expected a list of them"):
        generate_text(pair[1], None, "The", max_new_tokens=1)


def test_top_k_above_the_vocabulary_keeps_all(pair):
    def sample(top_k):
        generator = Generator().manual_seed(3)
        return generate(pair[1], [[1, 2]], max_new_tokens=8, do_sample=True, top_k=top_k, generator=generator)

    assert torch.equal(sample(10_000), sample(None))


def test_a_vocabulary_smaller_than_what_beams_keep(tmp_path):
    _, model = make_pair((2, 16, 1, 1, 8), tmp_path)
    for options in ({"top_k": 1}, {"min_p": 0.5}):
        out = generate(
            model,
            [[1]],
            max_new_tokens=4,
            num_beams=2,
            do_sample=True,
            eos_token_id=[0, 1],
            early_stopping=True,
            **options,
        )
        assert out.size(1) > 1


def test_a_row_that_has_ended_may_have_nothing_left(pair):
    prompts = torch.tensor([[1, 2], [3, 4]])
    free = generate(pair[1], prompts, max_new_tokens=1)[:, -1]
    eos = int(free[0])
    assert eos != int(free[1])

    def process(ids, scores):
        scores = torch.where(torch.arange(257) == free[:, None], scores + 1e4, scores) if ids.size(1) == 2 else scores
        return scores.masked_fill((ids[:, -1:] == eos) & (ids.size(1) > 2), float("-inf"))

    out = generate(pair[1], prompts, max_new_tokens=4, do_sample=True, eos_token_id=eos, logits_processor=process)
    assert (out[0, 2:] == eos).all()


def test_damaged_weights_are_found_with_a_prompt_beyond_the_context(pair):
    model = copy.deepcopy(pair[1])
    model.transformer.ln_f.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits are NaN"):
        generate(model, [[1] * 100], max_new_tokens=2, sliding=True)
