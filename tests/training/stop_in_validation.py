"""For test_launch.py: train configurations; a stop request reaches the last rank inside the second validation.

torchrun --nproc_per_node=2 tests/training/stop_in_validation.py a.yaml b.yaml
"""

import os
import signal
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
            passes = []

            def stop(model, inputs, run=run, passes=passes):
                passes.append(run.state.step)
                if not model.training and passes.count(2) == 3 and run.processes.rank == run.processes.world_size - 1:
                    os.kill(os.getpid(), signal.SIGTERM)

            run.model.register_forward_pre_hook(stop)
            print(train(run), "forward passes after step 2:", passes.count(2))
    stop_processes()


main()
