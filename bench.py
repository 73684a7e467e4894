"""How fast it is, beside others, as ratios on one machine:

    python bench.py train --peer transformers --peer nanogpt=../nanoGPT
    python bench.py decode --peer transformers
    python bench.py tokenize
    python bench.py hellaswag --peer build-nanogpt=../build-nanogpt
    python bench.py all --json bench.json

Every contestant lives in a process of its own and runs in turn with the others, so that a machine whose speed drifts
slows all of them; medians are reported. Peers are given as directories of their repositories, and read from there;
tiktoken is always among them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

from command import at_least_one, ending

ROWS, TOKENS = 4, 512  # of a training step
NEW_TOKENS = 256  # of a decoding run
QUESTIONS = 32  # of a HellaSwag run
VOCAB = 50257
HERE = Path(__file__).resolve().parent
Run = Callable[[], object]
Contestants = dict[str, Callable[[], Run]]  # by name, what sets each up in a process of its own


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


# ---- decoding: 256 new tokens, greedily, 124M in the precision that this processor computes in


def decode_ours(batch: int, dtype: str) -> Run:
    import torch

    from device import DTYPES
    from generation import generate, pack_weights
    from model import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(GPTConfig.preset("gpt2")).to(DTYPES[dtype]).eval()
    pack_weights(model)
    ids = torch.randint(VOCAB, (batch, 8))
    return lambda: generate(model, ids, max_new_tokens=NEW_TOKENS)


def decode_transformers(batch: int, dtype: str) -> Run:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from device import DTYPES

    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config()).eval()
    model.to(DTYPES[dtype])
    ids = torch.randint(VOCAB, (batch, 8))
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(ids, attention_mask=mask, **options)


def decode_ctranslate2(batch: int, dtype: str) -> Run:
    """CTranslate2, on a directory of ours that its own converter has read."""
    import ctranslate2
    import torch

    from data.tokenizer import load_tokenizer
    from model import GPT, GPTConfig

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        GPT(GPTConfig.preset("gpt2")).save_pretrained(temporary)
        load_tokenizer("gpt2").save(temporary)
        converted = str(Path(temporary) / "converted")
        ctranslate2.converters.TransformersConverter(temporary).convert(converted, quantization=dtype)
        generator = ctranslate2.Generator(converted, compute_type=dtype, intra_threads=torch.get_num_threads())
    prompts = [["<|endoftext|>"] * 8] * batch
    length = 8 + NEW_TOKENS
    return lambda: generator.generate_batch(prompts, max_length=length, min_length=length, sampling_topk=1)


def decode_nanogpt(directory: str) -> Run:
    """As its sample.py has it: one sample at a time, no cache, float32 on a CPU, top-k 200."""
    import torch

    nanogpt = load_file(Path(directory) / "model.py")
    torch.manual_seed(0)
    model = nanogpt.GPT(nanogpt.GPTConfig()).eval()
    ids = torch.randint(VOCAB, (1, 8))
    return lambda: model.generate(ids, NEW_TOKENS, temperature=0.8, top_k=200)


# ---- the loader: batches of 524,288 tokens from a shard


def loader_ours(directory: Path) -> Run:
    import numpy as np

    from data.loader import Loader, TokenWindows
    from data.shards import ShardWriter, open_split

    writer = ShardWriter(directory, "train", 10_000_000, VOCAB - 1)
    writer.write(np.random.default_rng(0).integers(VOCAB, size=writer.shard_tokens, dtype=np.uint16))
    writer.finish()
    windows = TokenWindows(open_split(directory, "train"), 1024, VOCAB)
    loader = Loader(windows, batch_tokens=524288, micro_batch=64, seed=0)
    return lambda: [next(loader) for _ in range(10)]


# ---- HellaSwag: questions spread over the validation set, 124M, completion convention


def hellaswag_rows() -> list[dict[str, Any]]:
    from eval.choices import read_rows

    rows = read_rows("hellaswag/none/validation")
    return rows[:: len(rows) // QUESTIONS][:QUESTIONS]


def hellaswag_ours(dtype: str) -> Run:
    """As eval.run has it."""
    import torch

    from data.tokenizer import load_tokenizer
    from device import DTYPES, autocast, keep_freed_memory
    from eval.choices import answer
    from eval.hellaswag import completion
    from eval.likelihood import log_likelihoods
    from model import GPT, GPTConfig

    keep_freed_memory()
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset("gpt2")).eval()
    tokenizer = load_tokenizer("gpt2")
    questions = [completion(row) for row in hellaswag_rows()]

    def run() -> None:
        with autocast(torch.device("cpu"), DTYPES[dtype]):
            answer(questions, tokenizer, lambda requests: log_likelihoods(model, requests), "completion")

    return run


def hellaswag_build_nanogpt(directory: str) -> Run:
    """Its evaluate(), which is in float32 on a CPU, over a model and rows that are here already."""
    import tiktoken
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from data.tokenizer import load_tokenizer

    tokenizer: Any = load_tokenizer("gpt2")
    tiktoken.get_encoding = lambda encoding_name: tokenizer._tiktoken  # the same, from what is here
    theirs: Any = load_file(Path(directory) / "hellaswag.py")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    rows = [row | {"label": int(row["label"])} for row in hellaswag_rows()]
    theirs.iterate_examples = lambda split: iter(rows)
    theirs.GPT2LMHeadModel.from_pretrained = lambda name: model
    theirs.print = lambda *words: None
    return lambda: theirs.evaluate("gpt2", "cpu")


# ---- text to shards, gpt2 tokens, from reading to writing

# Code, markup and prose, by the names of files.
CODE = {".py", ".pyi", ".pyx", ".c", ".h", ".hpp", ".cpp", ".cu", ".cuh", ".js", ".ts", ".sh", ".pl", ".java", ".rs"}
MARKUP = {".html", ".xml", ".svg", ".css", ".json", ".ipynb", ".toml", ".yaml", ".yml", ".cmake", ".po"}
PROSE = {".txt", ".md", ".rst", ".tex"}


def text_files(roots: list[str]) -> Iterator[str]:
    """The text of every file under `roots` whose name says that it is text, each content once."""
    seen = set()
    for path in itertools.chain.from_iterable(sorted(Path(root).rglob("*")) for root in roots):
        if path.suffix not in CODE | MARKUP | PROSE or path.is_symlink() or not path.is_file():
            continue
        data = path.read_bytes()
        digest = hashlib.sha256(data).digest()
        if not data or digest in seen:
            continue
        seen.add(digest)
        try:
            yield data.decode()
        except UnicodeDecodeError:
            continue


def repeated_plays(size: int) -> Iterator[str]:
    """The plays over and over, up to `size` bytes."""
    from data.sources.shakespeare import read_plays

    written = 0
    for text in itertools.cycle(read_plays().values()):
        if written >= size:
            return
        yield text
        written += len(text.encode())


def write_corpus(texts: Iterator[str], path: Path) -> tuple[float, float]:
    """Write a .jsonl; returns its megabytes of text, and how many different words of GPT-2's splitting rule there are
    in each megabyte of 20, of documents drawn from all of it."""
    import regex
    from tiktoken_ext.openai_public import r50k_pat_str

    size, lengths = 0, []
    with open(path, "w", encoding="utf-8") as file:
        for text in texts:
            lengths.append(len(text.encode()))
            size += lengths[-1]
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    share = min(1.0, 20e6 / max(size, 1))
    draw = random.Random(0)
    chosen = [draw.random() < share for _ in lengths]
    words: set[str] = set()
    with open(path, encoding="utf-8") as file:
        for line in itertools.compress(file, chosen):
            words.update(regex.findall(r50k_pat_str, json.loads(line)["text"]))
    sampled = sum(itertools.compress(lengths, chosen))
    return size / 1e6, len(words) / max(sampled / 1e6, 1e-9)


def tokenize_ours(corpus: Path) -> Run:
    """The command itself."""
    command = [sys.executable, "-m", "data.prepare", "text", str(corpus), "--val-fraction", "0", "--out"]

    def run() -> None:
        subprocess.run([*command, tempfile.mkdtemp(dir=corpus.parent)], check=True, capture_output=True, cwd=HERE)

    return run


def tokenize_tiktoken(corpus: Path) -> Run:
    """encode_ordinary_batch on all cores, and the same writing."""
    import numpy as np

    from data.shards import ShardWriter
    from data.tokenizer import load_tokenizer

    tokenizer: Any = load_tokenizer("gpt2")

    def batches() -> Iterator[list[str]]:
        batch: list[str] = []
        size = 0
        with open(corpus, encoding="utf-8") as file:
            for line in file:
                batch.append(json.loads(line)["text"])
                size += len(batch[-1])
                if size > 1 << 26:
                    yield batch
                    batch, size = [], 0
        yield batch

    def run() -> None:
        writer = ShardWriter(Path(tempfile.mkdtemp(dir=corpus.parent)), "train", 100_000_000, tokenizer.eot)
        for batch in batches():
            for ids in tokenizer._tiktoken.encode_ordinary_batch(batch, num_threads=os.cpu_count() or 1):
                writer.write(np.array([tokenizer.eot, *ids], np.uint16))
        writer.finish()

    return run


def check_shards(directory: Path) -> None:
    """ValueError unless the datasets in a directory, whoever wrote them, have the same shards byte by byte."""
    from data.shards import file_sha256

    datasets = [path for path in directory.iterdir() if path.is_dir()]
    hashes = [[file_sha256(shard) for shard in sorted(dataset.glob("train_*.bin"))] for dataset in datasets]
    if hashes[0] == [] or any(found != hashes[0] for found in hashes):
        raise ValueError("two of the runs wrote different tokens for the same text")
    print(f"  every run wrote the same {len(hashes[0])} shards, byte by byte")


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


def serve(make: Callable[[], Run], warm_up: int, pipe: Connection) -> None:
    """A contestant's process: set up, warm up, then time one run each time it is asked to; None ends it."""
    peak, running = [0], threading.Event()
    threading.Thread(target=watch_memory, args=(peak, running), daemon=True).start()
    try:
        run = make()
        for _ in range(warm_up):
            run()
        pipe.send(None)
        while pipe.recv():
            running.set()
            began = time.perf_counter()
            run()
            seconds = time.perf_counter() - began
            running.clear()
            pipe.send(seconds)
        pipe.send(max(own_peak(), peak[0]))
    except Exception as error:
        pipe.send(error)
    except KeyboardInterrupt:
        pass  # the process that asks is interrupted too, and says so


def own_peak() -> int:
    """The most bytes this process has held. What the system reports on Linux counts those of its parent too."""
    if sys.platform == "linux":
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def watch_memory(peak: list[int], running: threading.Event) -> None:
    """Keep in peak[0] the most bytes of memory this process and those it started have held together, shared ones
    counted for each."""
    import psutil

    this = psutil.Process()
    while running.wait():
        held = 0
        for process in (this, *this.children(recursive=True)):
            try:
                held += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        peak[0] = max(peak[0], held)
        time.sleep(0.5)


def compare(contestants: Contestants, runs: int, warm_up: int = 2) -> dict[str, dict[str, float]]:
    """Seconds (median, lowest, highest) and peak memory in bytes of each contestant, run in turn `runs` times."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for name, make in contestants.items():
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(make, warm_up, theirs), daemon=True).start()
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

    from device import DTYPES

    dtype, best = DTYPES[dtype_name], 0.0
    for n_in, n_out in [(768, 2304), (768, 768), (768, 3072), (3072, 768), (768, VOCAB)]:
        x, weight = torch.randn(ROWS * TOKENS, n_in, dtype=dtype), torch.randn(n_out, n_in, dtype=dtype)
        y = x @ weight.T
        for left, right in [(x, weight.T), (y, weight), (y.T, x)] * 6:
            began = time.perf_counter()
            left @ right
            best = max(best, 2 * x.numel() * n_out / (time.perf_counter() - began))
    return best


def memory_bandwidth() -> float:
    """Bytes a second of copying 512 MB, read and written counted, by all threads."""
    import torch

    source, target = torch.ones(2**27), torch.zeros(2**27)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - began))
    return best


def read_bandwidth() -> float:
    """Bytes a second of reading 512 MB, by all threads."""
    import torch

    source, best = torch.ones(2**27), 0.0
    for _ in range(5):
        began = time.perf_counter()
        source.sum()
        best = max(best, source.nbytes / (time.perf_counter() - began))
    return best


def native_dtypes() -> list[str]:
    """The precisions that this CPU computes in, its default first. Rows in other ones are left out, which is said."""
    import torch

    import device

    native = [str(dtype).removeprefix("torch.") for dtype in device.native_dtypes(torch.device("cpu"))]
    if "bfloat16" not in native:
        print(f"\n  no rows in bfloat16: this CPU ({device.cpu_instruction_set()}) emulates it")
    return native


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
    contestants: Contestants = {"ours": train_ours}
    if "transformers" in peers:
        contestants["transformers"] = train_transformers
    if "nanogpt" in peers:
        contestants["nanogpt"] = partial(train_nanogpt, peers["nanogpt"])
    results = compare(contestants, runs)
    table = report(f"training step, 124M, {ROWS} x {TOKENS} tokens", "tokens", ROWS * TOKENS, results)
    flops = ROWS * TOKENS * (6 * 124_439_808 + 12 * 12 * 768 * TOKENS)
    for dtype in native_dtypes():
        rate = matmul_rate(dtype)
        table[f"matmul_{dtype}"] = rate
        share = flops / results["ours"]["seconds"] / rate
        print(f"  {dtype} matmuls reach {rate / 1e9:,.0f} GFLOP/s here; our step is at {share:.0%} of that")
    return [table]


def bench_decode(peers: dict[str, str], runs: int) -> list[dict[str, Any]]:
    """Greedy decoding at batch 1 and 8 in each native precision; nanoGPT and CTranslate2 in float32."""
    from device import DTYPES

    tables = []
    for dtype, batch in itertools.product(native_dtypes(), (1, 8)):
        contestants: Contestants = {"ours": partial(decode_ours, batch, dtype)}
        if "transformers" in peers:
            contestants["transformers"] = partial(decode_transformers, batch, dtype)
        if "ctranslate2" in peers and dtype == "float32":
            contestants["ctranslate2"] = partial(decode_ctranslate2, batch, dtype)
        if "nanogpt" in peers and batch == 1 and dtype == "float32":  # it decodes one sample at a time
            contestants["nanogpt"] = partial(decode_nanogpt, peers["nanogpt"])
        title = f"greedy decoding, 124M, {dtype}, batch {batch}, {NEW_TOKENS} new tokens"
        table = report(title, "tokens", batch * NEW_TOKENS, compare(contestants, runs))
        # a step reads every weight once but the positions, of which it needs one row
        bytes_read = (124_439_808 - 1024 * 768) * DTYPES[dtype].itemsize
        bytes_per_second = bytes_read * table["results"]["ours"]["rate"] / batch
        share = bytes_per_second / read_bandwidth()
        print(f"  ours reads the weights at {bytes_per_second / 1e9:.1f} GB/s: {share:.0%} of the read bandwidth here")
        tables.append(table | {"bytes_per_second": bytes_per_second, "share_of_read_bandwidth": share})
    return tables


def bench_hellaswag(peers: dict[str, str], runs: int) -> list[dict[str, Any]]:
    """In the precision that eval.run takes by itself, and in the other native ones."""
    default, *others = native_dtypes()
    contestants: Contestants = {"ours": partial(hellaswag_ours, default)}
    for dtype in others:
        contestants[f"ours, {dtype}"] = partial(hellaswag_ours, dtype)
    if "build-nanogpt" in peers:
        contestants["build-nanogpt"] = partial(hellaswag_build_nanogpt, peers["build-nanogpt"])
    title = f"HellaSwag, 124M, {QUESTIONS} questions; ours is in {default}, as eval.run is by itself, peers in float32"
    return [report(title, "questions", QUESTIONS, compare(contestants, runs, warm_up=1))]


def bench_tokenize(peers: dict[str, str], runs: int, corpus: list[str] | None = None) -> list[dict[str, Any]]:
    """Files of the Python installation, of /usr/share and /usr/include (or of `corpus`), and the plays repeated."""
    roots = corpus or list(dict.fromkeys([sys.prefix, sys.base_prefix, "/usr/share", "/usr/include"]))
    tables = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, texts in (("files", text_files(roots)), ("plays", repeated_plays(10**9))):
            path = Path(temporary) / f"{name}.jsonl"
            megabytes, words = write_corpus(texts, path)
            # A minute each, and nothing that needs to be warm.
            contestants: Contestants = {"ours": partial(tokenize_ours, path)}
            contestants["tiktoken"] = partial(tokenize_tiktoken, path)
            results = compare(contestants, min(runs, 3), warm_up=0)
            what = f"{', '.join(roots)}, each file once" if name == "files" else "the plays of Shakespeare, repeated"
            title = f"text to shards, {megabytes:,.0f} MB: {what}; {words:,.0f} different words a MB"
            tables.append(report(title, "MB", megabytes, results) | {"words_per_mb": words})
            check_shards(Path(temporary))
            for old in Path(temporary).iterdir():
                shutil.rmtree(old) if old.is_dir() else old.unlink()
    return tables


def bench_loader(peers: dict[str, str], runs: int) -> list[dict[str, Any]]:
    """Ten batches of 524,288 tokens."""
    with tempfile.TemporaryDirectory() as temporary:
        results = compare({"ours": partial(loader_ours, Path(temporary))}, runs)
    return [report("loader", "Mtokens", 5.24288, results)]


def bench_startup(peers: dict[str, str], runs: int) -> list[dict[str, Any]]:
    """The time a command takes to say how it is used."""
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
    "startup": bench_startup,
}
PEER_PACKAGES = ("transformers", "ctranslate2")
PEER_FILES = {"nanogpt": "model.py", "build-nanogpt": "hellaswag.py"}


def measure(args: argparse.Namespace, peers: dict[str, str]) -> None:
    """Take the benches that were chosen one after the other; print what comes of them, and write it where asked."""
    from training.metrics import hardware

    machine = hardware()
    bandwidth = memory_bandwidth()
    print(f"{json.dumps(machine)}\nmemory: {bandwidth / 1e9:.1f} GB/s, copying")
    chosen = list(BENCHES) if args.what == "all" else [args.what]
    tables = []
    for name in chosen:
        options = {"corpus": args.corpus} if name == "tokenize" else {}
        tables += BENCHES[name](peers, args.runs, **options)
    if args.json:
        args.json.write_text(
            json.dumps({"hardware": machine, "memory_bandwidth": bandwidth, "tables": tables}, indent=1) + "\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.py", description="Speed, beside others, on this machine.")
    parser.add_argument("what", choices=[*BENCHES, "all"])
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME[=DIR]",
        help="transformers, ctranslate2, nanogpt=DIR, build-nanogpt=DIR; repeatable (tiktoken is always there)",
    )
    parser.add_argument(
        "--corpus",
        nargs="+",
        metavar="DIR",
        help="of tokenize (default: the Python installation, /usr/share, /usr/include)",
    )
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each contestant (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    args = parser.parse_args()
    peers = {name: directory for name, _, directory in (peer.partition("=") for peer in args.peer)}
    for name, directory in peers.items():
        if name not in (*PEER_PACKAGES, *PEER_FILES):
            parser.error(f"unknown peer {name!r}: transformers, ctranslate2, nanogpt=DIR or build-nanogpt=DIR")
        if name in PEER_PACKAGES and importlib.util.find_spec(name) is None:
            parser.error(f"--peer {name}: the package is not installed, run: pip install {name}")
        if name in PEER_FILES and not (Path(directory) / PEER_FILES[name]).is_file():
            parser.error(f"no {PEER_FILES[name]} in {directory or 'no directory'}: give the repository's, {name}=DIR")
    for directory in args.corpus or ():
        if not Path(directory).is_dir():
            parser.error(f"--corpus {directory} is no directory")
    at_least_one(parser, args, "runs")
    if args.json and not args.json.parent.is_dir():  # now, not after all was timed
        parser.error(f"cannot write {args.json}: there is no directory {args.json.parent}")
    with ending(parser):
        measure(args, peers)


if __name__ == "__main__":
    main()
