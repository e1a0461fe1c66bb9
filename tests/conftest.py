"""What the tests share: a tiny config and text to train on, made by the test itself."""

from __future__ import annotations

import os

# Before torch is imported: on few cores a second thread waits on whatever else runs there, and one that spins takes its core away.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import random
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Those that may take longest begin first, so that no process is left alone with them at the end."""
    usual = float(config.getini("timeout"))
    allowed = {item: max(usual, *map(float, marker.args)) for item in items if (marker := item.get_closest_marker("timeout"))}
    items.sort(key=lambda item: -allowed.get(item, usual))


def sentences(n: int, seed: int = 0) -> str:
    """Paragraphs of varied length over a small vocabulary, with characters of one to four bytes."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 8))) for _ in range(60)] + ["größe", "가나다", "日本", "🙂"]
    return "\n\n".join(" ".join(rng.choices(words, k=rng.randint(3, 60))) for _ in range(n))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A text file of 200 paragraphs."""
    path = tmp_path / "corpus.txt"
    path.write_text(sentences(200), encoding="utf-8")
    return path


@pytest.fixture
def tiny(tmp_path: Path, corpus: Path) -> Path:
    """A config that trains in seconds: all that has state is in it, and packing buffers are never empty."""
    path = tmp_path / "tiny.toml"
    path.write_text(
        f"""
run = {{ name = "tiny", dir = "{tmp_path / "runs"}" }}
tokenizer = "byte"
[dataset]
name = "text"
paths = ["{corpus}"]
unit = "paragraph"
validation_fraction = 0.1
[model]
name = "decoder"
n_layers = 2
d_model = 32
n_heads = 4
n_kv_heads = 2
d_ff = 64
qk_norm = "learned"
[[optimizer]]
name = "adamw"
lr = 1e-2
[scheduler]
name = "cosine"
warmup_steps = 3
[averager]
name = "ema"
decay = 0.9
[data]
n_streams = 8
[train]
steps = 20
seq_len = 48
global_batch = 8
micro_batch = 4
device = "cpu"
deterministic = true
log_every = 1
[[validation]]
max_tokens = 2000
[checkpoint]
every = 7
keep_last = 10
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="session")
def zygote() -> Iterator[Any]:
    """Forks ranks from a process that has torch already (``tests/zygote.py``)."""
    import importlib.util
    import sys

    path = Path(__file__).with_name("zygote.py")
    spec = importlib.util.spec_from_file_location("zygote", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["zygote"] = module
    spec.loader.exec_module(module)
    server = module.Zygote()
    yield server
    server.close()
