"""A transformers GPT-2 and our GPT with the same weights, and calls of `generate` to compare them by."""

import itertools

import torch
from torch import Generator
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation import logits_process as hf_processors

from generation import generate
from model import GPT

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
PADDING = (0, 3, 5, 8)  # of four rows of 9 tokens: the prompts have 9, 6, 4 and 1 tokens


def make_pair(shape, directory, seed=0):
    """Return a transformers GPT-2 and our copy of it. The weights are large, so that greedy text does not repeat."""
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


def ragged_batch(vocab_size, seed=0):
    """Return ids and mask of four prompts of different lengths, padded on the left."""
    ids = torch.randint(vocab_size, (4, 9), generator=Generator().manual_seed(seed))
    mask = (torch.arange(9) >= torch.tensor(PADDING)[:, None]).long()
    return ids * mask, mask


def both(pair, ids, mask, **options):
    """Return the sequences that our `generate` and transformers' return for the same call."""
    theirs, ours = pair
    eos = options.get("eos_token_id", 0)
    pad = eos if isinstance(eos, int) else eos[0]
    expected = theirs.generate(ids, attention_mask=mask, pad_token_id=pad, **{"do_sample": False, **options})
    return generate(ours, ids, attention_mask=mask, **options), expected


def walk(vocab_size):
    """Return options for at least 40 tokens, followed by any of many end tokens: rows end at different lengths."""
    return {"max_new_tokens": 64, "min_new_tokens": 40, "eos_token_id": list(range(0, vocab_size, 12))[:30]}


def assert_varied(sequences):
    """Assert that every row contains at least 20 different tokens."""
    for row, padding in zip(sequences, itertools.cycle(PADDING), strict=False):
        assert len(set(row[padding:].tolist())) >= 20


def their_filter(temperature=1.0, top_k=None, top_p=None, min_p=None):
    """Return the processors of transformers for these options."""
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
