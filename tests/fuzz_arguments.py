"""Hostile arguments for every public constructor and function."""

import inspect
import math
import random
import tempfile
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import lightning_spectral as ls
from lightning_spectral import functional as f
from lightning_spectral import theory as t
from lightning_spectral.nanogpt import NanoGPT, ShardData, TextData, write_shard
from lightning_spectral.nanogpt.checkpoints import from_speedrun, load_speedrun
from lightning_spectral.nanogpt.config import GPTConfig
from tests.fuzz_case import Case, accept
from tests.runs.made_up import LAYER

GENERATOR = torch.Generator().manual_seed(0)
ROWS = torch.randn(12, 6, generator=GENERATOR)
VALUES = torch.arange(1, 13.0) ** -1.5
GROUPS = VALUES * torch.tensor([[1.0], [1.1], [0.9]])
GRAM = (ROWS @ ROWS.T).double()
COVARIANCE = (ROWS.T @ ROWS).double()
ALPHA = torch.tensor([1.0, 1.1, 1.2, 1.3, 1.5, 1.4])
TOKENS = torch.tensor([10.0, 12.0, 11.0, 15.0, 20.0, 18.0])
GPT_CONFIG = GPTConfig(num_layers=1, num_heads=2, width=16, block_size=8, vocab_size=16)


class Odd:
    """Says two lines of itself."""

    def __repr__(self) -> str:
        return "odd\n[red]one[/red]"


class Silent:
    """Cannot say what it is."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


PLAIN: list[Any] = [
    *(None, True, False, "", "x", "false", "no", "3", "nan", "a\nb", "a\0b", "[red]x[/red]", "x" * 5000, b"x"),
    *(0, -1, 1, 2, 3, 7, 64, 10**6, 10**9, 2**31, 2**63, 10**30, 10**400, -(10**400)),
    *(0.0, -0.0, 0.5, 1.5, 2.5, -0.5, 1e-320, 1e308, math.nan, math.inf, -math.inf, 1j, Decimal("1.5")),
    *([], [1], ["a"], ["a", 5], [None], [[1, 2]], [0.5, 0.1], {}, {"a": 1}, {5: 5}, set(), {1}, range(3)),
    *((), (1,), (1, 2), (5, 1), (1, 100), (1, 10**30), (0.1, 0.2, 0.3), (0.1, 5), (math.nan, 1.0), (True, False)),
    *((0.1, math.inf), ("1", "3"), (None, None), (-3, 3), (0.9, 0.95), (0.0, 1.0)),
    *(np.int64(3), np.float64(0.5), np.float32(2), np.array([1.0, 2.0]), np.array(["a"]), np.bool_(True)),
    *(object(), Odd(), Silent(), int, len, lambda *_: None, Path("nothing/here"), Path("/dev/null"), "/dev/zero", "/"),
    *(nn.Linear(2, 2), torch.device("cpu"), torch.float32, ...),
]
TENSORS: list[Tensor] = [
    *(ROWS, VALUES, GROUPS, GRAM, COVARIANCE, ALPHA, TOKENS, -VALUES, VALUES.flip(0), VALUES * 0, VALUES * math.nan),
    *(torch.tensor(1.0), torch.ones(0), torch.ones(0, 3), torch.ones(3, 0), torch.ones(1), torch.ones(1, 1), ROWS[:1]),
    *(torch.tensor([math.inf, 1.0]), torch.tensor([1.0, math.nan, 0.5]), torch.tensor([3.0, -1.0]), VALUES * 1e38),
    *(VALUES.double() * 1e300, VALUES.double() * 1e-320, VALUES * 1j, VALUES > 0.1, (VALUES * 100).long()),
    *(VALUES.to(torch.uint8), VALUES.half(), VALUES.bfloat16(), VALUES.clone().requires_grad_(), VALUES.to_sparse()),
    *(VALUES.to("meta"), ROWS.T, ROWS.expand(2, 12, 6), ROWS[::2, ::3], torch.eye(3)[None], torch.full((2, 2), 2**60)),
    *(nn.Parameter(ROWS.clone()), GRAM - 1e3, ROWS * 1e200),
    *(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), torch.ones(2, 3, 4, 5)),
]


class Target(NamedTuple):
    """Something that takes arguments, with some that it takes."""

    call: Callable[..., Any]
    good: dict[str, Any]
    check: Callable[[Any], None] = accept
    names: tuple[str, ...] = ()
    """What refusals name beside the arguments."""


def between(low: float, high: float) -> Callable[[Any], None]:
    def check(found: Any) -> None:
        numbers = torch.as_tensor(found, dtype=torch.float64)
        bad = (numbers < low - 1e-9) | (numbers > high + 1e-9)
        assert not bool(bad.any()), f"gives {numbers[bad][:3].tolist()}"

    return check


def is_spectrum(found: Any) -> None:
    assert found.dtype == torch.float64, f"gives {found.dtype}"
    assert not bool((found < 0).any()), "gives negative values"
    assert not bool((found[..., 1:] > found[..., :-1] * (1 + 1e-6)).any()), "gives rising values"


def is_power_law(found: f.PowerLaw) -> None:
    assert not bool((found.num_values[found.exponent.isfinite()] < 3).any()), "fits a line to less than three"
    assert not bool(found.exponent.isinf().any()), "gives an infinite exponent"


def is_forecast(found: f.Forecast) -> None:
    if not math.isnan(found.value):
        assert 0 <= found.low <= found.value <= found.high, f"gives {found}"


def _update(metric: Callable[..., Any], **kwargs: Any) -> Any:
    rows = kwargs.pop("x" if "x" in kwargs else "g")
    found = metric(**kwargs)
    found.update(rows)
    return found.compute()


def _request(callback: Any) -> None:
    assert isinstance(callback.state_key, str)


def _exponent(band: Any) -> f.Exponent:
    return f.Spectrum(VALUES, GROUPS, count=400).exponent(band)


def _floor(values: Any, leave_one_out: Any) -> Tensor:
    return f.js_floor(f.Spectrum(values, leave_one_out))


def _stack(log_gap: Any, log_batch: Any, tokens: Any, level: Any) -> f.StackedForecast:
    return f.stack(f.Early(log_gap, log_batch), tokens, level=level)


def _samples(batch: Any) -> list[Any]:
    return [batch]


def _per_sample(**kwargs: Any) -> Any:
    batch = {"x": torch.ones(2, 2)}  # which has samples along either axis
    return ls.per_sample_gradients(nn.Linear(2, 1), batch, loss_fn=lambda module, b: module(b["x"]).mean(), **kwargs)


def _report(**kwargs: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ls.report(path=f"{folder}/report.html", **kwargs)


def _asked(method: str) -> Callable[..., Any]:
    def ask(path: Any, **kwargs: Any) -> Any:
        return getattr(ls.Run(path), method)(**kwargs)

    return ask


_OF_ROWS = {
    "layers": "all",
    "every_n_steps": 5,
    "stage": "train",
    "num_tokens": 64,
    "num_groups": 4,
    "normalize": True,
    "dtype": "float32",
    "mask": None,
    "prefix": "",
    "dataloader_idx": 0,
    "channel_dim": None,
    "batch_dim": None,
    "samples": None,
    "sums_device": "auto",
    "overlap": True,
}
_OF_MODES = {"spectrum": VALUES, "power": VALUES, "rate": 0.1}
_BANDS = {"head": (1, 10), "tail": (0.125, 0.5)}
_OF_GRADIENTS = {
    **{"parameters": "all", "every_n_steps": 5, "stage": "train", "num_samples": 8, "method": "auto"},
    **{"chunk_size": None, "loss_fn": None, "loss_reduction": "mean", "weights": False, "num_groups": 4, "prefix": ""},
    **{"row_dtype": "float32", "row_device": "auto", "dataloader_idx": 0, "batch_dim": None, "samples": None},
    **_BANDS,
    "check": "refuse",
}
_OF_FORECASTER = {
    **{name: value for name, value in _OF_ROWS.items() if name != "layers"},
    **{"target_loss": 2.0, "monitor": "val_loss", "references": (), "layer": None, "tail": (0.125, 0.5)},
    "stop_if_relative_above": None,
    "predictor": "stack",
}
_OF_GPT = {**vars(GPT_CONFIG), "window": 4}

TARGETS: dict[str, Target] = {
    "covariance_spectrum": Target(f.covariance_spectrum, {"rows": ROWS}, is_spectrum),
    "singular_spectrum": Target(f.singular_spectrum, {"rows": ROWS, "centred": False}, is_spectrum),
    "eigenvalues": Target(f.eigenvalues, {"matrices": COVARIANCE, "rtol": None}, is_spectrum),
    "singular_values": Target(f.singular_values, {"gram": GRAM}, is_spectrum),
    "gram": Target(f.gram, {"rows": ROWS}),
    "gradient_moments": Target(f.gradient_moments, {"gram": GRAM}),
    "gradient_noise_scale": Target(f.gradient_noise_scale, {"gram": GRAM}, between(0, math.inf)),
    "noise_sums": Target(f.noise_sums, {"gram": GRAM, "groups": torch.arange(12) % 3, "num_groups": 3}),
    "moments": Target(f.moments, {"rows": ROWS}),
    "covariance": Target(f.covariance, {"sample": f.moments(ROWS)}),
    "pool": Target(f.pool, {"parts": f.moments(ROWS.reshape(3, 4, 6)), "subsets": None}),
    "normalize": Target(f.normalize, {"values": VALUES}, between(0, 1)),
    "rankme": Target(f.rankme, {"values": VALUES}, between(1, 200)),
    "head_share": Target(f.head_share, {"values": VALUES, "k": 3}, between(0, 1)),
    "js_divergence": Target(f.js_divergence, {"p": VALUES, "q": VALUES.sqrt()}, between(0, math.log(2))),
    "power_law": Target(f.power_law, {"values": VALUES, "band": (1, 8)}, is_power_law),
    "resolve_band": Target(f.resolve_band, {"band": (1, 8), "num_values": 12}),
    "jackknife": Target(f.jackknife, {"estimate": torch.tensor(1.0), "leave_one_out": ALPHA}),
    "principal_angles": Target(f.principal_angles, {"u": ROWS, "v": ROWS.flip(0)}, between(0, math.pi / 2)),
    "subspace_overlap": Target(f.subspace_overlap, {"u": ROWS, "v": ROWS.flip(0)}, between(0, 1)),
    "forecast_tokens": Target(
        f.forecast_tokens, {"alpha": ALPHA, "tokens": TOKENS, "at": 1.2, "level": 0.8}, is_forecast
    ),
    "backtest": Target(f.backtest, {"alpha": ALPHA, "tokens": TOKENS}),
    "extrapolate_loss": Target(f.extrapolate_loss, {"tokens": TOKENS, "losses": 5 / TOKENS, "target": 0.2}),
    "anchored_power_law": Target(f.anchored_power_law, {"tokens": TOKENS, "losses": 5 / TOKENS, "target": 0.2}),
    "stack": Target(_stack, {"log_gap": ALPHA.log(), "log_batch": ALPHA, "tokens": TOKENS, "level": 0.8}),
    "spearman": Target(f.spearman, {"x": ALPHA, "y": TOKENS}, between(-1, 1)),
    "partial_spearman": Target(f.partial_spearman, {"x": ALPHA, "y": TOKENS, "given": ALPHA.sqrt()}, between(-1, 1)),
    "spearman_interval": Target(
        f.spearman_interval, {"x": ALPHA, "y": TOKENS, "level": 0.9, "num_draws": 50, "seed": 0}, between(-1, 1)
    ),
    "Spectrum": Target(
        f.Spectrum, {"values": VALUES, "leave_one_out": GROUPS, "vectors": None, "count": 4}, names=("n,", "G,")
    ),
    "exponent": Target(_exponent, {"band": (1, 8)}),
    "js_floor": Target(_floor, {"values": VALUES, "leave_one_out": GROUPS}, between(0, math.log(2))),
    "gradient_flow_risk": Target(t.gradient_flow_risk, _OF_MODES | {"steps": 10.0}),
    "power_law_risk": Target(
        t.power_law_risk, {"alpha": 1.0, "beta": 2.0, "rate": 0.1, "steps": 10.0, "top": 1.0}, between(0, math.inf)
    ),
    "sgd_risk": Target(t.sgd_risk, _OF_MODES | {"batch_size": 4, "noise": 0.1, "steps": 10}),
    "stability": Target(t.stability, {"spectrum": VALUES, "rate": 0.1, "batch_size": 4, "noise": 0.1}),
    "steps_to_risk": Target(
        t.steps_to_risk, _OF_MODES | {"batch_size": 4, "noise": 0.1, "target": 0.5}, between(0, math.inf)
    ),
    "noise_scale": Target(t.noise_scale, {"spectrum": VALUES, "power": VALUES, "noise": 0.1}, between(1, math.inf)),
    "readout_loss": Target(
        t.readout_loss, {"loss": 2.0, "eigenvalues": VALUES, "power": VALUES, "rate": 0.1, "steps": 10.0}
    ),
    "task_power": Target(
        t.task_power, {"eigenvalues": VALUES[:6], "basis": torch.eye(6), "readout_gradient": ROWS}, between(0, math.inf)
    ),
    "power_law_spectrum": Target(t.power_law_spectrum, {"num": 8, "alpha": 1.0, "normalize": "trace"}, is_spectrum),
    "harmonic_energy": Target(t.harmonic_energy, {"state_means": ROWS}, between(0, math.inf)),
    "band_concentration": Target(t.band_concentration, {"energy": VALUES, "harmonics": [1]}),
    "CovarianceSpectrum": Target(partial(_update, ls.CovarianceSpectrum), {"num_features": 6, "x": ROWS}),
    "PerSampleGradientSpectrum": Target(partial(_update, ls.PerSampleGradientSpectrum), {"centred": False, "g": ROWS}),
    "ActivationSpectrum": Target(
        ls.ActivationSpectrum, _OF_ROWS | _BANDS | {"readout": "head", "overlap": False}, _request
    ),
    "GradientSpectrum": Target(ls.GradientSpectrum, _OF_GRADIENTS, _request),
    "HeadDrift": Target(ls.HeadDrift, _OF_ROWS | {"rank": 4, "reference": "first"}, _request),
    "TailForecaster": Target(ls.TailForecaster, _OF_FORECASTER, _request),
    "RunRecord": Target(
        ls.RunRecord,
        {
            **{"family": None, "tags": {"a": 1}, "tokens_per_sample": None, "loss": None},
            **{"vectors": True, "upload": False, "enabled": True},
        },
    ),
    "Run": Target(ls.Run, {"path": "nothing"}, names=("run",)),
    **{
        f"Run.{method}": Target(_asked(method), {"path": "B", **arguments}, names=("run", "kind"))
        for method, arguments in {
            "use": {"kind": "activation", "series": "activation-validate"},
            "span": {"series": "activation-validate"},
            "settings": {"kind": "gradient"},
            "steps": {"kind": "activation", "name": LAYER},
            "holds": {"kind": "activation", "name": LAYER},
            "names": {"kind": "weight"},
            "spectrum": {"kind": "activation", "name": LAYER, "step": 100},
            "spectra": {"kind": "activation", "step": 100, "without": ("vectors",)},
            "noise_scale": {"step": 100, "name": None, "kind": "gradient"},
            "readout": {"step": 100, "kind": "readout"},
            "tokens_at": {"kind": "activation", "step": 100},
            "spectrum_at": {"kind": "activation", "name": LAYER, "tokens": 5e4},
            "spectra_at": {"kind": "activation", "tokens": 5e4, "without": ()},
            "course": {"kind": "activation"},
            "tokens_to": {"loss": 1.0},
            "at_loss": {"loss": 1.0},
        }.items()
    },
    "compare": Target(ls.compare, {"base": "B", "variant": "V", "at_loss": None, "floor": None}, names=("run",)),
    "report": Target(_report, {"runs": "P", "at_loss": None, "floor": None}, names=("run", "at_loss", "floor")),
    "backtest of runs": Target(
        ls.backtest, {"paths": "P", "target": 1.5, "layer": None, "tail": None, "at": None}, names=("run",)
    ),
    "forecast": Target(
        ls.forecast, {"paths": "P", "target": 1.5, "layer": None, "tail": None, "at": None}, names=("run",)
    ),
    "per_sample_gradients": Target(
        _per_sample,
        {"parameters": "all", "method": "loop", "chunk_size": None, "batch_dim": None, "loss_reduction": "mean"},
    ),
    "GPTConfig": Target(GPTConfig, _OF_GPT, names=("num_heads", "window")),
    "TextData": Target(
        TextData, {"path": None, "block_size": 8, "batch_size": 2, "val_fraction": 0.1, "seed": 0, "num_workers": 0}
    ),
    "ShardData": Target(
        ShardData,
        {
            **{"path": "x", "block_size": 8, "batch_size": 2, "val_path": None, "val_tokens": 64, "eos_token": 0},
            **{"align_to_documents": False, "num_workers": 0},
        },
    ),
    "NanoGPT": Target(
        partial(NanoGPT, num_layers=1, num_heads=2, width=16, block_size=8, vocab_size=16),
        {
            **{"tier": "tiny", "recipe": "rope", "optimizer": None, "matrix_optimizer": None, "learning_rate": None},
            **{"lr_multiplier": 1.0, "weight_decay": None, "betas": None, "warmup_steps": 5, "cooldown": None},
            **{"stop_at_loss": None, "batch_tokens": None, "val_tokens": None, "switches": None},
        },
        names=("overrides", "num_layers", "width", "switches"),
    ),
    "write_shard": Target(write_shard, {"path": "SHARD", "tokens": [1, 2, 3]}),
    "from_speedrun": Target(
        from_speedrun, {"state": {}, "config": GPT_CONFIG, "turns_back": True}, names=("checkpoint",)
    ),
    "load_speedrun": Target(load_speedrun, {"path": "nothing", "gpt": None}),
}


def draw(rng: random.Random, folder: Path) -> Case:
    """One target with one or two of its arguments replaced."""
    name = rng.choice(list(TARGETS))
    target = TARGETS[name]
    arguments = dict(target.good)
    places = {"P": f"{folder}/base/run*", "B": f"{folder}/base/run0", "V": f"{folder}/base/run1"}
    places["SHARD"] = f"{folder}/shard_train.bin"
    arguments = {key: places.get(value, value) if isinstance(value, str) else value for key, value in arguments.items()}
    changed = rng.sample(list(arguments), min(len(arguments), rng.choice((1, 1, 1, 2))))
    for argument in changed:
        takes_tensors = isinstance(target.good[argument], Tensor)
        arguments[argument] = rng.choice(TENSORS if rng.random() < (0.8 if takes_tensors else 0.05) else PLAIN)
        # Where it is written to, what is replaced must not lead anywhere.
        if argument == "path" and name == "write_shard":
            arguments[argument] = rng.choice(
                [None, 5, "", "a\0b", str(folder), b"x", folder / "x_train.bin", Odd(), [""]]
            )
    shown = {argument: _shown(arguments[argument]) for argument in changed}
    return Case(
        f"{name}({shown})",
        (*_parameters(target.call), *arguments, *target.names),
        partial(target.call, **arguments),
        target.check,
    )


def _parameters(call: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(call).parameters if name not in ("self", "args", "kwargs")]


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor"
    try:
        return repr(value)[:60]
    except Exception:
        return type(value).__name__
