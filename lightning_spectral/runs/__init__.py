"""What a run leaves on disk, reading it back, and comparing two."""

from lightning_spectral.runs.backtesting import FamilyBacktest, backtest
from lightning_spectral.runs.comparison import Comparison, compare
from lightning_spectral.runs.finding import open_runs
from lightning_spectral.runs.forecasting import FamilyForecast, RunForecast, forecast
from lightning_spectral.runs.gains import Gain
from lightning_spectral.runs.history import History
from lightning_spectral.runs.movement import Lead, Movement
from lightning_spectral.runs.noise import NoiseScale
from lightning_spectral.runs.record import Record, Row
from lightning_spectral.runs.run import Matched, Run
from lightning_spectral.runs.shifts import Shift
from lightning_spectral.runs.verdict import Verdict

__all__ = [
    "Comparison",
    "FamilyBacktest",
    "FamilyForecast",
    "Gain",
    "History",
    "Lead",
    "Matched",
    "Movement",
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
