"""Measuring attention and choosing by it: what is chosen, that it is kept, and that it is chosen again where it cannot serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from titanlm import attention_choice
from titanlm.attention_choice import Shape, drawn_batch, fastest, measure, settle_attention
from titanlm.check import check
from titanlm.config import RunConfig, load
from titanlm.distributed.world import Peers
from titanlm.environment import requirements
from titanlm.errors import TitanError
from titanlm.models.decoder import Decoder, DecoderConfig
from titanlm.tuned import TUNED, Tuned

ROOT = Path(__file__).parents[1]
CUDA = torch.device("cuda")
TIMES: dict[str, tuple[float, float] | str] = {"cudnn": (1.32e-3, 4.29e-3), "flash4": (1.36e-3, 3.64e-3), "sdpa": (1.33e-3, 4.3e-3)}


def shape(**changes: Any) -> Shape:
    settings = {"rows": 2, "seq_len": 40, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "documents": False, "dtype": torch.float32}
    return Shape(**{**settings, **changes})


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, "cudnn+flash4"),
        ({"flash4": "RuntimeError: no"}, "cudnn"),
        ({"cudnn": "RuntimeError: no"}, "flash4"),
        ({"cudnn": "no", "flash4": "no"}, "sdpa"),
        ({"cudnn": "no", "flash4": "no", "sdpa": "no"}, "sdpa"),
        ({"sdpa": (1.3e-3, 3.64e-3)}, "cudnn+flash4"),  # 0.4 % less is noise
        ({"sdpa": (1e-3, 3e-3)}, "sdpa"),
        ({"flash3": (1e-3, 5e-3)}, "flash3+flash4"),
    ],
)
def test_each_pass_has_the_fastest_kernel(changes: dict[str, Any], chosen: str) -> None:
    assert fastest({**TIMES, **changes}) == chosen


def test_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)  # whatever tests before this one left
    found = measure(["sdpa", "math", "cudnn"], shape(), torch.device("cpu"), repeats=1, each=1)
    assert all(seconds > 0 for name in ("sdpa", "math") for seconds in found[name])  # type: ignore[operator]
    assert found["cudnn"] == (
        'TitanError: model.attention_backend: "cudnn" computes in bf16 or fp16 alone, not in float32; set train.precision = "bf16", or use "auto" or "sdpa"'
    )
    for documents in (False, True):
        here = shape(documents=documents, seq_len=2000)
        batch = drawn_batch(here)
        ids = batch.document_ids.numpy() if documents else np.zeros((2, 2000))
        _, lengths = np.unique(ids + 10_000 * np.arange(2)[:, None], return_counts=True)
        assert here.flops(batch) == 4 * 4 * 16 * sum(n * (n + 1) / 2 for n in lengths)
        assert (len(lengths) > 2) == documents


# ---------------------------------------------------------------- at the start of a run
@pytest.fixture
def config() -> RunConfig:
    return load(ROOT / "train_configs/debug.toml", ["--train.precision=bf16", "--data.document_mask=false"])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """One that serves cuDNN and FlashAttention 4; ``measured`` counts."""
    here: dict[str, Any] = {"served": {"cudnn", "flash4", "sdpa"}, "measured": 0}

    def measured(names: list[str], shape: Shape, device: torch.device) -> dict[str, tuple[float, float] | str]:
        here["measured"] += 1
        return {name: TIMES[name] for name in names}

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(attention_choice, "refusals", lambda name, *_, **__: [] if name in here["served"] else ["no"])
    monkeypatch.setattr(attention_choice, "measure", measured)
    return here


def model(backend: str = "auto") -> Decoder:
    return Decoder(DecoderConfig(n_layers=2, d_model=64, n_heads=4, attention_backend=backend), vocab_size=8, max_seq_len=16)  # type: ignore[arg-type]


def settled(config: RunConfig, folder: Path, device: torch.device = CUDA) -> tuple[str, list[str]]:
    """What every layer and the model's mask go by, and what was said."""
    made, notes = model(), list[str]()
    notes += settle_attention(config, made, device, config.train.micro_batch, 16, Tuned(folder, Peers(), notes.append))
    (backend,) = {made.attention_backend, *(block.attention.backend for block in made.blocks)}  # type: ignore[union-attr]
    return backend, notes


def test_a_choice_is_kept_in_the_run_folder(config: RunConfig, gpu: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titanlm.models.decoder.usable_backend", lambda backend, width: backend)
    backend, (before, after) = settled(config, tmp_path)
    assert backend == "cudnn+flash4"
    assert before == "measuring, which may take a minute: attention of 8 × 16, 4/4 heads × 16, causal, bfloat16, a GPU"
    assert "4.29" in after
    ((key, value),) = json.loads((tmp_path / TUNED).read_text())["choices"].items()
    assert key == "attention of 8 × 16, 4/4 heads × 16, causal, bfloat16, a GPU"
    assert value == {"backend": "cudnn+flash4", "forward, backward ms": {"cudnn": [1.32, 4.29], "flash4": [1.36, 3.64], "sdpa": [1.33, 4.3]}}
    assert settled(config, tmp_path) == ("cudnn+flash4", [])
    assert gpu["measured"] == 1

    gpu["served"].remove("flash4")
    backend, notes = settled(config, tmp_path)
    assert backend == "cudnn"
    assert "attention: 'cudnn+flash4' was chosen before, and 'flash4' cannot be used here; chosen again" in notes
    assert settled(config, tmp_path)[0] == "cudnn"
    assert gpu["measured"] == 2
    gpu["served"].add("flash4")
    assert settled(config, tmp_path) == ("cudnn+flash4", [])

    for damaged in ({key: {"backend": 7}}, {key: "cudnn"}, {key: {"backend": "rm+x"}}):
        (tmp_path / TUNED).write_text(json.dumps({"format": 1, "choices": damaged}))
        assert settled(config, tmp_path)[0] == "cudnn+flash4"


def test_one_candidate_is_not_timed(gpu: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titanlm.models.decoder.usable_backend", lambda backend, width: backend)
    gpu["served"] = {"flex"}
    assert settled(load(ROOT / "train_configs/debug.toml", ["--train.precision=bf16"]), tmp_path)[0] == "flex"
    assert gpu["measured"] == 0


def test_where_nothing_is_measured_nothing_changes(config: RunConfig, gpu: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titanlm.models.decoder.usable_backend", lambda backend, width: backend)
    fp32 = load(ROOT / "train_configs/debug.toml", ["--train.precision=fp32"])
    for here, device in ((config, torch.device("cpu")), (fp32, CUDA)):
        assert settled(here, tmp_path, device) == ("auto", [])
    other = torch.nn.Linear(2, 2)
    assert settle_attention(config, other, CUDA, config.train.micro_batch, 16, Tuned(tmp_path, Peers(), print)) == []
    assert not (tmp_path / TUNED).exists()
    assert gpu["measured"] == 0


def test_a_named_backend_serves_or_the_run_does_not_start(config: RunConfig, tmp_path: Path) -> None:
    tuned = Tuned(tmp_path, Peers(), print)
    with pytest.raises(TitanError, match='model.attention_backend: "cudnn" runs on CUDA alone, not on cpu'):
        settle_attention(config, model("cudnn"), torch.device("cpu"), config.train.micro_batch, 16, tuned)
    assert settle_attention(config, model("sdpa"), torch.device("cpu"), config.train.micro_batch, 16, tuned) == []


def test_a_config_is_told_what_its_backend_refuses() -> None:
    overrides = ["--model.attention_backend=cudnn", "--train.deterministic=true", "--train.device=cpu", "--train.precision=fp32", "--data.document_mask=true"]
    problems = "\n".join(check(load(ROOT / "train_configs/debug.toml", overrides)).problems)
    for words in ("knows no documents", "no deterministic", "in bf16 or fp16 alone", "on CUDA alone"):
        assert 'model.attention_backend: "cudnn" ' in problems
        assert words in problems
    assert not check(load(ROOT / "train_configs/debug.toml", ["--model.attention_backend=varlen", "--train.precision=bf16", "--train.device=auto"])).problems


def test_a_machine_without_the_package_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titanlm.kernels.refusals.HAS_FLASH4", False)
    (problem,) = requirements(load(ROOT / "train_configs/debug.toml", ["--model.attention_backend=flash4"]))
    assert problem == "model.attention_backend: 'flash4' needs a package that is not installed: pip install \"flash-attn-4>=4.0.0b36\"; or use 'auto'"


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [False, True])
def test_a_measurement_on_a_gpu(documents: bool) -> None:
    here = shape(rows=4, seq_len=512, head_dim=64, documents=documents, dtype=torch.bfloat16)
    found = measure(attention_choice.INSIDE_DOCUMENTS if documents else attention_choice.CAUSAL, here, CUDA, repeats=1, each=2)
    always = ["flex"] if documents else ["cudnn", "sdpa"]
    assert all(not isinstance(found[name], str) for name in always), found
    assert fastest(found) != "auto"
