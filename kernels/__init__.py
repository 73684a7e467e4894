"""Faster forms of operations that model.py states plainly; this package imports nothing else from the project.

Each file also contains the plain form, in a few lines, or names it. The tests compare the two.
"""

from kernels import cuda_loss  # noqa: F401 (registers the loss for CUDA)
