"""Numbers and foreign text, as people read them."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` with every control, format and separator character escaped; line breaks stay, tabs become spaces.

    Sample texts, file names and error messages come from data and models. On a
    terminal their escape sequences would be obeyed.
    """
    lines = (line.expandtabs(4) for line in text.replace("\r\n", "\n").split("\n"))
    return "\n".join("".join(map(_escape, line)) for line in lines)


def _escape(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")


def count(value: float) -> str:
    """12345 → "12.3k"."""
    for unit in ("", "k", "M", "G"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"


def duration(seconds: float) -> str:
    """4000 → "1:06:40"."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hour, minute = divmod(minutes, 60)
    days, hour = divmod(hour, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
