"""This repository as a contestant, with a module for each benchmark.

The function for a benchmark sets up the work and returns a second function. Each call of the second function is one run
of the benchmark, and bench.py times these calls.
"""
