"""Scripts that run experiments, write corpora for them, convert and upload models, and check this repository."""
