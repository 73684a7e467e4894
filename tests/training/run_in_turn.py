"""For test_parallel.py: train several configurations in one start, to spare the others the seconds that a start takes.

    torchrun --nproc_per_node=2 tests/training/run_in_turn.py a.yaml b.yaml

Each process leaves the token ids of its part of every global batch in the run's directory, ids-<rank>.npy.
"""

import sys

import numpy as np

from train import Trainer
from training.config import parse_config
from training.parallel import start_processes, stop_processes


def main() -> None:
    processes = None
    for path in sys.argv[1:]:
        config = parse_config(["--config", path])
        processes = processes or start_processes(config.system)
        trainer = Trainer(config, processes)
        steps, batches = [], iter(trainer.loader)

        def watched(batches=batches, steps=steps):
            for batch in batches:
                steps.append(np.concatenate([part.inputs.numpy() for part in batch if part.weight]))
                yield batch

        loader, trainer.loader = trainer.loader, watched()
        trainer.run()
        trainer.loader = loader
        trainer.close()
        np.save(trainer.directory / f"ids-{processes.rank}.npy", np.stack(steps))
    stop_processes()


main()
