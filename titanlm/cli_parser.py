"""From words to a verb and its arguments: what the command line has beyond argparse.

Verbs may have verbs of their own. Overrides are told from options by name, and
whatever is misspelt is answered with the word that was probably meant.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from titanlm.registry import did_you_mean

_OVERRIDE = re.compile(r"(--[A-Za-z0-9_.-]+)=.*", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """A verb, or a verb that has verbs of its own."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.verbs: dict[str, Parser] = {}

    @property
    def options(self) -> list[str]:
        return list(self._option_string_actions)


def adder(parser: Parser) -> Callable[..., Parser]:
    """What adds verbs to a parser: ``add(name, run, summary, example, overrides=False)``; ``run`` is None for one that has verbs of its own."""
    verbs = parser.add_subparsers(metavar="VERB", required=True, parser_class=Parser)

    def add(name: str, run: Callable[[argparse.Namespace], int | None] | None, summary: str, example: str, overrides: bool = False) -> Parser:
        usage = "\n\n--section.key=value overrides any setting" if overrides else ""
        verb = verbs.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=f"example:\n  {example}{usage}")
        if run is not None:
            verb.set_defaults(run=run, takes_overrides=overrides)
        parser.verbs[name] = verb
        return verb

    return add


def parse(root: Parser, words: Sequence[str]) -> argparse.Namespace:
    """The verb's arguments, with its overrides in ``overrides``. A mistake ends the process, as argparse does."""
    parser = root
    for word in words:
        if not parser.verbs or word.startswith("-"):
            break
        if word not in parser.verbs:
            parser.error(f"no verb {word!r}{did_you_mean(word, parser.verbs)} (verbs: {', '.join(parser.verbs)})")
        parser = parser.verbs[word]
    overrides = []
    if parser.get_default("takes_overrides"):
        # Taken out first: argparse would read an override with a blank in its value as a file name.
        matches = {word: match[1] for word in words if (match := _OVERRIDE.fullmatch(word))}
        overrides = [word for word in words if word in matches and matches[word] not in parser.options]
        words = [word for word in words if word not in overrides]
    args, unknown = root.parse_known_args(words)
    for word in unknown:
        if word.startswith("--"):
            hint = did_you_mean(word.partition("=")[0], parser.options)
            how = "; an override is written --section.key=value, in one word" if parser.get_default("takes_overrides") and not hint else ""
            parser.error(f"no option {word!r}{hint}{how}")
    if unknown:
        parser.error(f"unexpected argument {unknown[0]!r}")
    args.overrides = overrides
    return args


def attempt(root: Parser, words: Sequence[str]) -> argparse.Namespace | str:
    """The verb's arguments, or what is wrong with the words; the process goes on."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return parse(root, words)
    except SystemExit as exit:
        return said.getvalue().partition("error: ")[2].strip() if exit.code else "asks for help, and does nothing"


# ---------------------------------------------------------------- types of arguments
def positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def sha256(text: str) -> str:
    if not re.fullmatch(r"[0-9A-Fa-f]{64}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no sha256, 64 hexadecimal digits")
    return text.lower()


def step_or_best(text: str) -> int | str:
    return text if text == "best" else int(text)
