"""README.md of a submission: scores of every seed, the budget, the test against the record, how to reproduce."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from titanlm.submission.metadata import MAX_BYTES, TIME_LIMIT_S, Submission
from titanlm.submission.statistics import LEVEL

_STAGES = {
    "raw": "the weights after the last step",
    "averaged": "their average over training",
    "after round trip": "those weights, quantized, written to the artifact and read back from it",
    "sliding": "the same file, windows overlapping, so that a token has the context before its window too",
}


def readme(submission: Submission, *, n_processes: int = 8) -> str:
    """The text. ``n_processes`` is what the command that reproduces it starts."""
    parts = [_head(submission), _scores(submission), _budget(submission), _test(submission), _reproduction(submission, n_processes)]
    return "\n\n".join(parts) + "\n"


def _head(submission: Submission) -> str:
    bits, n = submission.bits, len(submission.results)
    spread = "one seed" if bits.sd is None else f"mean of {n} seeds, standard deviation {bits.sd:.5f}"
    total = submission.bytes_total
    fit = f"{total:,} of {MAX_BYTES:,} bytes" if total <= MAX_BYTES else f"{total:,} bytes, {total - MAX_BYTES:,} over the limit of {MAX_BYTES:,}"
    lines = [f"# {_line(submission.name)}", f"**{bits.mean:.5f} bits per byte** ({spread}), {fit}. {_line(submission.hardware)}.", submission.blurb.strip()]
    return "\n\n".join(line for line in lines if line)


def _scores(submission: Submission) -> str:
    results = submission.results
    stages = list(dict.fromkeys(stage for result in results for stage in result.scores))
    chosen = list(dict.fromkeys(name for result in results for name in result.chosen))
    rows = [
        [
            str(result.seed),
            f"{result.steps:,}",
            f"{result.step_avg_ms:.2f}",
            *(f"{result.scores[stage].val_bpb:.5f}" if stage in result.scores else "–" for stage in stages),
            *(f"{result.chosen[name]:.4g}" if name in result.chosen else "–" for name in chosen),
            f"{submission.bytes_code + result.artifact_bytes:,}",
        ]
        for result in results
    ]
    header = ["seed", "steps", "ms/step", *stages, *(name.replace("_", " ") for name in chosen), "bytes"]
    said = "; ".join(["Bits per byte", "bytes: code and artifact", *(f"{stage}: {_STAGES[stage]}" for stage in stages if stage in _STAGES)]) + "."
    bits, losses = submission.bits, submission.losses
    spread = "" if bits.sd is None or losses.sd is None else f", standard deviation {bits.sd:.5f} and {losses.sd:.5f}"
    last = f"The last score counts: mean {bits.mean:.8f} bits per byte, val_loss {losses.mean:.8f} nats per token{spread}."
    return "\n\n".join(["## Scores", _table(header, rows), said, last, "![Loss over the run](loss.png)"])


def _budget(submission: Submission) -> str:
    best, total = submission.best, submission.bytes_total
    slowest, longest = max(result.train_time_s for result in submission.results), max(result.eval_time_s for result in submission.results)
    rows = [
        ["train_gpt.py", f"{submission.bytes_code:,} bytes", ""],
        [f"model.titanlm (seed {best.seed})", f"{best.artifact_bytes:,} bytes", ""],
        ["together", f"{total:,} bytes", f"{MAX_BYTES:,} bytes"],
        ["training, the slowest seed", f"{slowest:.1f} s", f"{TIME_LIMIT_S:.0f} s" if submission.track == "10min_16mb" else "none in this track"],
        ["evaluation, the slowest seed", f"{longest:.1f} s", f"{TIME_LIMIT_S:.0f} s" if submission.track == "10min_16mb" else "none in this track"],
    ]
    return "\n\n".join(["## Budget", _table(["what", "used", "allowed"], rows)])


def _test(submission: Submission) -> str:
    return f"## Against the record\n\n{_verdict(submission)}"


def _verdict(submission: Submission) -> str:
    record, found = submission.record, submission.losses
    if record is None:
        return "No record was named, so none is tested."
    against = f"{_line(record.name)} has a mean val_loss of {record.val_loss:.5f} nats per token; this has {found.mean:.5f}"
    if found.t is None or found.p is None:
        why = "one seed has no spread" if found.n == 1 else "all seeds have the same score"
        return f"{against}. No test: {why}."
    gain = "passes" if found.beats_record else "does not pass"
    return (
        f"{against}. One-sided t test of {found.n} seeds, that the mean is more than {found.margin} nats below it: "
        f"t = {found.t:.3f}, degrees of freedom {found.n - 1}, p = {found.p:.3g}; at p < {LEVEL} it {gain}. "
        "The record's mean is taken as exact."
    )


def _reproduction(submission: Submission, n_processes: int) -> str:
    return f"""## How to reproduce

```
pip install -r requirements.txt
SEED={submission.best.seed} DATA_PATH=... TOKENIZER_PATH=... torchrun --standalone --nproc_per_node={n_processes} train_gpt.py
DATA_PATH=... TOKENIZER_PATH=... python train_gpt.py --eval model.titanlm
```

The first trains, quantizes, writes the artifact and scores it; `MAX_WALLCLOCK_SECONDS` changes when training stops. \
The second scores the artifact that lies here. \
`DATA_PATH` is the folder of the challenge's shards, `TOKENIZER_PATH` the tokenizer's file. `train_gpt.py` needs no other file of this folder; \
titanlm is inside it and need not be installed. With titanlm, `titanlm submission verify .` checks sizes, keys and logs."""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(text: str) -> str:
    """On one line, so that it stays inside its heading or sentence."""
    return " ".join(text.split())
