"""Scores against sums over the raw documents in float64, and everything they must leave alone."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from titanlm.batch import Batch
from titanlm.cli import main
from titanlm.config import Validation, load
from titanlm.distributed.world import Peers, World
from titanlm.errors import ConfigError, DataError, TitanError
from titanlm.evaluate import Scores, ValidationSet, evaluate_target, open_set, score, summary
from titanlm.registry import Component
from titanlm.stream import build_streams
from titanlm.targets import open_target
from titanlm.train import Trainer

CPU = torch.device("cpu")
BOUNDARY = 256


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a GPU, ``auto`` would take it, and sums would differ in the last digits."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def trained(config_path: Path, *overrides: str, steps: int = 4) -> Trainer:
    with Trainer(load(config_path, [f"--train.steps={steps}", "--scheduler=constant", *overrides])) as trainer:
        trainer.train()
    return trainer


def held_out(corpus: Path, fraction: float) -> list[bytes]:
    """The paragraphs of the validation split, by the rule in the docs."""
    paragraphs = corpus.read_bytes().split(b"\n\n")
    return [text for text in paragraphs if int.from_bytes(hashlib.sha256(b"titanlm validation\0" + text).digest()[:8], "big") < fraction * 2**64]


def exact(model: torch.nn.Module) -> Any:
    """The model in float64."""
    model = copy.deepcopy(model).double().eval()
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float64
    return model


@torch.no_grad()
def nll_of(model: Any, ids: list[int], targets: list[int]) -> float:
    """−Σ log p(target | ids up to its place): one text, alone, from position 0, in float64."""
    tokens = torch.tensor([ids])
    zeros = torch.zeros_like(tokens)
    hidden = model(Batch(tokens, tokens, torch.arange(len(ids))[None], zeros, zeros, document_mask=False))
    log_p = torch.log_softmax(model.head(hidden[0]), -1)
    assert log_p.dtype == torch.float64
    return -float(log_p[torch.arange(len(targets)), torch.tensor(targets)].sum())


# ---------------------------------------------------------------- numbers
def test_against_every_document_by_itself(tiny: Path, corpus: Path) -> None:
    """Rows so long that none of the documents is cut: then packing must not change anything."""
    fraction = 0.03
    trainer = trained(tiny, f"--dataset.validation_fraction={fraction}", "--validation.0.max_tokens=0")
    model, texts = exact(trainer.model), held_out(corpus, fraction)
    assert len(texts) >= 4
    nll = sum(nll_of(model, [BOUNDARY, *text], [*text, BOUNDARY]) for text in texts)
    n_bytes, n_tokens = sum(map(len, texts)), sum(len(text) + 1 for text in texts)
    entry = trainer.validation[0]
    for seq_len, micro_batch in ((2048, 1), (2048, 3), (2500, 1)):
        scores = score(trainer.module, replace(entry, seq_len=seq_len, micro_batch=micro_batch), CPU)
        assert (scores.n_tokens, scores.n_bytes) == (n_tokens, n_bytes)
        assert scores.nll == pytest.approx(nll, rel=1e-6)
        assert scores.loss == pytest.approx(nll / n_tokens, rel=1e-6)
        assert scores.perplexity == pytest.approx(math.exp(nll / n_tokens), rel=1e-5)
        assert scores.bits_per_byte == pytest.approx(nll / math.log(2) / n_bytes, rel=1e-6)


@pytest.mark.parametrize("document_mask", [True, False])
def test_rows_that_cut_documents(tiny: Path, corpus: Path, document_mask: bool) -> None:
    """Each target once, seen from its row alone, and inside its document where documents are masked."""
    trainer = trained(tiny, f"--data.document_mask={str(document_mask).lower()}", "--validation.0.max_tokens=0")
    model, texts = exact(trainer.model), held_out(corpus, 0.1)
    ids = [i for text in texts for i in (BOUNDARY, *text, BOUNDARY)]
    starts = set(np.cumsum([0] + [len(text) + 2 for text in texts]).tolist())
    nll, n_tokens, n_bytes, seq_len = 0.0, 0, 0, 48
    for first in range(0, len(ids) - 1, seq_len):
        end = min(first + seq_len, len(ids) - 1)  # of the targets' places
        cuts = [first, *(at for at in range(first + 1, end) if document_mask and at in starts), end]
        for a, b in zip(cuts, cuts[1:], strict=False):
            targets = ids[a + 1 : b + 1]
            if document_mask and b in starts:
                targets = targets[:-1]  # the next document's first id
            nll += nll_of(model, ids[a : a + len(targets)], targets) if targets else 0.0
            n_tokens, n_bytes = n_tokens + len(targets), n_bytes + sum(target != BOUNDARY for target in targets)
    assert n_bytes == sum(map(len, texts))
    for micro_batch in (1, 4, 7):
        scores = score(trainer.module, replace(trainer.validation[0], micro_batch=micro_batch), CPU)
        assert (scores.n_tokens, scores.n_bytes) == (n_tokens, n_bytes)
        assert scores.nll == pytest.approx(nll, rel=1e-6)


SHORT = ["a pad", "ab", "aaaa aaaa", "größe", "b", "🙂 and a", "the longest of them all"]


@pytest.mark.parametrize("packer", ["none", "best_fit", "concat"])
def test_padding_is_no_label_whatever_its_id(tiny: Path, tmp_path: Path, packer: str) -> None:
    """Short documents, padded with what is also a label: the separator that ends each of them, or a letter of theirs."""
    file = tmp_path / "short.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in SHORT), encoding="utf-8")
    shapes = ((1, 64), (3, 96), (16, 130)) if packer != "concat" else ((1, 130), (3, 140), (16, 150))  # `concat` would cut documents at shorter rows' ends
    sets = (f'{{name="of {rows}",file="{file}",seq_len={seq_len},micro_batch={rows},packer="{packer}"}}' for rows, seq_len in shapes)
    trainer = trained(tiny, f"--validation=[{','.join(sets)}]")
    model, texts = exact(trainer.model), [text.encode() for text in SHORT]
    nll = sum(nll_of(model, [BOUNDARY, *text], [*text, BOUNDARY]) for text in texts)
    for entry in trainer.validation:
        assert entry.boundaries["pad_id"] == trainer.tokenizer.eos_id == BOUNDARY
        batches = list(entry.batches())
        assert {batch.labels.shape for batch in batches} == {(entry.micro_batch, entry.seq_len)}
        assert any((batch.document_ids < 0).any() for batch in batches), "nothing is padded"
        found = score(trainer.module, entry, CPU)
        assert (found.n_tokens, found.n_bytes) == (sum(len(text) + 1 for text in texts), sum(map(len, texts)))
        assert found.nll == pytest.approx(nll, rel=1e-6)
        assert found == score(trainer.module, replace(entry, boundaries=entry.boundaries | {"pad_id": ord("a")}), CPU)


def test_max_tokens_takes_the_first_rows(tiny: Path) -> None:
    trainer = trained(tiny)
    entry = replace(trainer.validation[0], max_tokens=0)
    whole = score(trainer.module, entry, CPU)
    parts = [score(trainer.module, replace(entry, max_tokens=limit), CPU) for limit in (1, 48, 95, 96, 480, 10**9)]
    assert parts[0] == parts[1] == parts[2]  # whole rows, one at least
    assert parts[0].n_tokens <= 48 < parts[3].n_tokens <= 96
    assert [part.nll for part in parts] == sorted(part.nll for part in parts)
    assert parts[-1] == whole
    assert score(trainer.module, entry, CPU) == whole  # every scoring starts from the start


SLIDING_16 = Component.named("packer", "sliding", stride=16)
SLIDING = '--validation=[{name="sliding",packer={name="sliding",stride=16}}]'


@pytest.mark.parametrize("document_mask", [True, False])
def test_sliding_rows_score_each_target_once_with_what_is_before_it(tiny: Path, corpus: Path, document_mask: bool) -> None:
    """Windows at 0, 16, 32..., each by itself in float64: the first is scored whole, of the others the last 16 targets."""
    fraction, seq_len, stride = 0.03, 48, 16
    settings = (SLIDING, f"--dataset.validation_fraction={fraction}", f"--data.document_mask={str(document_mask).lower()}", "--data.boundary_label=next")
    trainer = trained(tiny, *settings)
    model, texts = exact(trainer.model), held_out(corpus, fraction)
    ids = [i for text in texts for i in (BOUNDARY, *text, BOUNDARY)]
    starts = np.cumsum([0] + [len(text) + 2 for text in texts]).tolist()
    nll = n_windows = 0.0
    for first in range(0, len(ids) - 1, stride):
        end = min(first + seq_len, len(ids) - 1)
        scored = first if first == 0 else first + seq_len - stride
        if scored >= end:
            break
        n_windows += 1
        cuts = [first, *(at for at in starts if document_mask and first < at < end), end]
        for a, b in zip(cuts, cuts[1:], strict=False):
            if b > scored:  # the model is causal, so what was scored before is a difference
                nll += nll_of(model, ids[a:b], ids[a + 1 : b + 1]) - (nll_of(model, ids[a:scored], ids[a + 1 : scored + 1]) if scored > a else 0.0)
    entry = trainer.validation[0]
    plain = score(trainer.module, replace(entry, stream=open_set(Validation(), trainer.config, trainer.tokenizer)), CPU)
    for micro_batch in (1, 7):
        scores = score(trainer.module, replace(entry, micro_batch=micro_batch), CPU)
        assert (scores.n_tokens, scores.n_bytes) == (len(ids) - 1, sum(map(len, texts))) == (plain.n_tokens, plain.n_bytes)
        assert scores.nll == pytest.approx(nll, rel=1e-6)
        assert abs(scores.nll - plain.nll) > 1e-3, "more context must matter"
    assert sum(len(rows) for rows in replace(entry, micro_batch=1).rows()) == n_windows == 1 + -(-(len(ids) - 1 - seq_len) // stride)


class Turn(Peers):
    """One of several ranks that are scored one after the other: sums stay this rank's own."""

    def _reduce(self, values: Sequence[int], operation: str) -> list[int]:
        return list(values)

    def add_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@pytest.mark.parametrize("packer", ["concat", '{name="sliding",stride=16}', '{name="sliding",stride=16,drop_tail=true}'])
def test_ranks_share_a_set_and_make_only_their_own_batches(tiny: Path, packer: str) -> None:
    trainer = trained(tiny, f"--validation=[{{max_tokens=3001,packer={packer if '{' in packer else repr(packer)}}}]", steps=2)
    for micro_batch in (4, 5):
        entry = replace(trainer.validation[0], micro_batch=micro_batch)
        alone = score(trainer.module, entry, CPU)
        for size in (2, 4):
            with patch.object(ValidationSet, "batch", autospec=True, side_effect=ValidationSet.batch) as made:
                ranks = [score(trainer.module, entry, CPU, peers=Turn(World(rank, size))) for rank in range(size)]
            assert sum(rank.n_tokens for rank in ranks) == alone.n_tokens
            assert sum(rank.n_bytes for rank in ranks) == alone.n_bytes
            assert sum(rank.nll for rank in ranks) == pytest.approx(alone.nll, rel=1e-12)
            n_batches = len(list(entry.rows()))
            assert made.call_count == -(-n_batches // size) * size, "a rank makes no batch of another's, and as many as the others"


@pytest.mark.parametrize(("limit", "n_rows", "n_tokens"), [(1, 1, 48), (48, 1, 48), (63, 1, 48), (64, 2, 64), (79, 2, 64), (480, 28, 480)])
def test_max_tokens_counts_what_is_scored_where_rows_overlap(tiny: Path, limit: int, n_rows: int, n_tokens: int) -> None:
    config = load(tiny, ["--data.document_mask=false"])
    entry = ValidationSet.build(replace(config.validation[0], packer=SLIDING_16, max_tokens=limit), config, config.tokenizer.build())
    labels = torch.cat([batch.labels for batch in replace(entry, micro_batch=1).batches()])
    assert (len(labels), int((labels >= 0).sum())) == (n_rows, n_tokens)


def test_a_stored_config_may_be_scored_with_another_packer(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tiny, SLIDING, "--data.document_mask=false", steps=2).folder.path
    sixteen, four = (values(run, overrides=[f"--validation.0.packer.stride={stride}"])["validation"]["sliding"] for stride in (16, 4))
    assert values(run)["validation"]["sliding"] == sixteen
    assert four["tokens"] == sixteen["tokens"]
    assert four["loss"] != sixteen["loss"]
    tail = ["--validation.0.packer.drop_tail=true", "--validation.0.packer.stride=48"]
    assert values(run, overrides=tail)["validation"]["sliding"]["tokens"] == sixteen["tokens"] // 48 * 48
    with pytest.raises(DataError, match=r"packer\.stride: 49 positions between rows of 48"):
        evaluate_target(run, overrides=["--validation.0.packer.stride=49"])
    with pytest.raises(ConfigError, match=r"validation\.0\.packer\.strid: unknown key of packer 'sliding'; did you mean 'stride'"):
        load(tiny, ['--validation=[{packer={name="sliding",strid=1}}]'])
    capsys.readouterr()
    plain = trained(tiny, "--run.name=plain", steps=1).folder.path
    assert main(["eval", str(plain), "--json", "--validation.0.packer.name=sliding", "--validation.0.packer.stride=8"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["validation"]["validation"]["tokens"] > 1900


def test_the_validation_set_of_an_entry(tiny: Path) -> None:
    config = load(tiny, ['--validation=[{name="a",max_tokens=100},{name="b",split="train",max_tokens=7}]', "--train.seq_len=24", "--data.document_mask=false"])
    tokenizer = config.tokenizer.build()
    a, b = (ValidationSet.build(entry, config, tokenizer) for entry in config.validation)
    assert (a.name, a.max_tokens, a.seq_len, a.micro_batch, a.boundaries["document_mask"]) == ("a", 100, 24, 4, False)
    assert (b.name, b.max_tokens) == ("b", 7)
    read = [next(iter(entry.batches())) for entry in (a, b)]
    assert not torch.equal(read[0].tokens, read[1].tokens), "the splits must differ"
    assert torch.equal(next(iter(a.batches())).tokens, read[0].tokens), "a second scoring must read the same"


def test_a_set_may_have_its_own_file_length_and_batch(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "held_out.txt"
    file.write_text("one short text", encoding="utf-8")
    config = load(tiny, [f'--validation=[{{name="own",file="{file}",seq_len=5,micro_batch=2,every=3}}]'])
    entry = ValidationSet.build(config.validation[0], config, config.tokenizer.build())
    assert (entry.seq_len, entry.micro_batch, entry.every) == (5, 2, 3)
    batches = list(entry.batches())
    labels = torch.cat([batch.labels for batch in batches]).flatten()
    assert bytes(labels[(labels >= 0) & (labels < 256)].tolist()) == b"one short text"
    assert {tuple(batch.tokens.shape) for batch in batches} == {(2, 5)}
    assert torch.equal(torch.cat([batch.tokens for batch in entry.batches()]), torch.cat([batch.tokens for batch in batches]))
    with pytest.raises(ConfigError, match=r"validation\.0\.file: .*\.csv' ends in none of \.parquet, \.jsonl, \.jsonl\.gz, \.txt, \.bin"):
        load(tiny, ['--validation=[{file="x.csv"}]'])
    with pytest.raises(ConfigError, match=r"validation\.0\.file: excludes `dataset`"):
        load(tiny, ['--validation=[{file="x.txt",dataset="python_stdlib"}]'])


def test_a_split_without_end_needs_a_limit(tiny: Path) -> None:
    run = trained(tiny, steps=1).folder.path
    with pytest.raises(ConfigError, match=r"validation\.0\.max_tokens: the split 'train' never ends"):
        evaluate_target(run, overrides=["--validation.0.split=train", "--validation.0.max_tokens=0"])


def test_nothing_to_score_is_an_error(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare:
        """Bytes, with nothing around a document: a document of one byte has no target."""

        vocab_size, bos_id, eos_id, lossless, fingerprint = 257, None, None, True, "bare"

        def encode(self, text: str) -> np.ndarray:
            return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)

        def target_bytes(self, ids: np.ndarray, prev_ids: np.ndarray) -> np.ndarray:
            return np.ones_like(ids)

    trainer = trained(tiny, steps=1)
    letters = tiny.with_name("letters.txt")
    letters.write_text("a\nb\nc\n")
    dataset = Component.named("dataset", "text", paths=("corpus.txt",), validation_paths=(str(letters),), unit="line")
    monkeypatch.chdir(tiny.parent)
    (stream,) = build_streams(dataset, trainer.config.packer, Bare(), split="validation", n_streams=1, seed=0, seq_len=48)
    with pytest.raises(DataError, match="validation set 'validation': its text has no token that follows"):
        score(trainer.module, replace(trainer.validation[0], stream=stream), CPU)


def test_scores_that_are_too_large_for_a_float() -> None:
    scores = Scores(loss=1e4, n_tokens=2, n_bytes=0, nll=2e4)
    assert scores.perplexity == math.inf
    assert math.isnan(scores.bits_per_byte)
    assert scores.metrics("validation/v", "averaged_").keys() == {f"validation/v/averaged_{name}" for name in ("loss", "perplexity", "bits_per_byte")}


# ---------------------------------------------------------------- several sets
def metrics_of(losses: dict[str, float], prefix: str = "") -> dict[str, float]:
    """As of sets with a byte for two tokens."""
    scores = {name: Scores(loss, n_tokens=10, n_bytes=5, nll=10 * loss) for name, loss in losses.items()}
    return {key: value for name, one in scores.items() for key, value in one.metrics(f"validation/{name}", prefix).items()}


def test_a_summary_is_the_mean_by_weight() -> None:
    weights, losses = {"english": 3.0, "math": 1.0, "code": 0.5}, {"english": 12.26, "math": 2.5, "code": 11.0}
    sets = [Validation(name=name, weight=weight) for name, weight in weights.items()]
    mean = np.average(list(losses.values()), weights=list(weights.values()))
    found = summary(sets, metrics_of(losses))
    assert found == {
        "validation/summary/loss": pytest.approx(mean, rel=1e-14),
        "validation/summary/perplexity": pytest.approx(math.exp(mean), rel=1e-13),
        "validation/summary/bits_per_byte": pytest.approx(mean * 2 / math.log(2), rel=1e-14),
    }
    geometric = math.prod(math.exp(losses[name]) ** (weight / 4.5) for name, weight in weights.items())
    assert found["validation/summary/perplexity"] == pytest.approx(geometric, rel=1e-12)
    same = summary([Validation(name=name, weight=7.0) for name in losses], metrics_of(losses))
    assert same["validation/summary/loss"] == pytest.approx(sum(losses.values()) / 3, rel=1e-14)
    huge = [Validation(name=name, weight=weight * 5e307) for name, weight in weights.items()]  # their sum is no float
    assert summary(huge, metrics_of(losses))["validation/summary/loss"] == pytest.approx(mean, rel=1e-14)
    high = summary(sets, metrics_of(dict.fromkeys(losses, 1e4)))
    assert (high["validation/summary/loss"], high["validation/summary/perplexity"]) == (pytest.approx(1e4, rel=1e-14), math.inf)


def test_a_summary_is_of_all_its_sets_or_none() -> None:
    sets = [Validation(name="a"), Validation(name="b")]
    assert summary((), metrics_of({"a": 1.0})) == {}
    assert summary(sets, metrics_of({"a": 1.0, "c": 2.0})) == {}
    found = summary(sets, metrics_of({"a": 1.0, "b": 2.0}) | metrics_of({"a": 3.0, "b": 5.0}, "averaged_"))
    assert found["validation/summary/loss"] == 1.5
    assert found["validation/summary/averaged_loss"] == 4.0
    assert found["validation/summary/averaged_perplexity"] == pytest.approx(math.exp(4), rel=1e-14)
    assert not [key for key in summary(sets, metrics_of({"a": 1.0, "b": 2.0}) | metrics_of({"a": 3.0}, "averaged_")) if "averaged" in key]


def test_which_sets_count(tiny: Path) -> None:
    def counted(sets: str) -> list[str]:
        return [entry.name for entry in load(tiny, [f"--validation={sets}"]).counted]

    assert counted("[]") == counted("[{}]") == counted("[{},{name='b',weight=0}]") == []
    assert counted("[{name='a'},{name='b',weight=0},{name='c',weight=2}]") == ["a", "c"]
    for sets, problem in (
        ("[{name='a',weight=0},{name='b',weight=0}]", r"validation: every set has weight 0; give one that counts a weight above it"),
        ("[{name='a',weight=-1}]", r"validation\.0\.weight: expected a number greater than or equal to 0, got int -1"),
        ("[{},{name='summary'}]", r"validation\.1\.name: 'summary' is what the mean over sets is called; take another"),
    ):
        with pytest.raises(ConfigError, match=problem):
            counted(sets)


DOMAINS = '--validation=[{name="english",max_tokens=200,every=2,weight=3},{name="math",max_tokens=300,every=4},{name="code",max_tokens=400,every=1,weight=0}]'


def test_a_run_logs_the_summary_where_all_that_count_are_scored(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tiny, DOMAINS, '--logger=["console","jsonl","tensorboard"]', steps=6).folder.path
    lines = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "validation/code/loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    summed = [line for line in lines if any(key.startswith("validation/summary/") for key in line)]
    assert [line["step"] for line in summed] == [4, 6]
    printed = capsys.readouterr().out
    for line in summed:
        for prefix in ("", "averaged_"):
            english, math_, mean = (line[f"validation/{name}/{prefix}loss"] for name in ("english", "math", "summary"))
            assert mean == pytest.approx((3 * english + math_) / 4, rel=1e-14)
            assert line[f"validation/summary/{prefix}perplexity"] == pytest.approx(math.exp(mean), rel=1e-14)
            bits = [line[f"validation/{name}/{prefix}bits_per_byte"] for name in ("english", "math", "summary")]
            assert bits[2] == pytest.approx((3 * bits[0] + bits[1]) / 4, rel=1e-14)
            weights = " (averaged weights)" if prefix else ""
            said = f"validation summary{weights}: loss {mean:.4f}  perplexity {math.exp(mean):.4f}  bits per byte {bits[2]:.4f}"
            assert f"step {line['step']}/6  {said}" in printed
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("validation/summary/averaged_bits_per_byte")] == [4, 6]


def test_the_summary_of_a_finished_run(tiny: Path) -> None:
    run = trained(tiny, DOMAINS).folder.path
    for averaged in (False, True):
        found = values(run, averaged=averaged)["validation"]
        assert list(found) == ["english", "math", "code", "summary"]
        assert found["summary"].keys() == {"loss", "perplexity", "bits_per_byte"}
        for key in ("loss", "bits_per_byte"):
            assert found["summary"][key] == pytest.approx((3 * found["english"][key] + found["math"][key]) / 4, rel=1e-14)
        mean = found["summary"]
        last = evaluate_target(run, averaged=averaged).splitlines()[-1]
        said = f"loss {mean['loss']:.4f}  perplexity {math.exp(mean['loss']):.3f}  bits per byte {mean['bits_per_byte']:.4f}"
        assert last == f"  summary: {said}  (english 3, math 1)"
    assert "summary" not in values(run, overrides=["--validation.1.weight=0"])["validation"]


def test_sets_scored_before_are_scored_again_for_a_summary(tiny: Path) -> None:
    """The data end at a step at which one set was due, and at the end all are."""
    settings = ["--data.epochs=1", "--scheduler=constant", "--checkpoint.every=0", "--dataset.validation_fraction=0.9"]
    with Trainer(load(tiny, ["--run.name=first", *settings])) as trainer:
        trainer.train()
        last = trainer.progress.step
    assert 1 < last < 20
    sets = f'--validation=[{{name="due",max_tokens=100,every={last}}},{{name="end",max_tokens=100,every=0}},{{name="no",max_tokens=50,every={last},weight=0}}]'
    with Trainer(load(tiny, [*settings, sets])) as trainer:
        trainer.train()
        assert trainer.scored == {str(last): ["due", "no", "end"]}
    lines = [json.loads(line) for line in (trainer.folder.path / "metrics.jsonl").read_text().splitlines()]
    scored = [[name for name in ("due", "end", "no", "summary") if f"validation/{name}/loss" in line] for line in lines if line["step"] == last]
    assert [names for names in scored if names] == [["due", "no"], ["due", "end", "summary"]]


# ---------------------------------------------------------------- side effects
def test_scoring_leaves_everything_as_it_was(tiny: Path) -> None:
    with Trainer(load(tiny)) as trainer:
        for _ in range(3):
            trainer.train_step()
        state = json.dumps(trainer.loader.state(), default=lambda array: array.tolist())
        generators = random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state()
        weights = {name: tensor.clone() for name, tensor in trainer.module.state_dict().items()}
        for training in (True, False):
            trainer.module.train(training)
            score(trainer.module, trainer.validation[0], CPU)
            assert all(module.training == training for module in trainer.module.modules())
        assert random.getstate() == generators[0]
        assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(legacy=True), generators[1], strict=True))
        assert torch.equal(torch.get_rng_state(), generators[2])
        assert json.dumps(trainer.loader.state(), default=lambda array: array.tolist()) == state
        assert all(torch.equal(tensor, weights[name]) for name, tensor in trainer.module.state_dict().items())
        assert all(parameter.grad is None for parameter in trainer.model.parameters())
        assert torch.is_grad_enabled()


# ---------------------------------------------------------------- targets
def values(target: Path, **settings: Any) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(evaluate_target(target, as_json=True, **settings))
    return result


def test_raw_and_averaged_weights(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trained(tiny, steps=8)
    run = trainer.folder.path
    raw = score(trainer.module, trainer.validation[0], CPU)
    with trainer.averagers[0].swap():
        averaged = score(trainer.module, trainer.validation[0], CPU)
    assert raw != averaged
    assert values(run, averaged=False) == {
        "target": str(run),
        "weights": "raw",
        "validation": {
            "validation": {
                "loss": raw.loss, "perplexity": raw.perplexity, "bits_per_byte": raw.bits_per_byte, "tokens": raw.n_tokens, "bytes": raw.n_bytes,
                "text_bytes": raw.text_bytes, "uncounted_bytes": 0,
            }
        },
    }  # fmt: skip
    for choice in (None, True):
        result = values(run, averaged=choice)
        assert result["weights"] == "averaged"
        assert result["validation"]["validation"]["loss"] == averaged.loss
    capsys.readouterr()
    assert main(["eval", str(run), "--raw"]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head == f"{run / 'checkpoints' / 'step-00000008'} (raw weights)"
    assert line == (
        f"  validation: loss {raw.loss:.4f}  perplexity {raw.perplexity:.3f}  bits per byte {raw.bits_per_byte:.4f}"
        f"  ({raw.n_tokens:,} tokens, {raw.n_bytes:,} bytes)"
    )
    assert main(["eval", str(run), "--json", "--validation.0.max_tokens=100"]) == 0
    (result,) = capsys.readouterr().out.splitlines()
    assert json.loads(result)["validation"]["validation"]["tokens"] <= 96


def test_a_run_without_an_average(tiny: Path) -> None:
    text = tiny.read_text()
    tiny.write_text(text.replace('[averager]\nname = "ema"\ndecay = 0.9\n', ""))
    run = trained(tiny, steps=2).folder.path
    assert values(run)["weights"] == "raw"
    with pytest.raises(TitanError, match="has no averager, so there are no averaged weights"):
        evaluate_target(run, averaged=True)


def test_run_checkpoint_and_artifact_agree(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An artifact in float32 without quantizers is the averaged weights, bit for bit."""
    run = trained(tiny, "--export.dtype=float32", steps=8).folder.path
    assert main(["export", str(run)]) == 0
    targets = [run, run / "checkpoints" / "step-00000008", run / "artifact.titanlm"]
    results = [values(target) for target in targets]
    assert results[0]["validation"] == results[1]["validation"] == results[2]["validation"]
    assert [result["weights"] for result in results] == ["averaged", "averaged", "artifact"]
    whole, packed = open_target(targets[0]), open_target(targets[2])
    for name, parameter in whole.module.named_parameters():
        assert torch.equal(parameter, packed.module.get_parameter(name)), name
    assert values(targets[1].with_name("step-00000007"))["validation"] != results[0]["validation"]


def test_several_sets(tiny: Path) -> None:
    run = trained(tiny, '--validation=[{name="held out",max_tokens=500},{name="seen",split="train",max_tokens=500}]', steps=2).folder.path
    results = values(run)["validation"]
    assert list(results) == ["held out", "seen", "summary"]
    assert results["held out"]["loss"] != results["seen"]["loss"]
    assert evaluate_target(run).count("\n") == 3, "a head, two sets and their summary"


def test_how_far_counted_bytes_are_from_the_text_is_never_hidden(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import sentencepiece

    words = tiny.with_name("corpus.txt").read_text(encoding="utf-8")
    model = tiny.with_name("nmt.model")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words.split("\n\n")), model_prefix=str(model.with_suffix("")), vocab_size=340, byte_fallback=True, minloglevel=2
    )
    file = tiny.with_name("held_out.txt")
    file.write_text("two  spaces and the ﬁ ligature  ", encoding="utf-8")
    settings = [f'--tokenizer={{name="sentencepiece",path="{model}"}}', f'--validation=[{{name="own",file="{file}"}}]']
    run = trained(tiny, *settings, steps=1).folder.path
    said = r"own: bits per byte counts [-+]\d+ bytes \([-+]\d+\.\d\d%\) against the text: the tokenizer does not round-trip"
    assert re.search(said, capsys.readouterr().out)
    assert re.search(said, evaluate_target(run))
    scored = json.loads(evaluate_target(run, as_json=True))["validation"]["own"]
    assert scored["text_bytes"] == len(file.read_bytes())
    assert scored["bytes"] == scored["text_bytes"] - scored["uncounted_bytes"] != scored["text_bytes"]
