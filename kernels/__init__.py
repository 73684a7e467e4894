"""Faster forms of operations that model.py states plainly; this package imports nothing else from the project.

Each file also contains the plain form, in a few lines. The tests compare the two.
"""
