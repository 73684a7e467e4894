"""The parts of bench.py: contestants, corpora, the clock, and measurements of the machine's limits.

A contestant is an implementation that bench.py times: this repository (ours/) or another one (peers/). Each contestant
has a module of its own, and a process imports only the module of the contestant that it runs. So the libraries of one
contestant take no memory and change no settings in the process of another.
"""
