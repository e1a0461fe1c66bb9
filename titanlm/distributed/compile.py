"""torch.compile, in place: names of parameters keep, and eager code can still be reached."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, Literal

import torch

from titanlm.environment import c_compiler, cxx_compiler

MAX_GRAPHS = 256
"""Of one piece of code: ten stages of a curriculum, with and without rounding, scored and trained, are forty for each kind of block.
More would be a mistake, such as rows of ever new lengths."""


SHALLOW = 4
"""Blocks up to which ``auto`` compiles a model whole. That takes as much longer as there are blocks, where by block they cost no more than one (the
first step of a tiny model on two CPU cores: 2 blocks 31 s whole and 32 s by block, 6 blocks 55 s and 19 s), so a deep one pays
for it in every start, whether it then gains or not (docs/performance.md has both)."""


def compile_module(module: Any, mode: Literal["none", "auto", "block", "model"]) -> Literal["none", "block", "model"]:
    """Compile a train module's model as a whole or block by block; returns what was done.

    ``block`` compiles one graph that all equal blocks share: quick to compile.
    ``model`` lets the compiler fuse across blocks. ``auto`` is ``model`` for a
    shallow model, and ``block`` for a deep one or one whose blocks are gathered.
    A machine without a C compiler cannot compile and says so once.
    """
    if mode == "none":
        return mode
    if mode == "auto":
        mode = "model" if len(module.model.blocks) <= SHALLOW and not hasattr(module, "unshard") else "block"
    # On the CPU inductor writes C++; on CUDA triton builds its launchers in C.
    on_cpu = next(module.parameters()).device.type == "cpu"
    if (cxx_compiler() if on_cpu else c_compiler()) is None:
        wanted = "C++ compiler and none was found (c++, g++, clang++ or $CXX)" if on_cpu else "C compiler and none was found (cc, gcc, clang or $CC)"
        print(f"WARNING: train.compile = {mode!r} needs a {wanted}: training runs uncompiled", file=sys.stderr)
        return "none"
    # All blocks share one code object, and each kind of block, shape, gradient mode and phase is a graph of its own. Past
    # torch's limit of 8 a block fails and a whole model silently runs uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    # Else a graph with a torch.autograd.Function is in no cache. It may be: Dynamo traces both its passes into the graph
    # of which the key is made, so another constant or shape in either is another key.
    from torch._functorch import config  # which brings the compiler along

    config.autograd_cache_allow_custom_autograd_functions = True
    if mode == "model":
        module.model.compile(dynamic=False)
        module.training_graph_only = True
    else:
        for block in module.model.blocks:
            # Its forward, not the block: what gathers and frees sharded parameters are hooks around that, and stays outside the graph.
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
    compile_kernels(module.modules(), mode)
    return mode


def compile_kernels(parts: Iterable[Any], mode: Literal["none", "block", "model"]) -> None:
    """In a run that compiles, let those that have kernels of their own, modules and optimizers, compile them."""
    for part in parts:
        if hasattr(part, "compile_kernels"):
            part.compile_kernels = mode != "none"
