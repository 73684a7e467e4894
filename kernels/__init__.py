"""Faster forms of operations of model.py and of decoding, and attention masks.

The package imports no other module of the project. The plain form of an operation is a few lines of PyTorch. Each file
with a faster form contains the plain form or names it, and the tests compare the two.
"""

from kernels import cuda_loss  # noqa: F401 (registers the loss for CUDA)
