"""For test_distributed.py: train several configurations in one start of the processes, which takes seconds.

    torchrun --nproc_per_node=2 tests/training/run_in_turn.py a.yaml b.yaml

Each process writes the token ids of its part of every global batch to the run's directory, ids-<rank>.npy.
"""

import numpy as np

from tests.training.each_run import each_run
from train import train


def main() -> None:
    for run in each_run():
        steps, loader = [], run.loader

        def recorded(loader=loader, steps=steps):
            for batch in loader:
                steps.append(np.concatenate([part.inputs.numpy() for part in batch if part.weight]))
                yield batch

        run.loader = recorded()
        train(run)
        run.loader = loader
        np.save(run.directory.path / f"ids-{run.processes.rank}.npy", np.stack(steps))


main()
