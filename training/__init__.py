"""Parts of training: configuration, setup, data, optimizers, checkpoints, metrics and validation."""
