"""Memory of a pass: against the CPU's allocator, against peaks that were measured on a GPU, and where no number can be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from titanlm.check import build_model
from titanlm.config import load
from titanlm.distributed import activation_checkpointing
from titanlm.distributed.world import World
from titanlm.kernels.fused import use_kernels
from titanlm.metrics import GIB, memory_of
from titanlm.micro_batch import made_up
from titanlm.pass_memory import Held, pass_bytes
from titanlm.precision import set_precision
from titanlm.recipe_plan import Layout, planned_model
from titanlm.train_module import TrainModule
from titanlm.weights import initialise

ROOT = Path(__file__).parents[1]
GOLF = ("train_configs/golf/pr369_logged.toml", "--train.micro_batch=64")


def traced(file: str | Path, *overrides: str) -> tuple[int, int]:
    """Bytes of a pass, and of all that a device keeps."""
    config = load(ROOT / file, overrides)
    model = planned_model(config)
    rows = config.train.rows(config.train.seq_len)
    assert rows is not None
    return pass_bytes(config, model, rows, config.train.seq_len), sum(Layout(config, model, World()).memory().device.values())


def allocated_at_most(run: Any) -> int:
    """Most bytes that the CPU's allocator had given out beyond those before, by its own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    sizes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]" and event.device_type() == DeviceType.CPU]
    total = peak = 0
    for _, size in sorted(sizes, key=lambda one: one[0]):
        total += size
        peak = max(peak, total)
    return peak


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_pass_takes_what_the_allocator_gives_out(tiny: Path, recompute: str) -> None:
    """fp32 with heads of their own for keys, so that the CPU's attention keeps what a GPU's does, and a vocabulary that a GPU need not pad."""
    words = [
        "--model.n_kv_heads=4",
        "--model.n_layers=4",
        "--data.document_mask=false",
        "--loss.chunk_tokens=64",
        f"--train.activation_checkpointing={recompute}",
    ]
    config = load(tiny, [*words, "--train.seq_len=128", "--model.embedding_rank=16", "--model.tie_embeddings=false"])
    meta = planned_model(config)
    expected = pass_bytes(config, meta, 4, config.train.seq_len)
    assert all(parameter.grad is None for parameter in meta.parameters())

    model = build_model(config, config.tokenizer.build()).to_empty(device="cpu")
    initialise(model, 0)
    module = TrainModule(model, config.loss.build())
    set_precision(module, "fp32")
    activation_checkpointing.apply(model.blocks, config.train.activation_checkpointing)
    batch = made_up(4, 128, model.vocab_size, 1, document_mask=False)

    def step() -> None:
        (module(batch)[0].loss / batch.labels.numel()).backward()

    step()  # gradients lie there from now on
    assert allocated_at_most(step) == pytest.approx(expected, rel=0.03)


def test_recomputing_and_smaller_chunks_take_less(tiny: Path) -> None:
    common = ("--train.seq_len=256", "--model.n_layers=8", "--model.vocab_size=4096")
    (most, _), (selective, _), (full, _) = (traced(tiny, *common, f"--train.activation_checkpointing={how}") for how in ("none", "selective", "full"))
    assert full < selective < most
    assert traced(tiny, *common, "--loss.chunk_tokens=128")[0] < traced(tiny, *common, "--loss.chunk_tokens=1024")[0]


def test_a_large_vocabulary_is_counted_by_chunks(tiny: Path) -> None:
    """Nothing but the loss is large: a chunk of logits in bf16, some copies of it in fp32, and the head's gradient."""
    vocab, chunk, d = 200_005, 64, 32
    words = (f"--model.vocab_size={vocab}", f"--loss.chunk_tokens={chunk}", "--train.precision=bf16", "--model.tie_embeddings=false", "--train.seq_len=256")
    taken, _ = traced(tiny, *words)
    logits, head = chunk * vocab, vocab * d
    least = 2 * logits + 4 * logits + (2 + 2 + 4) * head  # bf16 weights, their gradient and its sum in fp32
    assert least < taken < least + 3 * 4 * logits


def test_casts_to_fp8_are_counted_where_they_are_the_peak(tiny: Path) -> None:
    """No less than both operands of one more product in a byte each, and no more than they take in fp64 on the way there."""
    words = ("--train.precision=bf16", "--train.seq_len=512", "--model.d_ff=512", "--loss.chunk_tokens=64")
    plain, _ = traced(tiny, *words)
    in_fp8, _ = traced(tiny, *words, '--quantizer=[{name="float8",recipe="rowwise",select="measured"}]')
    operands = 4 * 512 * (32 + 512)
    assert operands <= in_fp8 - plain <= 8 * operands


def test_peaks_that_were_measured() -> None:
    """On an H200 (docs/performance.md): uncompiled within 1 %, compiled below."""
    taken, kept = traced(*GOLF)
    assert (taken + kept) / GIB == pytest.approx(35.7, rel=0.01)
    assert (taken + kept) / GIB > 27.7
    taken, kept = traced("train_configs/decoder_124m.toml")
    assert (taken + kept) / GIB > 22.4


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_pass_takes_what_the_gpus_allocator_gives_out(recompute: str) -> None:
    """Four layers of Yxanul in bf16 with its vocabulary, uncompiled, without fused kernels; the allocator rounds blocks up and has workspaces among them."""
    shape = ("--model.n_layers=4", "--model.expect_params=170771840", "--quantizer=[]", "--train.micro_batch_tokens=8192", "--data.document_mask=false")
    config = load(ROOT / "train_configs/yxanul/yxanul_270m.toml", [*shape, f"--train.activation_checkpointing={recompute}"])
    expected = pass_bytes(config, planned_model(config), 4, config.train.seq_len)
    model = planned_model(config).to_empty(device="cuda")
    initialise(model, 0)
    module = TrainModule(model, config.loss.build())
    set_precision(module, "bf16")
    use_kernels(module, "plain")
    activation_checkpointing.apply(model.blocks, config.train.activation_checkpointing)
    batch = made_up(4, 2048, model.vocab_size, 1, document_mask=False).to(torch.device("cuda"))
    for _ in range(2):
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        (module(batch)[0].loss / batch.labels.numel()).backward()
    assert torch.cuda.max_memory_allocated() - held == pytest.approx(expected, rel=0.05)


def test_nothing_is_counted_twice_and_all_is_let_go() -> None:
    with Held() as held:
        x = torch.empty(1000, device="meta")
        y = x.view(10, 100).t()
        y.add_(1)
        assert (held.now, held.peak) == (4000, 4000)
        z = y * 2
        assert held.now == 8000
        del x, y
        assert held.now == 4000
        del z
    assert (held.now, held.peak) == (0, 8000)


def test_what_cannot_run_without_numbers_says_so(tiny: Path) -> None:
    class Looks(nn.Module):
        def forward(self, *arguments: Tensor) -> Tensor:
            assert arguments[0].sum().item() >= 0
            return arguments[0]

    config = load(tiny)
    model = planned_model(config)
    model.blocks[0] = Looks()
    with pytest.raises(RuntimeError, match="meta"):
        pass_bytes(config, model, 4, config.train.seq_len)


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("NVIDIA GeForce RTX 4090", 23.6),
        ("NVIDIA GeForce RTX 5090", 31.3),
        ("NVIDIA A100-SXM4-40GB", 39.3),
        ("A100 40GB", 39.3),
        ("NVIDIA A100 80GB PCIe", 79.1),
        ("NVIDIA A100-SXM4-80GB", 79.1),
        ("NVIDIA H100 80GB HBM3", 79.1),
        ("NVIDIA H200", 139.7),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 NVL", None),
        ("A100", None),
    ],
)
def test_memory_by_name(name: str, gib: float | None) -> None:
    assert memory_of(name) == (None if gib is None else int(gib * GIB))
