"""The 8-bit linear layer: its emulation against the definition, and the hardware's products against the emulation."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, vmap

from lightning_spectral.nanogpt import float8
from lightning_spectral.nanogpt.float8 import ACTIVATIONS, GRADIENTS, Float8Linear, float8_linear, round_to_float8

_spec = importlib.util.spec_from_file_location("nanogpt_reference", Path(__file__).with_name("_reference.py"))
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

SCALES = (2.0, 32.0, 2.0**29)


@pytest.fixture
def problem():
    """Features (2, 16, 48), weight (32, 48), and the gradient of a mean over 32 tokens."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 48, generator=generator, dtype=torch.float64)
    weight = 0.05 * torch.randn(32, 48, generator=generator, dtype=torch.float64)
    gradient = torch.randn(2, 16, 32, generator=generator, dtype=torch.float64) / 32 / 10
    return x.requires_grad_(), weight.requires_grad_(), gradient


@pytest.mark.parametrize(("dtype", "twin"), [(ACTIVATIONS, reference.e4m3), (GRADIENTS, reference.e5m2)])
def test_rounding(dtype, twin):
    x = torch.cat((torch.linspace(-500, 500, 1001), torch.logspace(-9, 6, 500), torch.tensor([0.0, 1.0625, 1.1875])))
    rounded = round_to_float8(x, 0.5, dtype).double().numpy()
    np.testing.assert_array_equal(rounded, twin(0.5 * x.double().numpy()))


def test_emulation_is_the_definition(problem):
    x, weight, gradient = problem
    y = float8_linear(x, weight, "emulate", SCALES)
    y.backward(gradient)
    rows, matrix = (t.detach().flatten(0, -2).numpy() for t in (x, weight))
    scale = 2.0**29 * 32 / 65536  # 32 rows
    x8, w8 = reference.e4m3(2 * rows), reference.e4m3(32 * matrix)
    g8 = reference.e5m2(scale * gradient.flatten(0, 1).numpy())
    np.testing.assert_allclose(y.detach().flatten(0, 1), x8 @ w8.T / 64, rtol=1e-12)
    np.testing.assert_allclose(x.grad.flatten(0, 1), g8 @ w8 / (scale * 32), rtol=1e-12)
    np.testing.assert_allclose(weight.grad, g8.T @ x8 / (scale * 2), rtol=1e-12)


def test_emulation_is_near_the_exact_product(problem):
    x, weight, gradient = problem
    y = float8_linear(x, weight, "emulate", SCALES)
    exact = x @ weight.T
    assert 1e-3 < (y - exact).norm() / exact.norm() < 0.05
    for wanted, found in zip(
        torch.autograd.grad(exact, (x, weight), gradient), torch.autograd.grad(y, (x, weight), gradient), strict=True
    ):
        assert 1e-3 < (found - wanted).norm() / wanted.norm() < 0.1


@pytest.mark.parametrize("rows", [16, 32, 9])
def test_hardware_products_are_the_emulated_ones(monkeypatch, problem, rows):
    """torch._scaled_mm has a CPU version, with which the path of the GPU can be walked but for its device check."""
    monkeypatch.setattr(float8, "refuse_without_float8", lambda device: None)
    x, weight = (t.detach().float().requires_grad_() for t in (problem[0].flatten(0, 1)[:rows], problem[1]))
    gradient = problem[2].flatten(0, 1)[:rows].float()
    results = []
    for mode in ("on", "emulate"):
        y = float8_linear(x, weight, mode, SCALES)
        results.append((y, *torch.autograd.grad(y, (x, weight), gradient.to(y.dtype).float().to(y.dtype))))
    for found, wanted in zip(*results, strict=True):
        assert found.shape == wanted.shape
        # bfloat16 results, and gradients that were bfloat16 before they were rounded to 8 bits
        assert (found.float() - wanted).norm() < 0.02 * wanted.norm()
    assert results[0][0].dtype == torch.bfloat16
    assert [t.dtype for t in results[0][1:]] == [torch.float32] * 2


def test_too_large_is_the_largest():
    x = torch.tensor([1e9, -1e9])
    assert round_to_float8(x, 1.0, ACTIVATIONS).float().tolist() == [448, -448]
    assert round_to_float8(x, 1.0, GRADIENTS).float().tolist() == [57344, -57344]


@pytest.mark.parametrize("rows", [1, 64, 9000, 65536])
def test_gradients_of_a_mean_are_never_too_large(rows):
    scale = SCALES[2] * min(1, rows / float8.TOKENS)
    assert scale / rows == pytest.approx(8192), "the largest gradient of a mean over rows, scaled"


def test_refused_without_hardware(problem):
    with pytest.raises(
        ValueError, match=r"fp8='on' must run on a CUDA device .* 8.9 or higher, got cpu: take"
    ) as error:
        float8_linear(*problem[:2], "on", SCALES)
    assert "\n" not in str(error.value)


def test_refused_on_older_hardware(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"got cuda:0 of compute capability 8.0: take fp8='emulate'"):
        float8.refuse_without_float8(torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    float8.refuse_without_float8(torch.device("cuda:0"))


def test_per_sample_gradients():
    layer = Float8Linear(8, 16, "emulate", SCALES)
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    parameters = dict(layer.named_parameters())

    def loss(parameters, row):
        return functional_call(layer, parameters, (row,)).square().mean()

    vectorized = vmap(grad(loss), in_dims=(None, 0))(parameters, x)["weight"]
    torch.testing.assert_close(vectorized, torch.stack([grad(loss)(parameters, row)["weight"] for row in x]))


def test_autocast_gives_its_dtype():
    layer, x = Float8Linear(8, 16, "emulate", SCALES), torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert (y.dtype, x.grad.dtype, layer.weight.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
