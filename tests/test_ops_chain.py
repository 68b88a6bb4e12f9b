"""Two linear layers in one call: against fp64, against two calls, and as PyTorch sees the operator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fanin_compile import ops
from fanin_compile.condensed import CondensedWeight
from fanin_compile.ops_chain import gather_matmul_chain, reference_gather_matmul_chain
from fanin_compile.packed import Header, decode
from fanin_compile.packing import pack

from .helpers import assert_close_at_scale
from .strategies import SIZES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    assert ops.native_available()


def sparse(out: int, in_features: int, seed: int, *, density: float = 0.2) -> CondensedWeight:
    """Ragged, about one row in eight ablated."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(out, in_features, generator=generator) < density
    mask[torch.rand(out, generator=generator) < 0.125] = False
    return CondensedWeight.from_dense(torch.randn(out, in_features, generator=generator), mask)


@dataclass(frozen=True, eq=False)
class Chain:
    """activation2(h @ W2.T + bias2 + residual), h = activation(x @ W.T + bias), gated or not."""

    first: CondensedWeight
    second: CondensedWeight
    bias: Tensor | None
    bias2: Tensor | None
    activation: str = "gelu"
    gated: bool = False
    activation2: str = "none"
    block_rows: int = 16

    @classmethod
    def random(
        cls, in_features: int, hidden: int, out: int, *, gated: bool = False, seed: int = 0, **options: Any
    ) -> Chain:
        first = sparse((2 if gated else 1) * hidden, in_features, seed)
        second = sparse(out, hidden, seed + 1)
        return cls(first, second, torch.randn(first.shape[0]), torch.randn(out), gated=gated, **options)

    def arguments(self, x: Tensor, residual: Tensor | None = None) -> tuple[Any, ...]:
        first, second = (pack(w, block_rows=self.block_rows) for w in (self.first, self.second))
        return (
            *(x, first.values, first.structure, self.bias, self.activation, self.gated),
            *(second.values, second.structure, self.bias2, self.second.shape[1], self.second.shape[0]),
            *(self.activation2, residual),
        )

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return gather_matmul_chain(*self.arguments(x, residual))

    def exact(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The result in fp64, and how far sums in fp32 may take each element from it.

        A sum of k products is off by (k + 2) eps sum|x||w| and by what its inputs are off; slopes are at most 1.2.
        """
        eps, rounding = torch.finfo(torch.float32).eps, self._rounding(x.dtype)
        x = x.double()
        z, error = _linear(self.first, self.bias, x, torch.zeros_like(x))
        error = error + rounding * z.abs()
        act = ops.ACTIVATIONS[self.activation].forward
        if self.gated:
            (g, up), (error_g, error_up) = z.chunk(2, -1), error.chunk(2, -1)
            h = act(g) * up
            error = 1.2 * error_g * up.abs() + act(g).abs() * error_up + 8 * eps * h.abs()
        else:
            h = act(z)
            error = 1.2 * error + 8 * eps * h.abs()
        y, error = _linear(self.second, self.bias2, h, error + 2 * rounding * h.abs())
        if residual is not None:
            y, error = y + residual.double(), error + eps * residual.double().abs()
        y = ops.ACTIVATIONS[self.activation2].forward(y)
        return y, 1.2 * error + 8 * eps * y.abs()

    def _rounding(self, dtype: torch.dtype) -> float:
        """Relative, of what lies between the layers: fp32 in the kernel, x's dtype where it makes two calls."""
        blocks = Header.read(pack(self.first, block_rows=self.block_rows).structure).blocks
        return torch.finfo(dtype).eps if self.gated and blocks % 2 else 0.0

    def check(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self(x, residual)
        expected, error = self.exact(x, residual)
        assert (y.shape, y.dtype, y.is_contiguous()) == (expected.shape, x.dtype, True)
        assert bool(y.isfinite().all()), "not written, or read from outside"
        limits = torch.finfo(x.dtype)
        bound = 2 * error + limits.eps * expected.abs() + limits.smallest_normal
        excess = (y.double() - expected).abs() / bound
        assert excess.numel() == 0 or float(excess.max()) <= 1, f"{float(excess.max()):.2f} times its bound"
        return y


def _linear(w: CondensedWeight, bias: Tensor | None, x: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    dense = w.to_dense().double()
    size = x.abs() @ dense.abs().t()
    z = x @ dense.t()
    if bias is not None:
        z, size = z + bias.double(), size + bias.double().abs()
    eps = torch.finfo(torch.float32).eps
    return z, (w.max_fan_in + 2) * eps * size + error @ dense.abs().t()


def poison() -> None:
    """Leaves NaN in memory that the allocator hands out next: an element the kernel does not write shows."""
    for size in (64, 1000, 30000):
        torch.full((size,), math.nan)


@settings(deadline=None, max_examples=80)
@given(data=st.data(), gated=st.booleans(), seed=st.integers(0, 2**20))
def test_any_chain(data: st.DataObject, gated: bool, seed: int) -> None:
    draw = data.draw
    size, dtype = st.sampled_from(SIZES), st.sampled_from(DTYPES)
    in_features, hidden, out = draw(size), draw(size), draw(size)
    names, blocks = st.sampled_from(list(ops.ACTIVATIONS)), draw(st.sampled_from((1, 16, 384)))
    first = sparse((2 if gated else 1) * hidden, in_features, seed).with_dtype(draw(dtype))
    second = sparse(out, hidden, seed + 1).with_dtype(draw(dtype))
    bias = torch.randn(first.shape[0]).to(draw(dtype)) if draw(st.booleans()) else None
    bias2 = torch.randn(out).to(draw(dtype)) if draw(st.booleans()) else None
    chain = Chain(first, second, bias, bias2, draw(names), gated, draw(names), blocks)
    batch, x_dtype = draw(st.sampled_from((0, 1, 2, 8, 9, 33, 100))), draw(dtype)
    residual = torch.randn(batch, out).to(x_dtype) if draw(st.booleans()) else None
    poison()
    chain.check(torch.randn(batch, in_features).to(x_dtype), residual)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("in_features", "hidden", "out"), [(300, 1200, 300), (1300, 600, 70), (20, 255, 1000)]
)
@pytest.mark.usefixtures("threads")
def test_sizes_that_cross_blocks_and_chunks(in_features: int, hidden: int, out: int, gated: bool) -> None:
    chain = Chain.random(in_features, hidden, out, gated=gated, block_rows=96)
    assert Header.read(chain.arguments(torch.empty(0))[2]).blocks % 2 == 0
    for batch in (1, 2, 23, 64):
        x, residual = torch.randn(batch, in_features), torch.randn(batch, out)
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            poison()
            results.append(chain.check(x, residual))
        assert torch.equal(*results), "depends on the number of threads"


@pytest.mark.parametrize("gated", [False, True])
def test_hidden_layers_too_wide_for_a_cache(gated: bool) -> None:
    chain = Chain.random(3, 33000, 5, gated=gated)
    for batch in (1, 9):
        chain.check(torch.randn(batch, 3))


def test_a_gated_layer_of_one_block() -> None:
    """Its block holds rows of both factors, which the kernel leaves to two calls."""
    chain = Chain.random(40, 30, 20, gated=True, block_rows=384)
    assert Header.read(chain.arguments(torch.empty(0))[2]).blocks == 1
    for batch in (1, 9):
        chain.check(torch.randn(batch, 40))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.usefixtures("threads")
def test_the_same_bits_whatever_else_is_in_the_batch(gated: bool) -> None:
    chain = Chain.random(300, 400, 300, gated=gated, activation="relu")
    x, residual = torch.randn(100, 300), torch.randn(100, 300)
    whole = chain(x, residual)
    for count in (1, 2):
        torch.set_num_threads(count)
        for part in (slice(0, 2), slice(1, 9), slice(5, 30), slice(60, 100)):
            assert torch.equal(chain(x[part], residual[part]), whole[part])


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
def test_in_fp32_it_has_the_bits_of_two_calls(activation: str) -> None:
    chain = Chain.random(300, 400, 130, activation=activation, activation2="gelu")
    for batch in (1, 2, 60):
        args = chain.arguments(torch.randn(batch, 300), torch.randn(batch, 130))
        assert torch.equal(gather_matmul_chain(*args), reference_gather_matmul_chain(*args))


def test_the_hidden_layer_is_not_rounded_to_half_precision() -> None:
    chain = Chain.random(60, 400, 50)
    x = torch.randn(20, 60, dtype=torch.bfloat16)
    expected, _ = chain.exact(x, None)
    in_one, in_two = (f(*chain.arguments(x)) for f in (gather_matmul_chain, reference_gather_matmul_chain))
    errors = [float((y.double() - expected).square().mean()) for y in (in_one, in_two)]
    assert errors[0] < 0.7 * errors[1]


def test_unread_inputs_and_hidden_neurons_do_not_leak() -> None:
    chain = Chain.random(300, 100, 60, activation="none")
    mask = chain.first.mask()
    reads = chain.second.mask().float() @ mask.float() > 0  # [out, in]
    for batch in (1, 2, 40):
        x = torch.randn(batch, 300)
        x[:, 7] = math.nan
        assert torch.equal(chain(x).isnan(), reads[:, 7].expand(batch, 60))


def test_strides_and_leading_dimensions() -> None:
    chain = Chain.random(50, 70, 30)
    base = torch.randn(4, 6, 50)
    for x in (
        base.transpose(0, 1),
        base[:, ::2],
        base[0, 0],
        torch.randn(50, 9).t(),
        torch.randn(9, 77)[:, 3:53],
    ):
        chain.check(x, torch.randn(30, *x.shape[:-1]).movedim(0, -1))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(gated: bool, dtype: torch.dtype) -> None:
    args = list(Chain.random(20, 12, 7, gated=gated).arguments(torch.randn(2, 3, 20), torch.randn(2, 3, 7)))
    args = [t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in args]
    torch.library.opcheck(torch.ops.fanin.gather_matmul_chain.default, tuple(args))
    for i in (0, 1, 3, 6, 8, 12):
        args[i] = args[i].requires_grad_()
    torch.library.opcheck(torch.ops.fanin.gather_matmul_chain.default, tuple(args))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_the_dense_layers(gated: bool, compiled: bool) -> None:
    chain = Chain.random(20, 12, 7, gated=gated, activation="silu", activation2="relu")
    args = list(chain.arguments(torch.randn(5, 20), torch.randn(5, 7)))
    wanted = [args[i].requires_grad_() for i in (0, 1, 3, 6, 8, 12)]
    torch._dynamo.reset()
    function = torch.compile(gather_matmul_chain, fullgraph=True) if compiled else gather_matmul_chain
    got = torch.autograd.grad(function(*args).square().sum(), wanted)

    x, _, bias, _, bias2, residual = (t.detach().double().requires_grad_() for t in wanted)
    w, w2 = (c.to_dense().double().requires_grad_() for c in (chain.first, chain.second))
    z = x @ w.t() + bias
    h = F.silu(z[:, :12]) * z[:, 12:] if gated else F.silu(z)
    y = torch.relu(h @ w2.t() + bias2 + residual)
    expected = torch.autograd.grad(y.square().sum(), (x, w, bias, w2, bias2, residual))
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if i in (1, 3):  # values
            _, index, entry = decode(args[2 if i == 1 else 7])
            a, b = a[entry], b.flatten()[index]
        assert_close_at_scale(a, b)


def test_meta_tensors_and_flops() -> None:
    args = Chain.random(20, 12, 7).arguments(torch.randn(2, 3, 20))
    on_meta: list[Any] = [t.to("meta") if isinstance(t, Tensor) else t for t in args]
    y = gather_matmul_chain(*on_meta)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 7), torch.float32, "meta")
    with FlopCounterMode(display=False) as counter:
        gather_matmul_chain(*args)
    assert counter.get_total_flops() == 2 * 6 * (len(args[1]) + len(args[6]))


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.randn(2, 19), "in_features = 20"),
        (4, "softmax", "softmax"),
        (5, True, "gated"),
        (9, 13, "13 hidden features"),
        (10, 8, "8 outputs"),
        (3, torch.randn(13), "bias must have 12"),
        (8, torch.randn(8), "bias must have 7"),
        (12, torch.randn(1, 7), "residual must have the output's shape"),
        (7, torch.zeros(512, dtype=torch.uint8), "another version"),
    ],
)
def test_refuses_parts_that_do_not_fit(position: int, value: Any, message: str) -> None:
    args = list(Chain.random(20, 12, 7).arguments(torch.randn(2, 20)))
    args[position] = value
    with pytest.raises(ValueError, match=message):
        gather_matmul_chain(*args)
