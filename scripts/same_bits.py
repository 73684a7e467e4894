"""Check that two revisions of the code give equal results, bit for bit:

    python -m scripts.same_bits BASE HEAD

BASE and HEAD are git revisions, which are checked out into temporary git worktrees, or `.` for the working tree with
its uncommitted changes. With the code of each, the script prepares datasets, trains tiny models for 20 steps, decodes
and evaluates. It compares the hashes of the shards, weights and optimizer states, the metrics that do not depend on
time, the decoded tokens and the scores. With the code of HEAD, it also resumes some of BASE's runs.

Exit status 0: all compared results are equal. 1: a result differs, or a command failed. 2: the arguments are wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

# This script imports none of the project's modules, because they may move between BASE and HEAD. It depends only on the
# command lines, the configuration's fields and the files that a run writes.

Facts = dict[tuple[str, str], Any]  # compared values: (what, where) -> value, such as ("train loss", "step 3") -> 5.91

STEPS, RESUME_AT = 20, 10  # steps of each run, and the step whose checkpoint HEAD resumes
CHECKPOINT_FILES = ("model.safetensors", "trainer/optimizer.safetensors")
# Metrics with one of these words in their names vary from run to run, so they are not compared.
TIMING = ("second", "mfu", "memory")
TIMEOUT = 600.0  # seconds for one command, which usually takes less than ten
GRACE = 60.0  # seconds between SIGTERM and SIGKILL for a command that does not end
SHOWN = 3  # largest number of differences that are printed for one case

CONFIG: dict[str, dict[str, Any]] = {
    "run": {"dir": "runs"},
    "model": {"preset": None, "n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64},
    # 8 windows in micro-batches of at most 3: gradients are accumulated over micro-batches of different sizes
    "data": {"dir": "prepared/bpe", "batch_tokens": 512, "sequence_length": 64, "micro_batch": 3},
    "optim": {"lr": 0.01, "warmup_steps": 2, "steps": STEPS},
    "eval": {"every": 10, "samples": 1, "hellaswag": False},
    "checkpoint": {"every": RESUME_AT, "keep": 3},
    "system": {"device": "cpu", "dtype": "float32", "compile": False},
}

# Environment variables of every command. One thread per process: the number of threads can change the order of sums.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
}
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Failure(Exception):
    """A command failed, or a file or a result that it should produce is missing."""


@dataclass(frozen=True)
class Side:
    """One of the two revisions: its code and the directory in which its commands run.

    Commands name datasets and runs relative to `directory`, so the paths are equal on both sides.
    """

    code: Path
    directory: Path

    @property
    def compiled_code(self) -> Path:
        """Directory of torch.compile's cache. Both sides can share it: its keys are hashes of the compiled graphs."""
        return self.directory.parent / "inductor"

    def launch(self, *arguments: str, processes: int = 1) -> str:
        """Run `python ARGUMENTS` with this side's code, under torchrun if there are several processes.

        Return the standard output. Raises Failure if the exit status is not 0 or the command exceeds TIMEOUT.
        """
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        script, *rest = arguments
        command += [str(self.code / script) if script.endswith(".py") else script, *rest]
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        environment |= ENVIRONMENT | {"PYTHONPATH": str(self.code), "TORCHINDUCTOR_CACHE_DIR": str(self.compiled_code)}
        process = subprocess.Popen(
            command,
            cwd=self.directory,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        try:
            output, errors = process.communicate(timeout=TIMEOUT)
        except BaseException as error:
            process.terminate()  # SIGTERM first, because torchrun can then stop its workers
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            process.kill()
            if isinstance(error, subprocess.TimeoutExpired):
                raise Failure(f"`{' '.join(arguments)}` did not end within {TIMEOUT:.0f} seconds") from None
            raise
        if process.returncode:
            last = (errors.strip() or output.strip() or "no output").splitlines()[-12:]
            raise Failure(f"`{' '.join(arguments)}` exited with {process.returncode}:\n    " + "\n    ".join(last))
        return output


@dataclass(frozen=True)
class Case:
    """A comparison of BASE and HEAD, which is one line of the report."""

    name: str
    base: Callable[[], Facts]  # returns the facts of BASE; runs its commands first, unless an earlier case ran them
    head: Callable[[], Facts]  # returns the facts of HEAD, after running its commands
    not_run: str = ""  # the reason why this machine cannot run the case, or "" if it can


@dataclass
class Result:
    """The outcome of a case."""

    name: str
    status: str  # equal | different | failed | not run
    compared: int = 0  # number of values that were compared
    seconds: float = 0.0
    details: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------------------------
# Comparison


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file. Raises Failure if the file does not exist."""
    if not path.is_file():
        raise Failure(f"the file {path} is missing")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def metrics_facts(path: Path) -> Facts:
    """Return the values of a metrics.jsonl that do not depend on time, by split, column and step.

    Raises Failure if the run did not log its last step.
    """
    facts: Facts = {}
    seen: Counter[tuple[str, int]] = Counter()
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        record = json.loads(line)
        split, step = record.pop("split"), record.pop("step")
        seen[split, step] += 1
        where = f"step {step}" if seen[split, step] == 1 else f"step {step}, record {seen[split, step]}"
        for column, value in record.items():
            if not any(word in column for word in TIMING):
                facts[f"{split} {column}", where] = value
    if ("train loss", f"step {STEPS}") not in facts:
        raise Failure(f"{path} has no train loss of step {STEPS}")
    return facts


def compare(base: Mapping[tuple[str, str], Any], head: Mapping[tuple[str, str], Any]) -> tuple[list[str], list[str]]:
    """Compare the facts of the two sides. Return the differences and the additions, each as a list of texts.

    The key of a fact is a quantity and a place, such as "train loss" and "step 3". A quantity that only HEAD has is an
    addition. Any other fact that one side lacks or has differently is a difference.
    """
    absent, known = object(), {what for what, _ in base}
    differences = []
    for key in [*base, *(key for key in head if key[0] in known and key not in base)]:
        old, new = base.get(key, absent), head.get(key, absent)
        if old is absent or new is absent:
            found = ["no value" if value is absent else excerpt(repr(value)) for value in (old, new)]
        elif old != new:
            texts = [repr(old), repr(new)]
            first = next((i for i, pair in enumerate(zip(*texts, strict=False)) if pair[0] != pair[1]), 0)
            found = [excerpt(text, first) for text in texts]
        else:
            continue
        differences.append(f"{key[0]}, {key[1]}: BASE {found[0]}, HEAD {found[1]}")
    additions = sorted({what for what, _ in head} - known)
    return differences, [f"only at HEAD, not compared: {what}" for what in additions]


def excerpt(text: str, position: int = 0, width: int = 48) -> str:
    """Return at most `width` characters of a text around a position, with … where text is omitted."""
    if len(text) <= width:
        return text
    start = max(0, min(position - width // 3, len(text) - width))
    return ("…" if start else "") + text[start : start + width] + ("…" if start + width < len(text) else "")


# ---------------------------------------------------------------------------------------------------------------------
# The commands of the cases


def write_inputs(directory: Path) -> None:
    """Generate and write the texts, prompts and completions that all commands read, the same for BASE and HEAD."""
    chance = random.Random(1337)
    syllables = [first + vowel + last for first in "bdklmrst" for vowel in "aeiou" for last in ("", "n", "s")]
    words = ["".join(chance.choices(syllables, k=chance.randint(1, 4))) for _ in range(800)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]  # word frequencies of Zipf's law, which a model can learn

    def sentence(length: int) -> str:
        return " ".join(chance.choices(words, weights, k=length)).capitalize() + "."

    documents = [" ".join(sentence(chance.randint(4, 12)) for _ in range(6)) for _ in range(100)]
    (directory / "text.txt").write_text("\n\n".join(documents), encoding="utf-8")
    (directory / "heldout.txt").write_text("\n\n".join(sentence(10) for _ in range(20)), encoding="utf-8")
    (directory / "prompts.txt").write_text("".join(sentence(n) + "\n" for n in (2, 5, 9)), encoding="utf-8")
    completions = directory / "completions"
    completions.mkdir()
    for split, count in (("train", 60), ("val", 10)):
        lines = [json.dumps({"prompt": sentence(4), "completion": " " + sentence(3)}) for _ in range(count)]
        (completions / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def prepare(side: Side, tokenizer: str) -> Facts:
    """Prepare a dataset of several shards. Return the hashes of the shards and of the tokenizer's file."""
    name = tokenizer.split(":")[0]
    out = f"prepared/{name}"
    options = ("--tokenizer", tokenizer, "--val-fraction", "0.1", "--shard-tokens", "8000", "--workers", "1")
    side.launch("-m", "data.prepare", "text", "text.txt", "--separator", "\n\n", "--out", out, *options)
    files = sorted((side.directory / out).glob("*.bin"))
    if not any(path.name.startswith("val") for path in files):
        raise Failure(f"{side.directory / out} has no shard of the val split")
    return {("sha256", f"{name}/{path.name}"): sha256(path) for path in [*files, files[0].parent / "tokenizer.json"]}


def prepare_all(side: Side, tokenizers: tuple[str, ...]) -> Facts:
    """Prepare a dataset with each tokenizer. Return the facts of all datasets."""
    facts: Facts = {}
    for tokenizer in tokenizers:
        facts |= prepare(side, tokenizer)
    return facts


def run_facts(run: Path) -> Facts:
    """Return the facts of a run's directory that are compared: metrics, samples, weights and optimizer state."""
    facts = metrics_facts(run / "metrics.jsonl")
    facts["samples.txt", "sha256"] = sha256(run / "samples.txt")
    for step in (RESUME_AT, STEPS):
        for name in CHECKPOINT_FILES:
            facts[name, f"step {step}"] = sha256(checkpoint_directory(run, step) / name)
    return facts


def checkpoint_directory(run: Path, step: int) -> Path:
    """Return the directory of a run's checkpoint."""
    return run / "checkpoints" / f"step-{step:06d}"


def train(side: Side, name: str, changes: Mapping[str, Any], processes: int) -> Facts:
    """Train a run with CONFIG and `changes` ({"section.field": value}). Return the run's facts."""
    config = {section: dict(fields) for section, fields in CONFIG.items()}
    config["run"]["name"] = name
    for path, value in changes.items():
        section, key = path.split(".")
        config[section][key] = value
    (side.directory / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    side.launch("train.py", "--config", f"{name}.yaml", processes=processes)
    if config["system"]["compile"] and not side.compiled_code.is_dir():
        raise Failure("system.compile is true, but torch.compile left no code in its cache: nothing was compiled")
    return run_facts(side.directory / "runs" / name)


def resume(base: Side, head: Side, name: str, processes: int) -> Facts:
    """Resume a copy of BASE's run with HEAD's code from step RESUME_AT. Return the facts of the finished run."""
    run = head.directory / "resumed" / name
    shutil.copytree(base.directory / "runs" / name, run)
    shutil.rmtree(checkpoint_directory(run, STEPS))
    # If HEAD finds no checkpoint, it fails with run.resume must. With auto, it would start at step 0 and still end with
    # the same bits.
    arguments = ("--config", f"{name}.yaml", "--run.dir", "resumed", "--run.resume", "must")
    head.launch("train.py", *arguments, processes=processes)
    return run_facts(run)


def decode(side: Side, model: str, methods: tuple[tuple[str, ...], ...]) -> Facts:
    """Continue the prompts with each decoding method, given as options of sample.py.

    Return the texts, tokens and log-probabilities.
    """
    common = ("--model", model, "--file", "prompts.txt", "--json", "--max-new-tokens", "24")
    facts: Facts = {}
    for method in methods:
        output = side.launch("sample.py", *common, "--dtype", "float32", "--device", "cpu", *method)
        lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        if not lines or not all("tokens" in line and "logprobs" in line for line in lines):
            raise Failure(f"`sample.py {' '.join(method)} --json` printed no tokens and logprobs")
        for number, line in enumerate(lines, 1):
            facts |= {(key, f"{' '.join(method)}, output {number}"): value for key, value in line.items()}
    return facts


def evaluate(side: Side, model: str) -> Facts:
    """Evaluate a checkpoint on the validation split and on a text. Return all fields of the results as facts."""
    facts: Facts = {}
    for task, source in (("loss", ("--data", "prepared/bpe")), ("perplexity", ("--text", "heldout.txt"))):
        arguments = ("--model", model, "--tasks", task, *source, "--dtype", "float32", "--device", "cpu")
        side.launch("-m", "eval.run", *arguments, "--json", f"{task}.json")
        rows = json.loads((side.directory / f"{task}.json").read_text(encoding="utf-8"))
        if not any(isinstance(row.get("value"), float) for row in rows):
            raise Failure(f"eval.run --tasks {task} wrote no figure")
        for row in rows:
            facts |= {(key, f"{task} {row['metric']}"): value for key, value in row.items()}
    return facts


# ---------------------------------------------------------------------------------------------------------------------
# The cases


def make_cases(base: Side, head: Side, *, short: bool) -> list[Case]:
    """Return the cases in the order in which they run: later cases read files that earlier cases wrote."""
    # Both sides decode and evaluate BASE's checkpoint. So a change of training code makes only training cases differ.
    model = str(Path("..") / base.directory.name / "runs" / "adamw-float32")
    final = str(checkpoint_directory(Path(model), STEPS))

    def both(name: str, run: Callable[[Side], Facts], not_run: str = "") -> Case:
        return Case(name, lambda: run(base), lambda: run(head), not_run)

    def training(name: str, changes: Mapping[str, Any], processes: int = 1, not_run: str = "") -> Case:
        return both(name, lambda side: train(side, name, changes, processes), not_run)

    def resumption(name: str, processes: int = 1) -> Case:
        run = base.directory / "runs" / name
        return Case(f"{name}, resumed", lambda: run_facts(run), lambda: resume(base, head, name, processes))

    muon = {"optim.name": "muon"}
    tokenizers = ("bpe:512",) if short else ("bpe:512", "gpt2", "char")
    methods: tuple[tuple[str, ...], ...] = (("--greedy",), ("--greedy", "--batch-size", "1"))
    if not short:
        methods += (("--seed", "1", "--top-k", "50", "--num-samples", "2"), ("--num-beams", "3"))
    cases = [
        both("datasets", lambda side: prepare_all(side, tokenizers)),
        training("adamw-float32", {}),
        training("muon-float32", muon),
        resumption("adamw-float32"),
        resumption("muon-float32"),
        both("decoding", lambda side: decode(side, final, methods)),
        both("evaluation", lambda side: evaluate(side, final)),
    ]
    if short:
        return cases
    bfloat16, no_bfloat16 = {"system.dtype": "bfloat16"}, missing_bfloat16()
    completions = {"data.dir": "completions", "data.format": "completions", "data.pack": True, "model.init_from": final}
    return [
        *cases,
        training("adamw-bfloat16", bfloat16, not_run=no_bfloat16),
        training("muon-bfloat16", muon | bfloat16, not_run=no_bfloat16),
        training("dropout", {"model.dropout": 0.1}),
        training("completions", completions),
        training("ddp", {"system.parallel": "ddp"}, 2),
        training("fsdp", {"system.parallel": "fsdp"}, 2),
        resumption("ddp", 2),
        resumption("fsdp", 2),
        training("compiled", {"system.compile": True}, not_run=missing_compiler()),
    ]


def missing_bfloat16() -> str:
    """Return why bfloat16 is not compared on this machine, or an empty string if the processor computes in it."""
    capabilities = torch.cpu.get_capabilities()
    native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "" if native else "this processor does not compute in bfloat16"


def missing_compiler() -> str:
    """Return why torch.compile is not compared on this machine, or an empty string if there is a C++ compiler."""
    compiler = os.environ.get("CXX", "g++")
    return "" if shutil.which(compiler) else f"there is no C++ compiler {compiler}"


def run_case(case: Case) -> Result:
    """Run a case on both sides and compare."""
    if case.not_run:
        return Result(case.name, "not run", details=[case.not_run])
    began = time.monotonic()
    facts: list[Facts] = []
    for name, run in (("BASE", case.base), ("HEAD", case.head)):
        try:
            facts.append(run())
        except (Failure, OSError, ValueError, KeyError) as error:
            return Result(case.name, "failed", 0, time.monotonic() - began, [f"{name}: {error}"])
    differences, additions = compare(*facts)
    details = differences[:SHOWN] + additions
    if len(differences) > SHOWN:
        details.insert(SHOWN, f"and {len(differences) - SHOWN} further differences")
    status = "different" if differences else "equal"
    return Result(case.name, status, len(facts[0]), time.monotonic() - began, details)


def table(results: list[Result]) -> str:
    """Return the results as aligned text."""
    rows = [("case", "values", "seconds", "result")]
    rows += [(result.name, str(result.compared), f"{result.seconds:.1f}", result.status) for result in results]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{name:<{widths[0]}}  {compared:>{widths[1]}}  {seconds:>{widths[2]}}  {status}"
        for name, compared, seconds, status in rows
    )


# ---------------------------------------------------------------------------------------------------------------------
# Revisions and the command line


def git(*arguments: str, directory: Path | None = None) -> str:
    """Run git and return its output. Raises ValueError with git's message if git fails."""
    result = subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"git {arguments[0]}: {(result.stderr.strip() or 'it failed').splitlines()[-1]}")
    return result.stdout.strip()


def find_commit(revision: str, repository: Path) -> str:
    """Return the hash of the commit that a revision names. For the working tree, which is ".", return ".".

    Raises ValueError if there is no such commit.
    """
    if revision == ".":
        return revision
    try:
        return git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", directory=repository)
    except ValueError:
        raise ValueError(
            f"{revision!r} is not a commit of {repository}: give a branch, a tag or a hash, or `.` for the working tree"
        ) from None


@contextlib.contextmanager
def checkout(commit: str, repository: Path, directory: Path) -> Iterator[Path]:
    """Check out a commit in a worktree at `directory`, and remove the worktree afterwards.

    If `commit` is ".", yield `repository` itself.
    """
    if commit == ".":
        yield repository
        return
    try:
        git("worktree", "add", "--detach", str(directory), commit, directory=repository)
        yield directory
    finally:
        with contextlib.suppress(ValueError):  # if `worktree add` failed, there is no worktree to remove
            git("worktree", "remove", "--force", str(directory), directory=repository)


def run(commits: tuple[str, str], repository: Path, keep: Path | None, *, short: bool) -> bool:
    """Run all cases and print the report. Return False if a case differed or failed.

    Datasets and runs are written to the new directory `keep`, or to a temporary directory if `keep` is None.
    """
    with contextlib.ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="same-bits-"))).resolve()
        work = temporary / "work" if keep is None else keep.resolve()
        sides = []
        for name, commit in zip(("base", "head"), commits, strict=True):
            code = stack.enter_context(checkout(commit, repository, temporary / f"code-{name}"))
            sides.append(Side(code, work / name))
            sides[-1].directory.mkdir(parents=True)
            write_inputs(sides[-1].directory)
        results = []
        for case in make_cases(*sides, short=short):
            results.append(result := run_case(case))
            details = "".join(f"\n  {detail}" for detail in result.details)
            print(f"{result.name}: {result.status}{details}", flush=True)
        print(f"\n{table(results)}")
        return all(result.status in ("equal", "not run") for result in results)


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and exit with the status that the module's docstring describes."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.same_bits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", metavar="BASE", help="revision before the change, or `.` for the working tree")
    parser.add_argument("head", metavar="HEAD", help="revision with the change, or `.` for the working tree")
    parser.add_argument("--short", action="store_true", help="only float32 on one process, in about a minute")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="new directory that keeps the datasets and runs of both sides"
    )
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # exit by an exception, so that the worktrees are removed
    try:
        repository = Path(git("rev-parse", "--show-toplevel"))
        commits = find_commit(args.base, repository), find_commit(args.head, repository)
        if args.keep is not None and args.keep.exists():
            raise ValueError(f"--keep {args.keep} exists already: name a new directory")
        sys.exit(not run(commits, repository, args.keep, short=args.short))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
