"""What bench.py measures: this repository's contestants, its peers, the corpora, the clock and the machine's limits.

Each contestant has a module of its own, because a process imports only the module of the contestant that it runs: the
libraries of one contestant take no memory and change no settings in the process of another.
"""
