"""`log_likelihoods` against scoring one request at a time, without padding, cache or shared contexts."""

import random
import threading

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from eval.hf_model import HFModel
from eval.likelihood import Request, check_pair, log_likelihoods
from model import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=97, block_size=48, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(CONFIG).eval()
    with torch.no_grad():  # probabilities far from uniform, and a large offset that all logits have in common
        for parameter in model.parameters():
            parameter.mul_(4)
        model.transformer.wte.weight.add_(0.5)
        model.transformer.ln_f.bias.add_(5)
    return model


def make_requests(n=60, seed=0, longest=60):
    rng = random.Random(seed)

    def ids(low, high):
        return tuple(rng.randrange(CONFIG.vocab_size) for _ in range(rng.randint(low, high)))

    requests = []
    while len(requests) < n:
        context = ids(1, longest)
        requests += [Request(context, ids(1, 12)) for _ in range(rng.randint(1, 5))]
    return requests[:n]


@torch.no_grad()
def one_at_a_time(model, request):
    """Return the log-probability and whether the continuation is greedy, from one forward pass over this request."""
    tokens = torch.tensor([*request.context, *request.continuation])[-(CONFIG.block_size + 1) :]
    log_probs = F.log_softmax(model(tokens[None, :-1]).logits[0].double(), dim=-1)
    n = len(request.continuation)
    targets = tokens[-n:]
    picked = log_probs[-n:].gather(1, targets[:, None])
    return float(picked.sum()), bool((log_probs[-n:].argmax(-1) == targets).all())


def test_scores_match_those_of_each_request_alone(model):
    requests = make_requests()
    # Add requests that continue as the model does, so that `greedy` is true for some.
    for request in requests[:10]:
        context = request.context[-20:]
        for _ in range(3):
            context = (*context, int(model(torch.tensor([context])).logits[0, -1].argmax()))
        requests.append(Request(context[:-3], context[-3:]))
    expected = [one_at_a_time(model, request) for request in requests]
    assert {greedy for _, greedy in expected} == {True, False}
    for batch_size in (1, 3, 16, 64):
        scores = log_likelihoods(model, requests, batch_size=batch_size)
        np.testing.assert_allclose(scores.log_probs, [total for total, _ in expected], rtol=2e-5, atol=2e-4)
        assert scores.greedy.tolist() == [greedy for _, greedy in expected]


def test_a_continuation_longer_than_the_block_size_is_scored_in_windows(model):
    tokens = make_requests(1, seed=3)[0].context[:1] + tuple(np.random.default_rng(0).integers(0, 97, 130).tolist())
    got = log_likelihoods(model, [Request(tokens[:1], tokens[1:])]).log_probs[0]
    step = CONFIG.block_size // 2
    windows = [Request(tokens[: 1 + i], tokens[1 + i : 1 + i + step]) for i in range(0, 130, step)]
    assert got == pytest.approx(sum(one_at_a_time(model, window)[0] for window in windows), rel=1e-5)


def test_a_model_of_transformers_gets_the_same_scores(model, tmp_path):
    from transformers import GPT2LMHeadModel

    model.save_pretrained(tmp_path)
    hf_model = HFModel(GPT2LMHeadModel.from_pretrained(tmp_path).eval(), 97)
    assert (hf_model.config.block_size, hf_model.config.vocab_size) == (48, 97)
    requests = make_requests()
    ours, theirs = log_likelihoods(model, requests), log_likelihoods(hf_model, requests)
    np.testing.assert_allclose(ours.log_probs, theirs.log_probs, rtol=2e-5, atol=2e-4)
    assert (ours.greedy == theirs.greedy).all()


class Ranks:
    """All-reduce over threads that take the place of processes."""

    def __init__(self, n):
        self.barrier = threading.Barrier(n)
        self.lock = threading.Lock()
        self.parts = []

    def sum(self, tensor):
        with self.lock:
            self.parts.append(tensor.clone())
        self.barrier.wait()
        tensor.copy_(torch.stack(self.parts).sum(0))
        self.barrier.wait()


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_divide_the_work_and_run_the_same_number_of_forward_passes(model, world_size, monkeypatch):
    requests = make_requests(50)
    alone = log_likelihoods(model, requests, batch_size=4)
    ranks, calls, results = Ranks(world_size), [0] * world_size, [None] * world_size
    # Each thread has its own copy of the model, as each process does.
    models = [GPT(CONFIG).eval() for _ in range(world_size)]

    def work(rank):
        models[rank].load_state_dict(model.state_dict())
        models[rank].register_forward_hook(lambda *_: calls.__setitem__(rank, calls[rank] + 1))
        results[rank] = log_likelihoods(
            models[rank], requests, batch_size=4, rank=rank, world_size=world_size, reduce=ranks.sum
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(calls)) == 1
    assert calls[0] > 0
    for result in results:
        assert result.log_probs.tolist() == alone.log_probs.tolist()  # bit for bit
        assert result.greedy.tolist() == alone.greedy.tolist()


def test_shared_contexts_are_computed_once(model):
    tokens = []
    hook = model.register_forward_pre_hook(lambda _, args: tokens.append(args[0].numel()))
    context = tuple(range(30))
    log_likelihoods(model, [Request(context, (i, 5)) for i in range(8)], batch_size=8)
    hook.remove()
    assert sum(tokens) == 29 + 8 * 2


def test_bfloat16_does_not_round_the_offset_common_to_all_logits(model):
    # The common offset is much larger than the differences between logits. Rounded together with it, the logits would
    # have an error of 0.3.
    requests = make_requests(40)
    exact = log_likelihoods(model, requests).log_probs
    with torch.autocast("cpu", torch.bfloat16):
        rounded = log_likelihoods(model, requests).log_probs
    n_tokens = np.array([len(request.continuation) for request in requests])
    assert np.abs((rounded - exact) / n_tokens).max() < 0.1


def test_the_mode_of_the_model_is_restored(model):
    dropped = GPT(GPTConfig(vocab_size=97, block_size=48, n_layer=2, n_head=2, n_embd=32, dropout=0.5))
    dropped.load_state_dict(model.state_dict())
    dropped.train()
    requests = make_requests(8)
    np.testing.assert_array_equal(
        log_likelihoods(dropped, requests).log_probs, log_likelihoods(model, requests).log_probs
    )
    assert dropped.training


def test_nan_logits_are_refused(model):
    broken = GPT(CONFIG)
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.transformer.wpe.weight[20] = float("nan")
    requests = [Request((1,), (2, 3)), Request(tuple(range(25)), (4,))]
    with pytest.raises(ValueError, match=r"not finite .* for 1 of 2 requests, first for request 1"):
        log_likelihoods(broken, requests)


def test_invalid_requests_are_refused(model):
    with pytest.raises(ValueError, match="request 1 has a token id outside the model's vocabulary of 97"):
        log_likelihoods(model, [Request((1,), (2,)), Request((1,), (97,))])
    with pytest.raises(ValueError, match="request 0 has an empty continuation"):
        log_likelihoods(model, [Request((1,), ())])
    with pytest.raises(ValueError, match="2 processes need the argument `reduce`"):
        log_likelihoods(model, [Request((1,), (2,))], world_size=2)


class TokenizerOfSize:
    def __init__(self, vocab_size):
        self.vocab_size = vocab_size


@pytest.mark.parametrize("n", [98, 300])
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(model, n):
    with pytest.raises(ValueError, match=f"the tokenizer has {n} tokens and the model a vocabulary of 97"):
        check_pair(model, TokenizerOfSize(n))


def test_a_padded_vocabulary_is_accepted_but_a_much_smaller_tokenizer_is_refused():
    padded = GPT(GPTConfig(vocab_size=50304, block_size=8, n_layer=1, n_head=1, n_embd=4))
    check_pair(padded, TokenizerOfSize(50257))
    with pytest.raises(ValueError, match="do not belong together"):
        check_pair(padded, TokenizerOfSize(257))
