"""The peers: other implementations that bench.py measures, a module for each. Functions return the same as in ours/."""
