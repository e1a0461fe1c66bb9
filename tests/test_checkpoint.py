"""Checkpoints: whole or absent, written and read by any number of ranks, nothing executed on load."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from titanlm import checkpoint
from titanlm.errors import CheckpointError
from titanlm.state_tree import fills
from titanlm.tensor_file import CODES, write_tensors


def state(seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "progress": {"step": 3, "elapsed_s": 0.1 + 0.2, "none": None, "flag": True},
        "model": {"a": torch.randn(4, 5, generator=generator), "b": torch.randn(3, generator=generator).bfloat16(), "empty": torch.zeros(0, 3)},
        "data": {"streams": {0: {"ids": np.arange(7, dtype=np.int32), "at": 2**53 + 1}, 1: {"ids": np.zeros((0,), np.int32), "at": 0}}},
        "list": [1, "zwei", [torch.tensor(3.0)]],
    }


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def test_round_trip(tmp_path: Path) -> None:
    own = {"torch": torch.arange(5, dtype=torch.uint8), "position": 7}
    folder = checkpoint.save(tmp_path, 3, state(), own, "x = 1\n")
    assert folder.name == "step-00000003"
    saved = checkpoint.load(folder)
    assert equal(saved.state, state())
    assert equal(saved.ranks, [own])
    assert (saved.folder, saved.step, saved.config_toml) == (folder, 3, "x = 1\n")
    assert not list(tmp_path.glob(".*"))


def test_keys_that_would_fall_together_are_kept_apart(tmp_path: Path) -> None:
    tree = {"a/b": torch.tensor(1), "a": {"b": torch.tensor(2)}, "a~1b": torch.tensor(3), "$tensor": {0: torch.tensor(4), "0": torch.tensor(5)}}
    assert equal(checkpoint.load(checkpoint.save(tmp_path, 1, {"x": tree}, tree, "")).state, {"x": tree})


def test_what_cannot_be_saved_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    for value in ({1, 2}, np.array(["text"]), torch.zeros(2, dtype=torch.complex128), {(1, 2): 3}):
        with pytest.raises(CheckpointError, match="model/w"):
            checkpoint.save(tmp_path, 1, {"model": {"w": value}}, {}, "")
    for key in ("own", "../x", "a/b", ""):
        with pytest.raises(CheckpointError, match="cannot be named"):
            checkpoint.save(tmp_path, 1, {key: 1}, {}, "")
    assert not list(tmp_path.iterdir())


def test_views_into_one_storage_are_saved_apart(tmp_path: Path) -> None:
    base = torch.arange(10.0)
    folder = checkpoint.save(tmp_path, 1, {"model": {"a": base[:4], "b": base[2:6], "t": base.view(2, 5).t()}}, {}, "")
    loaded = checkpoint.load(folder).state["model"]
    assert torch.equal(loaded["b"], base[2:6])
    assert torch.equal(loaded["t"], base.view(2, 5).t())


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    bits = torch.randint(0, 2, (64,), dtype=torch.uint8)
    tensors: dict[str, Any] = {name: bits.view(getattr(torch, name)) for name in CODES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(3, 0, 2), "strided": torch.arange(12.0).view(3, 4).t()[1:], "ünï": torch.ones(1)}
    arrays = {"array": np.arange(6, dtype=">i4").reshape(2, 3), "flag": np.array(True)}
    described = write_tensors(tmp_path / "x.safetensors", tensors | arrays)
    assert described["bytes"] == (tmp_path / "x.safetensors").stat().st_size
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys() | arrays.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist(), name
    assert found["array"].tolist() == arrays["array"].tolist()
    assert found["flag"].item() is True


def test_boxes_fill_a_shape_when_each_element_is_in_one() -> None:
    box = lambda *spans: (tuple(a for a, _ in spans), tuple(b for _, b in spans))  # noqa: E731
    assert fills((), [((), ())])
    assert fills((4, 4), [box((0, 2), (0, 4)), box((2, 4), (0, 1)), box((2, 4), (1, 4))])
    assert fills((2,), [box((1, 2)), box((0, 1))])
    for wrong in (
        [],
        [box((0, 2), (0, 4))],  # half
        [box((0, 3), (0, 4)), box((2, 4), (0, 4))],  # overlap
        [box((0, 2), (0, 4)), box((3, 4), (0, 4))],  # gap
        [box((0, 2), (0, 4)), box((2, 5), (0, 4))],  # beyond
        [box((0, 4), (0, 4)), box((0, 4), (0, 4))],  # twice
        [box((0, 4), (0, 4)), box((4, 4), (0, 4))],  # empty
        [box((0, 1), (0, 3)), box((0, 3), (3, 4)), box((3, 4), (1, 4)), box((1, 4), (0, 1)), box((1, 3), (1, 3))],  # a pinwheel, which no mesh makes
    ):
        assert not fills((4, 4), wrong), wrong


def test_stored_tensors_are_read_when_asked_for(tmp_path: Path) -> None:
    saved = checkpoint.opened(checkpoint.save(tmp_path, 3, state(), {}, ""))
    stored = saved.state["model"]["a"]
    assert (stored.shape, stored.dtype) == ((4, 5), torch.float32)
    assert equal(stored.whole(), state()["model"]["a"])
    assert equal(stored.like(torch.zeros(4, 5)), state()["model"]["a"])
    assert equal(checkpoint.fit(saved.state, state(1)), state())
    assert equal(checkpoint.fit(saved.state, {"model": [], "list": 3}), state())


RANKS = """
import torch
import torch.distributed as dist
from pathlib import Path
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from titanlm import checkpoint
from titanlm.distributed.world import Peers, World

world = World.from_environment()
dist.init_process_group("gloo")
peers = Peers(world)
ROWS = (7, 997, 2)

def meshes(n):
    yield DeviceMesh("cpu", torch.arange(n)), [Shard(0)]
    if n == 4:
        square = DeviceMesh("cpu", torch.arange(4).view(2, 2))
        yield square, [Replicate(), Shard(0)]
        yield square, [Shard(1), Shard(0)]
        yield DeviceMesh("cpu", torch.arange(4)), [Replicate()]

def trained(mesh, placements):
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randn(n, 3, generator=generator)
    parameters = [torch.nn.Parameter(distribute_tensor(draw(n), mesh, placements)) for n in ROWS]
    parameters.append(torch.nn.Parameter(torch.randn(5, generator=generator)))
    optimizer = torch.optim.AdamW(parameters, lr=0.1, foreach=False)
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = distribute_tensor(gradient, mesh, placements) if isinstance(parameter, DTensor) else gradient
    optimizer.step()
    names = dict(zip(parameters, "abcd"))
    return parameters, optimizer, names

full = lambda tensor: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
"""

SAVED_AND_LOADED = """
def save(n, peers, number, mesh, placements):
    parameters, optimizer, names = trained(mesh, placements)
    state = {"model": {name: parameter for parameter, name in names.items()}, "optimizers": [checkpoint.optimizer_state(optimizer, names)], "n": number}
    folder = checkpoint.save(root, 10 * n + number, state, {"rank": world.rank, "g": torch.full((3,), world.rank)}, "", peers=peers)
    assert len(list(folder.glob("state-*"))) == n

def load(peers, mesh, placements):
    parameters, optimizer, names = trained(mesh, placements)
    expected = {names[parameter]: full(parameter.detach()) for parameter in parameters}
    moments = {names[parameter]: {key: full(value) for key, value in optimizer.state[parameter].items()} for parameter in parameters}
    for folder in (folder for _, folder in checkpoint.steps(root)):
        saved = checkpoint.opened(folder, peers)
        assert [own["rank"] for own in saved.ranks] == list(range(saved.step // 10)), saved.ranks
        assert all(own["g"].tolist() == [rank] * 3 for rank, own in enumerate(saved.ranks))
        whole = checkpoint.load(folder, peers).state
        fitted = checkpoint.fit(saved.state["model"], {name: parameter for parameter, name in names.items()})
        fresh = [torch.nn.Parameter(torch.zeros_like(parameter)) for parameter in parameters]
        other = torch.optim.AdamW(fresh, lr=0.1, foreach=False)
        checkpoint.restore_optimizer(other, dict(zip(fresh, "abcd")), saved.state["optimizers"][0])
        for before, after, name in zip(parameters, fresh, "abcd"):
            assert torch.equal(whole["model"][name], expected[name]), name
            assert all(torch.equal(whole["optimizers"][0]["params"][name][key], value) for key, value in moments[name].items()), name
            assert type(fitted[name]) is (DTensor if isinstance(before, DTensor) else torch.Tensor)
            for here, there in [(before.detach(), fitted[name]), *((value, other.state[after][key]) for key, value in optimizer.state[before].items())]:
                assert isinstance(here, DTensor) == isinstance(there, DTensor)
                if isinstance(here, DTensor):
                    assert (here.placements, here.shape, here.stride()) == (there.placements, there.shape, there.stride())
                    here, there = here.to_local(), there.to_local()
                assert torch.equal(here, there), name
    for parameter in fresh:
        parameter.grad = torch.ones_like(parameter)
    other.step()  # what was restored is fit to go on with

worlds = [(n, Peers(World(world.rank % n, n), dist.new_group(list(range(n)))), list(meshes(n))) for n in (1, 2, 4)]
for n, peers, each in worlds:
    for number, (mesh, placements) in enumerate(each):
        if world.rank < n:
            save(n, peers, number, mesh, placements)
dist.barrier()
for n, peers, each in worlds:
    for mesh, placements in each[:3]:
        if world.rank < n:
            load(peers, mesh, placements)
dist.barrier()
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_any_number_of_ranks_loads_what_any_number_saved(tmp_path: Path, zygote: Any) -> None:
    """One, two and four, of parameters that do not divide evenly, on flat and two-dimensional meshes: parameters and moments are equal bit for bit."""
    zygote.run(f"root = Path({str(tmp_path)!r})\n".join([RANKS, SAVED_AND_LOADED]), ranks=4).expect(0)
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [10, 20, 40, 41, 42, 43]
    held = {file.name for file in (tmp_path / "step-00000043").iterdir()}
    assert "model-00000.safetensors" in held
    assert "model-00001.safetensors" not in held, "the second replica wrote what the first had"


@pytest.mark.distributed
def test_one_rank_that_fails_is_the_failure_of_all(tmp_path: Path, zygote: Any) -> None:
    script = textwrap.dedent("""
        good = checkpoint.save(root, 1, {"model": {"w": torch.ones(2)}}, {}, "", peers=peers)
        own = {"bad": {1, 2}} if world.rank == 1 else {}
        for attempt in ("type", "folder"):
            if attempt == "folder":
                own = {}
                if world.rank == 1:
                    root = root / "elsewhere"  # as if the run folder were this host's own
            try:
                checkpoint.save(root, 2, {"model": {"w": torch.ones(2)}}, own, "", peers=peers)
            except checkpoint.CheckpointError as error:
                words = "rank 1: TypeError: own/bad: a set cannot be saved" if attempt == "type" else "rank 1:"
                assert words in str(error) and (attempt == "type" or "share" in str(error)), error
            else:
                raise AssertionError
        if world.rank == 1:
            root = root.parent
        assert checkpoint.latest(root, peers) == good
        assert sorted(path.name for path in root.iterdir()) == ["step-00000001"]
    """)
    zygote.run(f"root = Path({str(tmp_path)!r})\n".join([RANKS, script]), ranks=2).expect(0)


@pytest.mark.distributed
def test_every_rank_chooses_the_same_checkpoint(tmp_path: Path, zygote: Any) -> None:
    """Each hashes only some of the files, and one of them finds the damage."""
    script = textwrap.dedent("""
        for step in (1, 2):
            state = {"model": {"w": distribute_tensor(torch.ones(9, 3), DeviceMesh("cpu", torch.arange(2)), [Shard(0)])}}
            checkpoint.save(root, step, state, {"g": torch.ones(3)}, "x = 1", peers=peers)
        names = sorted(file.name for file in (root / "step-00000002").iterdir())
        for name in names:
            file = root / "step-00000002" / name
            content = file.read_bytes()
            peers.sum([0])
            if world.rank == 0:
                file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            peers.sum([0])
            assert checkpoint.latest(root, peers).name == "step-00000001", name
            peers.sum([0])
            if world.rank == 0:
                file.write_bytes(content)
            peers.sum([0])
        assert checkpoint.latest(root, peers).name == "step-00000002"
    """)
    launched = zygote.run(f"root = Path({str(tmp_path)!r})\n".join([RANKS, script]), ranks=2).expect(0)
    assert "model-00001.safetensors (part of rank 1) is damaged" in launched.output(0)
    assert "passed over" not in launched.output(1), "only rank 0 is to say it"


def test_rotation_keeps_the_last_the_best_and_every_nth(tmp_path: Path) -> None:
    for step in range(10, 100, 10):
        checkpoint.save(tmp_path, step, {"at": step}, {}, "")
    checkpoint.rotate(tmp_path, keep_last=2, newest=90, best=20, keep_every=40)
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [20, 40, 80, 90]


def test_checkpoints_of_another_course_are_set_aside(tmp_path: Path) -> None:
    for _ in range(2):
        for step in (50, 900, 1000):
            checkpoint.save(tmp_path, step, {"at": step}, {}, "")
        moved = checkpoint.set_aside(tmp_path, 50)
        assert [folder.name for folder in moved] == ["step-00000900", "step-00001000"]
        assert all(checkpoint.verify(folder) is None for folder in moved)
        assert [step for step, _ in checkpoint.steps(tmp_path)] == [50]
    assert sorted(folder.name for folder in tmp_path.glob("after-*")) == ["after-step-00000050-1", "after-step-00000050-2"]
    assert checkpoint.set_aside(tmp_path, 50) == []


def test_pickle_is_never_read(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 3, state(), {"g": torch.ones(2)}, "")
    script = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from titanlm import checkpoint
        def hook(event, arguments):
            if event.startswith("pickle."):
                raise SystemExit("pickle!")
        sys.addaudithook(hook)
        checkpoint.load(Path({str(folder)!r}))
    """)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_the_json_says_nothing_of_tensors_but_dtype_and_shape(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 3, state(), {}, "")
    document = json.loads((folder / "state-00000.json").read_text())
    assert document["state"]["model"] == {"a": {"$tensor": ["F32", [4, 5]]}, "b": {"$tensor": ["BF16", [3]]}, "empty": {"$tensor": ["F32", [0, 3]]}}
    assert document["shards"]["model/a"] == [[0, 0], [4, 5]]
    assert "model/empty" not in document["shards"]


def test_optimizer_state_survives_another_grouping() -> None:
    torch.manual_seed(0)
    a, b = torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(2))
    names = {a: "a", b: "b"}
    first = torch.optim.AdamW([{"params": [a]}, {"params": [b]}], fused=True)
    a.grad, b.grad = torch.ones(3), torch.ones(2)
    first.step()
    saved = checkpoint.optimizer_state(first, names)
    second = torch.optim.AdamW([{"params": [b]}, {"params": [a]}], fused=True)
    checkpoint.restore_optimizer(second, names, saved)
    assert torch.equal(second.state[a]["exp_avg"], first.state[a]["exp_avg"])
    assert torch.equal(second.state[b]["exp_avg_sq"], first.state[b]["exp_avg_sq"])
    with pytest.raises(CheckpointError, match="did `params` patterns change"):
        checkpoint.restore_optimizer(torch.optim.AdamW([a]), names, saved)


def test_state_that_optimizers_keep_in_groups_and_integer_moments_survive(tmp_path: Path) -> None:
    class Counting(torch.optim.SGD):
        """Keeps a count in its group, as schedule-free methods do, and 8-bit and integer state."""

        def step(self, closure=None):
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1
                for parameter in group["params"]:
                    self.state[parameter] |= {"code": torch.full((2,), 200, dtype=torch.uint8), "count": torch.tensor(2**30 + 1)}

    parameter = torch.nn.Parameter(torch.zeros(2))
    names = {parameter: "w"}
    first, second = Counting([parameter], lr=0.1), Counting([parameter], lr=0.1)
    first.step()
    first.step()
    folder = checkpoint.save(tmp_path, 1, {"optimizer": checkpoint.optimizer_state(first, names)}, {}, "")
    checkpoint.restore_optimizer(second, names, checkpoint.opened(folder).state["optimizer"])
    assert second.param_groups[0]["k"] == 2
    assert second.state[parameter]["code"].dtype == torch.uint8
    assert second.state[parameter]["count"].item() == 2**30 + 1
    first.state["global"] = {"d": 1.0}
    with pytest.raises(CheckpointError, match="keeps state under"):
        checkpoint.optimizer_state(first, names)
