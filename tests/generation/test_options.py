"""Test that the options are declared once with the same defaults, and that impossible requests are refused."""

import dataclasses
import inspect

import pytest
import torch
from torch import Generator

from generation import GenerationOptions, generate, generate_text


def test_the_signature_of_generate_lists_the_options_with_their_types_and_defaults():
    parameters = inspect.signature(generate).parameters
    assert list(parameters)[:3] == ["model", "input_ids", "attention_mask"]
    declared = {name: (p.annotation, p.default) for name, p in list(parameters.items())[3:]}
    fields = inspect.signature(GenerationOptions).parameters
    assert declared == {name: (p.annotation, p.default) for name, p in fields.items()}
    assert list(declared) == list(fields)
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[2:])
    assert generate.__doc__.startswith("Continue each prompt")


def test_options_cannot_be_changed_without_a_check():
    options = GenerationOptions(max_new_tokens=3, do_sample=True, temperature=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.top_p = 2.0
    with pytest.raises(ValueError, match="set do_sample=True"):
        dataclasses.replace(options, do_sample=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'top_kk'"):
        generate(None, [[1]], max_new_tokens=3, top_kk=1)


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
        ({"bad_words_ids": [[]]}, "no word may be empty"),
        ({"eos_token_id": 300}, r"0\.\.256"),
        ({"stop_strings": "x"}, "tokenizer"),
        ({"attention_mask": torch.ones(1, 3)}, r"\(1, 3\), but input_ids \(1, 2\)"),
        ({"attention_mask": torch.tensor([[1, 0]])}, "padded on the left"),
        ({"generator": [Generator()] * 2}, "got 2 generators, expected one for all rows or 1,"),
        ({"bad_words_ids": [[k] for k in range(257)]}, "no token is left to choose at position 2"),
        ({"bad_words_ids": [[k] for k in range(257)], "num_beams": 2}, "fewer than 1 continuations"),
        # Only one token is allowed, so all beams except the first are impossible after the first step.
        ({"bad_words_ids": [[k] for k in range(256)], "num_beams": 2, "num_return_sequences": 2}, "fewer than 2"),
        ({"stop_strings": ["x", ""], "tokenizer": object()}, "stop_strings contain an empty string"),
    ],
)
def test_impossible_options_are_refused(pair, options, message):
    with pytest.raises(ValueError, match=message):
        generate(pair[1], torch.tensor([[1, 2]]), **{"max_new_tokens": 4, **options})


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[1, 257]]), r"contain 257, outside 0\.\.256"),
        (torch.tensor([[-1, 1]]), "contain -1"),
        (torch.tensor([1, 2]), r"shape \(2,\)"),
        ([[1], []], "at least one token"),
        ([], "at least one token"),
    ],
    ids=str,
)
def test_impossible_ids_are_refused(pair, ids, message):
    with pytest.raises(ValueError, match=message):
        generate(pair[1], ids, max_new_tokens=4)


def test_a_flat_list_and_a_single_string_are_refused(pair):
    with pytest.raises(ValueError, match="expected a list of such lists"):
        generate(pair[1], [1, 2], max_new_tokens=1)
    with pytest.raises(ValueError, match="expected a list of strings"):
        generate_text(pair[1], None, "The", max_new_tokens=1)
