"""What a run leaves on disk, reading it back, and comparing two."""

from lightning_spectral.runs.backtesting import FamilyBacktest, backtest
from lightning_spectral.runs.comparison import Comparison, Gain, Shift, compare
from lightning_spectral.runs.finding import open_runs
from lightning_spectral.runs.forecasting import FamilyForecast, RunForecast, forecast
from lightning_spectral.runs.history import History
from lightning_spectral.runs.noise import NoiseScale
from lightning_spectral.runs.record import Record, Row
from lightning_spectral.runs.run import Matched, Run
from lightning_spectral.runs.verdict import Verdict

__all__ = [
    "Comparison",
    "FamilyBacktest",
    "FamilyForecast",
    "Gain",
    "History",
    "Matched",
    "NoiseScale",
    "Record",
    "Row",
    "Run",
    "RunForecast",
    "Shift",
    "Verdict",
    "backtest",
    "compare",
    "forecast",
    "open_runs",
]
