"""Matrix products in FP8 while training: half the bits, twice the peak, on GPUs of compute capability 8.9 and above.

A product y = x Wᵀ has two more in its backward pass, ∂x = ∂y W and ∂W = ∂yᵀ x.
Operands are scaled, cast to eight bits, multiplied with sums in fp32, and the
result is divided by the scales and rounded to bf16. The scale of a set of
numbers is the largest FP8 number over their largest magnitude, found anew each
time (dynamic scaling), so there is no state: weights stay fp32, and a
checkpoint does not say whether it was trained in FP8 or bf16. The recipes and
the products are torchao's (``torchao.float8``; formats: Micikevicius et al.
2022, arXiv:2209.05433):

* ``tensorwise``: one scale a tensor; x and W in e4m3, ∂y in e5m2. The fastest.
* ``rowwise``: one scale a row of each product's left and a column of its right
  operand, all in e4m3, scales rounded down to powers of two.
* ``rowwise_with_gw_hp``: the same, but ∂W in bf16, and W with one scale in ∂x.
  The most exact.

e4m3 has 3 bits of mantissa and ends at 448, e5m2 has 2 and ends at 57,344:
operands are off by up to 1/16 and 1/8 of themselves. e4m3 loses what is under
2^-19 of its set's largest, e5m2 what is under 2^-33; so gradients, which spread
most, want e5m2 where they have one scale, or a scale a row.

The casts cost passes over memory. Fused by the compiler into what comes before
they are cheap, uncompiled they cost more than FP8 gains; and small matrices do
not gain at all. Hence ``select``.

Operands' sizes must be multiples of 16. A head's vocabulary is padded with rows
of zeros, and so are tokens; other matrices stay in bf16 if theirs are not.

With ``fsdp2`` weights are gathered as without this quantizer and cast after
that, or, with one scale a tensor and ``parallel.gather_dtype = "float8"``, as
what they are cast to (``titanlm.distributed.code_gather``).

On the CPU products of the same rounded operands are computed in fp32, which
tells what FP8 does to a loss and is slow. A run on a GPU without the FP8 of its
recipe is refused before that (``titanlm.environment``).
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanlm.models.layers.head import aligned_product, project
from titanlm.models.layers.product import Codes, Multiplier, Product, compute_with, multipliers
from titanlm.registry import register

if TYPE_CHECKING:
    from titanlm.tuned import Tuned

ALIGNMENT = 16
"""Of every size of an operand, in elements."""
E4M3_MAX = 448.0
CAPABILITY: dict[str, tuple[int, int]] = {"tensorwise": (8, 9), "rowwise": (9, 0), "rowwise_with_gw_hp": (9, 0)}
"""From which compute capability on a recipe's products exist."""


@dataclass(frozen=True)
class Float8Config:
    params: tuple[str, ...] = ("@matrix",)
    """Globs of parameter names; "@role" stands for every parameter of that role. Add "@head" (tied: "@embedding") for the head."""
    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
    """One scale a tensor (fastest), one a row, or one a row with weight gradients in bf16 (most exact)."""
    select: Literal["policy", "measured", "all"] = "policy"
    """policy: shapes that gain on an H100 by torchao's measurements. measured: those that gain on this device, timed when the run first starts."""

    @property
    def capability(self) -> tuple[int, int]:
        """Which a GPU needs."""
        return CAPABILITY[self.recipe]

    @property
    def n_products(self) -> int:
        """How many of a matrix's three, forward and backward, are in FP8."""
        return 2 if self.recipe == "rowwise_with_gw_hp" else 3


class Shape(NamedTuple):
    """Of a product; equal ones are decided on together."""

    n_tokens: int
    n_in: int
    n_out: int
    is_head: bool

    def __str__(self) -> str:
        return f"{'head ' if self.is_head else ''}{self.n_in:,} → {self.n_out:,}"


@register("quantizer", "float8")
class Float8:
    """Computes products in FP8; stores nothing, so the same matrices may have another quantizer for their artifact or for ``qat``."""

    of_products = True

    def __init__(self, config: Float8Config) -> None:
        self.config = config

    def prepare(self, model: nn.Module, params: Sequence[str]) -> None:
        """Changes nothing. Raises ValueError naming parameters by which no module multiplies, or when no matrix has sizes that FP8 can do."""
        found = multipliers(model, params)
        shapes = {_shape(each, _heads(model), 0, 0) for each in found}
        if found and not any(map(is_aligned, shapes)):
            sizes = ", ".join(sorted(map(str, shapes)))
            raise ValueError(f"quantizer 'float8' needs sizes that are multiples of {ALIGNMENT}, and has {sizes}; change widths and head_dim, or leave it out")

    def begin(
        self, model: nn.Module, params: Sequence[str], *, device: torch.device, n_tokens: int, n_head_tokens: int, compiled: bool, tuned: Tuned
    ) -> list[str]:
        """Set the products of the modules, before anything is traced; returns what was decided, a line for each shape.

        ``n_tokens`` are those of a forward pass, ``n_head_tokens`` those that
        the loss gives the head at once. With ``compiled`` products outside a
        compiled graph are compiled by themselves.
        """
        recipe, emulate = self.config.recipe, not has_float8(device, self.config.recipe)
        in_blocks = float8_product(recipe, emulate=emulate, compiled=compiled)
        in_head = partial(aligned_product, product=in_blocks, multiple=ALIGNMENT)
        if compiled and recipe != "tensorwise":
            _keep_casts()
        heads, groups = _heads(model), dict[Shape, list[Multiplier]]()
        for each in multipliers(model, params):
            groups.setdefault(_shape(each, heads, n_tokens, n_head_tokens), []).append(each)
        lines, done, total = [], 0, 0
        for shape, members in groups.items():
            product = in_head if shape.is_head else in_blocks
            converts, why = self._decide(shape, product, device, tuned)
            for each in members if converts else ():
                compute_with(each, product)
            work = len(members) * shape.n_in * shape.n_out
            done, total = done + converts * work, total + work
            lines.append(f"float8: {len(members)} × ({shape}) in {'FP8' if converts else 'bf16'}: {why}; {members[0].name}{' …' if len(members) > 1 else ''}")
        lines.insert(0, f"float8: {recipe}, {self.config.select}: {done / max(total, 1):.0%} of the multiply-adds with the matrices it was given are in FP8")
        if emulate and done:
            needed = ".".join(map(str, CAPABILITY[recipe]))
            lines.insert(0, f"WARNING: float8: {device} has no FP8 products (compute capability {needed}): emulated in fp32, for tests, slower than bf16")
        if not done:
            lines.insert(0, 'WARNING: float8: no matrix is computed in FP8; leave the quantizer out, or set select = "all"')
        return lines

    def _decide(self, shape: Shape, product: Product, device: torch.device, tuned: Tuned) -> tuple[bool, str]:
        """Whether products of this shape are computed in FP8, and why."""
        if not is_aligned(shape):
            return False, f"its sizes are no multiples of {ALIGNMENT}"
        if self.config.select == "all":
            return True, "aligned"
        if self.config.select == "policy":
            pays = gains(self.config.recipe, shape.n_in, shape.n_out)
            return pays, "gains on an H100" if pays else "too small to gain on an H100"
        key = f"float8 {self.config.recipe}: {shape}, {shape.n_tokens:,} tokens"
        times = tuned.choice(key, lambda: measure(shape, {"bf16": project, "float8": product}, device))
        return times["float8"] < times["bf16"], f"{times['float8']:.3g} ms against {times['bf16']:.3g} in bf16"


def is_aligned(shape: Shape) -> bool:
    return shape.n_in % ALIGNMENT == 0 and (shape.is_head or shape.n_out % ALIGNMENT == 0)


def gains(recipe: str, n_in: int, n_out: int) -> bool:
    """Whether FP8 gained in torchao's measurements on H100 (``_auto_filter_for_recipe``), which are of whole forward and backward passes.

    They have none of ``rowwise_with_gw_hp``, whose kernels are those of ``rowwise``.
    """
    if recipe == "tensorwise":
        return n_out > 1024 or n_in > 4096
    return n_out > 2048 and n_in > 1024 and (n_out > 4096 or n_in > 2048)


def has_float8(device: torch.device, recipe: str) -> bool:
    """Also the meta device, on which nothing is computed."""
    return device.type == "meta" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY[recipe])


def float8_product(recipe: str, *, emulate: bool, compiled: bool = False) -> Product:
    """The product of a recipe, ``emulate``d in fp32 or by the device; outside a graph compiled by itself if ``compiled``.

    Tokens are padded to a multiple of 16; n_in and n_out have to be one.
    """
    multiply = _torchao_product(recipe, emulate)

    def product(x: Tensor, weight: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if padding := -len(rows) % ALIGNMENT:  # of zeros, which change no scale but their own
            y = multiply(F.pad(rows, (0, 0, 0, padding)), weight.t())[:-padding]
        else:
            y = multiply(rows, weight.t())
        return y.view(*x.shape[:-1], len(weight))

    found: Any = product
    if compiled:
        alone = torch.compile(product, fullgraph=True, dynamic=False)

        def product_anywhere(x: Tensor, weight: Tensor) -> Tensor:
            y: Tensor = product(x, weight) if torch.compiler.is_compiling() else alone(x, weight)
            return y

        found = product_anywhere
    if recipe == "tensorwise":
        whole = partial(torch.compile, fullgraph=True, dynamic=False)
        found.codes = Codes(whole(encode), whole(decode)) if compiled else Codes(encode, decode)
    return found  # type: ignore[no-any-return]


def encode(x: Tensor, largest: Tensor) -> Tensor:
    """What ``tensorwise`` makes of a part of a weight whose largest magnitude is known, as bytes (``Codes``)."""
    return (x.float() * _scale(largest)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def decode(codes: Tensor, largest: Tensor, into: Tensor) -> None:
    """bf16 numbers with the same largest magnitude, of which ``tensorwise`` makes these codes: bf16 is off by 2⁻⁹, the next code by 2⁻⁵ at least."""
    into.copy_(codes.view(torch.float8_e4m3fn).float() / _scale(largest))


def _scale(largest: Tensor) -> Tensor:
    """As torchao computes it, in fp64."""
    return (E4M3_MAX / largest.double().clamp(min=1e-12)).float()


def _torchao_product(recipe: str, emulate: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """(n, n_in) and (n_in, n_out) → (n, n_out)."""
    silenced = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it warns of extensions of its own that a torch without CUDA cannot load; nothing of them is used here
    try:
        from torchao.float8.config import Float8LinearConfig
        from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
        from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig
    finally:
        logging.disable(silenced)
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    products = (config.gemm_config_output, config.gemm_config_grad_input, config.gemm_config_grad_weight)
    kernels = LinearMMConfig(*(ScaledMMConfig(emulate, each.use_fast_accum, False, config.pad_inner_dim) for each in products))

    def multiply(x: Tensor, transposed: Tensor) -> Tensor:
        y: Tensor = matmul_with_hp_or_float8_args.apply(x, transposed, kernels, config)
        return y

    return multiply


def _keep_casts() -> None:
    """Let compiled code round to bf16 where uncompiled code does.

    Fused with a norm, casts for the backward pass met numbers that the forward
    pass had not, and losses became NaN with scales a row (pytorch issue 150859).
    Newer compilers see to what is kept for the backward pass by themselves.
    """
    import torch._inductor.config as inductor

    if not hasattr(inductor, "emulate_precision_casts_on_saved_tensors"):
        inductor.emulate_precision_casts = True


def measure(shape: Shape, products: dict[str, Product], device: torch.device, *, repeats: int = 20) -> dict[str, float]:
    """Milliseconds of a forward and backward pass of each product, bf16 in and out: the median of ``repeats``, taken in turns.

    Operands are cast by themselves here. In a block the compiler fuses casts
    into what makes the operands, so FP8 gains rather more than measured.
    """
    # A generator of its own: the run's numbers are not drawn from.
    draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device, dtype=torch.bfloat16)
    x, weight = (draw(n, shape.n_in).requires_grad_() for n in (shape.n_tokens, shape.n_out))
    gradient = draw(shape.n_tokens, shape.n_out)
    taken: dict[str, list[float]] = {name: [] for name in products}
    for turn in range(3 + repeats):
        for name, product in products.items():
            elapsed = _timer(device)
            torch.autograd.grad(product(x, weight), (x, weight), gradient)
            taken[name] += [elapsed()] if turn >= 3 else []  # the first ones compile and warm up
    return {name: statistics.median(times) for name, times in taken.items()}


def _timer(device: torch.device) -> Callable[[], float]:
    """Started now; gives the milliseconds of the device until it is called."""
    if device.type != "cuda":
        start = time.perf_counter()
        return lambda: 1000 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()

    def elapsed() -> float:
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    return elapsed


def _heads(model: nn.Module) -> set[nn.Module]:
    head: Any = getattr(model, "head", None)
    return set(head.modules()) if isinstance(head, nn.Module) else set()


def _shape(multiplier: Multiplier, heads: set[nn.Module], n_tokens: int, n_head_tokens: int) -> Shape:
    is_head = multiplier.module in heads
    return Shape(n_head_tokens if is_head else n_tokens, multiplier.n_in, multiplier.n_out, is_head)
