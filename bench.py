"""Compare the speed of this repository with that of other implementations on one machine, as ratios.

    python bench.py train --peer transformers --peer nanogpt=../nanoGPT
    python bench.py decode --peer transformers
    python bench.py tokenize
    python bench.py hellaswag --peer build-nanogpt=../build-nanogpt
    python bench.py attention --runs 3
    python bench.py all --json bench.json
    python bench.py all --device cuda --peer transformers --peer nanogpt=../nanoGPT

The contestants are this repository and its peers, the other implementations. Each contestant runs in a process of its
own. The contestants take turns, so that a change of the machine's speed affects all of them. The tables show medians.
For a peer that is not a package, give a directory with a clone of its repository.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.clock import Call, call_in_process, compare
from benchmarks.workload import (
    ATTENTION_TOKENS,
    ATTENTIONS,
    BATCH,
    DECODED,
    LOADER_BATCH_TOKENS,
    LOADER_BATCHES,
    NEW_TOKENS,
    PARAMETERS,
    QUESTIONS,
)
from command import CommandParser, at_least_one, ending
from files import check_writable, file_sha256

# multiprocessing imports this file in the process of each contestant, and the memory of all imported modules counts as
# the contestant's. So do not import modules that need PyTorch or a peer here: pass their names to the process.

HERE = Path(__file__).resolve().parent


def native_dtypes(device: str) -> list[str]:
    """Return the precisions that the device computes without emulation, the default one first.

    If bfloat16 is not among them, print a note that the tables have no rows in bfloat16.
    """
    native, name = call_in_process("benchmarks.machine", "native_dtypes", device)
    if "bfloat16" not in native:
        print(f"\n  no rows in bfloat16: this {'CPU' if device == 'cpu' else 'card'} ({name}) emulates it")
    return native


def check_shards(directory: Path) -> None:
    """Check that all datasets in a directory have equal shards, byte by byte, and print the number of shards.

    Raises ValueError if the shards of two datasets differ, or if there are no shards.
    """
    datasets = [path for path in directory.iterdir() if path.is_dir()]
    hashes = [[file_sha256(shard) for shard in sorted(dataset.glob("train_*.bin"))] for dataset in datasets]
    if hashes[0] == [] or any(found != hashes[0] for found in hashes):
        raise ValueError("two of the runs wrote different tokens for the same text")
    print(f"  every run wrote the same {len(hashes[0])} shards, byte by byte")


def spread(result: dict[str, float]) -> float:
    """Return the difference between the slowest and the fastest run, as a fraction of the median."""
    return (result["highest"] - result["lowest"]) / result["seconds"]


def report(title: str, unit: str, amount: float, results: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Print and return a table: each contestant's rate in `unit` per second, and our rate divided by that rate.

    The rate and the ratio are also added to the contestant's entry in `results`. amount is the work of one run, in
    `unit`.
    """
    print(f"\n{title}")
    print(f"  {'':<14}{unit + '/s':>12}{'spread':>9}{'peak MiB':>10}{'ours is':>10}")
    ours = results["ours"]["seconds"]
    for name, result in results.items():
        ratio = result["seconds"] / ours
        rate = amount / result["seconds"]
        print(
            f"  {name:<14}{rate:>12,.1f}{spread(result):>9.0%}{result['peak_memory'] / 2**20:>10,.0f}"
            + (f"{ratio:>9.2f}x" if name != "ours" else "")
        )
        result |= {"rate": rate, "ours_is": ratio}
    return {"title": title, "unit": unit, "results": results}


def bench_train(peers: dict[str, str], runs: int, device: str) -> list[dict[str, Any]]:
    """Time a training step. Compare our FLOP/s with those of the fastest matrix product of the model, timed alone."""
    rows, tokens = BATCH[device]
    work = (device, rows, tokens)
    contestants = {"ours": Call("benchmarks.ours.train", "train", work)}
    if "transformers" in peers:
        contestants["transformers"] = Call("benchmarks.peers.transformers", "train", work)
    if "nanogpt" in peers:
        contestants["nanogpt"] = Call("benchmarks.peers.nanogpt", "train", (peers["nanogpt"], *work))
    results = compare(contestants, runs)
    table = report(f"training step, 124M, {rows} x {tokens} tokens", "tokens", rows * tokens, results)
    flops = rows * tokens * (6 * PARAMETERS + 12 * 12 * 768 * tokens)  # as in training/estimate.py
    for dtype in native_dtypes(device):
        rate = call_in_process("benchmarks.machine", "matmul_rate", dtype, device)
        table[f"matmul_{dtype}"] = rate
        fraction = flops / results["ours"]["seconds"] / rate
        print(f"  {dtype} matmuls reach {rate / 1e9:,.0f} GFLOP/s here; our step is at {fraction:.0%} of that")
    return [table]


def bench_decode(peers: dict[str, str], runs: int, device: str) -> list[dict[str, Any]]:
    """Time greedy decoding at several batch sizes in each native precision (nanoGPT and CTranslate2: float32 only)."""
    tables = []
    if "ctranslate2" in peers and device != "cpu":
        print("\n  ctranslate2 is left out: it is compared on a CPU only")
    for dtype, batch in itertools.product(native_dtypes(device), DECODED[device]):
        contestants = {"ours": Call("benchmarks.ours.decode", "decode", (batch, dtype, device))}
        if "transformers" in peers:
            contestants["transformers"] = Call("benchmarks.peers.transformers", "decode", (batch, dtype, device))
        if "ctranslate2" in peers and dtype == "float32" and device == "cpu":
            contestants["ctranslate2"] = Call("benchmarks.peers.ctranslate2", "decode", (batch, dtype))
        if "nanogpt" in peers and batch == 1 and dtype == "float32":  # nanoGPT's sample.py decodes one sample at a time
            contestants["nanogpt"] = Call("benchmarks.peers.nanogpt", "decode", (peers["nanogpt"], device))
        title = f"greedy decoding, 124M, {dtype}, batch {batch}, {NEW_TOKENS} new tokens"
        table = report(title, "tokens", batch * NEW_TOKENS, compare(contestants, runs))
        # A step reads every weight once, except the position embeddings: a step needs only one of their 1,024 rows.
        bytes_read = (PARAMETERS - 1024 * 768) * (4 if dtype == "float32" else 2)
        bytes_per_second = bytes_read * table["results"]["ours"]["rate"] / batch
        fraction = bytes_per_second / call_in_process("benchmarks.machine", "read_bandwidth", device)
        print(
            f"  ours reads the weights at {bytes_per_second / 1e9:.1f} GB/s: {fraction:.0%} of the read bandwidth here"
        )
        tables.append(table | {"bytes_per_second": bytes_per_second, "share_of_read_bandwidth": fraction})
    return tables


def bench_hellaswag(peers: dict[str, str], runs: int, device: str) -> list[dict[str, Any]]:
    """Time HellaSwag: ours in all native precisions of the device, the peer in float32."""
    default, *others = native_dtypes(device)
    contestants = {"ours": Call("benchmarks.ours.hellaswag", "evaluate", (default, device))}
    for dtype in others:
        contestants[f"ours, {dtype}"] = Call("benchmarks.ours.hellaswag", "evaluate", (dtype, device))
    if directory := peers.get("build-nanogpt"):
        contestants["build-nanogpt"] = Call("benchmarks.peers.build_nanogpt", "evaluate", (directory, device))
    title = f"HellaSwag, 124M, {QUESTIONS} questions; ours in {default}, the default of eval.run, peers in float32"
    return [report(title, "questions", QUESTIONS, compare(contestants, runs, warm_up=1))]


def bench_tokenize(
    peers: dict[str, str], runs: int, device: str, corpus: list[str] | None = None
) -> list[dict[str, Any]]:
    """Time `data.prepare`, from text to shards, for two corpora.

    The first corpus consists of the files in the directories `corpus` (default: the Python installation, /usr/share and
    /usr/include). The second consists of the plays of Shakespeare, repeated.
    """
    roots = corpus or list(dict.fromkeys([sys.prefix, sys.base_prefix, "/usr/share", "/usr/include"]))
    corpora: list[tuple[str, str, tuple]] = [
        (f"{', '.join(roots)}, each file once", "write_files", (roots,)),
        ("the plays of Shakespeare, repeated", "write_plays", ()),
    ]
    tables = []
    for description, function, arguments in corpora:
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "corpus.jsonl"
            megabytes, words = call_in_process("benchmarks.corpus", function, *arguments, path)
            # At most 3 runs, because a run takes about a minute. No warm-up, because it would not make a run faster.
            contestants = {
                "ours": Call("benchmarks.ours.tokenize", "tokenize", (path,)),
                "tiktoken": Call("benchmarks.peers.tiktoken", "tokenize", (path,)),
            }
            results = compare(contestants, min(runs, 3), warm_up=0)
            title = f"text to shards, {megabytes:,.0f} MB: {description}; {words:,.0f} different words a MB"
            tables.append(report(title, "MB", megabytes, results) | {"words_per_mb": words})
            check_shards(Path(temporary))
    return tables


def bench_loader(peers: dict[str, str], runs: int, device: str) -> list[dict[str, Any]]:
    """Time how long our loader takes to read batches of 524,288 tokens from a shard. There is no peer."""
    with tempfile.TemporaryDirectory() as temporary:
        results = compare({"ours": Call("benchmarks.ours.loader", "load", (Path(temporary),))}, runs)
    return [report("loader", "Mtokens", LOADER_BATCHES * LOADER_BATCH_TOKENS / 1e6, results)]


def bench_attention(peers: dict[str, str], runs: int, device: str) -> list[dict[str, Any]]:
    """Time the forward and backward pass of a one-layer model on long sequences, with each kind of attention."""
    print(
        f"\nforward and backward pass, 1 layer\n  {'tokens':>6}  attention{'seconds':>10}{'spread':>9}{'peak MiB':>10}"
    )
    tables = []
    for tokens in ATTENTION_TOKENS:
        contestants = {name: Call("benchmarks.ours.attention", "train", (name, tokens)) for name in ATTENTIONS}
        results = compare(contestants, runs, warm_up=1)
        for name, result in results.items():
            ratio = results["full"]["seconds"] / result["seconds"]
            cells = f"{result['seconds']:>10.3f}{spread(result):>9.0%}{result['peak_memory'] / 2**20:>10,.0f}"
            print(f"  {tokens:>6}  {name:<9}{cells}" + (f"{ratio:>9.2f}x as fast" if name != "full" else ""))
            result["times_as_fast_as_full"] = ratio
        tables.append({"title": "attention", "tokens": tokens, "results": results})
    return tables


def bench_startup(peers: dict[str, str], runs: int, device: str) -> list[dict[str, Any]]:
    """Time how long train.py and sample.py take to print their help, including the time of their imports."""
    print()
    tables = []
    for command in ("train.py", "sample.py"):
        seconds = []
        for _ in range(runs):
            began = time.perf_counter()
            subprocess.run([sys.executable, command, "--help"], check=True, capture_output=True, cwd=HERE)
            seconds.append(time.perf_counter() - began)
        print(f"{command} --help: {statistics.median(seconds):.2f} s")
        tables.append({"title": f"{command} --help", "seconds": statistics.median(seconds)})
    return tables


BENCHES = {
    "train": bench_train,
    "decode": bench_decode,
    "tokenize": bench_tokenize,
    "hellaswag": bench_hellaswag,
    "loader": bench_loader,
    "attention": bench_attention,
    "startup": bench_startup,
}
ON_A_GPU = ("train", "decode", "hellaswag")
PEER_PACKAGES = ("transformers", "ctranslate2")
PEER_FILES = {"nanogpt": "model.py", "build-nanogpt": "hellaswag.py"}


def measure(args: argparse.Namespace, peers: dict[str, str]) -> None:
    """Run the chosen benchmarks one after the other, print their tables, and write the tables to --json."""
    machine, bandwidth = call_in_process("benchmarks.machine", "describe", args.device)
    print(f"{json.dumps(machine)}\nmemory of the {args.device}: {bandwidth / 1e9:.1f} GB/s, copying")
    chosen = list(BENCHES) if args.what == "all" else [args.what]
    tables = []
    for name in chosen:
        if args.device != "cpu" and name not in ON_A_GPU:
            print(f"\n{name} is left out: it measures work of the CPU. Run bench.py {name} without --device")
            continue
        options = {"corpus": args.corpus} if name == "tokenize" else {}
        tables += BENCHES[name](peers, args.runs, args.device, **options)
    if args.json:
        results = {"hardware": machine, "device": args.device, "memory_bandwidth": bandwidth, "tables": tables}
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = CommandParser(
        prog="bench.py",
        description="Measure the speed of this repository beside other implementations, on this machine.",
    )
    parser.add_argument("what", help="the benchmark to run", choices=[*BENCHES, "all"])
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="device of all contestants (default: cpu)"
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME[=DIR]",
        help="transformers, ctranslate2, nanogpt=DIR or build-nanogpt=DIR; repeatable (tiktoken is always included)",
    )
    parser.add_argument(
        "--corpus",
        nargs="+",
        metavar="DIR",
        help="directories of text files for tokenize (default: the Python installation, /usr/share, /usr/include)",
    )
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each contestant (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    args = parser.parse_args()
    peers = {name: directory for name, _, directory in (peer.partition("=") for peer in args.peer)}
    for name, directory in peers.items():
        if name not in (*PEER_PACKAGES, *PEER_FILES):
            parser.error(f"unknown peer {name!r}: transformers, ctranslate2, nanogpt=DIR or build-nanogpt=DIR")
        if name in PEER_PACKAGES and importlib.util.find_spec(name) is None:
            parser.error(f"--peer {name}: the package is not installed, run: pip install {name}")
        if name in PEER_FILES and not (Path(directory) / PEER_FILES[name]).is_file():
            found = f"no {PEER_FILES[name]} in {directory}" if directory else f"--peer {name} has no directory"
            parser.error(f"{found}: give the clone of its repository, --peer {name}=DIR")
    for directory in args.corpus or ():
        if not Path(directory).is_dir():
            parser.error(f"--corpus {directory} is not a directory")
    at_least_one(parser, args, "runs")
    with ending(parser):
        if args.json:  # fail before the measurements, not after them
            check_writable(args.json)
        measure(args, peers)


if __name__ == "__main__":
    main()
