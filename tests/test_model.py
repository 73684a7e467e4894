"""The model against transformers' GPT-2 with the same weights, and against properties that it must have."""

import math
import random

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from kernels.attention import CausalAttention
from kernels.loss import IGNORE_INDEX
from model import GPT, PRESETS, GPTConfig


def small_shape(seed):
    """Return the shape of a random small GPT-2, as keywords of GPT2Config, and a sequence length."""
    rng = random.Random(seed)
    n_head = rng.randint(1, 5)
    shape = {
        "vocab_size": rng.randint(50, 400),
        "n_positions": rng.randint(30, 70),
        "n_layer": rng.randint(1, 4),
        "n_head": n_head,
        "n_embd": n_head * rng.choice([4, 8, 16]),
    }
    return shape, rng.randint(12, 30)


WIDE = {"vocab_size": 500, "n_positions": 1024, "n_embd": 768}
SHAPES = [small_shape(seed) for seed in range(8)] + [
    (WIDE | {"n_layer": 2, "n_head": 12}, 1024),
    (WIDE | {"n_layer": 1, "n_head": 6}, 1024),
]


def twins(tmp_path, attention="eager", seed=0, **shape):
    """Return transformers' model and ours with the same weights, large enough that biases and gains have an effect."""
    torch.manual_seed(seed)
    pdrop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    special = {"bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(**shape, **pdrop, **special, initializer_range=0.1, attn_implementation=attention)
    theirs = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "twin")
    return theirs, GPT.from_pretrained(tmp_path / "twin")


@pytest.fixture
def small(tmp_path):
    return twins(tmp_path, vocab_size=101, n_positions=48, n_layer=3, n_head=4, n_embd=32)


def assert_close(ours, theirs, tolerance=1e-4):
    """Assert that ||ours - theirs|| <= tolerance ||theirs|| over the whole tensor."""
    assert ours.shape == theirs.shape
    error = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30)
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance}"


def left_padded(lengths, T, vocab_size, seed=0):
    """Return ids (B, T), a mask that keeps the last lengths[i] tokens of row i, and the positions of kept tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (len(lengths), T), generator=generator)
    mask = (torch.arange(T) >= T - torch.tensor(lengths)[:, None]).long()
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def with_holes(ids, seed=0):
    """Return the ids as labels, with IGNORE_INDEX in about a third of the positions."""
    holes = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    return ids.masked_fill(holes, IGNORE_INDEX)


# ---- against transformers


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_forward_equals_that_of_transformers(tmp_path, index, attention):
    shape, T = SHAPES[index]
    theirs, ours = twins(tmp_path, attention, seed=index, **shape)
    ids = torch.randint(shape["vocab_size"], (1 if T == 1024 else 2, T))
    labels = with_holes(ids)
    eager = attention == "eager"
    with torch.no_grad():
        expected = theirs(ids, labels=labels, output_hidden_states=True, output_attentions=eager)
        plain = ours(ids, labels=labels, return_logits=True, output_hidden_states=True)
        watched = ours(ids, output_hidden_states=True, output_attentions=True)
    assert_close(plain.loss, expected.loss)
    for output in (plain, watched):
        assert_close(output.logits, expected.logits)
        assert_close(output.last_hidden_state, expected.hidden_states[-1])
        assert len(output.hidden_states) == shape["n_layer"] + 1
        for state, other in zip(output.hidden_states, expected.hidden_states, strict=True):
            assert_close(state, other)
    assert len(watched.attentions) == shape["n_layer"]
    if eager:
        for weights, other in zip(watched.attentions, expected.attentions, strict=True):
            assert_close(weights, other)


def assert_same_gradients(theirs, ours, ids, labels, **inputs):
    theirs(ids, labels=labels, **inputs).loss.backward()
    ours.train()(ids, labels=labels, **inputs).loss.backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = expected[name].grad
        if name.endswith(("c_attn.weight", "q_attn.weight", "c_proj.weight", "c_fc.weight")):
            gradient = gradient.T
        # A key's bias shifts all scores of a query equally. Its exact gradient is zero, so only rounding is compared.
        if name.endswith("c_attn.bias"):
            C = ours.config.n_embd
            key = slice(0, C) if "crossattention" in name else slice(C, 2 * C)
            assert parameter.grad[key].norm() <= 1e-4 * gradient.norm()
        assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("index", range(4))
def test_gradient_of_every_parameter_equals_that_of_transformers(tmp_path, index):
    shape, T = SHAPES[index]
    theirs, ours = twins(tmp_path, seed=index, **shape)
    ids = torch.randint(shape["vocab_size"], (3, T))
    assert_same_gradients(theirs, ours, ids, with_holes(ids))


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("gpt2", 2),
        pytest.param("gpt2-medium", 6, marks=pytest.mark.slow),
        pytest.param("gpt2-large", 4, marks=pytest.mark.slow),
        pytest.param("gpt2-xl", 3, marks=pytest.mark.slow),
    ],
)
def test_presets_equal_transformers(tmp_path, name, layers):
    _, n_head, n_embd = PRESETS[name]
    theirs, ours = twins(tmp_path, "sdpa", n_layer=layers, n_head=n_head, n_embd=n_embd)
    ids = torch.randint(50257, (2, 40))
    with torch.no_grad():
        assert_close(ours(ids).logits, theirs(ids).logits)
    assert_same_gradients(theirs, ours, ids, with_holes(ids))


@pytest.mark.parametrize(
    ("name", "count"),
    [("gpt2", 124439808), ("gpt2-medium", 354823168), ("gpt2-large", 774030080), ("gpt2-xl", 1557611200)],
)
def test_parameter_counts(name, count):
    with torch.device("meta"):
        assert GPT(GPTConfig.preset(name)).num_parameters() == count


def test_bfloat16_is_close_to_transformers(tmp_path):
    theirs, ours = twins(tmp_path, "sdpa", vocab_size=300, n_positions=64, n_layer=3, n_head=4, n_embd=64)
    theirs, ours = theirs.bfloat16(), ours.bfloat16()
    ids = torch.randint(300, (4, 64))
    with torch.no_grad():
        expected = theirs(ids, labels=ids, output_hidden_states=True)
        output = ours(ids, labels=ids, return_logits=True, output_hidden_states=True)
    assert output.logits.dtype == torch.bfloat16
    assert_close(output.logits, expected.logits, 2e-2)
    assert_close(output.loss, expected.loss, 2e-2)
    for state, other in zip(output.hidden_states, expected.hidden_states, strict=True):
        assert_close(state, other, 2e-2)


@torch.no_grad()
def test_embeddings_and_positions_as_input(small):
    theirs, ours = small
    ids = torch.randint(101, (2, 9))
    embeddings = torch.randn(2, 9, 32)
    positions = torch.randint(48, (2, 9))
    assert_close(ours(inputs_embeds=embeddings).logits, theirs(inputs_embeds=embeddings).logits)
    assert torch.equal(ours(inputs_embeds=ours.transformer.wte(ids)).logits, ours(ids).logits)
    assert_close(ours(ids, position_ids=positions).logits, theirs(ids, position_ids=positions).logits)
    shared = ours(ids, position_ids=positions[0]).logits
    assert torch.equal(shared, ours(ids, position_ids=positions[:1].expand(2, 9)).logits)


@torch.no_grad()
@pytest.mark.parametrize("watched", [False, True])
def test_left_padding(small, watched):
    theirs, ours = small
    ids, mask, positions = left_padded([20, 3, 11, 1], 20, 101)
    expected = theirs(ids, attention_mask=mask, position_ids=positions, output_attentions=True)
    output = ours(ids, attention_mask=mask, output_attentions=watched)
    kept = mask.bool()
    assert_close(output.logits[kept], expected.logits[kept])
    for weights, other in zip(output.attentions or (), expected.attentions, strict=watched):
        assert_close(weights.transpose(1, 2)[kept], other.transpose(1, 2)[kept])
    assert output.logits.isfinite().all()  # at padding, too


@torch.no_grad()
def test_each_row_of_a_padded_batch_gets_the_logits_it_has_alone(small):
    _, ours = small
    lengths = [1, 2, 5, 9, 14, 23, 31, 40]
    ids, mask, _ = left_padded(lengths, 40, 101)
    together = ours(ids, attention_mask=mask).logits
    for row, length in enumerate(lengths):
        torch.testing.assert_close(
            together[row, -length:], ours(ids[row : row + 1, -length:]).logits[0], atol=1e-5, rtol=1e-5
        )


def test_logits_and_loss_only_on_request(small):
    _, ours = small
    ids = torch.randint(101, (2, 8))
    output = ours(ids, targets=ids)
    assert output.logits is None
    assert output.hidden_states is output.attentions is output.cache is None
    assert ours(ids).loss is None
    assert ours(ids, return_logits=False).logits is None
    everything = ours(ids).logits
    # Close, not equal: a product with another number of rows may sum in another order.
    torch.testing.assert_close(ours(ids, logits_to_keep=3).logits, everything[:, -3:])
    torch.testing.assert_close(ours(ids, targets=ids, return_logits=True).logits, everything)
    # Labels are shifted once, targets are not shifted.
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), IGNORE_INDEX)], dim=1)
    torch.testing.assert_close(ours(ids, labels=ids).loss, ours(ids, targets=shifted).loss)


# ---- the cache


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_cached_passes_give_the_logits_of_a_single_pass(small, padded):
    theirs, ours = small
    ids, mask, positions = left_padded([12, 5, 9] if padded else [12] * 3, 12, 101)
    more = torch.randint(101, (3, 10))
    all_ids = torch.cat([ids, more], dim=1)
    all_mask = torch.cat([mask, torch.ones_like(more)], dim=1)
    whole = ours(all_ids, attention_mask=all_mask).logits
    cache = ours.new_cache(3, 30)
    parts = []
    for first, last in [(0, 12), (12, 13), (13, 14), (14, 20), (20, 22)]:  # a prompt, one by one, a chunk
        inputs = {"attention_mask": all_mask[:, :last]} if padded else {}
        parts.append(ours(all_ids[:, first:last], cache=cache, **inputs).logits)
        assert cache.length == last
    kept = all_mask.bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[kept], whole[kept], atol=1e-5, rtol=1e-5)

    past = theirs(ids, attention_mask=mask, position_ids=positions, use_cache=True).past_key_values
    after = positions[:, -1:] + 1 + torch.arange(10)
    expected = theirs(more, attention_mask=all_mask, position_ids=after, past_key_values=past).logits
    assert_close(torch.cat(parts, dim=1)[:, 12:], expected)


@torch.no_grad()
def test_greedy_tokens_are_the_same_with_and_without_cache(small):
    _, ours = small
    ids = torch.randint(101, (2, 4))
    cache, new = ours.new_cache(2, 40), ids
    for _ in range(30):
        token = ours(ids).logits[:, -1].argmax(-1, keepdim=True)
        cached = ours(new, cache=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        assert torch.equal(token, cached)
        ids, new = torch.cat([ids, token], dim=1), token


@torch.no_grad()
def test_reorder_and_crop(small):
    _, ours = small
    ids = torch.randint(101, (3, 8))
    cache = ours.new_cache(3, 20)
    ours(ids, cache=cache)
    rows = torch.tensor([2, 0, 0])
    cache.reorder(rows)
    cache.crop(5)
    new = torch.randint(101, (3, 4))
    expected = ours(torch.cat([ids[rows, :5], new], dim=1)).logits[:, 5:]
    torch.testing.assert_close(ours(new, cache=cache).logits, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="cache of 9 tokens to 10"):
        cache.crop(10)


# ---- the options


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
def test_cross_attention(tmp_path, cached):
    shape = {"vocab_size": 60, "n_positions": 32, "n_layer": 2, "n_head": 2, "n_embd": 16}
    theirs, ours = twins(tmp_path, "sdpa", add_cross_attention=True, **shape)
    ids = torch.randint(60, (2, 7))
    memory = {"encoder_hidden_states": torch.randn(2, 5, 16)}
    mask = {"encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 1]])}
    for inputs in (memory, memory | mask):
        expected = theirs(ids, labels=ids, **inputs)
        if cached:
            cache = ours.new_cache(2, 10)
            logits = [ours(part, cache=cache, **inputs).logits for part in ids.split([4, 1, 2], dim=1)]
            assert_close(torch.cat(logits, dim=1), expected.logits)
        else:
            assert_close(ours(ids, **inputs).logits, expected.logits)
            assert_close(ours(ids, labels=ids, **inputs).loss, expected.loss)
    assert_close(ours(ids).logits, theirs(ids).logits)  # without encoder states, these layers are skipped


def test_gradients_with_cross_attention(tmp_path):
    shape = {"vocab_size": 60, "n_positions": 32, "n_layer": 2, "n_head": 2, "n_embd": 16}
    theirs, ours = twins(tmp_path, add_cross_attention=True, **shape)
    ids = torch.randint(60, (2, 7))
    assert_same_gradients(theirs, ours, ids, ids, encoder_hidden_states=torch.randn(2, 5, 16))


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_bidirectional(small, padded):
    theirs, ours = small
    free = GPT(GPTConfig(**{**vars(ours.config), "causal": False})).eval()
    free.load_state_dict(ours.state_dict())
    ids, mask, positions = left_padded([9, 4] if padded else [9, 9], 9, 101)
    seen = mask[:, None, None, :].bool().expand(2, 1, 9, 9)  # transformers uses a mask of four dimensions as it is
    bias = torch.zeros(2, 1, 9, 9).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = theirs(ids, attention_mask=bias, position_ids=positions).logits
    for watched in (False, True):
        output = free(ids, attention_mask=mask if padded else None, output_attentions=watched)
        assert_close(output.logits[mask.bool()], expected[mask.bool()])
    with pytest.raises(ValueError, match="causal=True"):
        free.new_cache(1, 4)


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
def test_a_masked_head_equals_a_head_without_output_weights(small, cached):
    _, ours = small
    ids = torch.randint(101, (2, 10))
    D = 32 // 4
    per_layer = torch.ones(3, 4)
    per_layer[0, 1] = per_layer[2, 3] = per_layer[2, 0] = 0
    for head_mask in (per_layer, torch.tensor([1.0, 0.0, 1.0, 1.0])):
        pruned = GPT(ours.config).eval()
        pruned.load_state_dict(ours.state_dict())
        for layer, head in (head_mask.expand(3, 4) == 0).nonzero().tolist():
            pruned.transformer.h[layer].attn.c_proj.weight[:, head * D : (head + 1) * D] = 0
        if cached:
            cache = ours.new_cache(2, 10)
            parts = [ours(part, head_mask=head_mask, cache=cache).logits for part in ids.split([6, 1, 3], dim=1)]
            logits = torch.cat(parts, dim=1)
        else:
            logits = ours(ids, head_mask=head_mask).logits
        torch.testing.assert_close(logits, pruned(ids).logits, atol=1e-5, rtol=1e-5)
        assert (logits - ours(ids).logits).abs().max() > 0.01


def test_resize_token_embeddings(small):
    _, ours = small
    ids = torch.randint(101, (2, 6))
    before = ours(ids).logits
    rows = ours.transformer.wte.weight.clone()
    ours.resize_token_embeddings(105)
    assert ours.config.vocab_size == 105
    assert torch.equal(ours.transformer.wte.weight[:101], rows)
    torch.testing.assert_close(ours(ids).logits[..., :101], before, atol=1e-6, rtol=0)  # a product of another width
    assert 0.01 < ours.transformer.wte.weight[101:].std() < 0.03
    ours(torch.full((1, 3), 104), targets=torch.full((1, 3), 103)).loss.backward()
    assert ours.transformer.wte.weight.grad[104].abs().sum() > 0
    ours.resize_token_embeddings(40)
    assert torch.equal(ours.transformer.wte.weight, rows[:40])
    with pytest.raises(ValueError, match="vocab_size"):
        ours.resize_token_embeddings(0)


def test_freeze(small):
    _, ours = small
    ours.freeze(layers=2)
    ids = torch.randint(101, (2, 6))
    ours.train()(ids, targets=ids).loss.backward()
    trained = {name for name, parameter in ours.named_parameters() if parameter.grad is not None}
    last = {name for name, _ in ours.named_parameters() if name.startswith(("transformer.h.2.", "transformer.ln_f."))}
    assert trained == last
    with pytest.raises(ValueError, match="4 layers of 3"):
        ours.freeze(layers=4)


def test_initialization():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=1000, block_size=64, n_layer=8, n_head=4, n_embd=128))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif parameter.dim() == 1:
            assert (parameter == 1).all()
        else:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.1 * std
    ids = torch.randint(1000, (4, 64))
    assert model(ids, targets=ids.roll(1, 0)).loss.item() == pytest.approx(math.log(1000), rel=0.05)


def test_dropout_only_in_training():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=16, dropout=0.5))
    ids = torch.randint(50, (2, 8))
    assert not torch.equal(model(ids).logits, model(ids).logits)
    weights = model(ids, output_attentions=True).attentions[0]
    assert 0.3 < (weights != 0).sum() / (2 * 2 * 36) < 0.7  # of the 36 pairs in each of 2 rows and 2 heads
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


# ---- the choice of attention's kernel


def test_causal_attention_is_used_only_to_train_on_a_cpu_below_float32(monkeypatch):
    taken = []
    theirs = CausalAttention.apply
    monkeypatch.setattr(CausalAttention, "apply", lambda *inputs: taken.append(len(inputs)) or theirs(*inputs))
    ids = torch.randint(50, (2, 8))

    def calls(dtype=torch.bfloat16, keep=None, **fields):
        taken.clear()
        model = GPT(GPTConfig(vocab_size=50, block_size=8, n_layer=2, n_head=2, n_embd=16, **fields)).train()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model(ids, targets=ids, attention_mask=keep).loss.backward()
        return len(taken)

    assert calls() == calls(torch.float16) == 2
    assert calls(torch.float32) == calls(dropout=0.1) == calls(causal=False) == calls(keep=torch.ones(2, 8)) == 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        GPT(GPTConfig(vocab_size=50, block_size=8, n_layer=2, n_head=2, n_embd=16))(ids)
    assert not taken


# ---- misuse


def ids_of(*shape):
    return torch.zeros(shape, dtype=torch.long)


MISUSE = [
    ({}, "exactly one of input_ids and inputs_embeds is needed, got neither"),
    ({"input_ids": ids_of(2, 5), "inputs_embeds": torch.zeros(2, 5, 32)}, "got both"),
    ({"input_ids": ids_of(5)}, r"input_ids has shape \(5,\), expected \(B, T\)"),
    ({"inputs_embeds": torch.zeros(2, 5, 31)}, r"shape \(2, 5, 31\), expected \(B, T, 32\)"),
    ({"input_ids": ids_of(2, 49)}, "49 new tokens, expected 1 to block_size 48"),
    ({"input_ids": ids_of(2, 0)}, "0 new tokens"),
    ({"input_ids": ids_of(2, 5) + 101}, r"input_ids hold 101, outside 0..100 \(vocab_size 101\)"),
    ({"input_ids": ids_of(2, 5) - 1}, "input_ids hold -1"),
    ({"input_ids": ids_of(2, 5), "attention_mask": ids_of(2, 6)}, r"has shape \(2, 6\), expected \(2, 5\)"),
    ({"input_ids": ids_of(2, 5), "position_ids": ids_of(2, 5) + 48}, r"position_ids hold 48, outside 0..47"),
    ({"input_ids": ids_of(2, 5), "position_ids": ids_of(4)}, r"shape \(4,\), expected \(2, 5\) or \(5,\)"),
    ({"input_ids": ids_of(2, 5), "head_mask": torch.ones(5)}, r"shape \(5,\), expected \(4,\) or \(3, 4\)"),
    ({"input_ids": ids_of(2, 5), "head_mask": torch.ones(4, 3)}, r"shape \(4, 3\), expected \(4,\) or \(3, 4\)"),
    ({"input_ids": ids_of(2, 5), "labels": ids_of(2, 5), "targets": ids_of(2, 5)}, "got both targets .* and labels"),
    ({"input_ids": ids_of(2, 5), "targets": ids_of(2, 4)}, r"targets has shape \(2, 4\), expected \(2, 5\)"),
    ({"input_ids": ids_of(2, 5), "labels": ids_of(10)}, r"labels has shape \(10,\), expected \(2, 5\)"),
    ({"input_ids": ids_of(2, 5), "targets": ids_of(2, 5) + 101}, "targets hold 101, outside 0..100"),
    ({"input_ids": ids_of(2, 5), "targets": ids_of(2, 5) - 1}, "targets hold -1"),
    ({"input_ids": ids_of(2, 5), "encoder_hidden_states": torch.zeros(2, 3, 32)}, "cross_attention=True"),
]


@pytest.mark.parametrize(("inputs", "message"), MISUSE, ids=[message[:40] for _, message in MISUSE])
@pytest.mark.parametrize("training", [False, True])
def test_misuse(inputs, message, training):
    model = GPT(GPTConfig(vocab_size=101, block_size=48, n_layer=3, n_head=4, n_embd=32)).train(training)
    with pytest.raises(ValueError, match=message):
        model(**inputs)


def test_misuse_of_the_encoder_inputs():
    model = GPT(GPTConfig(vocab_size=20, block_size=8, n_layer=1, n_head=2, n_embd=8, cross_attention=True))
    memory = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match=r"encoder_attention_mask has shape \(2, 4\), expected \(2, 3\)"):
        model(ids_of(2, 5), encoder_hidden_states=memory, encoder_attention_mask=ids_of(2, 4))
    with pytest.raises(ValueError, match=r"encoder_hidden_states has shape \(2, 3, 8\), expected \(1, M, 8\)"):
        model(ids_of(1, 5), encoder_hidden_states=memory)
    with pytest.raises(ValueError, match="needs the encoder_hidden_states"):
        model(ids_of(2, 5), encoder_attention_mask=ids_of(2, 3))


@torch.no_grad()
def test_misuse_of_the_cache(small):
    _, ours = small
    with pytest.raises(ValueError, match="cache of 49 tokens is longer than block_size 48"):
        ours.new_cache(1, 49)
    cache = ours.new_cache(2, 8)
    ours(ids_of(2, 6), cache=cache)
    for inputs, message in [
        ({"input_ids": ids_of(2, 3)}, "too small: 6 tokens .* 3 new > max_length 8"),
        ({"input_ids": ids_of(3, 1)}, "2 rows, the input 3"),
        ({"input_ids": ids_of(2, 1), "attention_mask": ids_of(2, 1)}, r"shape \(2, 1\), expected \(2, 7\)"),
        ({"input_ids": ids_of(2, 1) + 500}, "hold 500"),
        ({"input_ids": ids_of(2, 1), "targets": ids_of(2, 1) + 500}, "targets hold 500"),
        ({"input_ids": ids_of(2, 1), "head_mask": torch.ones(7)}, r"head_mask .* shape \(7,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            ours(cache=cache, **inputs)
        assert cache.length == 6  # unchanged, so a corrected call can follow
    full = ours.new_cache(2, 48)
    ours(ids_of(2, 48), cache=full)
    with pytest.raises(ValueError, match="48 cached"):
        ours(ids_of(2, 1), cache=full)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("block_size", -1),
        ("n_layer", 1.5),
        ("n_head", True),
        ("n_embd", "768"),
        ("n_embd", 770),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", "0.1"),
    ],
)
def test_impossible_configurations(field, value):
    with pytest.raises(ValueError, match=field):
        GPTConfig(**{field: value})


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"'gpt3'.*gpt2-medium"):
        GPTConfig.preset("gpt3")
