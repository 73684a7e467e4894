"""For test_distributed.py: train several configurations in one start of the processes, which takes seconds.

    torchrun --nproc_per_node=2 tests/training/run_in_turn.py a.yaml b.yaml

Each process writes the token ids of its part of every global batch to the run's directory, ids-<rank>.npy.
"""

import sys

import numpy as np

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
            steps, loader = [], run.loader

            def recorded(loader=loader, steps=steps):
                for batch in loader:
                    steps.append(np.concatenate([part.inputs.numpy() for part in batch if part.weight]))
                    yield batch

            run.loader = recorded()
            train(run)
            run.loader = loader
        np.save(run.directory.path / f"ids-{processes.rank}.npy", np.stack(steps))
    stop_processes()


main()
