"""Threads spin while the machine is quiet, and not while other processes compute."""

import os

import pytest

import openmp

IMPORT_ORDER = """
import sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("openmp" in sys.modules)

sys.meta_path.insert(0, Watch())
import train
"""


@pytest.mark.parametrize(
    ("loads", "expected"),
    [([5.0], None), ([15.0], None), ([25.0, 25.0], openmp.SPINS_WHEN_BUSY), ([100.0, 10.0], None)],
    ids=["quiet", "half a core", "a core", "a short burst"],
)
def test_threads_stop_spinning_early_only_on_a_busy_machine(monkeypatch, loads, expected):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that monkeypatch removes what is set below
        monkeypatch.delenv(name)
    monkeypatch.setattr("psutil.cpu_count", lambda: 4)
    measured = iter(loads)
    monkeypatch.setattr("psutil.cpu_percent", lambda seconds: next(measured))
    openmp.adapt_to_load()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_a_single_thread_needs_no_measurement(monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("openmp.cores_in_use", lambda seconds: pytest.fail("measured"))
    openmp.adapt_to_load()
    assert "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_the_users_own_setting_is_kept(monkeypatch, name):
    for unset in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS"):
        monkeypatch.delenv(unset, raising=False)
    monkeypatch.setenv(name, "7")
    monkeypatch.setattr("psutil.cpu_percent", lambda seconds: 100.0)
    openmp.adapt_to_load()
    assert os.environ[name] == "7"
    assert os.environ.get("GOMP_SPINCOUNT") in (None, "7")


def test_train_decides_before_torch_is_imported(python):
    assert python("-c", IMPORT_ORDER).stdout.split() == ["True"]
