"""HellaSwag with a model that FSDP has sharded, as the training loop calls it."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard

from data.tokenizer import load_tokenizer
from eval.hellaswag import hellaswag
from model import GPT, GPTConfig

N = 2


def make_model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=256, n_layer=2, n_head=2, n_embd=16))


def evaluate(rank, rendezvous, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=N)
    model = make_model()
    for block in model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    # As in the training loop, evaluation runs between two training steps.
    ids = torch.arange(8)[None]
    model(ids, labels=ids).loss.backward()
    results[rank] = hellaswag(
        model, load_tokenizer("gpt2"), limit=9, batch_size=4, rank=rank, world_size=N, reduce=dist.all_reduce
    )
    model(ids, labels=ids).loss.backward()
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_model_has_the_same_result_as_an_unsharded_one(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(evaluate, args=(tmp_path / "rendezvous", results), nprocs=N)
        found = dict(results)
    expected = hellaswag(make_model(), load_tokenizer("gpt2"), limit=9)
    assert found == {0: expected, 1: expected}
