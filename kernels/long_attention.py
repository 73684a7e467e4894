"""Attention over part of the earlier tokens, for sequences that are too long for attention over all of them.

`Window`: each token attends to the last `size` tokens, itself included.

`LSH`: locality-sensitive hashing, after the Reformer (Kitaev et al. 2020, section 2). In full attention, keys that
point in a similar direction as a query get most of its weight. A hash usually puts vectors of similar direction into
the same bucket. So with LSH, each query attends only to its own key and to the last `chunk` earlier keys in its bucket.
This is done in several rounds: each round uses another hash, and a query attends to the keys of all rounds. Two points
differ from the paper:

- In the paper, the query and the key of a token are equal. Here they differ, as in GPT-2, and are hashed separately.
- The paper sorts the tokens by bucket and cuts the sorted list into chunks. A query attends to keys in its own chunk
  and the previous one. Tokens after a query move the borders of the chunks, so they can change which earlier keys the
  query attends to. Here they cannot: the `chunk` keys are counted backward from the query. So cached decoding gives the
  same result as a pass over the whole text.

`__call__` is the fast form of a pattern. `mask` is the plain form, which returns the keys that each query attends to.
Without padding, the memory of the fast form grows with the number T of tokens. The plain form's memory grows with T².
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

HASH_SEED = 2020  # the hashes are part of the architecture: they are equal in all runs and processes
# If a hash needs more random vectors than this and the number of buckets is a multiple of 4, `factors` (below) chooses
# two smaller hashes instead.
MOST_DIRECTIONS = 64
# Maximum number of queries in a group of the fast form of LSH (below). Smaller groups would make the matrix products
# too small to be fast, and larger groups would have more padding.
CHUNK_QUERIES = 64
# Approximate number of attention scores that one call of `attend` computes. On a CPU, this is the number for each
# thread, so that the scores of a thread fit into the cache of its core.
CPU_SCORES, GPU_SCORES = 2**18, 2**22


class Window(NamedTuple):
    """Each token attends to the last `size` tokens, itself included."""

    size: int

    @property
    def most_keys(self) -> int:
        """Maximum number of tokens that a token attends to."""
        return self.size

    def mask(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """Return booleans (B or 1, 1, T, S), True where a query of q (B, H, T, D) attends to a key of k (B, H, S, D).

        The queries are the last T of S tokens. `mask` (B or 1, 1, T, S) must exclude later keys, and may also exclude
        padding. None excludes only later keys.
        """
        T, S = q.size(2), k.size(2)
        window = torch.ones(1, 1, T, S, dtype=torch.bool, device=q.device).tril(S - T).triu(S - T + 1 - self.size)
        return window if mask is None else window & mask

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """Return the attention (B, H, T, D) of q (B, H, T, D), k and v (B, H, S, D). `mask` is as in `Window.mask`."""
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
        # Divide the sequence into blocks of w tokens. `first` is the result of the first block. In each later block,
        # the queries need the keys of their own block and of the previous one. The blocks take the place of the heads,
        # so that one call processes all blocks.
        blocks = [F.pad(t, (0, 0, 0, -T % w)).unflatten(2, (-1, w)).flatten(0, 1) for t in (q, k, v)]
        keys, values = (torch.cat([t[:, :-1], t[:, 1:]], dim=2) for t in blocks[1:])  # (B H, blocks - 1, 2 w, D)
        window = torch.ones(w, 2 * w, dtype=torch.bool, device=q.device).tril(w).triu(1)
        rest = F.scaled_dot_product_attention(blocks[0][:, 1:], keys, values, attn_mask=window, dropout_p=dropout)
        return torch.cat([first, rest.unflatten(0, (B, H)).flatten(2, 3)[:, :, : T - w]], dim=2)


class LSH(NamedTuple):
    """Each token attends to itself and, in each round, to the last `chunk` earlier keys in the bucket of its query."""

    buckets: int  # 1 or even
    rounds: int
    chunk: int
    layer: int  # each layer has hashes of its own

    @property
    def most_keys(self) -> int:
        """Maximum number of tokens that a token attends to."""
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
            newer = same.flip(-1).cumsum(dim=-1).flip(-1)  # 1 for the newest key of the bucket, 2 for the one before it
            seen = seen | same & (newer <= self.chunk)
        return seen

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """Return the attention (B, H, T, D). The arguments are those of `Window.__call__`; `dropout` must be 0."""
        assert not dropout, "GPTConfig refuses dropout with attention lsh"
        # The last query may attend to every key that is not padding, so its row of `mask` shows which keys are padding.
        keep = None if mask is None else mask[:, 0, -1].expand(len(q), -1)  # (B, S)
        return lsh_attention(q, k, v, keep, *self)[0]


def find_pattern(config: dict[str, Any], layer: int) -> Window | LSH | None:
    """Return the attention pattern of one layer, or None for full attention. `config` has the fields of GPTConfig."""
    if config["attention"] == "full":
        return None
    if config["attention"] == "window":
        return Window(config["window_size"])
    # A chunk has twice as many keys as a bucket has on average, as in the paper. Its size depends on block_size and not
    # on the length of the text, so that later tokens cannot change which tokens a token attends to.
    chunk = math.ceil(2 * config["block_size"] / config["lsh_buckets"])
    return LSH(config["lsh_buckets"], config["lsh_rounds"], chunk, layer)


def factors(buckets: int) -> list[int]:
    """Return the sizes of the hashes that together make `buckets` buckets: [64] for 64, [32, 32] for 1024, [] for 1.

    A single hash multiplies each vector by `buckets` / 2 random vectors. With many buckets, this would take longer than
    the attention. Two combined hashes need far fewer random vectors.
    """
    if buckets == 1:
        return []
    if buckets > 2 * MOST_DIRECTIONS and buckets % 4 == 0:
        half = next(n for n in range(math.isqrt(buckets // 4), 0, -1) if buckets // 4 % n == 0)
        return [2 * half, buckets // (2 * half)]
    return [buckets]


@functools.lru_cache(maxsize=256)
def rotations(buckets: int, rounds: int, layer: int, head_dim: int, device: torch.device) -> list[list[Tensor]]:
    """Return the random matrices that define the hashes of a layer: a list for each round.

    The list of a round has one matrix (D, n / 2) for each size n in factors(buckets); see `find_buckets`.
    """
    generator = torch.Generator().manual_seed(HASH_SEED + layer)  # PyTorch's global generator is not used
    sizes = factors(buckets)
    return [[torch.randn(head_dim, n // 2, generator=generator).to(device) for n in sizes] for _ in range(rounds)]


def find_buckets(x: Tensor, rotation: list[Tensor]) -> Tensor:
    """Return the bucket of each vector of x (..., D) as an integer. The shape is that of x without D.

    `rotation` has the random matrices of one round, R (D, n / 2) for each n of `factors`. The hash by one matrix is the
    argmax of [x R; -x R], a number below n (Andoni et al. 2015, "Practical and optimal LSH for angular distance"). With
    two matrices, two vectors are in the same bucket only if both hashes are equal.
    """
    buckets = torch.zeros(x.shape[:-1], dtype=torch.long, device=x.device)
    for directions in rotation:
        half = directions.size(1)
        rows = max(1, CPU_SCORES // half)
        for part, vectors in zip(buckets.view(-1).split(rows), x.detach().flatten(0, -2).split(rows), strict=True):
            products = vectors.float() @ directions
            (high, positive), (low, negative) = products.max(dim=1), products.min(dim=1)
            part.mul_(2 * half).add_(torch.where(high >= -low, positive, negative + half))
    return buckets


# ---------------------------------------------------------------------------------------------------------------------
# The fast form of LSH
#
# The queries of all sequences and heads form one list of N queries, the keys form one list of M keys. In each round,
# queries and keys are sorted by sequence and head, then by bucket, then by position. After sorting, the keys that a
# query sees are a range of at most `chunk` neighbors. The sorted keys are cut into blocks of `chunk` keys, so a range
# lies in at most two neighboring blocks. Queries whose ranges end in the same block are divided into groups of equal
# size. Each group is processed together with the keys of this block and of the previous one.


class Round(NamedTuple):
    """The queries and keys of one round in sorted order, and the range of keys that each query sees."""

    keys: Tensor  # (M,) the index of each sorted key in the input
    queries: Tensor  # (N,) the index of each sorted query in the input
    first: Tensor  # (N,) int32: query i of the input sees the sorted keys first[i]..last[i] - 1
    last: Tensor  # (N,) int32, one more than the index of the last of these sorted keys


class Groups(NamedTuple):
    """The queries of a round in c groups of s queries."""

    queries: Tensor  # (c s,) the index of each query in the input; N stands for padding
    blocks: Tensor  # (c,) for each group, the index of the block of sorted keys in which its ranges end
    places: Tensor  # (N,) for each query of the input, its index in the field `queries`


def sort_round(q_bucket: Tensor, k_bucket: Tensor, buckets: int, chunk: int) -> Round:
    """Return a round for the buckets of queries (G, T) and keys (G, S). G = B H counts the heads of all sequences.

    The range of a query does not include its own key, which `lsh_attention` adds once for all rounds.
    """
    (G, T), S, device = q_bucket.shape, k_bucket.size(1), q_bucket.device
    row = torch.arange(G, device=device).unsqueeze(1) * (buckets + 1)
    position = torch.arange(S, device=device)
    key_codes, keys = ((row + k_bucket) * S + position).flatten().sort()
    query_codes, queries = ((row + q_bucket) * S + position[S - T :]).flatten().sort()
    last = torch.searchsorted(key_codes, query_codes)
    first = torch.searchsorted(key_codes, query_codes - query_codes % S).maximum(last - chunk)
    return Round(keys, queries, unsort(queries, first.int()), unsort(queries, last.int()))


def unsort(order: Tensor, values: Tensor) -> Tensor:
    """Undo a sort: `values` (n,) are in sorted order, and the result has them in the order before the sort.

    `order` (n,) has, for each place in the sorted order, the index before the sort.
    """
    return torch.empty_like(values).index_copy_(0, order, values)


def group_queries(order: Round, chunk: int) -> Groups:
    """Divide the queries of a round into groups of equal size. The ranges of a group all end in the same block."""
    size = min(CHUNK_QUERIES, chunk, len(order.queries))
    block = (order.last[order.queries].long() - 1).clamp(min=0) // chunk  # ascending, because queries are sorted
    counts = block.bincount()
    n_groups = (counts + size - 1) // size
    # The block of a query is the block of keys in which its range ends. The place of a query is its index in
    # `Groups.queries`: the start of the first group of its block, plus the number of queries of the same block that
    # come before it in the sorted order.
    shift = (n_groups.cumsum(0) - n_groups) * size - (counts.cumsum(0) - counts)
    places = torch.arange(len(block), device=block.device) + shift[block]
    blocks = torch.arange(len(counts), device=block.device).repeat_interleave(n_groups)
    queries = block.new_full((len(blocks) * size,), len(block)).index_copy_(0, places, order.queries)
    return Groups(queries, blocks, unsort(order.queries, places))


def into_blocks(sorted_keys: Tensor, chunk: int, fill: int) -> Tensor:
    """Cut a tensor (M,) into blocks, (1 + ceil(M / chunk), chunk).

    An extra first block and the padding of the last block contain `fill`.
    """
    return F.pad(sorted_keys, (chunk, -len(sorted_keys) % chunk), value=fill).unflatten(0, (-1, chunk))


class Part(NamedTuple):
    """Some groups of a round: c groups of s queries, with the two blocks of keys that each group needs."""

    rows: slice  # the part of `Groups.queries` that has these queries
    queries: Tensor  # (c s,) the index of each query in the input; N - 1 for padding, whose results are not used
    pairs: Tensor  # (2 c,) the two blocks of each group, as indices in the result of `into_blocks`
    q: Tensor  # (c, s, D)
    k: Tensor  # (c, 2 chunk, D)
    v: Tensor  # (c, 2 chunk, D)
    bias: Tensor  # (c, s, 2 chunk), added to the scores: 0 where a query sees the key, otherwise very negative


def split_groups(q: Tensor, k: Tensor, v: Tensor, rounds: list[Round], groups: Groups, chunk: int) -> Iterator[Part]:
    """Yield the groups of the last round in `rounds`, some groups at a time. q is (N, D), k and v are (M, D).

    Keys that a query has seen in an earlier round are hidden from this query, so each key counts once, as in the paper
    (appendix A).
    """
    (*earlier, order), size, (N, D) = rounds, len(groups.queries) // len(groups.blocks), q.shape
    sorted_keys = into_blocks(order.keys, chunk, 0).flatten()
    keys, values = (t.index_select(0, sorted_keys).view(-1, chunk, D) for t in (k, v))
    # Each element of `places` lists the keys in the sorted order of this round. `places[0]` has their indices in this
    # order, and each later element has their indices in the sorted order of an earlier round.
    place = torch.arange(len(k), dtype=torch.int32, device=k.device)
    places = [into_blocks(each, chunk, -1) for each in (place, *(unsort(o.keys, place)[order.keys] for o in earlier))]
    # Query N, which stands for padding, gets an empty range: it sees no key.
    ranges = [(F.pad(each.first, (0, 1)), F.pad(each.last, (0, 1))) for each in (order, *earlier)]
    hide = torch.finfo(q.dtype).min / 2  # not -inf, with which the softmax of a query that sees no key would be NaN
    scores = CPU_SCORES * torch.get_num_threads() if q.device.type == "cpu" else GPU_SCORES
    begin, count = 0, max(1, scores // (2 * chunk * size))
    for block in groups.blocks.split(count):
        rows = slice(begin, begin + len(block) * size)
        begin, queries = rows.stop, groups.queries[rows]
        # Each group needs the keys of the blocks `block - 1` and `block`. In `keys`, the indices of the two blocks are
        # higher by one, because `into_blocks` adds a first block.
        pairs = torch.stack([block, block + 1], dim=1).flatten()
        # Use integer arithmetic instead of comparisons, which take several times as long on a CPU.
        inside = []  # for each round, (c, s, 2 chunk): negative where the range of the query does not have the key
        for each, (first, last) in zip(places, ranges, strict=True):
            key = each.index_select(0, pairs).view(-1, 1, 2 * chunk)
            low, high = (bound.index_select(0, queries).view(-1, size, 1) for bound in (first, last))
            distance = key - low
            inside.append(torch.minimum(distance, (high - 1) - key, out=distance))
        seen = inside[0]
        for again in inside[1:]:
            # In `again`, a key that the query saw in this earlier round has a number >= 0. The operator ~ makes it
            # negative, and the minimum keeps it negative, so the key is hidden.
            torch.minimum(seen, again.bitwise_not_(), out=seen)
        bias = seen.clamp_(-1, 0).to(q.dtype).mul_(-hide)
        queries = queries.clamp(max=N - 1)
        part_k, part_v = (t.index_select(0, pairs).view(-1, 2 * chunk, D) for t in (keys, values))
        yield Part(rows, queries, pairs, q.index_select(0, queries).view(-1, size, D), part_k, part_v, bias)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attention (c, s, D) of q (c, s, D), k and v (c, n, D), and the log of softmax's denominator (c, s).

    bias (c, s, n) is added to the scores.
    """
    if q.device.type != "cpu":
        return plain_attend(q, k, v, bias)
    # F.scaled_dot_product_attention runs this kernel too, but does not return the log of the denominator.
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(t.unsqueeze(1) for t in (q, k, v)), attn_mask=bias.unsqueeze(1)
    )
    return found[0].squeeze(1), found[1].squeeze(1)


def plain_attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `attend` returns, on any device."""
    scores = (q.float() / math.sqrt(q.size(2))) @ k.float().mT + bias
    log_total = scores.logsumexp(dim=-1)
    return scores.sub_(log_total.unsqueeze(2)).exp_().to(v.dtype) @ v, log_total


def attend_gradients(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, log_total: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients with respect to q, k and v, where k and v belong to some of the keys that the queries see.

    y (c, s, D) and log_total (c, s) are the results over all keys that the queries see. The other arguments are
    those of `attend`.
    """
    if q.device.type != "cpu":
        return plain_attend_gradients(dy, q, k, v, y, log_total, bias)
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(t.unsqueeze(1) for t in (dy, q, k, v, y, log_total)), 0.0, False, attn_mask=bias.unsqueeze(1)
    )
    return tuple(gradient.squeeze(1) for gradient in found)


def plain_attend_gradients(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, log_total: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    """Return what `attend_gradients` returns, on any device."""
    scale = 1 / math.sqrt(q.size(2))
    weights = ((q.float() * scale) @ k.float().mT + bias).sub_(log_total.unsqueeze(2)).exp_()
    # dy · y is, for each query, the mean of the gradients of its attention weights, weighted by these weights.
    mean = (dy.float() * y.float()).sum(dim=-1, keepdim=True)
    dscores = (dy @ v.mT).float().sub_(mean).mul_(weights).mul_(scale).to(q.dtype)
    return dscores @ k, dscores.mT @ q, weights.to(q.dtype).mT @ dy


# This is a custom operator, so that torch.compile treats it as a single operation: the number of its groups depends on
# the data, so its loop cannot become a fixed graph.
@torch.library.custom_op("gpt2::lsh_attention", mutates_args=())
def lsh_attention(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, buckets: int, rounds: int, chunk: int, layer: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the result (B, H, T, D) of LSH attention, and five tensors for its backward pass.

    The five tensors are the log of softmax's denominator (N,), and the fields of `Round` for all rounds: keys (rounds,
    M), queries, first and last (rounds, N). keep (B, S) is False for a key that is padding; None: there is no padding.
    """
    (_, _, T, D), S = q.shape, k.size(2)
    chunk = min(chunk, S)
    with torch.autocast(q.device.type, enabled=False):
        flat = q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2)
        # y is the result so far, and log_total the log of its softmax's denominator. At first, each query attends to
        # its own key only.
        y = v[:, :, S - T :].flatten(0, 2).to(torch.float32, copy=True)
        log_total = (q.float() * k[:, :, S - T :]).sum(dim=-1).flatten() / math.sqrt(D)
        orders: list[Round] = []
        for rotation in rotations(buckets, rounds, layer, D, q.device):
            q_bucket, k_bucket = find_buckets(q, rotation), find_buckets(k, rotation)
            if keep is not None:
                k_bucket = k_bucket.masked_fill(~keep.unsqueeze(1), buckets)  # a bucket that no query is in
            orders.append(sort_round(q_bucket.flatten(0, 1), k_bucket.flatten(0, 1), buckets, chunk))
            groups = group_queries(orders[-1], chunk)
            round_y, round_total = y.new_empty(len(groups.queries), D), y.new_empty(len(groups.queries))
            for part in split_groups(*flat, orders, groups, chunk):
                part_y, part_total = attend(part.q, part.k, part.v, part.bias)
                round_y[part.rows], round_total[part.rows] = part_y.flatten(0, 1), part_total.flatten()
            # Combine the attention over the keys so far with that over the keys of this round, as FlashAttention does.
            round_total = round_total.index_select(0, groups.places)
            y.lerp_(round_y.index_select(0, groups.places), (round_total - log_total).sigmoid_().unsqueeze(1))
            log_total = torch.logaddexp(log_total, round_total)
        keys, queries, first, last = (torch.stack(parts) for parts in zip(*orders, strict=True))
        return y.to(v.dtype).view(q.shape), log_total, keys, queries, first, last


@torch.library.custom_op("gpt2::lsh_attention_gradients", mutates_args=())
def lsh_attention_gradients(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, log_total: Tensor,
    keys: Tensor, queries: Tensor, first: Tensor, last: Tensor, chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients with respect to q, k and v.

    `dy` is the gradient of y. The arguments from y to last are the results of `lsh_attention`.
    """
    (_, _, T, D), S = q.shape, k.size(2)
    chunk, scale = min(chunk, S), 1 / math.sqrt(D)
    orders = [Round(*fields) for fields in zip(keys, queries, first, last, strict=True)]
    # First compute the part of the gradients that comes from each query's own key.
    own_q, own_k, own_v, own_dy = (t.flatten(0, 2).float() for t in (q, k[:, :, S - T :], v[:, :, S - T :], dy))
    mean = (own_dy * y.flatten(0, 2)).sum(dim=-1)  # as in `plain_attend_gradients`
    weight = ((own_q * own_k).sum(dim=-1) * scale - log_total).exp()
    dscore = (weight * ((own_dy * own_v).sum(dim=-1) - mean) * scale).unsqueeze(1)
    dq = dscore * own_k
    dk, dv = (torch.zeros(k.shape, dtype=torch.float32, device=k.device) for _ in range(2))
    dk[:, :, S - T :] = (dscore * own_q).view(q.shape)
    dv[:, :, S - T :] = (weight.unsqueeze(1) * own_dy).view(q.shape)
    dk, dv = dk.flatten(0, 2), dv.flatten(0, 2)
    # Then add the parts that come from the keys of each round.
    flat_dy, flat_q, flat_k, flat_v, flat_y = (t.flatten(0, 2) for t in (dy, q, k, v, y))
    for r, order in enumerate(orders):
        groups = group_queries(order, chunk)
        round_dq = dq.new_empty(len(groups.queries), D)
        blocks = [dk.new_zeros(1 + math.ceil(len(dk) / chunk), chunk, D) for _ in range(2)]
        for part in split_groups(flat_q, flat_k, flat_v, orders[: r + 1], groups, chunk):
            part_dy, part_y = (t.index_select(0, part.queries).view(part.q.shape) for t in (flat_dy, flat_y))
            part_total = log_total.index_select(0, part.queries).view(part.q.shape[:2])
            part_dq, *parts = attend_gradients(part_dy, part.q, part.k, part.v, part_y, part_total, part.bias)
            round_dq[part.rows] = part_dq.flatten(0, 1)
            for total, gradient in zip(blocks, parts, strict=True):
                total.index_add_(0, part.pairs, gradient.float().view(-1, chunk, D))
        dq += round_dq.index_select(0, groups.places)
        place = unsort(order.keys, torch.arange(chunk, chunk + len(dk), device=dk.device))
        dk += blocks[0].flatten(0, 1).index_select(0, place)
        dv += blocks[1].flatten(0, 1).index_select(0, place)
    return dq.view(q.shape).to(q.dtype), dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype)


@lsh_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, buckets: int, rounds: int, chunk: int, layer: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_queries, n_keys = q.shape[:-1].numel(), k.shape[:-1].numel()
    keys, queries = (q.new_empty(rounds, n, dtype=torch.long) for n in (n_keys, n_queries))
    first, last = (q.new_empty(rounds, n_queries, dtype=torch.int32) for _ in range(2))
    return v.new_empty(q.shape), q.new_empty(n_queries, dtype=torch.float32), keys, queries, first, last


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
