"""Models with window and LSH attention: against full attention, with a cache, with padding, as files."""

import json

import pytest
import torch
from transformers import GPT2LMHeadModel

from generation import generate
from model import GPT, GPTConfig

SHAPE = {"vocab_size": 50, "block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 32}
KINDS = [{"attention": "window", "window_size": 7}, {"attention": "lsh", "lsh_buckets": 16, "lsh_rounds": 2}]
COVERING = [{"attention": "window", "window_size": 64}, {"attention": "lsh", "lsh_buckets": 1, "lsh_rounds": 2}]
kinds = pytest.mark.parametrize("kind", KINDS, ids=["window", "lsh"])


def make_model(**fields):
    """A model with large weights, so that the choice of keys has an effect."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE | fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4
    return model


@pytest.fixture
def ids():
    return torch.randint(50, (2, 64), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", COVERING, ids=["window", "lsh"])
def test_a_window_or_bucket_over_the_sequence_gives_the_model_with_full_attention(kind, ids):
    results = []
    for model in (make_model(), make_model(**kind)):
        loss = model(ids, targets=ids).loss
        loss.backward()
        results.append(torch.cat([loss.detach().view(1), *(p.grad.flatten() for p in model.parameters())]))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@kinds
def test_logits_depend_on_the_pattern_and_only_on_earlier_tokens(kind, ids):
    model = make_model(**kind)
    logits = model(ids).logits
    assert (logits - make_model()(ids).logits)[:, 40:].abs().max() > 0.1
    changed = torch.cat([ids[:, :40], ids.flip(1)[:, :24]], dim=1)
    assert (model(changed).logits - logits)[:, :40].abs().max() < 1e-4
    assert (model(ids[:, :40]).logits - logits[:, :40]).abs().max() < 1e-4


@kinds
def test_cached_and_padded_passes_give_the_logits_of_one_pass(kind, ids):
    model = make_model(**kind)
    expected = model(ids).logits
    cache = model.new_cache(2, 64)
    parts = [model(part, cache=cache).logits for part in ids.split([20, 17, *[1] * 27], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=1e-4)
    padded = torch.cat([torch.zeros(2, 9, dtype=torch.long), ids[:, :50]], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :9] = 0
    together = model(padded, attention_mask=mask).logits[:, 9:]
    torch.testing.assert_close(together, expected[:, :50], atol=1e-4, rtol=1e-4)


@kinds
def test_the_weights_of_the_plain_form_are_those_of_the_fast_form(kind, ids):
    model = make_model(**kind)
    plain = model(ids, output_attentions=True)
    torch.testing.assert_close(plain.logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    seen = (plain.attentions[0] > 0).sum(dim=-1)
    assert seen.max() == 7 if kind["attention"] == "window" else seen.max() <= 1 + 2 * (2 * 64 // 16)
    masked = model(ids, head_mask=torch.ones(2)).logits
    torch.testing.assert_close(masked, plain.logits, atol=1e-5, rtol=1e-5)


@kinds
def test_generation_continues_as_a_pass_over_the_whole_text_does(kind, ids):
    model, rows = make_model(**kind), ids[:, :10]
    found = generate(model, rows, max_new_tokens=20)
    for _ in range(20):
        rows = torch.cat([rows, model(rows).logits[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(found, rows)


@kinds
def test_a_saved_model_is_the_same_here_and_a_plain_gpt2_elsewhere(kind, ids, tmp_path):
    model = make_model(**kind)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert kind.items() <= config.items()
    again = GPT.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(ids).logits, model(ids).logits)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(theirs(ids).logits, make_model()(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_model_with_full_attention_has_no_field_of_this_repository(tmp_path):
    make_model().save_pretrained(tmp_path)
    assert (
        not {"attention", "window_size", "lsh_buckets", "lsh_rounds", "causal"}
        & json.loads((tmp_path / "config.json").read_text()).keys()
    )


WRONG = [
    ({"attention": "local"}, "attention must be full, window or lsh, got 'local'"),
    ({"attention": "window", "window_size": 0}, "window_size must be an integer from 1 to"),
    ({"attention": "lsh", "lsh_buckets": 7}, "lsh_buckets must be 1 or even, got 7"),
    ({"attention": "lsh", "lsh_rounds": True}, "lsh_rounds must be an integer from 1"),
    ({"attention": "window", "causal": False}, "attention window needs causal=True"),
]


@pytest.mark.parametrize(("fields", "message"), [*WRONG, ({"attention": "lsh", "dropout": 0.1}, "dropout must be 0")])
def test_impossible_values_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**fields)


@pytest.mark.parametrize(("fields", "message"), [*WRONG, ({"attention": "lsh", "attn_pdrop": 0.1}, "dropout must be")])
def test_impossible_values_in_a_file_name_the_file(fields, message, tmp_path):
    make_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        GPT.from_pretrained(tmp_path)
