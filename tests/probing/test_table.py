"""How a probe looks to people and to programs."""

import io
import json
from dataclasses import FrozenInstanceError

import pytest
import torch
from rich.console import Console
from torch import nn

from lightning_spectral import Probe, probe
from lightning_spectral.probing.table import show_bytes, show_seconds
from tests.models import PROBES, LanguageModel, token_loader


@pytest.fixture(scope="module")
def found() -> Probe:
    torch.manual_seed(0)
    return probe(LanguageModel(), next(iter(token_loader())), num_tokens=64, num_samples=8)


def test_a_table_has_all_parts(found: Probe) -> None:
    text = str(found)
    for part in (
        "LanguageModel: one training batch on cpu, nothing trained",
        "samples     4 (axis 0, the length of input_ids)",
        "mask        none, every position counts",
        "self-check  passed, a mean of its samples' losses, residual",
        "activations; a row is positions of a sequence, 32 channels",
        "network.blocks.5.mlp.2.weight",
        "vmap     yes, 'auto' takes it",
        "64 rows of 5 layers, 2 steps",
        "products of rows like these and eigenvalues timed here",
    ):
        assert part in text, part
    assert all(f"network.{name}" in text for name in PROBES)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_nothing_is_cut_off_or_beyond_the_width(found: Probe, width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    console.print(found)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text


def test_programs_get_json(found: Probe) -> None:
    facts = json.loads(found.to_json())
    assert facts["layers"][0]["shape"] == [4, 8, 32]
    assert facts["samples"]["tensors"]["labels"] == [[4, 8], 0]
    assert [engine["works"] for engine in facts["engines"]] == [True] * 3
    assert set(facts) == set(found.as_dict())


def test_a_probe_does_not_change(found: Probe) -> None:
    with pytest.raises(FrozenInstanceError):
        found.device = "cuda"  # type: ignore[misc]


def test_names_are_no_markup_on_any_console() -> None:
    net = nn.ModuleDict({"[bold]a[/bold]": nn.Linear(4, 4), ":x:": nn.Linear(4, 4)})

    def loss(net: nn.ModuleDict, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return net[":x:"](net["[bold]a[/bold]"](batch["[red]"])).square().mean()

    found = probe(net, {"[red]": torch.randn(8, 4)}, layers="*", parameters="*weight", loss_fn=loss, num_samples=8)
    for text in (str(found), _printed(found)):
        for name in ("[bold]a[/bold]", ":x:", "[red] (8, 4) on axis 0", "[bold]a[/bold].weight"):
            assert name in text


def test_a_notebook_is_given_the_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = probe(nn.Linear(4, 4), torch.randn(8, 4), layers="", loss_fn=lambda net, x: net(x).square().mean())
    text = str(found)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert str(found) == text
    assert not capsys.readouterr().out


def _printed(found: Probe) -> str:
    console = Console(file=io.StringIO(), width=120)  # with markup and pictures
    console.print(found)
    return console.file.getvalue()


def test_estimates_have_few_digits() -> None:
    assert [show_seconds(seconds) for seconds in (0.01234, 1.26, 9.96, 1234.5)] == ["0.012", "1.3", "10", "1,234"]
    assert [show_bytes(count) for count in (12, 2048, 3 * 2**20, 2**41)] == ["12 B", "2 KiB", "3 MiB", "2 TiB"]
