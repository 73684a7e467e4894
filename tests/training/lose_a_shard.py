"""For test_parallel.py: train.py, in which the process of one rank finds a shard gone from some step on.

torchrun --nproc_per_node=2 tests/training/lose_a_shard.py RANK STEP --config FILE.yaml
"""

import os
import sys

import data.loader
import data.shards
import train


def main() -> None:
    rank, step = int(sys.argv.pop(1)), int(sys.argv.pop(1))
    windows = data.loader.Loader.windows

    def vanishing(self, at):
        if at >= step and int(os.environ["RANK"]) == rank:
            self.split.close()
            self.split.paths = [path.parent / "gone" / path.name for path in self.split.paths]
        return windows(self, at)

    data.loader.Loader.windows = vanishing
    train.main()


main()
