"""Continuing a text: against recomputation, against exact distributions, and at every kind of end."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from titanlm.batch import Batch
from titanlm.cli import main
from titanlm.config import load
from titanlm.errors import NonFiniteError, TitanError
from titanlm.generate import choose, continue_ids, continue_text, generate_text, prompt_batch
from titanlm.registry import Component
from titanlm.tokenizers.training import train_sentencepiece
from titanlm.train import Trainer

CPU = torch.device("cpu")
BYTE = Component.named("tokenizer", "byte").build()


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a GPU, ``auto`` would take it, and sums would differ in the last digits."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def train(config_path: Path, *overrides: str, steps: int = 6) -> Trainer:
    with Trainer(load(config_path, [f"--train.steps={steps}", "--scheduler=constant", "--validation.0.max_tokens=100", *overrides])) as trainer:
        trainer.train()
    return trainer


def ids_of(model: Any, ids: Sequence[int], max_tokens: int = 40, **settings: Any) -> list[int]:
    return list(continue_ids(model, ids, **{"vocab_size": 257, "eos_id": None, "max_tokens": max_tokens, **settings}))


class Scripted(nn.Module):
    """Says the ids of a script one by one, whatever it reads; hidden states are the logits."""

    def __init__(self, script: Sequence[int], n_prompt: int, vocab_size: int = 257) -> None:
        super().__init__()
        self.script, self.n_prompt, self.vocab_size = list(script), n_prompt, vocab_size
        self.unused = nn.Parameter(torch.zeros(1))
        self.head = nn.Identity()

    def forward(self, batch: Batch) -> Tensor:
        said = batch.tokens.shape[1] - self.n_prompt
        logits = torch.zeros(*batch.tokens.shape, self.vocab_size)
        logits[0, -1, self.script[said % len(self.script)]] = 50.0
        return logits


class Uncached(nn.Module):
    """A model without ``new_cache``, whose forward also gives auxiliary sums, as an outside one may."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner, self.head, self.config = model, model.head, model.config

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.inner(batch), {}


def pieces(script: Sequence[int], max_tokens: int | None = None, prompt: str = "", tokenizer: Any = BYTE) -> list[str]:
    n_prompt = len(tokenizer.encode(prompt)) + (tokenizer.bos_id is not None)
    model = Scripted(script, n_prompt, tokenizer.vocab_size)
    return list(continue_text(model, tokenizer, prompt, max_tokens=max_tokens or len(script), temperature=0))


# ---------------------------------------------------------------- the cache
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_greedy_with_the_cache_is_greedy_over_the_whole_text(tiny: Path, precision: str) -> None:
    trainer = train(tiny, f"--train.precision={precision}", steps=12)
    model: Any = trainer.model.eval()
    for prompt in ("", "a", "größe 🙂 and words"):
        ids = [256, *BYTE.encode(prompt).tolist()]
        found = ids_of(model, ids, 40, temperature=0)
        with torch.no_grad():
            for place, token in enumerate(found):
                logits = model.head(model(prompt_batch(ids + found[:place], 0, CPU))[0, -1])
                best = logits[:257].max()
                # In bf16 two logits may be equal, and rounding in another order decides between them.
                assert logits[token] >= best - (0.06 if precision == "bf16" else 1e-5)
                if precision == "fp32":
                    assert token == int(logits.argmax())
        assert len(found) == 40


def test_a_model_without_a_cache_gives_the_same(tiny: Path) -> None:
    model = train(tiny).model.eval()
    for settings in ({"temperature": 0}, {"temperature": 1.0, "seed": 3, "top_k": 20}):
        assert ids_of(Uncached(model), [256, 97], **settings) == ids_of(model, [256, 97], **settings)


# ---------------------------------------------------------------- sampling
def exact_distribution(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """Token by token, from the likeliest on, in float64."""
    z = np.exp((logits - logits.max()) / temperature)
    order = sorted(range(len(z)), key=lambda i: -z[i])
    if top_k is not None:
        for i in order[top_k:]:
            z[i] = 0.0
    p = z / z.sum()
    if top_p is not None:
        mass = 0.0
        for i in order:
            if mass >= top_p:
                p[i] = 0.0
            mass += p[i]
    result: np.ndarray = p / p.sum()
    return result


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.5, None, None), (2.0, 3, None), (1.0, None, 0.6), (0.8, 4, 0.9), (1.0, 100, 1.0), (1.0, None, 1e-9), (1.0, 1, None)],
)
def test_sampling_against_the_exact_distribution(temperature: float, top_k: int | None, top_p: float | None) -> None:
    logits = torch.tensor([1.0, -0.5, 2.0, 0.3, 1.7, -3.0])
    expected = exact_distribution(logits.double().numpy(), temperature, top_k, top_p)
    generator = torch.Generator().manual_seed(1)
    n = 4000
    counts = np.zeros(6)
    for _ in range(n):
        counts[choose(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)] += 1
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi_square = ((counts[kept] - n * expected[kept]) ** 2 / (n * expected[kept])).sum()
    assert chi_square < 25.7  # of 5 degrees of freedom at most: exceeded once in 10,000


def test_extreme_temperatures() -> None:
    logits = torch.tensor([5.0, 80.0, 79.0, -torch.inf])
    generator = torch.Generator().manual_seed(0)
    for temperature in (0.0, 1e-40, 1e-6):
        assert choose(logits, temperature=temperature, top_k=None, top_p=None, generator=generator) == 1
    seen = {choose(logits, temperature=1e6, top_k=None, top_p=None, generator=generator) for _ in range(100)}
    assert seen == {0, 1, 2}
    for bad in (torch.nan, torch.inf):
        with pytest.raises(NonFiniteError, match="the model's logits are not finite"):
            choose(torch.tensor([0.0, bad]), temperature=0, top_k=None, top_p=None, generator=generator)


def test_a_seed_settles_the_text(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tiny).folder.path
    state = torch.get_rng_state()
    texts = ["".join(generate_text(run, prompt="a", max_tokens=60, temperature=1.0, seed=seed)) for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state)
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", "a", "--max-tokens=60", "--temperature=1.0", "--seed=5"]) == 0
    assert capsys.readouterr().out == f"a{texts[0]}\n"


# ---------------------------------------------------------------- ends
def test_stops_at_the_end_of_the_document() -> None:
    assert "".join(pieces([*b"one", 256, *b"two"])) == "one"
    assert pieces([256]) == []
    assert ids_of(Scripted([1, 2, 3, 256], 1), [256], eos_id=256, temperature=0) == [1, 2, 3]
    assert ids_of(Scripted([1, 2, 3, 256], 1), [256], 6, eos_id=None, temperature=0) == [1, 2, 3, 256, 1, 2]


def test_stops_where_the_model_has_no_more_positions(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = train(tiny, "--train.seq_len=16", "--model.max_positions=16", steps=2)
    prompt = [256, *b"a prompt!"]
    capsys.readouterr()
    for model in (trainer.model, Uncached(trainer.model)):
        found = ids_of(model, prompt, 50, temperature=0)
        assert len(found) == 7  # ten ids and six more fill the positions; the seventh is only chosen
        assert capsys.readouterr().err == "\nstopped: the text has reached model.max_positions = 16 tokens\n"
    assert ids_of(trainer.model, prompt, 7, temperature=0) == found
    assert len(ids_of(trainer.model, [256] * 16, 50, temperature=0)) == 1
    capsys.readouterr()
    assert len(ids_of(trainer.model, prompt, 7)) == 7
    assert capsys.readouterr().err == ""  # it was not cut short
    with pytest.raises(TitanError, match="the prompt is 17 tokens long and model.max_positions is 16; shorten the prompt"):
        ids_of(trainer.model, [256] * 17, 1)
    assert main(["generate", str(trainer.folder.path), "--prompt", "x" * 16]) == 2
    assert "model.max_positions is 16" in capsys.readouterr().err


def test_samples_of_a_run_do_not_stop_it(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """128 tokens are asked for, 16 there is room for."""
    trainer = train(tiny, "--train.seq_len=16", "--model.max_positions=16", "--train.sample_every=1", "--train.sample_prompt=ab", steps=2)
    assert trainer.progress.step == 2
    assert capsys.readouterr().out.count("sample at step") == 2


def test_nothing_to_start_from(tiny: Path, corpus: Path) -> None:
    path = tiny.parent / "spm.model"
    train_sentencepiece([corpus.read_text(encoding="utf-8")], path, 320)
    tokenizer = Component.named("tokenizer", "sentencepiece", path=str(path), add_bos=False).build()
    with pytest.raises(TitanError, match="nothing to start from: this tokenizer has no start-of-document id, so give a prompt"):
        pieces([5], tokenizer=tokenizer)
    assert "".join(pieces(tokenizer.encode(" word").tolist(), prompt="a", tokenizer=tokenizer)) == " word"


# ---------------------------------------------------------------- characters
@pytest.mark.parametrize("text", ["한국어 문장", "🙂🙂", "größe", "a\ufffdb", "日本\n", "👩‍👩‍👧"])
def test_characters_come_out_whole(text: str) -> None:
    raw = text.encode()
    found = pieces(list(raw))
    assert "".join(found) == text
    assert all(piece in ("\ufffd", "\ufffdb") or "\ufffd" not in piece for piece in found)
    for n in range(1, len(raw)):  # cut anywhere: as much as is whole
        assert "".join(pieces(list(raw), n)) == raw[:n].decode(errors="ignore").rstrip("\ufffd")
        assert "".join(pieces([*raw[:n], 256])) == raw[:n].decode(errors="ignore").rstrip("\ufffd")


def test_bytes_that_are_no_text_do_not_hold_it_up() -> None:
    assert "".join(pieces([*b"a", 0xFF, *b"b"])) == "a\ufffdb"
    assert "".join(pieces([0x80] * 9 + [*b"z"])) == "\ufffd" * 9 + "z"
    assert len("".join(pieces([0x80] * 9))) == 6  # the last three might have been the start of something
    assert "".join(pieces([0xF0, 0x9F, *b"x"])) == "\ufffdx"
    assert "".join(pieces(list("é".encode()), prompt="caf")) == "é"


def other_model(path: Path, corpus: Path) -> str:
    """A SentencePiece model that puts a space before the first word, as most do."""
    import sentencepiece

    out = io.BytesIO()
    lines: Iterator[str] = (line for line in corpus.read_text(encoding="utf-8").splitlines() if line)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=out, vocab_size=400, model_type="bpe", byte_fallback=True, minloglevel=2)
    path.write_bytes(out.getvalue())
    return str(path)


def test_sentencepiece_keeps_spaces_and_characters(tiny: Path, corpus: Path) -> None:
    train_sentencepiece([corpus.read_text(encoding="utf-8")], tiny.parent / "own.model", 320)
    for path in (str(tiny.parent / "own.model"), other_model(tiny.parent / "other.model", corpus)):
        tokenizer = Component.named("tokenizer", "sentencepiece", path=path).build()
        whole = tokenizer.encode("one two 🐢 three 漢字").tolist()
        prompt = tokenizer.encode("one").tolist()
        assert whole[: len(prompt)] == prompt
        found = pieces(whole[len(prompt) :], prompt="one", tokenizer=tokenizer)
        assert "".join(found) == " two 🐢 three 漢字"
        assert not any("\ufffd" in piece for piece in found)


def test_padding_rows_of_the_vocabulary_are_never_chosen(tiny: Path) -> None:
    trainer = train(tiny, "--model.vocab_size=384", "--model.tie_embeddings=false", steps=1)
    model = trainer.model
    with torch.no_grad():
        model.head.weight[257:] *= 1000.0
    for settings in ({"temperature": 0}, {"temperature": 5.0}, {"temperature": 1.0, "top_k": 300}):
        assert max(ids_of(model, [256], 60, **settings)) < 257


# ---------------------------------------------------------------- what it leaves behind
def stance() -> str:
    from torch._dynamo import eval_frame

    return str(eval_frame._stance.stance)


def test_the_model_and_the_compiler_are_left_as_they_were(tiny: Path) -> None:
    model = train(tiny, steps=1).model
    for training in (True, False):
        model.train(training)
        text = continue_ids(model, [256], vocab_size=257, eos_id=None, max_tokens=30)
        next(text)
        assert stance() == "default"  # between two tokens the caller may train
        text.close()
        assert model.training is training
        with torch.no_grad():
            model.norm.weight.fill_(torch.nan)
        with pytest.raises(NonFiniteError):
            ids_of(model, [256])
        with torch.no_grad():
            model.norm.weight.fill_(1.0)
        assert model.training is training
        assert stance() == "default"
    assert torch.is_grad_enabled()


def test_a_cache_that_does_not_fit_leaves_the_compiler_alone(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = train(tiny, steps=1).model

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(model, "new_cache", full)
    with pytest.raises(torch.OutOfMemoryError):
        ids_of(model, [256])
    assert stance() == "default"
    assert model.training
