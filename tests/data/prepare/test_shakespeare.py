"""The plays of Shakespeare: from Markdown to dialogue."""

import re

from data.prepare.shakespeare import HELD_OUT, dialogue, read_plays

# `~` is replaced by two spaces, a line break in Markdown, which editors would remove at the end of a line.
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


def test_dialogue_has_speeches_only() -> None:
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
