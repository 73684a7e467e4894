"""Around the repository: sweeps, ideas that were tried, killing a run, a corpus for experiments."""
