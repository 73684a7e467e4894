"""Attention over part of the earlier tokens, for sequences that are too long for attention over all of them.

`Window`: each token attends to the last `size` tokens, itself included.

`LSH`: locality-sensitive hashing, after the Reformer (Kitaev et al. 2020, section 2). A query attends mostly to keys
that point in a similar direction, and a hash puts vectors of similar direction into the same bucket. So each query
attends to the last `chunk` keys of its own bucket, and to its own key. This is repeated in rounds with other hashes:
attention is over the union of the rounds. Two points differ from the paper:

- Queries and keys are hashed separately, so the model stays a GPT-2. The paper makes them equal.
- In the paper, the tokens after a query can change which earlier keys it attends to, because they move the borders of
  the sorted chunks. Here they cannot: a chunk is a unit of computation, not a limit on what a query sees. So the loss
  of a text is a probability, and cached decoding gives what a pass over the whole text gives.

Both are objects with two methods: the call is the fast form, and `mask` is the plain form, which returns which keys
each query attends to. Memory grows with T in the fast forms and with T² in the plain forms.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

HASH_SEED = 2020  # the hashes are constants of the architecture: equal in every run, process and attempt
CHUNK_QUERIES = 128  # queries that share two blocks of keys. Fewer: smaller products. More: more padding
SLICE_SCORES = 2**20  # attention scores that are in memory at a time, as in kernels/attention.py


class Window(NamedTuple):
    """Each token attends to the last `size` tokens, itself included."""

    size: int

    @property
    def most_keys(self) -> int:
        """Number of tokens that a token attends to at most."""
        return self.size

    def mask(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """Return booleans (B or 1, 1, T, S), True where a query of q (B, H, T, D) attends to a key of k (B, H, S, D).

        The queries are the last T of S tokens. `mask` (B or 1, 1, T, S) is causal; None stands for the causal mask.
        """
        T, S = q.size(2), k.size(2)
        window = torch.ones(1, 1, T, S, dtype=torch.bool, device=q.device).tril(S - T).triu(S - T + 1 - self.size)
        return window if mask is None else window & mask

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """Return the result (B, H, T, D) for q (B, H, T, D), k and v (B, H, S, D), and the mask as above."""
        B, H, T, _ = q.shape
        w = self.size
        if mask is None and T == 1:  # cached decoding
            return F.scaled_dot_product_attention(q, k[:, :, -w:], v[:, :, -w:], dropout_p=dropout)
        if mask is not None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(q, k, mask), dropout_p=dropout)
        start = slice(w)
        first = F.scaled_dot_product_attention(
            q[:, :, start], k[:, :, start], v[:, :, start], dropout_p=dropout, is_causal=True
        )
        if w >= T:
            return first
        # Blocks of w queries: each block needs the keys of its own block and of the one before it. The blocks take the
        # place of the heads, so that one call processes all of them.
        blocks = [F.pad(t, (0, 0, 0, -T % w)).unflatten(2, (-1, w)).flatten(0, 1) for t in (q, k, v)]
        keys, values = (torch.cat([t[:, :-1], t[:, 1:]], dim=2) for t in blocks[1:])  # (B H, blocks - 1, 2 w, D)
        window = torch.ones(w, 2 * w, dtype=torch.bool, device=q.device).tril(w).triu(1)
        rest = F.scaled_dot_product_attention(blocks[0][:, 1:], keys, values, attn_mask=window, dropout_p=dropout)
        return torch.cat([first, rest.unflatten(0, (B, H)).flatten(2, 3)[:, :, : T - w]], dim=2)


class LSH(NamedTuple):
    """Each token attends to itself and, in each of `rounds`, to the last `chunk` earlier keys of its query's bucket."""

    buckets: int  # 1 or even
    rounds: int
    chunk: int
    layer: int  # each layer has hashes of its own

    @property
    def most_keys(self) -> int:
        """Number of tokens that a token attends to at most."""
        return 1 + self.rounds * self.chunk

    def mask(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """Return booleans (B, H, T, S), True where a query attends. The arguments are those of `Window.mask`."""
        T, S = q.size(2), k.size(2)
        itself = torch.eye(S, dtype=torch.bool, device=q.device)[S - T :]
        earlier = torch.ones_like(itself).tril(S - T - 1)
        if mask is not None:
            earlier = earlier & mask
        seen = itself.expand(*q.shape[:3], S)
        for rotation in rotations(self.buckets, self.rounds, self.layer, q.size(-1), q.device):
            q_bucket, k_bucket = find_buckets(q, rotation), find_buckets(k, rotation)
            same = (q_bucket.unsqueeze(-1) == k_bucket.unsqueeze(-2)) & earlier
            newer = same.flip(-1).cumsum(dim=-1).flip(-1)  # number of the key, counted from the newest one
            seen = seen | same & (newer <= self.chunk)
        return seen

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """Return the result (B, H, T, D). The arguments are those of `Window`; `dropout` must be 0."""
        assert not dropout, "GPTConfig refuses dropout with attention lsh"
        # The last query may attend to every key that is not padding.
        keep = None if mask is None else mask[:, 0, -1].expand(len(q), -1)  # (B, S)
        return lsh_attention(q, k, v, keep, *self)[0]


def find_pattern(config: dict[str, Any], layer: int) -> Window | LSH | None:
    """Return the pattern of a layer that the fields of GPTConfig select, or None for full attention."""
    if config["attention"] == "full":
        return None
    if config["attention"] == "window":
        return Window(config["window_size"])
    # Twice the keys that a bucket has on average, as in the paper. It depends on block_size and not on the length of
    # the text, so that a token attends to the same tokens whatever follows it.
    chunk = math.ceil(2 * config["block_size"] / config["lsh_buckets"])
    return LSH(config["lsh_buckets"], config["lsh_rounds"], chunk, layer)


@functools.lru_cache(maxsize=256)
def rotations(buckets: int, rounds: int, layer: int, head_dim: int, device: torch.device) -> Tensor:
    """Return the random vectors (rounds, D, buckets / 2) that define the hashes of a layer."""
    generator = torch.Generator().manual_seed(HASH_SEED + layer)  # PyTorch's global generator is not used
    return torch.randn(rounds, head_dim, buckets // 2, generator=generator).to(device)


def find_buckets(x: Tensor, rotation: Tensor) -> Tensor:
    """Return the buckets (...) of vectors x (..., D): argmax of [x R; -x R], with R = `rotation` (D, buckets / 2).

    This is the hash of Andoni et al. 2015, "Practical and optimal LSH for angular distance". Vectors need not be
    normalized for it: their length does not change which of the products is the largest.
    """
    half = rotation.size(1)
    buckets = torch.zeros(x.shape[:-1], dtype=torch.long, device=x.device)
    if half == 0:
        return buckets
    rows = max(1, SLICE_SCORES // half)
    for part, vectors in zip(buckets.view(-1).split(rows), x.detach().flatten(0, -2).split(rows), strict=True):
        products = vectors.float() @ rotation
        (high, positive), (low, negative) = products.max(dim=1), products.min(dim=1)
        part.copy_(torch.where(high >= -low, positive, negative + half))
    return buckets


# ---------------------------------------------------------------------------------------------------------------------
# The fast form of LSH
#
# All sequences and heads are one list of N queries and one of M keys. In each round the keys are sorted by sequence and
# head, then by bucket, then by position. Then the keys that a query sees are neighbors: a range of at most `chunk` of
# them. The sorted keys are cut into blocks of `chunk`, and a range lies in at most two neighboring blocks. The queries
# whose ranges end in the same block are processed together: one matrix product computes their scores with two blocks.


class Round(NamedTuple):
    """The keys of one round in sorted order, and the range of them that each query sees."""

    keys: Tensor  # (M,) the number of each key in the order of the input
    first: Tensor  # (N,) query i sees the sorted keys first[i]..last[i] - 1
    last: Tensor


class Slice(NamedTuple):
    """The scores of c chunks of s queries each."""

    queries: Tensor  # (c, s), numbers of queries; N stands for padding
    blocks: Tensor  # (c, 2), the two blocks of sorted keys
    scores: Tensor  # (c, s, 2 chunk) in float32, -inf where a query does not see the key
    keys: Tensor  # (c, 2 chunk, D)
    values: Tensor


def sort_keys(q_bucket: Tensor, k_bucket: Tensor, buckets: int, chunk: int) -> Round:
    """Return a round for the buckets of queries (G, T) and keys (G, S). A query does not see its own key here."""
    (G, T), S, device = q_bucket.shape, k_bucket.size(1), q_bucket.device
    row = torch.arange(G, device=device).unsqueeze(1) * (buckets + 1)
    sorted_codes, keys = ((row + k_bucket) * S + torch.arange(S, device=device)).flatten().sort()
    bucket_codes = (row + q_bucket) * S
    last = torch.searchsorted(sorted_codes, (bucket_codes + torch.arange(S - T, S, device=device)).flatten())
    first = torch.searchsorted(sorted_codes, bucket_codes.flatten()).maximum(last - chunk)
    return Round(keys, first, last)


def group_queries(order: Round, chunk: int, size: int) -> tuple[Tensor, Tensor]:
    """Return chunks (c, size) of queries whose ranges end in the same block, N for padding, and that block (c,)."""
    queries = (order.last > order.first).nonzero().flatten()  # the others see no key in this round
    block, by_block = ((order.last[queries] - 1) // chunk).sort(stable=True)
    counts = block.bincount()
    n_chunks = (counts + size - 1) // size
    # A query's place: the first chunk of its block, and its number among the queries of this block.
    place = (n_chunks.cumsum(0) - n_chunks)[block] * size
    place += torch.arange(len(block), device=block.device) - (counts.cumsum(0) - counts)[block]
    chunks = queries.new_full((int(n_chunks.sum()), size), len(order.last))
    chunks.view(-1)[place] = queries[by_block]
    return chunks, torch.arange(len(counts), device=block.device).repeat_interleave(n_chunks)


def into_blocks(sorted_keys: Tensor, chunk: int) -> Tensor:
    """Return blocks (1 + ceil(M / chunk), chunk, ...) of the rows of a tensor (M, ...), after a block of zeros."""
    padded = sorted_keys.new_zeros(chunk + math.ceil(len(sorted_keys) / chunk) * chunk, *sorted_keys.shape[1:])
    padded[chunk : chunk + len(sorted_keys)] = sorted_keys
    return padded.unflatten(0, (-1, chunk))


def score_slices(q: Tensor, k: Tensor, v: Tensor, rounds: list[Round], chunk: int) -> Iterator[Slice]:
    """Yield the scores of the last of `rounds`, without those of pairs that an earlier round has.

    q (N + 1, D), the last row is padding; k and v (M, D). The union of the rounds is what the paper's appendix A
    computes by giving a key that a query sees in n rounds the weight 1/n in each.
    """
    (*earlier, order), N, scale = rounds, len(q) - 1, 1 / math.sqrt(q.size(1))
    keys, values = into_blocks(k[order.keys], chunk), into_blocks(v[order.keys], chunk)
    places = [into_blocks(torch.argsort(other.keys)[order.keys], chunk) for other in earlier]
    # The padding query N sees no key.
    ranges = [(F.pad(each.first, (0, 1)), F.pad(each.last, (0, 1))) for each in rounds]
    size = min(CHUNK_QUERIES, chunk, max(1, N))
    all_chunks, all_blocks = group_queries(order, chunk, size)
    within = torch.arange(-chunk, chunk, device=q.device)
    count = max(1, SLICE_SCORES // (2 * chunk * size))
    for queries, block in zip(all_chunks.split(count), all_blocks.split(count), strict=True):
        blocks = torch.stack([block, block + 1], dim=1)  # block - 1 and block, after the block of zeros
        place = (block.unsqueeze(1) * chunk + within).unsqueeze(1)  # (c, 1, 2 chunk)
        first, last = (bound[queries].unsqueeze(2) for bound in ranges[-1])  # (c, s, 1)
        hidden = (place < first) | (place >= last)
        for other, (other_first, other_last) in zip(places, ranges[:-1], strict=True):
            place = other[blocks].flatten(1).unsqueeze(1)
            hidden |= (place >= other_first[queries].unsqueeze(2)) & (place < other_last[queries].unsqueeze(2))
        part = keys[blocks].flatten(1, 2)
        scores = (q[queries].float() * scale) @ part.float().mT
        yield Slice(queries, blocks, scores.masked_fill_(hidden, float("-inf")), part, values[blocks].flatten(1, 2))


# A custom operator, because torch.compile treats it as a single operation: the number of chunks depends on the data.
@torch.library.custom_op("gpt2::lsh_attention", mutates_args=())
def lsh_attention(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, buckets: int, rounds: int, chunk: int, layer: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the result (B, H, T, D) of LSH attention, and what its backward pass needs.

    These are the log of softmax's denominator (N,), and for each round the sorted keys (rounds, M) and the first and
    last one (rounds, N) that a query sees. keep (B, S) is False for a key that is padding.
    """
    (_, _, T, D), S = q.shape, k.size(2)
    chunk = min(chunk, S)
    with torch.autocast(q.device.type, enabled=False):
        orders = []
        for rotation in rotations(buckets, rounds, layer, D, q.device):
            q_bucket, k_bucket = find_buckets(q, rotation), find_buckets(k, rotation)
            if keep is not None:
                k_bucket = k_bucket.masked_fill(~keep.unsqueeze(1), buckets)  # a bucket that no query is in
            orders.append(sort_keys(q_bucket.flatten(0, 1), k_bucket.flatten(0, 1), buckets, chunk))
        own_k, own_v = k[:, :, S - T :], v[:, :, S - T :]
        # As in FlashAttention: the highest score so far, the sum of exp(score - highest), and the sum of the values
        # with these weights. They begin with a query's own key. The last row of each is for the padding queries.
        highest = F.pad(((q.float() * own_k).sum(dim=-1) / math.sqrt(D)).flatten(), (0, 1))
        total, y = torch.ones_like(highest), F.pad(own_v.flatten(0, 2).float(), (0, 0, 0, 1))
        flat = F.pad(q.flatten(0, 2), (0, 0, 0, 1)), k.flatten(0, 2), v.flatten(0, 2)
        for r in range(rounds):
            for queries, _, scores, _, values in score_slices(*flat, orders[: r + 1], chunk):
                new = highest[queries].maximum(scores.amax(dim=-1))  # (c, s)
                weights = scores.sub_(new.unsqueeze(2)).exp_()
                shrink = (highest[queries] - new).exp()
                total[queries] = total[queries] * shrink + weights.sum(dim=-1)
                y[queries] = y[queries] * shrink.unsqueeze(2) + weights.to(v.dtype) @ values
                highest[queries] = new
        result = (y / total.unsqueeze(1))[:-1].to(v.dtype).view(q.shape)
        keys, first, last = (torch.stack(parts) for parts in zip(*orders, strict=True))
        return result, (highest + total.log())[:-1], keys, first, last


@torch.library.custom_op("gpt2::lsh_attention_gradients", mutates_args=())
def lsh_attention_gradients(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, log_total: Tensor,
    keys: Tensor, first: Tensor, last: Tensor, chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients with respect to q, k and v, given that of the output and what `lsh_attention` returned."""
    (_, _, T, D), S = q.shape, k.size(2)
    chunk, scale = min(chunk, S), 1 / math.sqrt(D)
    orders = [Round(*parts) for parts in zip(keys, first, last, strict=True)]
    own_q, own_k, own_v, own_dy = (t.flatten(0, 2).float() for t in (q, k[:, :, S - T :], v[:, :, S - T :], dy))
    mean = (own_dy * y.flatten(0, 2)).sum(dim=-1)  # the mean of the weights' gradients, with the weights
    # A query's own key
    weight = ((own_q * own_k).sum(dim=-1) * scale - log_total).exp()
    dscore = (weight * ((own_dy * own_v).sum(dim=-1) - mean) * scale).unsqueeze(1)
    dq = F.pad(dscore * own_k, (0, 0, 0, 1))
    dk, dv = (torch.zeros(k.shape, dtype=torch.float32, device=k.device) for _ in range(2))
    dk[:, :, S - T :] = (dscore * own_q).view(q.shape)
    dv[:, :, S - T :] = (weight.unsqueeze(1) * own_dy).view(q.shape)
    dk, dv = dk.flatten(0, 2), dv.flatten(0, 2)
    # The keys of the rounds
    flat = F.pad(q.flatten(0, 2), (0, 0, 0, 1)), k.flatten(0, 2), v.flatten(0, 2)
    dy, log_total, mean = F.pad(dy.flatten(0, 2), (0, 0, 0, 1)), F.pad(log_total, (0, 1)), F.pad(mean, (0, 1))
    for r, order in enumerate(orders):
        dk_blocks, dv_blocks = (into_blocks(torch.zeros_like(dk), chunk) for _ in range(2))
        for queries, blocks, scores, part, values in score_slices(*flat, orders[: r + 1], chunk):
            weights = scores.sub_(log_total[queries].unsqueeze(2)).exp_()
            part_dy = dy[queries]  # (c, s, D)
            dscores = (part_dy @ values.mT).float().sub_(mean[queries].unsqueeze(2)).mul_(weights).mul_(scale)
            weights, dscores = weights.to(q.dtype), dscores.to(q.dtype)
            dq[queries] += dscores @ part
            for total, gradient in ((dk_blocks, dscores.mT @ flat[0][queries]), (dv_blocks, weights.mT @ part_dy)):
                total.index_add_(0, blocks.flatten(), gradient.float().unflatten(1, (2, chunk)).flatten(0, 1))
        dk[order.keys] += dk_blocks.flatten(0, 1)[chunk : chunk + len(dk)]
        dv[order.keys] += dv_blocks.flatten(0, 1)[chunk : chunk + len(dv)]
    return dq[:-1].view(q.shape).to(q.dtype), dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype)


@lsh_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, buckets: int, rounds: int, chunk: int, layer: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_queries, n_keys = q.shape[:-1].numel(), k.shape[:-1].numel()
    keys, ranges = (q.new_empty(rounds, n, dtype=torch.long) for n in (n_keys, n_queries))
    log_total = q.new_empty(n_queries, dtype=torch.float32)
    return v.new_empty(q.shape), log_total, keys, ranges, torch.empty_like(ranges)


@lsh_attention_gradients.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    q, k, v, _, _, _, ctx.chunk, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(q, k, v, *output)


def _gradients(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return (*lsh_attention_gradients(dy, *ctx.saved_tensors, ctx.chunk), None, None, None, None, None)


lsh_attention.register_autograd(_gradients, setup_context=_save)
