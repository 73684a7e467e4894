"""Scripts for development: sweeps, changes of the training that were tried, corpora for experiments, and checks."""
