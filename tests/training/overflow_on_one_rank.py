"""For test_float16.py: train configurations, in which the gradient of the last rank overflows in the fifth step.

torchrun --nproc_per_node=2 tests/training/overflow_on_one_rank.py a.yaml b.yaml
"""

import sys

from train import Trainer
from training.config import parse_config
from training.parallel import start_processes, stop_processes


def main() -> None:
    processes = None
    for path in sys.argv[1:]:
        config = parse_config(["--config", path])
        processes = processes or start_processes(config.system)
        trainer = Trainer(config, processes)
        scale = trainer.scaler.scale

        def overflow(tensor, trainer=trainer, scale=scale):
            here = trainer.step == 4 and trainer.processes.rank == trainer.processes.world_size - 1
            return scale(tensor * float("inf") if here and tensor.requires_grad else tensor)

        trainer.scaler.scale = overflow
        trainer.run()
        trainer.close()
    stop_processes()


main()
