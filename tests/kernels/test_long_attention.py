"""Window and LSH attention against their plain forms, full attention and the Reformer of transformers."""

import math

import pytest
import torch
from torch.nn import functional as F

from kernels import long_attention
from kernels.attention import plain_causal_attention
from kernels.long_attention import (
    LSH,
    Window,
    attend,
    attend_gradients,
    factors,
    find_buckets,
    lsh_attention,
    plain_attend,
    plain_attend_gradients,
    rotations,
)

PATTERNS = [
    Window(1),
    Window(7),
    Window(64),
    LSH(1, 2, 10, 0),
    LSH(4, 1, 9, 0),
    LSH(8, 3, 5, 1),
    LSH(4, 2, 200, 2),
    LSH(132, 2, 9, 0),
]
# Queries, keys, and the first key of the second sequence that is not padding
SHAPES = [(1, 1, 0), (50, 50, 0), (64, 64, 0), (13, 50, 0), (1, 50, 0), (50, 50, 11), (13, 50, 11)]


def random_inputs(T, S, dtype=torch.float32):
    """q (2, 3, T, 16), k, v (2, 3, S, 16) and dy."""
    torch.manual_seed(T)
    q, k, v, dy = (torch.randn(2, 3, n, 16).to(dtype) for n in (T, S, S, T))
    return (q * 2).requires_grad_(), k.requires_grad_(), v.requires_grad_(), dy


def make_mask(T, S, padding):
    """The mask that model.py passes: none if the kernel knows it, otherwise the causal mask without padding."""
    if padding == 0 and (T == S or T == 1):
        return None
    kept = torch.ones(2, S, dtype=torch.bool)
    kept[1, :padding] = False
    itself = torch.eye(S, dtype=torch.bool)[S - T :]
    return torch.ones(T, S, dtype=torch.bool).tril(S - T) & kept[:, None, None, :] | itself


def plain(pattern, q, k, v, mask):
    scores = q @ k.mT / math.sqrt(q.size(-1))
    return scores.masked_fill(~pattern.mask(q, k, mask), float("-inf")).softmax(dim=-1) @ v


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_results_and_gradients_equal_the_plain_form(pattern, shape, monkeypatch):
    monkeypatch.setattr(long_attention, "CPU_SCORES", 100)  # several slices, of blocks of a few queries
    monkeypatch.setattr(long_attention, "CHUNK_QUERIES", 3)
    *qkv, dy = random_inputs(*shape[:2])
    mask = make_mask(*shape)
    found, expected = pattern(*qkv, mask, 0.0), plain(pattern, *qkv, mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    gradients = (torch.autograd.grad(y, qkv, dy) for y in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_groups_are_attended_to_in_the_same_way_on_a_gpu():
    """There the plain forms run. For a query that sees no key, the result has no weight, but must be finite."""
    torch.manual_seed(0)
    q, k, v, dy = (torch.randn(5, n, 16) for n in (7, 12, 12, 7))
    bias = torch.where(torch.rand(5, 7, 12) < 0.5, 0.0, torch.finfo(torch.float32).min / 2)
    bias[0, 0] = torch.finfo(torch.float32).min / 2
    y, log_total = attend(q, k, v, bias)
    plain_y, plain_total = plain_attend(q, k, v, bias)
    torch.testing.assert_close(log_total, plain_total, atol=1e-5, rtol=1e-5)
    assert log_total[0, 0] < -1e30
    assert plain_y[0, 0].isfinite().all()
    assert y[0, 0].isfinite().all()
    torch.testing.assert_close(y.flatten(0, 1)[1:], plain_y.flatten(0, 1)[1:], atol=1e-5, rtol=1e-5)
    total = log_total.clamp(min=0) + 1  # more than these keys have: there are others
    for one, other in zip(
        *(f(dy, q, k, v, y, total, bias) for f in (attend_gradients, plain_attend_gradients)), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pattern", [Window(50), Window(1000), LSH(1, 1, 100, 0), LSH(1, 3, 50, 0)], ids=str)
def test_a_window_or_bucket_over_the_sequence_is_full_attention(pattern):
    *qkv, dy = random_inputs(50, 50)
    found, expected = pattern(*qkv, None, 0.0), plain_causal_attention(*qkv)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for one, other in zip(*(torch.autograd.grad(y, qkv, dy) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("T", "buckets"), [(16, 6), (50, 6), (50, 132)])
def test_the_plain_form_of_lsh_is_its_definition(T, buckets):
    """Token by token: itself, and in each round the last keys before it in the bucket of its query."""
    lsh = LSH(buckets, rounds=2, chunk=4, layer=3)
    q, k, *_ = random_inputs(T, T)
    seen = lsh.mask(q, k, None)
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(T)).tolist():
        expected = {i}
        for rotation in rotations(buckets, 2, 3, 16, q.device):
            bucket, *others = (
                [int(torch.cat([x @ r, -x @ r]).argmax()) for r in rotation] for x in (q[b, h, i], *k[b, h, :i])
            )
            expected.update([j for j, other in enumerate(others) if other == bucket][-4:])
        assert set(seen[b, h, i].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("pattern", [Window(20), LSH(4, 2, 20, 0)], ids=str)
def test_bfloat16_is_as_accurate_as_its_plain_form(pattern):
    *qkv, dy = random_inputs(100, 100, torch.bfloat16)
    exact = torch.cat(torch.autograd.grad(plain(pattern, *(t.double() for t in qkv), None), qkv, dy.double()))
    found, rounded = (
        torch.cat(torch.autograd.grad(f(*qkv, None), qkv, dy)).double()
        for f in (lambda *a: pattern(*a, 0.0), lambda *a: plain(pattern, *a))
    )
    assert (found - exact.double()).norm() <= 1.1 * (rounded - exact.double()).norm()


def test_equals_the_reformer_of_transformers():
    """With queries in well separated clusters, each of which has a bucket of its own and fits into a chunk.

    Then the differences play no role: transformers lets a query see other buckets in its chunk, where the weights are
    negligible here, and counts a key once for each round. Its keys are normalized queries, and a token sees itself only
    if it sees nothing else, which is undone here.
    """
    reformer = pytest.importorskip("transformers.models.reformer.modeling_reformer")
    from transformers import ReformerConfig

    T, D, chunk, rounds = 64, 16, 16, 2
    torch.manual_seed(0)
    cluster = torch.arange(4).repeat(T // 4)[torch.randperm(T)]
    x = 40 * torch.eye(D)[cluster] + torch.randn(T, D)
    for seed in range(1000):
        torch.manual_seed(seed)
        rotation = torch.randn(1, D, rounds, 4).permute(0, 2, 1, 3)[0]
        buckets = [find_buckets(x, [r]) for r in rotation]
        if all(len(set(zip(cluster.tolist(), b.tolist(), strict=True))) == len(b.unique()) == 4 for b in buckets):
            break
    config = ReformerConfig(
        hidden_size=D, num_attention_heads=1, attention_head_size=D, num_hashes=rounds, num_buckets=8, hash_seed=seed,
        lsh_attn_chunk_length=chunk, lsh_num_chunks_before=1, is_decoder=True, lsh_attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = reformer.LSHSelfAttention(config).eval()
    with torch.no_grad():
        theirs.query_key.weight.copy_(torch.eye(D))
        expected = theirs(x[None]).hidden_states[0]
    q, k = x[None, None], F.normalize(x, dim=-1)[None, None] * math.sqrt(D)
    v = theirs.value(x)[None, None].detach()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_attention, "rotations", lambda *_: [[r] for r in rotation])
        y, log_total, *_ = lsh_attention(q, k, v, None, 8, rounds, chunk, 0)
    own = ((q * k).sum(dim=-1) / math.sqrt(D) - log_total.view(1, 1, T)).exp().unsqueeze(-1)  # weight of a token itself
    others = own[0, 0, :, 0] < 0.999  # the first token of a cluster sees only itself
    assert others.sum() == T - 4
    torch.testing.assert_close(((y - own * v) / (1 - own))[0, 0, others], expected[others], atol=1e-4, rtol=1e-4)


def test_hashes_are_constants_that_differ_between_layers_and_rounds():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    rotations.cache_clear()
    [(first,), (second,)] = rotations(8, 2, 0, 4, torch.device("cpu"))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    rotations.cache_clear()
    assert torch.equal(first, rotations(8, 2, 0, 4, torch.device("cpu"))[0][0])
    assert not torch.equal(first, second)
    assert not torch.equal(first, rotations(8, 2, 1, 4, torch.device("cpu"))[0][0])


@pytest.mark.parametrize(
    ("buckets", "expected"),
    [(1, []), (6, [6]), (128, [128]), (130, [130]), (132, [6, 22]), (1024, [32, 32]), (2048, [32, 64])],
)
def test_a_hash_into_many_buckets_is_made_of_two(buckets, expected):
    assert factors(buckets) == expected
    found = find_buckets(torch.randn(20000, 64), rotations(buckets, 1, 0, 64, torch.device("cpu"))[0])
    assert 0 <= found.min() <= found.max() < buckets
    assert len(found.unique()) > buckets * 0.9


def test_two_small_hashes_find_a_little_less_than_a_large_one():
    """The figures of docs/long-context.md: how often vectors with a cosine of 0.8 share one of 1,024 buckets."""
    torch.manual_seed(0)
    x, other = (F.normalize(torch.randn(20000, 64), dim=1) for _ in range(2))
    y = 0.8 * x + 0.6 * F.normalize(other - (x * other).sum(dim=1, keepdim=True) * x, dim=1)
    single, double = [torch.randn(64, 512)], [torch.randn(64, 16), torch.randn(64, 16)]
    found = [(find_buckets(x, r) == find_buckets(y, r)).float().mean().item() for r in (single, double)]
    assert found == pytest.approx([0.22, 0.16], abs=0.01)


@pytest.mark.parametrize("pattern", [Window(7), LSH(4, 2, 8, 0)], ids=str)
def test_both_compile_to_one_graph(pattern):
    *qkv, dy = random_inputs(40, 40)
    compiled = torch.compile(lambda q, k, v: pattern(q, k, v, None, 0.0), backend="aot_eager", fullgraph=True)
    gradients = (torch.autograd.grad(y, qkv, dy) for y in (compiled(*qkv), pattern(*qkv, None, 0.0)))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_the_operator_of_lsh_declares_its_shapes():
    *qkv, _ = random_inputs(40, 40)
    torch.library.opcheck(lsh_attention, (*qkv, None, 4, 2, 8, 0), test_utils=("test_schema", "test_faketensor"))
