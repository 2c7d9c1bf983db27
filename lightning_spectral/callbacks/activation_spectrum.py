"""The callback that watches the eigenvalues of layers' activation covariance."""

from collections.abc import Sequence
from math import isnan
from typing import Any, Literal, cast

from lightning_spectral import tensorboard
from lightning_spectral.callbacks.display import Line, SpectrumDisplay
from lightning_spectral.callbacks.measuring import MeasuringCallback
from lightning_spectral.callbacks.run_about import check_notes
from lightning_spectral.callbacks.staged_callback import DEFAULT_HEAD
from lightning_spectral.functional.powerlaw import Band, check_band, resolve_band
from lightning_spectral.functional.spectrum import head_share, rankme
from lightning_spectral.measurement import LayerSpectrum, Report
from lightning_spectral.terminal import number, with_error


class ActivationSpectrum(MeasuringCallback):
    """Logs the spectrum of the activation covariance of chosen layers while a model trains.

    No extra forward pass: the training (or validation) pass itself is read, by forward hooks that change nothing. Each
    report logs, per layer, the power-law exponents of the eigenvalues' head and tail with jackknife errors, RankMe, the
    share of the head and the number of rows; TensorBoard also gets histograms of log10 eigenvalues, a log-log figure
    and a chart with all layers. ``fit`` ends with a table of the first report and the last.

    Values lie under ``activation/{layer}/``: ``alpha_tail``, ``alpha_tail_stderr``, ``alpha_tail_corrected`` (bias of
    few rows removed), ``r2_tail``, ``alpha_head``, ``alpha_head_stderr``, ``rankme``, ``head_share``, ``num_tokens``;
    with ``activation/failed`` (layer spectra that could not be had so far, logged as NaN) and ``spectral/seconds``.
    They can be monitored by ModelCheckpoint and EarlyStopping (with ``check_finite=False``, since they are NaN until
    the first report).

    With ``WeightAveraging`` a validation pass runs on the averaged weights, and ``stage="validate"`` measures those.

    Args:
        layers: Glob patterns over module names, ``"all"`` for each block of the stack of equal blocks, None for five
            blocks spread evenly over it.
        every_n_steps: Optimizer steps between reports; between measured validation runs at the least.
        stage: ``"train"`` reads the last training batches before a report, ``"validate"`` the first rows of a
            validation run. Runs are compared on validation rows, which do not change.
        num_tokens: Rows per report over all ranks, after the mask. The exponent of the tail depends on rows per
            channel: compare runs at equal numbers. The default is 16 rows a channel at width 4,096: in all blocks of a
            small trained GPT, 16 bring the corrected exponent to within 0.011 of its truth on average and spread it by
            0.045; 64, as at width 1,024, to 0.005 and 0.03, with the uncorrected one 0.02 too high
            (``benchmarks/findings``, study 1).
        head: Band of the head exponent and of ``head_share``: two ints, 1-based inclusive ranks, or two fractions of
            the width. Ranks 1 to 10 as in *Spectral Lens*.
        tail: Band of the tail exponent, likewise. An eighth to a half of the width holds the bands of *Spectral Lens*
            at widths 768 to 1600; (30, 150) is that of its released scripts.
        num_groups: Groups of whole samples for the delete-a-group jackknife; 1 for no error bars. Each takes 8 d^2
            bytes for a layer of width d, on the model's device: four of five layers 94 MB at width 768, 410 MB at
            1,600.
        normalize: Apply a parameter-free RMSNorm to each row first, as in *Spectral Lens*.
        dtype: Type of the products; sums and solves are in float64. ``"float32"`` is good to 1e-5 for eigenvalues above
            1e-3 of the largest, ``"float64"`` above 1e-6, at about twice the cost of the products.
        mask: Key of the batch: a mask with 1 for real tokens, or labels with -100 for those that do not count.
        prefix: Put before every key, to tell two of these callbacks apart.
        dataloader_idx: Which validation loader to read.
        family: Name that comparable runs share in their records; None for one made of the model's class and its
            configuration, without batch size, learning rate and seed.
        tags: Whatever else the record of the run is to say, JSON-like.
        tokens_per_sample: For the record, how training tokens are counted: so many a sample, or the key of a tensor
            whose elements count, without those that are 0 in a mask or -100 in labels. None counts the elements of
            ``input_ids``, else of the first integer tensor of two or more axes, else samples.

    Raises:
        ValueError: For arguments out of range; at the start of ``fit`` for patterns that match nothing and keys that
            two callbacks would write; in the first batch for bands beyond the width.

    References:
        Liu, Paquette, Sous, *Spectral Lens: Activation and Gradient Spectra as Diagnostics of LLM Optimization*,
        arXiv 2605.05683 (2026).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ActivationSpectrum(every_n_steps=50)], logger=False)
    """

    kind = "activation"
    quantities = (
        "alpha_tail",
        "alpha_tail_stderr",
        "alpha_tail_corrected",
        "r2_tail",
        "alpha_head",
        "alpha_head_stderr",
        "rankme",
        "head_share",
        "num_tokens",
    )

    def __init__(
        self,
        layers: str | Sequence[str] | None = None,
        every_n_steps: int = 100,
        stage: Literal["train", "validate"] = "train",
        num_tokens: int = 65536,
        head: tuple[int, int] | tuple[float, float] = DEFAULT_HEAD,
        tail: tuple[int, int] | tuple[float, float] = (0.125, 0.5),
        num_groups: int = 4,
        normalize: bool = True,
        dtype: Literal["float32", "float64"] = "float32",
        mask: str | None = None,
        prefix: str = "",
        dataloader_idx: int = 0,
        family: str | None = None,
        tags: dict[str, Any] | None = None,
        tokens_per_sample: int | str | None = None,
    ) -> None:
        notes = check_notes(family, tags, tokens_per_sample)
        super().__init__(
            layers, every_n_steps, stage, num_tokens, num_groups, normalize, dtype, mask, dataloader_idx, prefix, notes
        )
        check_band("head", head)
        check_band("tail", tail)
        self.head = cast(Band, tuple(head))
        self.tail = cast(Band, tuple(tail))
        self.display = self._display = SpectrumDisplay(
            "activation",
            "layer",
            "eigenvalue",
            tensorboard.EIGENVALUE_EDGES,
            ("alpha_tail", "alpha_tail_corrected", "alpha_head", "rankme", "head_share"),
            {
                "alpha_tail": with_error("alpha_tail", 3),
                "corrected": number("alpha_tail_corrected", 3),
                "r2": number("r2_tail", 3),
                "alpha_head": number("alpha_head", 3),
                "RankMe": number("rankme", 1),
                "tokens": number("num_tokens", 0),
            },
        )

    def settings(self) -> dict[str, Any]:
        """How the measurement is made and its spectra are summed up.

        Returns:
            JSON-like values by name.
        """
        return super().settings() | {"head": list(self.head), "tail": list(self.tail)}

    def check_widths(self, widths: dict[str, int]) -> None:
        """Refuse bands of ranks beyond the width of a layer.

        Args:
            widths: Width by layer.

        Raises:
            ValueError: Naming band and width.
        """
        for width in widths.values():
            resolve_band(self.tail, width, "tail")
            # A layer narrower than the default head has no head exponent; nobody asked for it by rank.
            if self.head != DEFAULT_HEAD:
                resolve_band(self.head, width, "head")

    def measured(self, report: Report) -> dict[str, float]:
        """The logged values of each layer.

        Args:
            report: The shared report.

        Returns:
            Values by key, without the prefix.
        """
        rows = {name: self._describe(report, report.layers[name]) for name in self._layer_names}
        self._display.note(report.step, rows)
        return {f"activation/{name}/{quantity}": value for name, row in rows.items() for quantity, value in row.items()}

    def _describe(self, report: Report, layer: LayerSpectrum) -> dict[str, float]:
        head, tail = layer.exponent(self.head), layer.exponent(self.tail)
        if layer.failure is None:
            for exponent in (head, tail):
                # With one group nobody asked for error bars.
                if exponent.reason is not None and (self.request.num_groups > 1 or isnan(exponent.value)):
                    self.warn(f"at step {report.step}, {layer.name}: NaN, because {exponent.reason}")
        width = len(layer.eigenvalues)
        has_values = layer.failure is None and width > 0
        return {
            "alpha_tail": tail.value,
            "alpha_tail_stderr": tail.stderr,
            "alpha_tail_corrected": tail.corrected,
            "r2_tail": tail.r2,
            "alpha_head": head.value,
            "alpha_head_stderr": head.stderr,
            "rankme": float(rankme(layer.eigenvalues)) if has_values else float("nan"),
            "head_share": float(head_share(layer.eigenvalues, self._head_size(width))) if has_values else float("nan"),
            "num_tokens": float(layer.num_tokens),
        }

    def _head_size(self, width: int) -> int:
        hi = self.head[1]
        return min(hi, width) if isinstance(hi, int) else max(1, int(hi * width))

    def lines(self, report: Report) -> dict[str, Line]:
        """The spectra to show.

        Args:
            report: The shared report.

        Returns:
            Those of the layers of this callback.
        """
        layers = {name: report.layers[name] for name in self._layer_names}
        return {
            name: Line.of(layer.eigenvalues, self.tail, layer.exponent(self.tail).value)
            for name, layer in layers.items()
            if layer.failure is None
        }

    def title(self, report: Report | None = None) -> str:
        """What is shown.

        Args:
            report: One report, or None for all.

        Returns:
            A heading.
        """
        if report is None:
            return f"activation spectra, {self.stage}"
        return f"activation covariance, {self.stage}, step {report.step}"
