"""Test stream and generate_text: strings in, strings out."""

import copy

import pytest
import torch
from torch import Generator

from generation import generate, generate_text, stream


class Bytes:
    """A tokenizer whose tokens are the 256 byte values and end-of-text."""

    eot = 256
    vocab_size = 257

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return b"".join(b"<eot>" if i == 256 else bytes([i]) for i in ids).decode("utf-8", errors="replace")


def force(text):
    """Return a logits processor that makes the model generate the bytes of `text`, then end-of-text."""
    tokens, start = [*text.encode(), 256], []

    def processor(ids, scores):
        start.append(ids.size(1))
        return torch.full_like(scores, -50.0).index_fill(1, torch.tensor(tokens[ids.size(1) - start[0]]), 0.0)

    return processor


@pytest.mark.parametrize("text", ["Grüße, 世界 🙂!", "plain", "🙂", ""])
def test_a_stream_yields_only_whole_characters(pair, text):
    streamed = list(stream(pair[1], Bytes(), "Hi", max_new_tokens=40, eos_token_id=256, logits_processor=force(text)))
    assert [item.token for item in streamed] == [*text.encode(), 256]
    assert [item.text for item in streamed if item.text] == list(text)


def test_a_stream_ends_with_a_replacement_for_an_incomplete_character(pair):
    streamed = list(stream(pair[1], Bytes(), "Hi", max_new_tokens=3, logits_processor=force("a🙂")))
    assert [item.text for item in streamed] == ["a", "", "\ufffd"]


def test_a_stream_equals_the_tokens_of_generate(pair):
    options = {"max_new_tokens": 50, "do_sample": True}
    streamed = list(stream(pair[1], Bytes(), "abc", generator=Generator().manual_seed(4), **options))
    expected = generate(pair[1], [[97, 98, 99]], generator=Generator().manual_seed(4), **options)[0, 3:].tolist()
    assert [item.token for item in streamed] == expected
    assert "".join(item.text for item in streamed) == Bytes().decode(expected)


def test_a_stream_generates_each_token_only_when_it_is_requested(pair):
    calls = []
    streamed = stream(
        pair[1], Bytes(), "abc", max_new_tokens=50, logits_processor=lambda ids, scores: calls.append(1) or scores
    )
    next(streamed)
    next(streamed)
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
def test_text_ends_with_the_first_stop_string(pair, written, stop_strings, expected):
    options = {"max_new_tokens": 40, "logits_processor": force(written), "stop_strings": stop_strings}
    (completion,) = generate_text(pair[1], Bytes(), ["a, prompt. with stop strings in it"], **options)
    assert completion.text == expected
    assert completion.tokens == list(expected.encode())
    assert completion.finish_reason == "stop"


def test_a_stop_string_may_begin_in_the_prompt(pair):
    (completion,) = generate_text(
        pair[1], Bytes(), ["the st"], max_new_tokens=9, logits_processor=force("opped"), stop_strings="stop"
    )
    assert completion.text == "op"


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_with_stop_in_prompt_false_a_stop_string_ends_only_new_text(pair, options):
    """Also in a batch with a longer prompt."""
    options |= {"max_new_tokens": 10, "stop_strings": "stop", "stop_in_prompt": False}
    prompts = ["the st", "a longer prompt"]
    for completion in generate_text(pair[1], Bytes(), prompts, logits_processor=force("op stopped"), **options):
        assert (completion.text, completion.finish_reason) == ("op stop", "stop")
    completion = generate_text(pair[1], Bytes(), prompts, logits_processor=force("oppressed!"), **options)[0]
    assert (completion.text, completion.finish_reason) == ("oppressed!", "length")


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_a_stop_string_does_not_match_padding(pair, options):
    """The shorter prompt is padded with end-of-text, which decodes to <eot>, and an empty prompt is end-of-text."""
    options |= {"max_new_tokens": 4, "stop_strings": ["t>ab", "t>b"]}
    for prompts in (["a", "a longer prompt"], [""]):
        completion = generate_text(pair[1], Bytes(), prompts, logits_processor=force("bcde"), **options)[0]
        assert (completion.text, completion.finish_reason) == ("bcde", "length")


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_a_stop_string_does_not_match_padding_of_any_kind(pair, options):
    ids, mask = torch.tensor([list(b"xxa"), list(b"xya")]), torch.tensor([[0, 0, 1], [1, 1, 1]])
    options |= {"max_new_tokens": 4, "stop_strings": ["xab", "yab"], "tokenizer": Bytes(), "return_dict": True}
    output = generate(pair[1], ids, attention_mask=mask, logits_processor=force("bcde"), **options)
    assert output.lengths.tolist() == [4, 1]


def test_generate_text_does_not_depend_on_the_batch_size(pair):
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


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 1}, {"num_beams": 2}], ids=str)
def test_ids_beyond_the_tokenizer_are_never_chosen(pair, options):
    """A padded model gives the text, and the log-probabilities, of the model without padding."""
    prompts, options = ["one", "and two"], {"max_new_tokens": 20} | options
    expected = generate_text(pair[1], Bytes(), prompts, **options)
    padded = copy.deepcopy(pair[1])
    padded.resize_token_embeddings(300)
    state = padded.transformer.ln_f.weight.new_ones(43, 32)
    with torch.no_grad():
        padded.transformer.wte.weight[257:] = 100 * state  # the most probable tokens at many positions
    found = generate_text(padded, Bytes(), prompts, **options)
    assert [completion.tokens for completion in found] == [completion.tokens for completion in expected]
    for ours, other in zip(found, expected, strict=True):
        assert ours.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    if not options.get("seed") and "num_beams" not in options:
        streamed = list(stream(padded, Bytes(), "one", max_new_tokens=20, eos_token_id=256))
        assert [item.token for item in streamed if item.token != 256] == expected[0].tokens


def test_generate_text_returns_the_sequences_of_a_prompt_next_to_each_other(pair):
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


def test_an_empty_prompt_becomes_end_of_text(pair):
    (completion,) = generate_text(pair[1], Bytes(), [""], max_new_tokens=20)
    expected = generate(pair[1], [[256]], max_new_tokens=20, eos_token_id=256)[0, 1:].tolist()
    assert completion.tokens == [token for token in expected if token != 256]


def test_a_stream_refuses_impossible_options_before_the_first_token(pair):
    with pytest.raises(ValueError, match="temperature"):
        stream(pair[1], Bytes(), "a", max_new_tokens=4, do_sample=True, temperature=0.0)
    with pytest.raises(ValueError, match="only one sequence"):
        stream(pair[1], Bytes(), "a", max_new_tokens=4, num_beams=2)


def test_a_prompt_that_does_not_fit_fails_before_any_text_is_generated(pair):
    progress = []
    with pytest.raises(ValueError, match="block_size"):
        generate_text(pair[1], Bytes(), ["a"] * 20 + ["b" * 90], max_new_tokens=10, progress=progress.append)
    assert progress == []
