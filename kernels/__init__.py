"""Faster forms of operations of model.py and of decoding, and attention masks.

The package imports no other module of the project. Each file with a faster form of an operation contains or names the
plain form, which is a few lines of PyTorch. The tests compare the two forms.
"""

from kernels import cuda_loss  # noqa: F401 (registers the loss for CUDA)
