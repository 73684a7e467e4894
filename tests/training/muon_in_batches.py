"""For test_optim.py: three steps of Muon in batches, with whole and with sharded parameters, against the plain form.

    torchrun --nproc_per_node=2 tests/training/muon_in_batches.py

Each process prints the largest relative difference of the two.
"""

import torch
import torch.distributed as dist
from torch.distributed.tensor import distribute_tensor

from model import GPT, GPTConfig
from processes import start_processes, stop_processes
from training.distributed import shard
from training.optim import Muon


def matrices(model):
    found = [p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("transformer.h.")]
    stacked = [p for p in found if p.shape[0] == 3 * p.shape[1]]
    return stacked, [p for p in found if all(p is not other for other in stacked)]


def steps(sharded, batched):
    """Return the parameters after three steps. Their rows and their number do not divide evenly."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=3, n_head=1, n_embd=10))
    if sharded:
        shard(model, torch.float32)
    stacked, others = matrices(model)
    muon = Muon(stacked, others, lr=0.02, weight_decay=0.1, momentum=0.9, cautious=True, batched=batched)
    for step in range(3):
        for number, parameter in enumerate((*stacked, *others)):
            gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + number))
            if sharded:
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        muon.step()
    return [p.full_tensor() if sharded else p for p in (*stacked, *others)]


processes = start_processes("cpu", "float32")
plain = steps(sharded=False, batched=False)
for sharded in (False, True):
    found = steps(sharded, batched=True)
    difference = max(float((a - b).norm() / b.norm()) for a, b in zip(found, plain, strict=True))
    # torchrun's processes write without a buffer: one write for the whole line, or the lines of two processes mix
    print(f"{difference}\n", end="")
dist.barrier()
stop_processes()
