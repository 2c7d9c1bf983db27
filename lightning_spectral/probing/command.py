"""The command that probes: a model and its data as Lightning's own command line takes them."""

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

from lightning_spectral.probing.probe import probe
from lightning_spectral.terminal import console

PROGRAM = "lightning-spectral probe"

FROM_TRAINER = ("accelerator", "precision")
"""Of the Trainer's arguments, those by which a probe goes."""

CALLBACKS = ("ActivationSpectrum", "HeadDrift", "GradientSpectrum")
"""Those whose arguments in a configuration hold for the probe, the first of each argument."""


class _ProbeCLI(LightningCLI):
    """Reads the configuration of a run, and makes its model and data, but neither Trainer nor what goes with it."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
        parser.add_function_arguments(probe, skip={"module", "batch", *FROM_TRAINER})
        # What the configuration of a fit holds beside: Lightning saves it so.
        parser.add_method_arguments(Trainer, "fit", skip=self.subcommands()["fit"])

    @override
    def instantiate_classes(self) -> None:
        self.said = _said_by_callbacks(self.config["trainer"].get("callbacks"))
        self.config["trainer"]["callbacks"] = None
        self.config["trainer"]["logger"] = False
        super().instantiate_classes()

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        return None  # type: ignore[return-value]

    @property
    def arguments(self) -> dict[str, Any]:
        """For the probe: of the command line or the configuration, else of its callbacks, else the defaults."""
        defaults = {name: one.default for name, one in inspect.signature(probe).parameters.items()}
        given = {name: self.config_init[name] for name in defaults if name in self.config_init}
        said = {name: value for name, value in self.said.items() if given.get(name) == defaults.get(name, given)}
        return given | said | {name: self.config_init["trainer"][name] for name in FROM_TRAINER}


def _said_by_callbacks(callbacks: Any) -> dict[str, Any]:
    """Arguments of a probe that a configuration gives to callbacks."""
    known = set(inspect.signature(probe).parameters)
    said: dict[str, Any] = {}
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        path = callback.get("class_path", "") if isinstance(callback, Mapping) or hasattr(callback, "get") else ""
        if path.rpartition(".")[2] in CALLBACKS:
            arguments = dict(callback.get("init_args") or {})
            said = {name: value for name, value in arguments.items() if name in known} | said
    return said


def run_probe(words: Sequence[str]) -> None:
    """Run the command, given its arguments; ValueError for what :func:`probe` refuses altogether."""
    with _command_line(words):
        cli = _ProbeCLI(
            LightningModule,
            subclass_mode_model=True,  # and data in the same way, or none
            save_config_callback=None,
            seed_everything_default=0,
            parser_kwargs={"prog": PROGRAM},
            run=False,
        )
    if cli.config_init.get("ckpt_path") is not None:
        raise ValueError(f"ckpt_path must be None for a probe, got {cli.config_init['ckpt_path']!r}: leave it away")
    found = probe(cli.model, cli.datamodule, **cli.arguments)
    if cli.config_init["json"]:
        print(found.to_json())
    else:
        console().print(found)


@contextmanager
def _command_line(words: Sequence[str]) -> Iterator[None]:
    """Lightning reads the command line itself, and warns of any other way to give it its words."""
    before, sys.argv = sys.argv, [PROGRAM, *words]
    try:
        yield
    finally:
        sys.argv = before
