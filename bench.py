"""How fast it is, beside others, as ratios on one machine:

    python bench.py train --peer transformers --peer nanogpt=../nanoGPT
    python bench.py decode --peer transformers
    python bench.py all --json bench.json

Every contestant lives in a process of its own and runs in turn with the others, so that a machine whose speed drifts
slows all of them; medians are reported. Peers are given as directories of their repositories, and read from there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

ROWS, TOKENS = 4, 512  # of a training step
NEW_TOKENS = 256  # of a decoding run
VOCAB = 50257
Run = Callable[[], object]


# ---- training: one step of the 124M on 4 x 512 tokens, forward to optimizer


def train_ours() -> Run:
    import torch

    from model import GPT, GPTConfig
    from training.config import Config
    from training.optim import make_optimizers
    from training.parallel import clip_gradients, distribute, should_compile, start_processes

    config = Config()
    processes = start_processes(config.system)
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset("gpt2")).to(processes.device).train()
    compiled, _ = should_compile(config, model, processes.device)
    loss_function = distribute(model, config, processes, compiled=compiled, sharded=False)
    optimizers = make_optimizers(model, config.optim)
    ids = torch.randint(VOCAB, (ROWS, TOKENS + 1), device=processes.device)

    def step() -> None:
        with processes.autocast():
            loss = loss_function(ids[:, :-1], ids[:, 1:])
        loss.backward()
        clip_gradients(model, 1.0).item()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def train_transformers() -> Run:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
    ids = torch.randint(VOCAB, (ROWS, TOKENS))

    def step() -> None:
        model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def train_nanogpt(directory: str) -> Run:
    """As shipped: float32 on a CPU, its padded vocabulary, its optimizer, and not compiled, as its README has it."""
    import torch

    nanogpt = load_file(Path(directory) / "model.py")
    torch.manual_seed(0)
    model = nanogpt.GPT(nanogpt.GPTConfig(bias=False)).train()
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
    ids = torch.randint(VOCAB, (ROWS, TOKENS + 1))

    def step() -> None:
        model(ids[:, :-1], ids[:, 1:].contiguous())[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# ---- decoding: 256 new tokens, greedily, 124M


def decode_ours(batch: int, dtype: str) -> Run:
    import torch

    from generation import generate, pack_weights
    from model import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(GPTConfig.preset("gpt2")).to(getattr(torch, dtype)).eval()
    pack_weights(model)
    ids = torch.randint(VOCAB, (batch, 8))
    return lambda: generate(model, ids, max_new_tokens=NEW_TOKENS)


def decode_transformers(batch: int, dtype: str) -> Run:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).to(getattr(torch, dtype)).eval()
    ids = torch.randint(VOCAB, (batch, 8))
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(ids, attention_mask=mask, **options)


def decode_nanogpt(directory: str) -> Run:
    """As its sample.py has it: one sample at a time, no cache, float32 on a CPU, top-k 200."""
    import torch

    nanogpt = load_file(Path(directory) / "model.py")
    torch.manual_seed(0)
    model = nanogpt.GPT(nanogpt.GPTConfig()).eval()
    ids = torch.randint(VOCAB, (1, 8))
    return lambda: model.generate(ids, NEW_TOKENS, temperature=0.8, top_k=200)


# ---- the loader: batches of 524,288 tokens from a shard


def loader_ours() -> Run:
    import tempfile

    import numpy as np

    from data.loader import Loader
    from data.shards import MAGIC, VERSION, open_split

    directory = Path(tempfile.mkdtemp())
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, 10_000_000
    tokens = np.random.default_rng(0).integers(VOCAB, size=10_000_000, dtype=np.uint16)
    (directory / "train_000000.bin").write_bytes(header.tobytes() + tokens.tobytes())
    split = open_split(directory, "train")
    loader = Loader(split, batch_tokens=524288, sequence_length=1024, micro_batch=64, vocab_size=VOCAB, seed=0)
    return lambda: [next(loader) for _ in range(10)]


def load_file(path: Path) -> ModuleType:
    """A Python file of another repository as a module."""
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}: give the directory of the peer's repository")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# ---- measuring


def serve(make: Callable[..., Run], arguments: tuple, pipe: Connection) -> None:
    """A contestant's process: set up, warm up, then time one run each time it is asked to; None ends it."""
    try:
        run = make(*arguments)
        run()
        run()
        pipe.send(None)
        while pipe.recv():
            began = time.perf_counter()
            run()
            pipe.send(time.perf_counter() - began)
        pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    except Exception as error:
        pipe.send(error)


def compare(contestants: dict[str, tuple[Callable[..., Run], tuple]], runs: int) -> dict[str, dict[str, float]]:
    """Seconds (median, lowest, highest) and peak memory in bytes of each contestant, run in turn `runs` times."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for name, (make, arguments) in contestants.items():
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(make, arguments, theirs), daemon=True).start()
        receive(ours)  # warmed up, before the next begins to
        pipes[name] = ours
    for _ in range(runs):
        for name, pipe in pipes.items():
            pipe.send(True)
            seconds[name].append(receive(pipe))
    results = {}
    for name, pipe in pipes.items():
        pipe.send(False)
        values = seconds[name]
        results[name] = {
            "seconds": statistics.median(values),
            "lowest": min(values),
            "highest": max(values),
            "peak_memory": receive(pipe),
        }
    return results


def receive(pipe: Connection) -> Any:
    """What a contestant sends; its exception is raised here."""
    value = pipe.recv()
    if isinstance(value, Exception):
        raise value
    return value


def matmul_rate(dtype_name: str) -> float:
    """FLOP/s, the best over the step's own products, forward and backward: what this machine can do at most."""
    import torch

    dtype, best = getattr(torch, dtype_name), 0.0
    for n_in, n_out in [(768, 2304), (768, 768), (768, 3072), (3072, 768), (768, VOCAB)]:
        x, weight = torch.randn(ROWS * TOKENS, n_in, dtype=dtype), torch.randn(n_out, n_in, dtype=dtype)
        y = x @ weight.T
        for left, right in [(x, weight.T), (y, weight), (y.T, x)] * 6:
            began = time.perf_counter()
            left @ right
            best = max(best, 2 * x.numel() * n_out / (time.perf_counter() - began))
    return best


def report(title: str, unit: str, amount: float, results: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Print a table, and return it: each contestant's rate in `unit`, and ours as a multiple of it."""
    print(f"\n{title}")
    print(f"  {'':<14}{unit + '/s':>12}{'spread':>9}{'peak MiB':>10}{'ours is':>10}")
    ours = results["ours"]["seconds"]
    for name, result in results.items():
        spread = (result["highest"] - result["lowest"]) / result["seconds"]
        ratio = result["seconds"] / ours
        print(
            f"  {name:<14}{amount / result['seconds']:>12,.1f}{spread:>9.0%}{result['peak_memory'] / 2**20:>10,.0f}"
            + (f"{ratio:>9.2f}x" if name != "ours" else "")
        )
        result |= {"rate": amount / result["seconds"], "ours_is": ratio}
    return {"title": title, "unit": unit, "results": results}


def bench_train(peers: dict[str, str], runs: int) -> list[dict[str, Any]]:
    """The training step, and its share of the machine's matmul rate."""
    contestants: dict[str, tuple[Callable[..., Run], tuple]] = {"ours": (train_ours, ())}
    if "transformers" in peers:
        contestants["transformers"] = (train_transformers, ())
    if "nanogpt" in peers:
        contestants["nanogpt"] = (train_nanogpt, (peers["nanogpt"],))
    results = compare(contestants, runs)
    table = report(f"training step, 124M, {ROWS} x {TOKENS} tokens", "tokens", ROWS * TOKENS, results)
    flops = ROWS * TOKENS * (6 * 124_439_808 + 12 * 12 * 768 * TOKENS)
    for dtype in ("bfloat16", "float32"):
        rate = matmul_rate(dtype)
        table[f"matmul_{dtype}"] = rate
        share = flops / results["ours"]["seconds"] / rate
        print(f"  {dtype} matmuls reach {rate / 1e9:,.0f} GFLOP/s here; our step is at {share:.0%} of that")
    return [table]


def bench_decode(peers: dict[str, str], runs: int) -> list[dict[str, Any]]:
    """Greedy decoding at batch 1 and 8, in bfloat16; nanoGPT in its own float32, one sample at a time."""
    tables = []
    for batch in (1, 8):
        contestants: dict[str, tuple[Callable[..., Run], tuple]] = {"ours": (decode_ours, (batch, "bfloat16"))}
        if "transformers" in peers:
            contestants["transformers"] = (decode_transformers, (batch, "bfloat16"))
        if "nanogpt" in peers and batch == 1:
            contestants["nanogpt"] = (decode_nanogpt, (peers["nanogpt"],))
        title = f"greedy decoding, 124M, batch {batch}, {NEW_TOKENS} new tokens"
        tables.append(report(title, "tokens", batch * NEW_TOKENS, compare(contestants, runs)))
    return tables


def bench_loader(peers: dict[str, str], runs: int) -> list[dict[str, Any]]:
    """Ten batches of 524,288 tokens."""
    return [report("loader", "Mtokens", 5.24288, compare({"ours": (loader_ours, ())}, runs))]


def bench_startup(peers: dict[str, str], runs: int) -> list[dict[str, Any]]:
    """The time a command takes to say how it is used."""
    print()
    tables = []
    for command in ("train.py", "sample.py"):
        seconds = []
        for _ in range(runs):
            began = time.perf_counter()
            subprocess.run([sys.executable, command, "--help"], check=True, capture_output=True)
            seconds.append(time.perf_counter() - began)
        print(f"{command} --help: {statistics.median(seconds):.2f} s")
        tables.append({"title": f"{command} --help", "seconds": statistics.median(seconds)})
    return tables


BENCHES = {"train": bench_train, "decode": bench_decode, "loader": bench_loader, "startup": bench_startup}


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.py", description="Speed, beside others, on this machine.")
    parser.add_argument("what", choices=[*BENCHES, "all"])
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME[=DIR]", help="transformers, or nanogpt=DIR; repeatable"
    )
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each contestant (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file too")
    arguments = parser.parse_args()
    peers = {name: directory for name, _, directory in (peer.partition("=") for peer in arguments.peer)}
    if unknown := peers.keys() - {"transformers", "nanogpt"}:
        parser.error(f"unknown peer {unknown.pop()!r}: transformers, or nanogpt=DIR")
    if "nanogpt" in peers and not (Path(peers["nanogpt"]) / "model.py").is_file():
        parser.error(f"no model.py in {peers['nanogpt'] or 'no directory'}: give nanoGPT's directory, nanogpt=DIR")
    from training.metrics import hardware

    machine = hardware()
    print(json.dumps(machine))
    chosen = list(BENCHES) if arguments.what == "all" else [arguments.what]
    tables = [table for name in chosen for table in BENCHES[name](peers, arguments.runs)]
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"hardware": machine, "tables": tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()
