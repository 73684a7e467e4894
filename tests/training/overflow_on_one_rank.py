"""For test_float16.py: train configurations so that the gradient of the last rank overflows in the fifth step.

torchrun --nproc_per_node=2 tests/training/overflow_on_one_rank.py a.yaml b.yaml
"""

import sys

from processes import start_processes, stop_processes
from train import train
from training.config import parse_config
from training.setup import setup


def main() -> None:
    processes = None
    for path in sys.argv[1:]:
        config = parse_config(["--config", path])
        processes = processes or start_processes(config.system.device, config.system.dtype)
        with setup(config, processes) as run:
            scale = run.scaler.scale

            def overflow(tensor, run=run, scale=scale):
                here = run.state.step == 4 and run.processes.rank == run.processes.world_size - 1
                return scale(tensor * float("inf") if here and tensor.requires_grad else tensor)

            run.scaler.scale = overflow
            train(run)
    stop_processes()


main()
