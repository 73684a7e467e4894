"""Faster forms of operations of model.py, and attention masks. The package imports no other module of the project.

Each file with a faster form also contains the plain form, in a few lines, or names it. The tests compare the two.
"""

from kernels import cuda_loss  # noqa: F401 (registers the loss for CUDA)
