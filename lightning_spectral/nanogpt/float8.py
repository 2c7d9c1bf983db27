"""A linear layer whose three matrix products, one forward and two backward, take 8-bit floats."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

ACTIVATIONS = torch.float8_e4m3fn  # three bits of mantissa, largest 448; weights too
GRADIENTS = torch.float8_e5m2  # two bits of mantissa, largest 57344

TOKENS = 65536
"""Rows for which the scale of gradients is meant."""


def round_to_float8(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Scale and round to one of torch's 8-bit floats; what is too large becomes the largest number, not NaN."""
    largest = torch.finfo(dtype).max
    return (x * scale).clamp(-largest, largest).to(dtype)


def _multiply(a: Tensor, b: Tensor, scale: float, dtype: torch.dtype, emulate: bool, fast: bool = False) -> Tensor:
    # (m, k) times (k, n) of 8-bit floats; a is laid out by rows and b by columns, the only way the hardware takes them
    if emulate:
        return (a.to(dtype) @ b.to(dtype)) / scale
    one = torch.ones((), dtype=torch.float32, device=a.device)
    # fast: sums of products in fewer bits than float32, good enough for logits
    return torch._scaled_mm(a, b, scale_a=one / scale, scale_b=one, out_dtype=dtype, use_fast_accum=fast)


class _Float8Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, scales: tuple[float, float, float], emulate: bool) -> Any:
        x8 = round_to_float8(x, scales[0], ACTIVATIONS)  # (rows, in)
        w8 = round_to_float8(weight, scales[1], ACTIVATIONS)  # (out, in)
        dtype = x.dtype if emulate else torch.bfloat16
        return _multiply(x8, w8.t(), scales[0] * scales[1], dtype, emulate, fast=True), x8, w8  # (rows, out)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, ctx.scales, ctx.emulate = inputs
        ctx.dtypes = x.dtype, weight.dtype
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])  # a byte a number, where a plain linear layer keeps two or four

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        x8, w8 = ctx.saved_tensors
        x_scale, w_scale, g_scale = ctx.scales
        x_dtype, w_dtype = ctx.dtypes
        g8 = round_to_float8(grad, g_scale, GRADIENTS)  # (rows, out)
        dtype = x_dtype if ctx.emulate else torch.bfloat16
        grad_x = _multiply(g8, w8.t().contiguous().t(), g_scale * w_scale, dtype, ctx.emulate)  # (rows, in)
        dtype = w_dtype if ctx.emulate else torch.float32
        x_columns, g_columns = x8.t().contiguous(), g8.t().contiguous().t()  # (in, rows), (rows, out)
        grad_w = _multiply(x_columns, g_columns, x_scale * g_scale, dtype, ctx.emulate).t()  # (out, in)
        return grad_x.to(x_dtype), grad_w.to(w_dtype), None, None


def float8_linear(x: Tensor, weight: Tensor, mode: str, scales: tuple[float, float, float]) -> Tensor:
    r"""Multiply by a matrix with factors in 8 bits.

    With :math:`r` the rounding and :math:`s` the scales, :math:`y = r(s_x x)\, r(s_w W)^\top / (s_x s_w)`, and the
    gradients are :math:`r'(s_g g)\, r(s_w W) / (s_g s_w)` and :math:`r'(s_g g)^\top r(s_x x) / (s_g s_x)`, where
    :math:`r` keeps three bits of mantissa and :math:`r'` two.

    Args:
        x: Features, `(..., in)`.
        weight: Matrix, `(out, in)`.
        mode: "on" for the GPU's 8-bit products, which give bfloat16; "emulate" for products of the rounded factors in
            the precision of `x`, everywhere.
        scales: Factors on features, weights and gradients before rounding; the last is times rows / 65,536 for fewer
            rows, as the gradients of a mean over them are larger.

    Returns:
        Products, `(..., out)`.

    Raises:
        ValueError: If mode is "on" where there are no 8-bit products.
    """
    if mode == "on":
        refuse_without_float8(x.device)
    rows = x.reshape(-1, x.size(-1))  # (rows, in)
    scales = (*scales[:2], scales[2] * min(1.0, rows.size(0) / TOKENS))
    padding = -rows.size(0) % 16 if mode == "on" else 0  # the hardware sums over rows in sixteens
    if padding:
        rows = torch.cat((rows, rows.new_zeros(padding, rows.size(1))))
    y = _Float8Product.apply(rows, weight, scales, mode == "emulate")[0]  # (rows, out)
    return y[: y.size(0) - padding].view(*x.shape[:-1], weight.size(0))


def refuse_without_float8(device: torch.device) -> None:
    """Raise ValueError for a device without 8-bit matrix products."""
    what = str(device)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 9):
            return
        what = f"{device} of compute capability {capability[0]}.{capability[1]}"
    raise ValueError(
        f"fp8='on' must run on a CUDA device of compute capability 8.9 or higher, got {what}: "
        "take fp8='emulate' (the same rounding, slower) or fp8='off'"
    )


class Float8Linear(nn.Linear):
    """A linear layer without bias in 8-bit floats; arguments as in `float8_linear`."""

    def __init__(self, in_features: int, out_features: int, mode: str, scales: tuple[float, float, float]) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.mode, self.scales = mode, scales

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Multiply, (..., in) -> (..., out)."""
        return float8_linear(x, self.weight, self.mode, self.scales)
