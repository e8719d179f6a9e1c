"""Fused fake quantization on a GPU: sizes, memory, repetition and compilation that the interpreter cannot show."""

import pytest
import torch
from torch import Tensor, nn

from bbb_ao.kernels import fake_quantize_closed_form, fake_quantize_tokens
from bbb_ao.kernels.fake_quantize import dispatch
from bbb_ao.qat_linear import QATLinear

triton = pytest.importorskip("triton")
tl = triton.language
kernels = pytest.importorskip("bbb_ao.kernels.fake_quantize.triton_kernels")
_divide_by_step = kernels._divide_by_step
GRIDS = [(True, 4), (True, 0), (False, 2)]


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


@triton.jit
def divide_kernel(x_ptr, step_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    step = tl.load(step_ptr + tl.zeros((1, 1), tl.int32))
    tl.store(out_ptr + offsets, _divide_by_step(tl.load(x_ptr + offsets), step, True))


def test_the_short_division_is_exact_for_every_mantissa() -> None:
    x = (torch.arange(2**23, dtype=torch.int32, device="cuda") | 0x3F800000).view(torch.float32)
    for eighths in range(8, 16):
        for power in (-108, -7, 0, 30, 123):
            step = torch.tensor([eighths / 8 * 2.0**power], device="cuda")
            scaled = x * 2.0 ** min(power, 100)
            found = torch.empty_like(x)
            divide_kernel[(2**23 // 1024,)](scaled, step, found, 1024, enable_fp_fusion=False)
            assert torch.equal(found, scaled / step), (eighths, power)


@pytest.mark.parametrize(("half_step", "zero_point_bits"), GRIDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_large_weights_equal_the_reference(half_step: bool, zero_point_bits: int, bits: int) -> None:
    weight, upstream = randn(bits, 2048, 4096) / 64, randn(9, 2048, 4096).bfloat16()
    results = []
    # The reference on the CPU: on a GPU, torch multiplies by the rounded reciprocal of a number such as 3.5.
    for device in ("cuda", "cpu"):
        leaf = weight.to(device, copy=True).requires_grad_()
        assert dispatch.uses_triton(leaf) == (device == "cuda")
        out = fake_quantize_closed_form(leaf, bits, half_step, zero_point_bits, dtype=torch.bfloat16)
        out.backward(upstream.to(device))
        results.append((out.detach().cpu(), leaf.grad.cpu()))
    (out, gradient), (expected, reference) = results
    assert torch.equal(out, expected)
    # Bound as in tests/kernels/test_fake_quantize_triton.py, with the group's sum of magnitudes.
    total = upstream.float().cpu().abs().unflatten(1, (-1, 32)).sum(-1, keepdim=True)
    bound = (10 * 40 * torch.finfo(torch.float32).eps * total).expand(-1, -1, 32).flatten(1)
    assert ((gradient - reference).abs() <= bound).all()


def test_only_the_master_is_kept_for_the_backward_pass() -> None:
    weight = randn(0, 4096, 4096).requires_grad_()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = fake_quantize_closed_form(weight, 2, True, 4, dtype=torch.bfloat16)
    assert torch.cuda.memory_allocated() - before <= out.numel() * 2 + 4096
    assert torch.cuda.max_memory_allocated() - before <= out.numel() * 2 + 4096
    out.backward(out.detach())
    # The gradient becomes weight.grad as it is, without a copy.
    assert torch.cuda.max_memory_allocated() - before <= out.numel() * (2 + 4) + 8192


def test_repeated_runs_are_the_same_bit_for_bit() -> None:
    weight, x = randn(0, 1024, 4096), randn(1, 2048, 4096).bfloat16()
    runs = []
    for _ in range(3):
        pair = []
        for function, tensor in (
            (lambda t: fake_quantize_closed_form(t, 2, True, 4), weight),
            (lambda t: fake_quantize_tokens(t, 2, True), x),
        ):
            leaf = tensor.clone().requires_grad_()
            out = function(leaf)
            out.backward(out.detach() + 1)
            pair += [out.detach(), leaf.grad]
        runs.append(pair)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("act_bits", [None, 2])
def test_compiled_training_under_autocast_equals_eager(act_bits: int | None, learned: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    qat = QATLinear.from_linear(nn.Linear(256, 192), 2, act_bits, learned_scales=learned).cuda()
    x, upstream = randn(1, 64, 256), randn(2, 64, 192)
    found = []
    for layer in (qat, torch.compile(qat, fullgraph=True)):
        qat.zero_grad(set_to_none=True)
        leaf = x.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(leaf)
        y.float().backward(upstream)
        found.append([y.detach(), leaf.grad, *(p.grad.clone() for p in qat.parameters())])
    for eager, compiled in zip(*found, strict=True):
        # Both round the same products to bfloat16; sums may differ in their order.
        torch.testing.assert_close(compiled, eager, rtol=2**-6, atol=2**-6 * eager.abs().max().item())
