"""Check this repository on a GPU: `python -m scripts.gpu_check`. The check has nine parts, see docs/gpu.md.

report.py     Settings: device, shapes, and peers (programs to compare with); Report: the results of a part
runs.py       runs of train.py and other commands in separate processes
products.py   part 1: versions, the matrix products of the output head, the loss
parity.py     part 2: logits equal those of transformers; gradients and tokens equal those of a CPU
speed.py      parts 3, 4 and 9: training speed and memory, a profile, Muon and the choice of the micro-batch
training.py   parts 5, 6 and 7: loss curves, kill and resume, DDP and FSDP
inference.py  part 8: decoding and scoring questions
"""
