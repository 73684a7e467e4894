"""Attention inside documents: as if each document were alone, on every path, and in one graph."""

import shutil

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters
from torch.nn import functional as F

from kernels import document_attention
from kernels.attention import plain_causal_attention
from kernels.document_attention import DocumentAttention, DocumentMask, find_documents, make_block_mask
from kernels.loss import IGNORE_INDEX
from model import GPT, GPTConfig

LENGTHS = [[5, 1, 20, 6], [32], [32], [1, 1, 1, 29], [5, 1, 20, 6], [5, 1, 20, 6], [31, 1]]


def make_ids(lengths=LENGTHS):
    """Return document ids (B, T), which are not 0, 1, 2, ... everywhere."""
    return torch.stack([torch.arange(7, 7 + len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])


def random_inputs(dtype=torch.float32, D=16):
    """Return q, k, v and dy, (B, 3, T, D), with heads interleaved in memory as in the model."""
    torch.manual_seed(0)
    return [torch.randn(len(LENGTHS), 32, 3, D).transpose(1, 2).to(dtype) for _ in range(4)]


def alone(q, k, v):
    """Return the attention of each document in a call of its own."""
    parts = []
    for row, lengths in enumerate(LENGTHS):
        pieces = zip(*(t[row : row + 1].split(lengths, dim=2) for t in (q, k, v)), strict=True)
        parts.append(torch.cat([plain_causal_attention(*piece) for piece in pieces], dim=2))
    return torch.cat(parts)


def value_and_gradients(function, inputs):
    *qkv, dy = inputs
    qkv = [t.detach().requires_grad_() for t in qkv]
    y = function(*qkv)
    return [y, *torch.autograd.grad(y, qkv, dy)]


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: DocumentMask.of(make_ids()).attend(q, k, v),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=DocumentMask(make_ids()).dense()),
    ],
    ids=["documents", "dense"],
)
def test_each_document_is_as_if_it_were_alone(function):
    inputs = random_inputs()
    for found, expected in zip(value_and_gradients(function, inputs), value_and_gradients(alone, inputs), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_the_same_with_the_block_mask():
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v, _ = random_inputs()  # without gradients, which FlexAttention has on CUDA only
    found = flex_attention(q, k, v, block_mask=make_block_mask(make_ids()))
    torch.testing.assert_close(found, alone(q, k, v), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("short", [0, 20, 256])
def test_gradients_in_bfloat16_are_as_accurate_as_those_of_each_document_alone(short, monkeypatch):
    monkeypatch.setattr(document_attention, "SHORT", short)
    inputs = random_inputs(torch.bfloat16)
    exact = value_and_gradients(alone, [t.double() for t in inputs])
    ids = make_ids()
    found = value_and_gradients(lambda q, k, v: DocumentAttention.apply(q, k, v, ids), inputs)
    plain = value_and_gradients(alone, inputs)
    for ours, theirs, reference in zip(found, plain, exact, strict=True):
        assert (ours - reference).norm() <= 1.1 * (theirs - reference).norm()


def test_find_documents_joins_rows_that_are_cut_alike():
    found = [(rows.start, rows.stop, tokens.start, tokens.stop) for rows, tokens in find_documents(make_ids())]
    assert found[:5] == [(0, 1, 0, 5), (0, 1, 5, 6), (0, 1, 6, 26), (0, 1, 26, 32), (1, 3, 0, 32)]
    covered = torch.zeros(len(LENGTHS), 32, dtype=torch.int)
    for row, last_row, begin, end in found:
        covered[row:last_row, begin:end] += 1
    assert (covered == 1).all()


def test_positions_begin_at_zero_in_each_document():
    expected = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    assert torch.equal(DocumentMask(make_ids()).positions(), expected)


def make_model(**fields):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=99, block_size=32, n_layer=2, n_head=2, n_embd=32, **fields))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # positions and biases matter
    return model


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_logits_loss_and_gradients_of_a_model_equal_those_of_each_document_alone():
    model = make_model()
    ids = torch.randint(99, (len(LENGTHS), 32), generator=torch.Generator().manual_seed(1))
    targets = torch.randint(99, ids.shape, generator=torch.Generator().manual_seed(2))
    targets[:, 30:] = IGNORE_INDEX
    documents = make_ids()
    together = model(ids, targets=targets, document_ids=documents, return_logits=True)
    found = gradient(model, together.loss)
    nats, logits = torch.zeros(()), []
    for row, lengths in enumerate(LENGTHS):
        for text, wanted in zip(ids[row].split(lengths), targets[row].split(lengths), strict=True):
            logits.append(model(text[None]).logits[0])
            nats = nats + F.cross_entropy(logits[-1], wanted, ignore_index=IGNORE_INDEX, reduction="sum")
    loss = nats / (targets != IGNORE_INDEX).sum()
    torch.testing.assert_close(together.logits.flatten(0, 1), torch.cat(logits), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.loss, loss, atol=1e-5, rtol=1e-5)
    expected = gradient(model, loss)
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-5)
    assert (model(ids, targets=targets).loss - loss).abs() > 1e-3  # the mask matters
    # Weights that are asked for come from the plain form.
    weights = model(ids, document_ids=documents, output_attentions=True)
    torch.testing.assert_close(weights.logits, together.logits, atol=1e-5, rtol=1e-5)
    assert (weights.attentions[0].masked_select(~DocumentMask(documents).dense()) == 0).all()


def test_dropout_uses_the_dense_mask():
    model = make_model(dropout=0.1).train()
    ids = torch.randint(99, (len(LENGTHS), 32))
    loss = model(ids, targets=ids, document_ids=make_ids()).loss
    assert gradient(model, loss).isfinite().all()
    model.eval()
    changed = ids.clone()
    changed[0, :5] = 3  # the first document of the first row
    before, after = (model(x, document_ids=make_ids()).logits[0] for x in (ids, changed))
    assert torch.equal(before[5:], after[5:])
    assert not torch.equal(before[:5], after[:5])


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="no C++ compiler")
def test_one_graph_for_documents_of_any_number_and_length():
    torch._dynamo.reset()
    counters.clear()
    model = make_model().train()
    step = torch.compile(
        lambda ids, documents: model(ids, targets=ids, document_ids=documents).loss,
        backend="aot_eager", fullgraph=True, dynamic=False,
    )  # fmt: skip
    for lengths in ([[32], [32]], [[5, 27], [1, 1, 30]], [[1] * 32, [16, 16]]):
        ids = torch.randint(99, (2, 32))
        documents = make_ids(lengths)
        found = gradient(model, step(ids, documents))
        expected = gradient(model, model(ids, targets=ids, document_ids=documents).loss)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert not counters["recompiles"]


def test_document_ids_with_other_masks_or_a_wrong_shape_are_refused():
    model = make_model()
    ids = torch.zeros(1, 8, dtype=torch.long)
    for options in ({"attention_mask": torch.ones(1, 8)}, {"cache": model.new_cache(1, 8)}):
        with pytest.raises(ValueError, match="document_ids need causal=True, attention full, no cache and no"):
            model(ids, document_ids=ids, **options)
    with pytest.raises(ValueError, match=r"document_ids has shape \(1, 7\), expected \(1, 8\)"):
        model(ids, document_ids=ids[:, 1:])
