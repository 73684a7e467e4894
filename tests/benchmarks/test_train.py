"""Test the training step that is timed."""

import torch

from benchmarks.ours.train import make_run
from model import GPTConfig
from processes import Processes
from training.config import Config, Data, System


def test_batches_are_contiguous_and_targets_follow_inputs():
    """The loader's batches are contiguous. Others would be copied on the CPU before each step on a GPU."""
    shape = GPTConfig(vocab_size=97, block_size=16, n_layer=1, n_head=1, n_embd=8)
    data = Data(batch_tokens=6 * 16, sequence_length=16, micro_batch=4)
    config = Config(data=data, system=System(device="cpu", compile=False))
    run = make_run(config, shape, Processes(0, 1, torch.device("cpu"), torch.float32), n_batches=2)
    batches = [next(run.loader) for _ in range(3)]
    assert [[len(part.inputs) for part in batch] for batch in batches] == [[4, 2]] * 3
    for part in batches[0] + batches[1]:
        assert part.inputs.is_contiguous()
        assert part.targets.is_contiguous()
        assert torch.equal(part.inputs[:, 1:], part.targets[:, :-1])
    assert [part.weight for part in batches[0]] == [4 / 6, 2 / 6]
    assert torch.equal(batches[0][0].inputs, batches[2][0].inputs)
    assert not torch.equal(batches[0][0].inputs, batches[1][0].inputs)
