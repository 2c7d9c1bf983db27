"""What one report costs: activation spectra at their defaults against histograms of all weights and gradients.

    python -m benchmarks.watching

The contenders look at one model, in turn:

- wandb's method, written afresh: of each gradient and each parameter the finite values, their
  range, and 64 equal bins over it as a list. No file is written. Where wandb is installed, ``wandb.watch(log="all")``
  runs too, offline, and what its hooks and the logging of the step take is counted;
- TensorBoard's histograms of the same tensors, into an event file;
- ActivationSpectrum at its defaults with a real Trainer and TensorBoard logger. The rows are read in a validation run,
  so that no backward passes need be waited for; reading them is the same work in training. Counted is what the
  callback takes, not the forward passes, which happen anyway; the figure, which is drawn at the 1st, 2nd, 4th, 8th ...
  report, is counted in and told apart. In a run of N reports there are about log2 N figures.

They do not answer the same question: the histograms show magnitudes of weights and of one batch's gradients, once each;
a report multiplies out the covariance of five layers over all its tokens and solves it with and without each group.
"""

import argparse
import contextlib
import io
import logging
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from benchmarks.harness import Target, console, main, min_and_median, seconds_of
from lightning_spectral import ActivationSpectrum
from lightning_spectral.callbacks.host import Host
from lightning_spectral.nanogpt import NanoGPT, next_token_loss

NUM_BINS = 64
NAMES = ("wandb's method", "wandb.watch", "TensorBoard histograms", "ActivationSpectrum")


class Timed(ActivationSpectrum):
    """The callback, which also keeps what its parts take."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def _clock(self, part: str) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += perf_counter() - start

    def join(self, host: Host) -> Any:
        session = super().join(host)
        measurement: Any = self.measurement
        make_report = measurement.make_report

        def timed(step: int) -> None:
            with self._clock("solving"):
                make_report(step)

        measurement.make_report = timed
        return session

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.measurement is not None
        self.seconds["reading"] = self.measurement.stopwatch.seconds
        with self._clock("report"):
            super().on_validation_epoch_end(trainer, pl_module)
            trainer.logger.experiment.flush()

    def measured(self, report: Any) -> dict[str, float]:
        with self._clock("exponents and the like"):
            return super().measured(report)

    def draw(self, boards: Any, report: Any) -> None:
        with self._clock("drawing"):
            super().draw(boards, report)

    def draw_figure(self, boards: Any, report: Any) -> None:
        with self._clock("figure"):
            super().draw_figure(boards, report)

    def publish(self, host: Host, values: dict[str, float], step: int) -> None:
        with self._clock("scalars"):
            super().publish(host, values, step)

    def parts(self) -> dict[str, float]:
        """Seconds of each part of the one report, which add up to all of it."""
        parts = dict(self.seconds)
        parts["histograms and layout"] = parts.pop("drawing") - parts["figure"]
        report = parts.pop("report")
        parts["record and the rest"] = report + parts["reading"] - sum(parts.values())
        return parts


class Setting:
    """A model with gradients, and everybody's way to watch it."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        torch.manual_seed(0)
        sizes = {"num_layers": arguments.num_layers, "width": arguments.width, "block_size": arguments.block_size}
        self.module = NanoGPT(num_heads=max(1, arguments.width // 64), **sizes)
        for parameter in self.module.parameters():
            if not parameter.any():  # behind what is initialised to zero gradients are zero, and one bin holds them all
                torch.nn.init.normal_(parameter, std=0.02)
        shape = (arguments.batch_size, arguments.block_size)
        self.batch = {key: torch.randint(256, shape) for key in ("input_ids", "labels")}
        self.folder = folder
        self._writer = SummaryWriter(str(folder / "histograms"))
        self._num_runs = 0
        self.step()

    def step(self) -> None:
        """A training step's forward and backward pass."""
        self.module.zero_grad()
        next_token_loss(self.module.gpt(self.batch["input_ids"]), self.batch["labels"]).backward()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.gpt.named_parameters():
            assert parameter.grad is not None
            yield f"parameters/{name}", parameter.detach()
            yield f"gradients/{name}", parameter.grad

    def by_method(self) -> None:
        """What wandb.watch makes of tensors."""
        for _, tensor in self.tensors():
            binned(tensor)

    def by_tensorboard(self) -> None:
        """Histograms as TensorBoard's own writer makes them."""
        self._num_runs += 1
        for name, tensor in self.tensors():
            self._writer.add_histogram(name, tensor, self._num_runs)
        self._writer.flush()

    def by_spectra(self, num_tokens: int) -> dict[str, float]:
        """One report of ours, in parts."""
        self._num_runs += 1
        callback = Timed(stage="validate", num_tokens=num_tokens)
        num_batches = -(-num_tokens // self.batch["input_ids"].numel())
        trainer = Trainer(
            max_steps=1,
            callbacks=[callback],
            accelerator="cpu",
            devices=1,
            logger=TensorBoardLogger(self.folder, name="spectra", version=self._num_runs),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        batches: Any = [self.batch] * num_batches
        training, validation = (DataLoader(some, batch_size=None) for some in (batches[:1], batches))
        with contextlib.redirect_stdout(io.StringIO()):  # the table at the end of fit
            trainer.fit(self.module, training, validation)
        return callback.parts()


def binned(tensor: Tensor) -> tuple[list[float], list[float]]:
    """Counts and edges of equal bins over the range of a tensor's finite values."""
    values = tensor.detach().flatten()
    finite = values.isfinite()
    if not finite.all():
        values = values[finite]
    if values.numel() == 0:
        return [], []
    low, high = values.min().item(), values.max().item()
    if low == high:
        return [float(values.numel())], [low, high]
    counts = torch.histc(values, NUM_BINS, low, high)
    return counts.tolist(), torch.linspace(low, high, NUM_BINS + 1).tolist()


class RealWandb:
    """``wandb.watch`` in an offline run; counts what its hooks and its logging take.

    Args:
        folder: Where the run goes.

    Raises:
        Exception: Whatever wandb raises where it is not installed or cannot start.
    """

    def __init__(self, folder: Path) -> None:
        import wandb

        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
        self.run = wandb.init(mode="offline", dir=str(folder), project="watching", settings=settings)
        # Its hooks go through this one function, once for each tensor.
        history = self.run._torch
        self._seconds = 0.0
        history.log_tensor_stats = self._counted(history.log_tensor_stats)
        self._log = self._counted(self.run.log)

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._seconds += perf_counter() - start

        return call

    def __call__(self, setting: Setting) -> float:
        """Seconds that watching one training step takes."""
        self._seconds = 0.0
        self.run.watch(setting.module.gpt, log="all", log_freq=1)
        setting.step()
        self._log({})
        self.run.unwatch(setting.module.gpt)
        return self._seconds

    def close(self) -> None:
        self.run.finish()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--batch-size", type=int, default=16, help="sequences")
    parser.add_argument("--block-size", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--num-tokens", type=int, default=65536, help="of a report of ours")
    parser.add_argument("--repeats", type=int, default=3)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        setting = Setting(arguments, Path(folder))
        real, reason = None, ""
        try:
            real = RealWandb(Path(folder))
        except ImportError:
            reason = "not installed"
        except Exception as error:  # no service, no folder: the method itself is measured all the same
            reason = f"did not start: {error!r}".partition("\n")[0]
        try:
            return measure_in_turn(arguments, setting, real) | {"why_no_wandb": reason}
        finally:
            if real is not None:
                real.close()


def measure_in_turn(arguments: argparse.Namespace, setting: Setting, real: RealWandb | None) -> dict[str, Any]:
    """Seconds of all contenders by name, and of ours by part."""
    setting.by_method()
    setting.by_tensorboard()
    if real is not None:
        real(setting)
    # The first figure of a process imports matplotlib and looks for fonts.
    first_figure = setting.by_spectra(setting.batch["input_ids"].numel())["figure"]
    seconds: dict[str, list[float]] = {name: [] for name in ("training step", *NAMES)}
    parts: list[dict[str, float]] = []
    for _ in track(range(arguments.repeats), "rounds", console=console, transient=True):
        seconds["training step"].append(seconds_of(setting.step))
        seconds["wandb's method"].append(seconds_of(setting.by_method))
        if real is not None:
            seconds["wandb.watch"].append(real(setting))
        seconds["TensorBoard histograms"].append(seconds_of(setting.by_tensorboard))
        parts.append(setting.by_spectra(arguments.num_tokens))
        seconds["ActivationSpectrum"].append(sum(parts[-1].values()))
        setting.step()  # fit leaves no gradients
    numbers = sum(tensor.numel() for _, tensor in setting.tensors())
    num_probes = len({round(i * (arguments.num_layers - 1) / 4) for i in range(5)})
    return {
        "seconds": seconds,
        "parts": parts,
        "first_figure": first_figure,
        "values": dict.fromkeys(NAMES[:3], numbers)
        | {"ActivationSpectrum": num_probes * arguments.num_tokens * arguments.width},
        "steps_read": -(-arguments.num_tokens // (arguments.batch_size * arguments.block_size)),
    }


def without_figure(result: dict[str, Any]) -> list[float]:
    """Seconds of our reports that draw none, which are most."""
    return [sum(parts.values()) - parts["figure"] for parts in result["parts"]]


def show(result: dict[str, Any]) -> None:
    step = min(result["seconds"]["training step"])
    cadence = {"wandb's method": 1000, "wandb.watch": 1000, "TensorBoard histograms": 1000, "ActivationSpectrum": 100}
    columns = ("values looked at", "seconds a report, min / median", "in training steps", "share, every n steps")
    table = Table("", *columns, title="One report", title_justify="left")
    rows = {name: result["seconds"][name] for name in NAMES} | {"  without the figure": without_figure(result)}
    for name, seconds in rows.items():
        whose = name if name in NAMES else "ActivationSpectrum"
        if not seconds:
            table.add_row(name, result["why_no_wandb"])
            continue
        every = cadence[whose]
        share = f"{min(seconds) / (every * step):.3%} ({every})"
        values = f"{result['values'][whose]:,}"
        table.add_row(name, values, min_and_median(seconds), f"{min(seconds) / step:.2f}", share)
    console.print(table)
    table = Table("part", "seconds, min / median", title="One report of ours", title_justify="left")
    for part in result["parts"][0]:
        table.add_row(part, min_and_median([parts[part] for parts in result["parts"]]))
    console.print(table)
    reading = min(parts["reading"] for parts in result["parts"]) / result["steps_read"]
    console.print(
        f"a training step takes {step:.3f} s; watching each step costs histograms all of the above, and ours, while it "
        f"collects, {reading:.4f} s a step; the first figure of a process took {result['first_figure']:.2f} s"
    )


def targets(result: dict[str, Any]) -> list[Target]:
    ours, bare = min(result["seconds"]["ActivationSpectrum"]), min(without_figure(result))
    reading = min(parts["reading"] for parts in result["parts"])
    found = []
    for name in NAMES[:3]:
        if not result["seconds"][name]:
            continue
        theirs = min(result["seconds"][name])
        looks = result["values"]["ActivationSpectrum"] / result["values"][name]
        note = f"without the figure {bare / theirs:.2f}; ours looks at {looks:.1f} times as many values"
        floor = f"reading the rows alone {reading / theirs:.2f}"
        found.append(Target("5", f"a report of ours / one by {name}", ours / theirs, 1.0, True, floor, note))
    return found


if __name__ == "__main__":
    main(sys.modules[__name__])
