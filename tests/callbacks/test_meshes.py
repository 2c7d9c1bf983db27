"""Two and four real gloo processes under ModelParallelStrategy: spectra are those of one process that has it all."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_spectral import GradientSpectrum, Run
from lightning_spectral.measurement import Scene
from tests.callbacks.mesh_run import BATCH, LENGTH, NUM_HELD_OUT, STEPS, fit, runs
from tests.distributed import run_distributed

TWO = [("shared", 1, 2), ("sequence", 1, 2), ("sequence dtensor", 1, 2), ("fsdp", 2, 1)]
UNLIKE = ("unlike", 1, 2)
FOUR = [("fsdp shared", 2, 2), ("hsdp", 4, 1)]
EXACT = ("embed", "blocks.0", "blocks.1", "blocks.0.inner.0", "blocks.0.down", "blocks.1.norm", "head")
READ = [f"blocks.{i}.{one}" for i in (0, 1) for one in ("inner.0.weight", "inner.0.bias", "down.weight", "down.bias")]
NUM_ROWS = STEPS * 2 * BATCH * LENGTH


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("meshes")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict:
    return fit(folder, "one", method="hooks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> dict[str, list[dict]]:
    """What each rank found, by layout."""
    found = {}
    for world, wanted in ((2, [*TWO, UNLIKE]), (4, FOUR)):
        of_ranks = run_distributed(runs, world, folder, wanted)
        found |= {layout: [of_rank[layout] for of_rank in of_ranks] for layout, *_ in wanted}
        found[f"bare {wanted[1][0]}"] = [of_rank["bare"] for of_rank in of_ranks]
    return found


LAYOUTS = pytest.mark.parametrize("layout", [layout for layout, *_ in (*TWO, *FOUR)])


@LAYOUTS
def test_eigenvalues_are_those_of_one_process(one: dict, ranks: dict, layout: str) -> None:
    for found in ranks[layout]:
        for name in EXACT:
            values, failure, count = found["spectra"]["activation"][name]
            expected, _, _ = one["spectra"]["activation"][name]
            assert failure is None
            assert count == NUM_ROWS
            np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6 * expected[0])


@pytest.mark.parametrize("layout", [layout for layout, data, _ in TWO if data == 1])
def test_ranks_that_hold_the_same_data_share_the_rows_of_one(one: dict, ranks: dict, layout: str) -> None:
    # Of a pass of 144 rows 60 are read, those that one process reads.
    for found in ranks[layout]:
        for name in EXACT:
            values, failure, count = found["spectra"]["held out/activation"][name]
            expected, _, expected_count = one["spectra"]["held out/activation"][name]
            assert failure is None
            assert count == expected_count <= NUM_HELD_OUT
            np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6 * expected[0])


@LAYOUTS
def test_errors_and_counts_are_those_of_one_process(one: dict, ranks: dict, layout: str) -> None:
    for found in ranks[layout]:
        for name in EXACT:
            for quantity in ("alpha_tail", "alpha_tail_stderr", "alpha_tail_corrected", "num_tokens"):
                key = f"activation/{name}/{quantity}"
                assert found["metrics"][key] == pytest.approx(one["metrics"][key], rel=1e-6, nan_ok=True)


@LAYOUTS
def test_a_shard_that_cannot_be_told_is_refused(ranks: dict, layout: str) -> None:
    for found in ranks[layout]:
        values, failure, _ = found["spectra"]["activation"]["blocks.1.inner"]
        if layout in ("fsdp", "hsdp"):
            assert failure is None
        else:
            assert len(values) == 0
            assert failure.startswith("its output differs between the ranks that hold the same data")
            assert math.isnan(found["metrics"]["activation/blocks.1.inner/alpha_tail"])


@LAYOUTS
def test_gradients_are_those_of_one_process(one: dict, ranks: dict, layout: str) -> None:
    names = [*READ, "head.weight", *([] if "sequence" in layout else ["embed.weight"])]
    for found in ranks[layout]:
        for name in names:
            values, failure, count = found["spectra"]["gradient"][name]
            expected, _, _ = one["spectra"]["gradient"][name]
            assert failure is None
            assert count == 2 * BATCH
            np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6 * expected[0])
            for quantity in ("grad_norm", "noise_scale"):
                key = f"gradient/{name}/{quantity}"
                assert found["metrics"][key] == pytest.approx(one["metrics"][key], rel=1e-6)


@LAYOUTS
def test_all_ranks_log_the_same_and_auto_says_what_it_took(ranks: dict, layout: str) -> None:
    first, *others = ranks[layout]
    for other in others:
        ours = [{key: one for key, one in of["metrics"].items() if key != "val_loss"} for of in (first, other)]
        assert ours[1] == pytest.approx(ours[0], rel=0, abs=0, nan_ok=True)
    assert any("method='auto' reads training's own backward passes" in said for said in first["said"])
    assert not any("vmap" in said for said in first["said"])


@LAYOUTS
def test_records_count_each_token_once(folder: Path, ranks: dict, layout: str) -> None:
    tokens = [Run(folder / of / "version_0").history.tokens[-1] for of in (layout, "one")]
    assert tokens == [NUM_ROWS, NUM_ROWS]
    prints = [Run(folder / of / "version_0").about["validation_data"] for of in (layout, "one")]
    assert prints[0] == prints[1]


def test_ranks_with_the_same_data_that_went_ways_of_their_own_are_refused(ranks: dict) -> None:
    for found in ranks["unlike"]:
        of_layers, of_parameters = found["spectra"]["activation"], found["spectra"]["gradient"]
        assert of_layers["blocks.0"][1].startswith("its output differs between the ranks that hold the same data")
        assert of_layers["blocks.0.inner.0"][1].startswith(
            "its input differs between the ranks that hold the same data"
        )
        # What is put together from both, and its gradient, is the same for both; what they were given is not.
        for name in ("blocks.0.inner.0.weight", "blocks.1.inner.0.bias"):
            assert of_parameters[name][1].startswith("its input differs between the ranks that hold the same data")
        assert of_parameters["embed.weight"][1].startswith("its rows differ between ranks that hold the same data")


@pytest.mark.parametrize("layout", [TWO[1][0], FOUR[1][0]])
def test_training_is_bit_identical_without_callbacks(ranks: dict, layout: str) -> None:
    for found, bare in zip(ranks[layout], ranks[f"bare {layout}"], strict=True):
        assert all(map(torch.equal, found["weights"], bare["weights"]))


@pytest.mark.parametrize(
    "settings", [{"method": "vmap"}, {"method": "loop"}, {"method": "auto", "stage": "validate"}], ids=str
)
def test_what_would_run_a_copy_is_refused_by_name(settings: dict) -> None:
    request = GradientSpectrum("weight", **settings).request
    module = nn.Linear(2, 2)
    module.weight.placements = module.weight.device_mesh = ()  # as a DTensor has
    scene = Scene(module, torch.device("cpu"), None, None)  # type: ignore[arg-type]
    expected = (
        f"method must be 'hooks', with stage='train', where parameters are sharded, got method={request.method!r}"
    )
    with pytest.raises(ValueError, match=expected):
        request.measure(scene)
