"""Errors that are the user's to mend.

Every one derives from :class:`TitanError`; the command line prints them in one
piece without a traceback and exits with status 2. Anything else that escapes
is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class TitanError(Exception):
    """A mistake in the input or the surroundings; the text names the remedy."""


class ConfigError(TitanError):
    """Every mistake found in a config, one string each, dotted path first."""

    def __init__(self, problems: list[str], source: str = "config") -> None:
        self.problems = problems
        plural = "" if len(problems) == 1 else "s"
        lines = "\n".join(f"  {problem}" for problem in problems)
        super().__init__(f"{source}: {len(problems)} error{plural}\n{lines}")


class RegistryError(TitanError):
    """A component that cannot be registered or does not exist."""


class DataError(TitanError):
    """A dataset, tokenizer file or stream state that cannot be used."""


class CheckpointError(TitanError):
    """A checkpoint that is damaged, missing or of another run."""


class ArtifactError(TitanError):
    """An artifact that is damaged, hostile or over its byte limit."""


class NonFiniteError(TitanError):
    """A loss or gradient that is not finite; carries step and document ids."""


class PeerError(TitanError):
    """Another rank failed, which says so itself; this one only ends with it."""
