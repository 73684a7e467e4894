"""The gate passes equal revisions, and names what differs between others."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.same_bits import Case, Failure, Side, checkout, compare, excerpt, main, metrics_facts, run_case, table

ROOT = Path(__file__).parent.parent.parent
GIT = ("git", "-c", "user.name=A", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false")


def git(directory, *arguments):
    result = subprocess.run([*GIT, *arguments], cwd=directory, capture_output=True, text=True, check=True)
    return result.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one commit, as the current directory."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    directory = tmp_path / "repository"
    directory.mkdir()
    git(directory, "init", "--quiet")
    (directory / "train.py").write_text("print('first')\n", encoding="utf-8")
    git(directory, "add", "train.py")
    git(directory, "commit", "--quiet", "-m", "Begin")
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture
def clone(tmp_path):
    """A clone of this repository, with the code of its last commit."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    if not (ROOT / ".git").exists():
        pytest.skip("these files are a copy without git history: there are no revisions to compare")
    git(tmp_path, "clone", "--quiet", str(ROOT), "clone")
    return tmp_path / "clone"


@pytest.fixture
def gate(clone):
    """`gate("HEAD", ".", "--short")`: the completed process of this tree's script, in the clone."""

    def run(*arguments):
        command = [sys.executable, str(ROOT / "scripts" / "same_bits.py"), *arguments]
        return subprocess.run(command, cwd=clone, capture_output=True, text=True, timeout=900)

    return run


def statuses(output):
    """Return {case: status} of the table at the end of the report."""
    rows = output.partition("\ncase ")[2].splitlines()[1:]
    return {columns[0]: columns[-1] for columns in (re.split(r"\s{2,}", row) for row in rows)}


# ---------------------------------------------------------------------------------------------------------------------


def test_equal_facts_have_no_difference():
    facts = {("train loss", "step 1"): 6.5, ("train loss", "step 2"): None, ("sha256", "val_000000.bin"): "ab"}
    assert compare(facts, dict(reversed(facts.items()))) == ([], [])


def test_a_difference_of_one_bit_is_named_with_both_values():
    base, head = {("train loss", "step 3"): 0.3}, {("train loss", "step 3"): 0.1 + 0.2}
    expected = "train loss, step 3: BASE 0.3, HEAD 0.30000000000000004"
    assert compare(base, head) == ([expected], [])


def test_a_column_that_is_missing_at_head_is_a_difference():
    base = {("train loss", "step 1"): 6.5, ("train lr", "step 1"): 0.1}
    differences, additions = compare(base, {("train loss", "step 1"): 6.5})
    assert differences == ["train lr, step 1: BASE 0.1, HEAD no value"]
    assert additions == []


def test_a_null_at_head_is_a_difference():
    assert compare({("loss", "step 1"): 6.5}, {("loss", "step 1"): None})[0] == ["loss, step 1: BASE 6.5, HEAD None"]


def test_a_column_that_exists_only_at_head_is_an_addition():
    head = {("train loss", "step 1"): 6.5, ("train scale", "step 1"): 1.0, ("train scale", "step 2"): 1.0}
    assert compare({("train loss", "step 1"): 6.5}, head) == ([], ["only at HEAD, not compared: train scale"])


def test_a_further_step_at_head_is_a_difference():
    head = {("train loss", "step 1"): 6.5, ("train loss", "step 2"): 6.4}
    assert compare({("train loss", "step 1"): 6.5}, head)[0] == ["train loss, step 2: BASE no value, HEAD 6.4"]


def test_long_values_are_cut_to_where_they_differ():
    base, head = "a" * 200 + "b" + "c" * 200, "a" * 200 + "d" + "c" * 200
    [difference], _ = compare({("text", "output 1"): base}, {("text", "output 1"): head})
    assert "aaabccc" in difference
    assert "aaadccc" in difference
    assert len(difference) < 150
    assert excerpt("short") == "short"


def test_metrics_are_compared_without_columns_that_depend_on_time(tmp_path):
    path = tmp_path / "metrics.jsonl"
    timing = {"tokens_per_second": 9.0, "mfu": 0.1, "seconds": 3.0, "data_seconds": 1.0, "peak_memory": 5}
    records = [{"split": "train", "step": step, "loss": 1 / step, "lr": 0.1} | timing for step in range(1, 21)]
    records += [{"split": "val", "step": 20, "loss": 2.5}] * 2
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    facts = metrics_facts(path)
    assert {what for what, _ in facts} == {"train loss", "train lr", "val loss"}
    assert facts["train loss", "step 3"] == 1 / 3
    assert facts["val loss", "step 20, record 2"] == 2.5  # a step that appears twice stays visible
    assert len(facts) == 2 * 20 + 2


def test_metrics_without_the_last_step_are_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(Failure, match=r"metrics\.jsonl has no train loss of step 20"):
        metrics_facts(path)
    path.write_text('{"split": "train", "step": 19, "loss": 1.0}\n', encoding="utf-8")
    with pytest.raises(Failure, match=r"metrics\.jsonl has no train loss of step 20"):
        metrics_facts(path)


def test_the_result_of_a_case_names_the_side_that_failed_and_three_differences():
    def fail():
        raise Failure("`train.py` exited with 1")

    base, head = {("loss", f"step {n}"): n for n in range(5)}, {("loss", f"step {n}"): -n for n in range(5)}
    failed = run_case(Case("a", lambda: base, fail))
    assert (failed.status, failed.details) == ("failed", ["HEAD: `train.py` exited with 1"])
    assert run_case(Case("b", fail, lambda: head)).details == ["BASE: `train.py` exited with 1"]
    different = run_case(Case("c", lambda: base, lambda: head))
    assert (different.status, different.compared) == ("different", 5)
    assert different.details[0] == "loss, step 1: BASE 1, HEAD -1"
    assert different.details[3] == "and 1 further differences"
    skipped = run_case(Case("d", fail, fail, "there is no C++ compiler"))
    assert (skipped.status, skipped.details) == ("not run", ["there is no C++ compiler"])
    lines = table([failed, different, skipped]).splitlines()
    assert [line.split()[0] for line in lines] == ["case", "a", "c", "d"]
    assert [line.rsplit("  ", 1)[1] for line in lines] == ["result", "failed", "different", "not run"]


def test_a_command_runs_the_code_of_its_side_in_the_directory_of_its_side(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    code, directory = tmp_path / "code", tmp_path / "work"
    code.mkdir()
    directory.mkdir()
    (code / "marker.py").write_text("value = 3\n", encoding="utf-8")
    lines = ["import os, sys, marker", "names = ('OMP_NUM_THREADS', 'WORLD_SIZE')"]
    lines += ["print(marker.value, os.getcwd(), sys.argv[1:], [os.environ.get(name) for name in names])"]
    (code / "train.py").write_text("\n".join(lines), encoding="utf-8")
    (code / "bad.py").write_text("raise SystemExit('it cannot work')", encoding="utf-8")
    side = Side(code, directory)
    assert side.launch("train.py", "--x").split("\n")[0] == f"3 {directory} ['--x'] ['1', None]"
    assert side.launch("-m", "train").startswith("3 ")
    with pytest.raises(Failure, match=r"`bad\.py --x` exited with 1:\n    it cannot work"):
        side.launch("bad.py", "--x")


def test_a_worktree_holds_the_commit_and_is_removed_also_after_an_interrupt(repository, tmp_path):
    commit = git(repository, "rev-parse", "HEAD")
    (repository / "train.py").write_text("print('second')\n", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt), checkout(commit, repository, tmp_path / "code") as code:
        assert (code / "train.py").read_text(encoding="utf-8") == "print('first')\n"
        assert len(git(repository, "worktree", "list").splitlines()) == 2
        raise KeyboardInterrupt
    assert not (tmp_path / "code").exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1
    with checkout(".", repository, tmp_path / "code") as code:
        assert code == repository


def test_arguments_that_cannot_be_used_end_with_a_sentence(repository, tmp_path, capsys, monkeypatch):
    def refused(*arguments):
        with pytest.raises(SystemExit) as end:
            main([*map(str, arguments)])
        assert end.value.code == 2
        return capsys.readouterr().err

    assert "'HEAD~9' is not a commit of" in refused("HEAD~9", "HEAD")
    assert "give a branch, a tag or a hash, or `.` for the working tree" in refused("HEAD", "nowhere")
    assert "exists already: name a new directory" in refused("HEAD", ".", "--keep", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "not a git repository" in refused("HEAD", ".")


@pytest.mark.slow
def test_a_revision_equals_itself(gate, clone):
    result = gate("HEAD", "HEAD", "--short")
    assert result.returncode == 0, result.stdout + result.stderr
    assert set(statuses(result.stdout).values()) == {"equal"}
    assert len(git(clone, "worktree", "list").splitlines()) == 1


@pytest.mark.slow
def test_another_initialization_changes_training_from_the_first_loss_on_and_nothing_else(gate, clone):
    model = clone / "model.py"
    text, count = re.subn(r"std=0\.02\b", "std=0.02000001", model.read_text(encoding="utf-8"))
    assert count >= 1
    model.write_text(text, encoding="utf-8")
    result = gate("HEAD", ".", "--short")
    assert result.returncode == 1, result.stdout + result.stderr
    trained = dict.fromkeys(("adamw-float32", "muon-float32"), "different")
    others = ("datasets", "adamw-float32, resumed", "muon-float32, resumed", "decoding", "evaluation")
    assert statuses(result.stdout) == trained | dict.fromkeys(others, "equal")
    # The mean of the first validation may hide a change this small; the first training loss follows.
    first = r"adamw-float32: different\n  (val loss, step 0|train loss, step 1): BASE 6\.\d+, HEAD 6\.\d+\n"
    assert re.search(first, result.stdout)
