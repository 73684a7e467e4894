"""Evaluation: from a model to metrics."""
