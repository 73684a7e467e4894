"""For test_distributed.py: run train.py so that a shard is missing for one rank from some step on.

torchrun --nproc_per_node=2 tests/training/lose_a_shard.py RANK STEP --config FILE.yaml
"""

import os
import sys

import data.loader
import data.shards
import train


def main() -> None:
    rank, step = int(sys.argv.pop(1)), int(sys.argv.pop(1))
    order = data.loader.Loader.order

    def vanishing(self, at):
        if at >= step and int(os.environ["RANK"]) == rank:
            split = self.windows.split
            split.close()
            split.paths = [path.parent / "gone" / path.name for path in split.paths]
        return order(self, at)

    data.loader.Loader.order = vanishing
    train.main()


main()
