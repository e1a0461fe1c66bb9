"""`titanlm data inspect --overlap`: validation texts that training also reads.

A score on text that was trained on says nothing. Equal texts are found by the
64-bit hashes of the validation texts, which are held in memory, in one pass
over the training data; of a million texts and a billion, one pair would be
taken for equal by chance in twenty thousand such comparisons. Texts that differ
in one character are different here: near duplicates are not looked for.

Where one side has only tokens, the tokens are compared, without the special ids
at their ends.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from titanlm.datasets.inspect import beginning, line, progress
from titanlm.datasets.opening import Piece, Reading, Target, open_targets
from titanlm.errors import TitanError
from titanlm.registry import Tokenizer

_SHOWN = 5


@dataclass
class Overlap:
    """What a validation set shares with the training data."""

    validation: str
    documents: int = 0
    different: int = 0
    shared_documents: int = 0
    """Documents of the validation set whose text is in training."""
    shared_different: int = 0
    times: int = 0
    """Documents of the training data with such a text."""
    examples: list[tuple[str, str, str]] = field(default_factory=list)
    """(source in training, source in validation, beginning of the text)."""


def overlap(
    words: Sequence[str],
    *,
    tokenizer: str | None = None,
    column: str | None = None,
    max_rows: int | None = None,
    as_json: bool = False,
    overrides: Sequence[str] = (),
) -> tuple[str, bool]:
    """What the validation data of ``words`` (a config, or TRAIN and VALIDATION) shares with its training data; whether it shares anything.

    ``max_rows`` are read of each dataset at most.

    Raises TitanError when the words name no two sides, and when tokens are to
    be compared with text and no tokenizer is given.
    """
    sides = [open_targets(word, tokenizer=tokenizer, column=column, overrides=overrides) for word in words]
    if len(words) == 1 and words[0].endswith(".toml"):
        training, validation = ([target for target in sides[0] if target.validation is wanted] for wanted in (False, True))
    elif len(words) == 2:
        training, validation = [target for target in sides[0] if not target.validation], sides[1]
        validation = [target for target in validation if target.validation] or validation
    else:
        raise TitanError("--overlap compares the two sides of one config, or two targets: TRAIN VALIDATION")
    if not validation:
        raise TitanError(f"{words[0]}: has no validation set to compare training with")
    readings = [(target, Reading(target, max_rows)) for target in (*validation, *training)]
    by_tokens = any(not hasattr(reading.dataset, "next_text") for _, reading in readings)
    if by_tokens and any(target.tokenizer is None and hasattr(reading.dataset, "next_text") for target, reading in readings):
        raise TitanError("one side has only tokens and the other text: name the tokenizer of the tokens with --tokenizer")
    found: list[tuple[Overlap, dict[bytes, list[int]], list[str]]] = []
    stopped = False
    for target, reading in readings[: len(validation)]:
        result = Overlap(target.label)
        places: dict[bytes, list[int]] = {}
        sources: list[str] = []
        for piece in progress(reading, max_rows):
            key = _key(piece, target, by_tokens)
            # [documents of it in validation, where the first one is, documents of it in training]
            entry = places.get(key)
            if entry is None:
                places[key] = [1, len(sources), 0]
                sources.append(piece.source)
            else:
                entry[0] += 1
            result.documents += 1
        result.different = len(places)
        stopped |= reading.stopped
        found.append((result, places, sources))
    for target, reading in readings[len(validation) :]:
        for piece in progress(reading, max_rows):
            key = _key(piece, target, by_tokens)
            for result, places, sources in found:
                entry = places.get(key)
                if entry is None:
                    continue
                if not entry[2] and len(result.examples) < _SHOWN:
                    result.examples.append((piece.source, sources[entry[1]], beginning(piece, target)))
                entry[2] += 1
        stopped |= reading.stopped
    results = []
    for result, places, _ in found:
        shared = [entry for entry in places.values() if entry[2]]
        result.shared_documents, result.shared_different = sum(entry[0] for entry in shared), len(shared)
        result.times = sum(entry[2] for entry in shared)
        results.append(result)
    any_shared = any(result.times for result in results)
    if as_json:
        return json.dumps({"overlap": [asdict(result) for result in results], "stopped": stopped}), any_shared
    lines = [text for result in results for text in _lines(result)]
    if stopped:
        lines.append("stopped by --rows: what was not read was not compared")
    return "\n".join(lines), any_shared


def _key(piece: Piece, target: Target, by_tokens: bool) -> bytes:
    if not by_tokens:
        assert piece.text is not None
        data = piece.text.encode("utf-8", "surrogatepass")
    else:
        data = _bare(piece, target.tokenizer)
    return hashlib.blake2b(data, digest_size=8).digest()


def _bare(piece: Piece, tokenizer: Tokenizer | None) -> bytes:
    """The tokens without the special ids at their ends, which depend on settings."""
    ids = piece.tokenise().ids
    special = () if tokenizer is None else (tokenizer.bos_id, tokenizer.eos_id)
    start = int(len(ids) > 0 and int(ids[0]) in special)
    end = len(ids) - int(len(ids) > start and int(ids[-1]) in special)
    return ids[start:end].astype("<i4").tobytes()


def _lines(result: Overlap) -> list[str]:
    different = f" ({result.different:,} different)" if result.different < result.documents else ""
    head = f"{line(result.validation)}: {result.documents:,} documents{different}"
    if not result.times:
        return [f"{head}, none of them in training"]
    lines = [f"{head}, {result.shared_documents:,} of them in training ({result.shared_different:,} different texts, met {result.times:,} times)"]
    for training, validation, text in result.examples:
        lines += [f"  {line(training)} = {line(validation)}", f"    {line(text)}"]
    return lines
