"""Faster forms of operations that model.py states plainly, and masks; this package imports nothing else of the project.

Each file with a faster form also contains the plain form, in a few lines, or names it. The tests compare the two.
"""

from kernels import cuda_loss  # noqa: F401 (registers the loss for CUDA)
