"""README.md of a submission: its tables hold the numbers that it was made from."""

from __future__ import annotations

from dataclasses import replace

from titanlm.submission.metadata import Record, Score, SeedResult, Submission
from titanlm.submission.readme import readme


def result(seed: int, bpb: float, prune_fraction: float | None = 0.12) -> SeedResult:
    stages = {"raw": bpb + 0.014, "averaged": bpb + 0.013, "after round trip": bpb + 0.02, "sliding": bpb}
    chosen = {} if prune_fraction is None else {"prune_fraction": prune_fraction}
    return SeedResult(seed, 10_342, 58.004, 599.84, 178.2, 15_700_000 + seed, {name: Score(value * 1.6885, value) for name, value in stages.items()}, chosen)


THREE = Submission(
    name="Eleven\nlayers", author="a", github_id="a", blurb="What it is.\n\nAnd why.", date="2026-04-01", track="10min_16mb", hardware="8xH100 80GB SXM",
    pytorch_version="2.11.0", bytes_code=60_000, results=(result(2024, 1.13189429), result(1337, 1.13196492, 0.1), result(42, 1.13444261)),
    record=Record("PR 180", 1.9190),
)  # fmt: skip


def table(text: str, heading: str) -> list[list[str]]:
    """The cells below a heading, the rule left out."""
    section = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    return [rows[0], *rows[2:]]


def test_every_seed_has_its_row() -> None:
    header, *rows = table(readme(THREE), "Scores")
    assert header == ["seed", "steps", "ms/step", "raw", "averaged", "after round trip", "sliding", "prune fraction", "bytes"]
    assert rows[0] == ["2024", "10,342", "58.00", "1.14589", "1.14489", "1.15189", "1.13189", "0.12", "15,762,024"]
    assert [row[0] for row in rows] == ["2024", "1337", "42"]
    assert all(len(row) == len(header) for row in rows)


def test_head_mean_and_budget() -> None:
    text = readme(THREE)
    assert text.startswith("# Eleven layers\n\n**1.13277 bits per byte** (mean of 3 seeds, standard deviation 0.00145), 15,762,024 of 16,000,000 bytes.")
    assert "\n\nWhat it is.\n\nAnd why.\n\n" in text
    assert "mean 1.13276727 bits per byte" in text
    budget = {row[0]: row[1:] for row in table(text, "Budget")}
    assert budget["train_gpt.py"] == ["60,000 bytes", ""]
    assert budget["model.titanlm (seed 2024)"] == ["15,702,024 bytes", ""]
    assert budget["together"] == ["15,762,024 bytes", "16,000,000 bytes"]
    assert budget["training, the slowest seed"] == ["599.8 s", "600 s"]
    assert "SEED=2024 DATA_PATH=... TOKENIZER_PATH=... torchrun --standalone --nproc_per_node=8 train_gpt.py" in text


def test_the_test_is_told_with_its_numbers() -> None:
    text = readme(THREE)
    t, p = THREE.losses.t, THREE.losses.p
    assert t is not None
    assert p is not None
    assert f"PR 180 has a mean val_loss of 1.91900 nats per token; this has {THREE.losses.mean:.5f}" in text
    assert f"t = {t:.3f}, degrees of freedom 2, p = {p:.3g}; at p < 0.01 it does not pass." in text
    assert "it passes." in readme(replace(THREE, record=Record("old", 2.1)))
    assert "No test: one seed has no spread." in readme(replace(THREE, results=THREE.results[:1]))
    assert "No record was named" in readme(replace(THREE, record=None))


def test_what_a_run_has_not_is_not_told() -> None:
    one = replace(result(5, 1.2, None), scores={"raw": Score(2.0, 1.2)})
    text = readme(replace(THREE, results=(one,), track="non_record_16mb", bytes_code=400_000), n_processes=1)
    header, row = table(text, "Scores")
    assert header == ["seed", "steps", "ms/step", "raw", "bytes"]
    assert "deviation" not in text.split("## Against")[0]
    assert "averag" not in text
    assert "(one seed), 16,100,005 bytes, 100,005 over the limit of 16,000,000" in text
    assert "none in this track" in text
    assert "--nproc_per_node=1 " in text
    mixed = table(readme(replace(THREE, results=(one, *THREE.results))), "Scores")
    assert mixed[1] == ["5", "10,342", "58.00", "1.20000", "–", "–", "–", "–", "15,760,005"]
