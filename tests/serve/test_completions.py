"""Which requests are accepted, and the sentences for the others."""

import copy
import json
import random
from types import SimpleNamespace

import pytest
import torch

from serve.completions import CompletionRequest, Part, RequestError, TokenInfo, choice, join, parse_request
from serve.engine import Engine, find_stop, stop_overlap


def parse(**fields):
    return parse_request(json.dumps(fields).encode())


def test_the_defaults_are_those_of_openai():
    assert parse(prompt="a") == CompletionRequest(["a"], max_tokens=16, temperature=1.0, top_p=1.0, n=1)
    assert parse(model="m", user="u", prompt="a", best_of=1, suffix=None, logit_bias={}, frequency_penalty=0.0).n == 1


def test_prompts_and_stops_may_be_lists():
    request = parse(prompt=["a", "b"], stop="\n", n=2, best_of=2, stream_options={"include_usage": True})
    assert (request.prompts, request.stop, request.include_usage) == (["a", "b"], ("\n",), True)
    assert parse(prompt=[1, 2]).prompts == [[1, 2]]
    assert parse(prompt=[[1, 2], "b"], stop=["x", "y"]).prompts == [[1, 2], "b"]
    assert parse(max_tokens=20.0).max_tokens == 20


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON"),
        (b"\xff\xfe\xff", "the body is not JSON"),
        (b"[" * 100_000, "the body is not JSON"),
        (b"[]", "the body is a JSON list, expected an object"),
        (b'{"prompt": 3}', "prompt is 3, expected a text, token ids, or a list of texts or of token ids"),
        (b'{"prompt": []}', "prompt is []"),
        (b'{"prompt": [[]]}', "prompt is [[]]"),
        (b'{"prompt": [true]}', "prompt is [true]"),
        (rb'{"prompt": "\ud800"}', "prompt contains a lone surrogate"),
        (b'{"max_tokens": 0}', "max_tokens is 0, expected a whole number from 1 to 4096"),
        (b'{"max_tokens": 1.5}', "max_tokens is 1.5, expected a whole number"),
        (b'{"max_tokens": "9"}', 'max_tokens is "9", expected a whole number'),
        (b'{"temperature": NaN}', "temperature is NaN, expected a number from 0 to 100"),
        (b'{"temperature": -1}', "temperature is -1, expected a number from 0 to 100"),
        (b'{"temperature": true}', "temperature is true, expected a number"),
        (b'{"top_p": 0}', "top_p is 0, expected a number from 1e-09 to 1"),
        (b'{"n": 17}', "n is 17, expected a whole number from 1 to 16"),
        (b'{"n": 9, "prompt": ["a", "b"]}', "2 prompts times n 9 is more than 16"),
        (b'{"n": 3, "num_beams": 2}', "n 3 is more than num_beams 2"),
        (
            b'{"num_beams": 2, "temperature": 1, "seed": 3}',
            "temperature, seed affect only sampling, not beam search: omit them, or num_beams",
        ),
        (b'{"num_beams": 2, "top_p": 0.9}', "top_p affect"),
        (b'{"num_beams": 2, "top_k": 5}', "top_k affect"),
        (b'{"stream": 1}', "stream is 1, expected true or false"),
        (b'{"stop": [""]}', 'stop is [""], expected a text or a list'),
        (b'{"stop": 5}', "stop is 5, expected a text or a list"),
        (rb'{"stop": ["a", "\udfff"]}', "stop contains a lone surrogate, which is not a character: remove it"),
        (b'{"echo": true, "logprobs": 1}', "echo with logprobs is not supported"),
        (b'{"presence_penalty": 0.5}', "presence_penalty is not supported: omit it"),
        (b'{"best_of": 2}', "best_of is not supported"),
        (b'{"temprature": 1}', "unknown field temprature: omit it"),
        (b'{"seed": -1}', "seed is -1"),
    ],
    ids=lambda value: repr(value[:30]) if isinstance(value, bytes) else "",
)
def test_an_impossible_request_is_refused_with_a_sentence(body, message):
    with pytest.raises(RequestError) as error:
        parse_request(body)
    assert str(error.value).startswith(message)
    assert error.value.status == 400


@pytest.mark.parametrize("token", [99, -1, 2**63, -(2**63) - 1])
def test_a_token_id_outside_the_vocabulary_is_refused_with_the_name_of_the_field(tiny_model, token):
    job = SimpleNamespace(request=parse(prompt=[[1], [1, token]]), canceled=False)
    with pytest.raises(ValueError, match=rf"^prompt contains the token id {token}, outside 0\.\.98$"):
        list(Engine(*tiny_model)._complete(job))


def test_text_that_may_begin_a_stop_string_is_held_back():
    """A stream with stop strings shows the same text as a search in the whole text."""
    source = random.Random(0)
    for _ in range(2000):
        text = "".join(source.choices("ab\n", k=source.randrange(1, 12)))
        stops = ["".join(source.choices("ab\n", k=source.randrange(1, 4))) for _ in range(2)]
        ends = [end for end in range(1, len(text) + 1) if find_stop(text[:end], stops) is not None]
        expected = text[: find_stop(text[: ends[0]], stops)] if ends else text
        for end in range(ends[0] if ends else len(text)):
            so_far = text[:end]
            assert expected.startswith(so_far[: len(so_far) - stop_overlap(so_far, stops)])


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"num_beams": 2}], ids=str)
def test_a_stop_string_does_not_begin_in_the_prompt(tiny_model, fields):
    def complete(**more):
        job = SimpleNamespace(request=parse(prompt="run", max_tokens=3, **fields, **more), canceled=False)
        (part,) = join(list(Engine(*tiny_model)._complete(job)))
        return part.text, part.n_tokens, part.finish_reason

    text, _, reason = complete()
    assert (len(text), reason) == (3, "length")
    assert complete(stop=f"n{text[0]}") == (text, 3, "length")
    assert complete(stop=text[0]) == ("", 1, "stop")


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"num_beams": 2}], ids=str)
def test_the_end_of_text_counts_as_a_new_token(tiny_model, fields):
    model, tokenizer = copy.deepcopy(tiny_model)
    with torch.no_grad():  # end-of-text is the most probable token
        model.transformer.wte.weight[tokenizer.eot] = 10.0
    job = SimpleNamespace(request=parse(prompt="a", **fields), canceled=False)
    (part,) = join(list(Engine(model, tokenizer)._complete(job)))
    assert (part.text, part.n_tokens, part.finish_reason) == ("", 1, "stop")


def test_parts_are_joined_and_formatted():
    tokens = [TokenInfo("a", -1.0, [("a", -1.0), ("b", -2.0)]), TokenInfo("bc", -0.5, [])]
    parts = [Part(1, "x", [], 1, "stop"), Part(0, "a", tokens[:1], 1, None), Part(0, "bc", tokens[1:], 1, "length")]
    first, second = join(parts)
    assert first == Part(0, "abc", tokens, 2, "length")
    assert second == Part(1, "x", [], 1, "stop")
    assert choice(first, with_logprobs=True, offset=4) == {
        "text": "abc",
        "index": 0,
        "finish_reason": "length",
        "logprobs": {
            "tokens": ["a", "bc"],
            "token_logprobs": [-1.0, -0.5],
            "top_logprobs": [{"a": -1.0, "b": -2.0}, {}],
            "text_offset": [4, 5],
        },
    }
    assert choice(second, with_logprobs=False)["logprobs"] is None
