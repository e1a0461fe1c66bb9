"""Which entry of a list claims which parameter: the rule of `[[optimizer]]` and `[[quantizer]]`.

A pattern is a glob over parameter names (``blocks.*.attention.*``) or a role
(``@matrix``). The first entry with a matching pattern takes the parameter.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

from titanlm.registry import did_you_mean

if TYPE_CHECKING:
    from torch import nn

ROLES = ("embedding", "head", "matrix", "norm", "bias", "gain")


class NamedParam(NamedTuple):
    """What an optimizer is handed for each parameter it claims."""

    name: str
    parameter: nn.Parameter
    role: str


class Claims(NamedTuple):
    claimed: list[list[str]]
    """Names of each entry, in the order of the model."""
    unclaimed: list[str]
    problems: list[str]
    """``0.params: …`` for each pattern or entry without effect."""


def matches(patterns: Sequence[str], name: str, role: str) -> bool:
    return any(role == pattern[1:] if pattern.startswith("@") else fnmatchcase(name, pattern) for pattern in patterns)


def claim(roles: Mapping[str, str], entries: Sequence[Sequence[str]], groups: Sequence[Hashable] | None = None) -> Claims:
    """Share out the names in ``roles`` (name → role) among the entries' patterns.

    With ``groups``, one an entry, entries take names from others of their group alone.

    A name pattern must match something; a role that this model happens not to
    have (a tied model has no ``@head``) may not, as long as the entry claims
    something by its other patterns.
    """
    problems = []
    claimed: list[list[str]] = [[] for _ in entries]
    unclaimed: list[str] = []
    for name, role in roles.items():
        takers: dict[Hashable, int] = {}
        for index, patterns in enumerate(entries):
            if matches(patterns, name, role):
                takers.setdefault(groups[index] if groups else None, index)
        for taken in [claimed[index] for index in takers.values()] or [unclaimed]:
            taken.append(name)
    for index, patterns in enumerate(entries):
        for pattern in patterns:
            if pattern.startswith("@"):
                if pattern[1:] not in ROLES:
                    hint = did_you_mean(pattern[1:], ROLES)
                    problems.append(f"{index}.params: no role {pattern!r}{hint} (roles: {', '.join('@' + role for role in ROLES)})")
            elif not any(fnmatchcase(name, pattern) for name in roles):
                problems.append(f"{index}.params: pattern {pattern!r} matches no parameter{did_you_mean(pattern, roles)}")
        if not claimed[index] and not any(problem.startswith(f"{index}.") for problem in problems):
            problems.append(f"{index}.params: every parameter matched by {list(patterns)} is claimed by an entry before it, or there is none")
    return Claims(claimed, unclaimed, problems)
