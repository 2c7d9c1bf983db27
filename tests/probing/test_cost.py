"""What a probe says of memory is what is allocated; seconds are positive, and in proportion."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_spectral import Probe, probe
from lightning_spectral.measurement import ActivationRequest
from lightning_spectral.probing.cost import activation_cost
from lightning_spectral.probing.found import LayerFound
from tests.models import LanguageModel, token_loader

REQUEST = ActivationRequest(
    stage="train", every_n_steps=100, num_groups=4, num_tokens=4096, normalize=True, dtype="float32"
)


def found(**arguments: Any) -> Probe:
    torch.manual_seed(0)
    return probe(LanguageModel(), next(iter(token_loader(batch_size=8))), **arguments)


def layer(width: int, rows: int) -> LayerFound:
    return LayerFound("layer", "Linear", (rows, width), 1, width, "one of them", rows)


@pytest.mark.parametrize("num_groups", [1, 4])
def test_sums_are_what_the_collector_keeps(num_groups: int) -> None:
    request = replace(REQUEST, num_groups=num_groups)
    like = {"layer": torch.empty(16, 12, device="meta")}
    cost = activation_cost(request, [layer(12, 16)], like, 16, torch.device("cpu"))
    collector = request.collector(["layer"], torch.device("cpu"))
    collector.begin_batch(16, None)
    collector.add("layer", torch.randn(16, 12))
    spare = 0 if num_groups == 1 else 8 * (1 + 12 + 12**2)
    assert cost.kept_bytes == collector._sums["layer"].nbytes + spare
    assert cost.peak_bytes >= 8 * 12**2 * (num_groups + 3)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "4,096 rows of 1 layer, 64 steps"),
        ({"num_tokens": 10**6}, "6,400 rows of 1 layer, 100 steps"),
        ({"every_n_steps": 10}, "640 rows of 1 layer, 10 steps"),
    ],
)
def test_a_report_reads_no_more_than_its_window_holds(arguments: dict[str, Any], expected: str) -> None:
    like = {"layer": torch.empty(64, 12, device="meta")}
    cost = activation_cost(replace(REQUEST, **arguments), [layer(12, 64)], like, 64, torch.device("cpu"))
    assert cost.reads == expected


def test_rows_of_gradients_are_counted() -> None:
    short, long = found(num_samples=16), found(num_samples=64, row_dtype="bfloat16")
    numbers = sum(parameter.shape[0] * parameter.shape[1] for parameter in short.parameters)
    copy = sum(p.nbytes for p in (*LanguageModel().parameters(), *LanguageModel().buffers()))
    for one, rows in ((short, 16 * numbers * 4), (long, 64 * numbers * 2)):
        (_, cost) = one.costs
        assert cost.kept_bytes == rows
        assert cost.kept_on == "cpu"
        assert rows < cost.budget_bytes
        by = {engine.method: engine for engine in one.engines}
        assert cost.peak_bytes == by["vmap"].num_bytes > by["loop"].num_bytes > rows + copy
        # Off the backward pass of training: without a copy.
        assert by["hooks"].num_bytes == rows
        assert all(engine.seconds > 0 for engine in one.engines)
        assert cost.collecting == by["vmap"].seconds
        assert cost.solving > 0


def test_a_report_of_gradients_reads_no_more_than_its_steps_bring() -> None:
    (_, cost) = found(every_n_steps=2).costs
    assert cost.reads.startswith("16 samples x ")


def test_a_layer_that_is_refused_costs_nothing() -> None:
    good, bad = layer(12, 16), replace(layer(12, 16), name="bad", problem="no axis")
    like = {"layer": torch.empty(16, 12, device="meta")}
    one = activation_cost(REQUEST, [good], like, 16, torch.device("cpu"))
    both = activation_cost(REQUEST, [good, bad], like, 16, torch.device("cpu"))
    assert (both.kept_bytes, both.peak_bytes, both.reads) == (one.kept_bytes, one.peak_bytes, one.reads)


def test_without_a_layer_or_an_engine_no_cost_is_told() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    one = probe(net, [torch.randn(3, 4), torch.randn(2, 4)], layers="nothing", loss_fn=lambda net, xs: net(xs[0]).sum())
    assert one.costs == ()
    assert one.samples.problem is not None
