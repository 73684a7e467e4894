"""Evaluate models: compute losses, accuracies and other metrics."""
