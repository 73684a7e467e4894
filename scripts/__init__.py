"""Scripts for development: sweeps, ideas that were tried, a corpus for experiments, and checks of the whole project."""
