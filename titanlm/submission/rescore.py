"""The artifact of a submission: read here, and scored again by the submission's own script."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from titanlm.errors import ArtifactError, TitanError
from titanlm.submission.challenge_log import ChallengeLog
from titanlm.submission.folder import ARTIFACT, SCRIPT, Check, Folder
from titanlm.submission.metadata import MAX_BYTES, number
from titanlm.submission.process import environment, run

SCORE_TOLERANCE_BPB = 5e-4
"""Between two machines' scores of one artifact: bf16 and the kernels' order of sums."""


def read(folder: Folder, tokenizer: Path | None) -> Generator[Check, None, bool]:
    """Reads the artifact as ``titanlm eval`` would; returns whether it is sound and so can be scored."""
    if ARTIFACT not in folder.sizes:
        yield Check("not checked", "artifact", f"no {ARTIFACT}; artifacts of other formats are not opened, and no code is run")
        return False
    if folder.sizes[ARTIFACT] > MAX_BYTES:
        yield Check("not checked", ARTIFACT, "over the limit, so it is not opened")
        return False
    try:
        with tempfile.TemporaryDirectory() as scratch:
            check = _read(folder, Path(scratch), tokenizer)
    except (TitanError, OSError) as error:
        check = Check("FAIL", ARTIFACT, str(error))
    yield check
    return check.state == "ok"


def _read(folder: Folder, scratch: Path, tokenizer: Path | None) -> Check:
    from titanlm.exporters.artifact import inspect, read_artifact

    copy = scratch / ARTIFACT
    copy.write_bytes(folder.read(ARTIFACT, MAX_BYTES))
    try:
        header = inspect(copy)
        if header.tokenizer == "beside" and header.files:
            if tokenizer is None or len(header.files) != 1 or header.files[0].name == ARTIFACT:
                return Check("not checked", ARTIFACT, f"{len(header.tensors)} tensors by its header; for the rest, name the one file of its tokenizer")
            shutil.copyfile(tokenizer, scratch / header.files[0].name)
        read_artifact(copy)
    except ArtifactError as error:
        raise TitanError(str(error).removeprefix(f"{copy}: ")) from error
    return Check("ok", ARTIFACT, f"{len(header.tensors)} tensors ({header.codec}, {header.layout}); checksums are right, its tokenizer's too")


def rescore(
    folder: Folder, logs: Mapping[str, ChallengeLog], *, max_tokens: int, data: Path | None, tokenizer: Path | None, timeout_s: float
) -> Iterator[Check]:
    """Scores the artifact by the folder's own script, and compares with its log when that is of the same tokens."""
    if data is None or SCRIPT not in folder.sizes:
        yield Check("not checked", "re-score", f"asked for by naming validation shards and tokenizer; it runs {SCRIPT}, so only for folders you trust")
        return
    try:
        shards = sorted(path for path in data.iterdir() if path.suffix == ".bin" and ("_val_" in path.name or "_validation_" in path.name))
        if not shards:
            raise TitanError(f"{data}: no validation shards (*_val_*.bin) in it")
        with tempfile.TemporaryDirectory() as scratch:
            sets = _scored(folder, Path(scratch), shards, tokenizer, max_tokens, timeout_s)
    except (TitanError, OSError) as error:
        yield Check("FAIL", "re-score", str(error))
        return
    told = "; ".join(f"{name}: {values['bits_per_byte']:.8f} bits a byte over {values['tokens']:,.0f} tokens" for name, values in sets.items())
    yield Check("ok", "re-score", f"without titanlm, network and training data, {told}")
    yield _compared(folder, logs, sets, max_tokens)


def _compared(folder: Folder, logs: Mapping[str, ChallengeLog], sets: dict[str, dict[str, float]], max_tokens: int) -> Check:
    together = folder.sizes[SCRIPT] + folder.sizes[ARTIFACT]
    of_artifact = [log for log in logs.values() if log.total_bytes == together] or list(logs.values())
    claimed = [log.val_bpb for log in of_artifact if log.val_bpb is not None]
    if not claimed:
        return Check("not checked", "score", "no log has one")
    logged = f"{', '.join(f'{score:.8f}' for score in claimed)} in the log"
    if max_tokens:
        return Check("not checked", "score", f"{logged} are of the whole set, {max_tokens:,} tokens are not; leave --max-tokens out to compare")
    # The last set is the one that counts; of equals it is the one named.
    apart = {name: min(abs(values["bits_per_byte"] - score) for score in claimed) for name, values in reversed(sets.items())}
    name = min(apart, key=apart.__getitem__)
    said = f"{sets[name]['bits_per_byte']:.8f} on {name}, {logged}, apart by {apart[name]:.1e} where {SCORE_TOLERANCE_BPB:g} is allowed"
    return Check("ok" if apart[name] <= SCORE_TOLERANCE_BPB else "FAIL", "score", said)


def _scored(folder: Folder, scratch: Path, shards: Sequence[Path], tokenizer: Path | None, max_tokens: int, timeout_s: float) -> dict[str, dict[str, float]]:
    """What train_gpt.py prints of the artifact, by validation set. Raises TitanError when it fails."""
    home, place = scratch / "submission", scratch / "data"
    home.mkdir()
    place.mkdir()
    for name in (SCRIPT, ARTIFACT):  # what is counted, and nothing else
        (home / name).write_bytes(folder.read(name, MAX_BYTES))
    for shard in shards:
        (place / shard.name).symlink_to(shard.absolute())
    variables = environment(scratch) | {"DATA_PATH": str(place)}
    if tokenizer is not None:
        (scratch / "tokenizer").mkdir()
        variables["TOKENIZER_PATH"] = str(shutil.copy(tokenizer, scratch / "tokenizer" / tokenizer.name))
    command = [sys.executable, "-I", str(Path(__file__).with_name("isolated.py")), SCRIPT, "--eval", ARTIFACT]
    command += ["--max-tokens", str(max_tokens)] if max_tokens else []
    ended = run(command, home, variables, timeout_s)
    if ended.status:
        raise TitanError(f"{SCRIPT} --eval ended with status {ended.status}: {ended.last_words}")
    for line in reversed(ended.output.decode("utf-8", "replace").splitlines()):
        with contextlib.suppress(ValueError, RecursionError):
            if sets := _sets(json.loads(line)):
                return sets
    raise TitanError(f"{SCRIPT} --eval printed no line of JSON with a set's loss, bits_per_byte and tokens")


def _sets(document: Any) -> dict[str, dict[str, float]]:
    """The validation sets of a printed line; empty when it is another line."""
    validation = document.get("validation", document) if isinstance(document, dict) else None
    sets: dict[str, dict[str, float]] = {}
    for name, values in validation.items() if isinstance(validation, dict) else ():
        numbers = {key: number(values.get(key)) for key in ("loss", "bits_per_byte", "tokens")} if isinstance(values, dict) else {}
        known = {key: value for key, value in numbers.items() if value is not None}
        if len(known) == 3:
            sets[name] = known
    return sets
