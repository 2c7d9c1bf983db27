"""Options that commands on runs have in common."""

from argparse import ArgumentParser, Namespace
from typing import NoReturn

from lightning_spectral.runs.logs import Columns


class Parser(ArgumentParser):
    """Says what is wrong in one line, as everything here does."""

    def error(self, message: str) -> NoReturn:
        """Raise what the command line prints as one line."""
        raise ValueError(f"{message}: see {self.prog} --help")


def add_columns(parser: ArgumentParser) -> None:
    """Let a command be told which column of a log is what."""
    logs = parser.add_argument_group(
        "logs of other tools",
        "CSVLogger, TensorBoard, exports of W&B and MLflow; runs with a record need none of these",
    )
    for name, what in (
        ("loss", "loss, such as val/nll"),
        ("step", "optimizer steps done"),
        ("tokens", "training tokens so far"),
        ("seconds", "training time so far"),
    ):
        logs.add_argument(f"--{name}-key", metavar="COLUMN", help=f"the column of {what}")
    logs.add_argument(
        "--batch-tokens", metavar="N", help="tokens a step, or a product of hyperparameters: 'batch_size*256'"
    )
    logs.add_argument("--family", metavar="NAME", help="the family that they are of")


def columns_of(args: Namespace) -> Columns:
    """What it was told."""
    keys = {name: getattr(args, f"{name}_key") for name in ("loss", "step", "tokens", "seconds")}
    return Columns(**keys, batch_tokens=args.batch_tokens, family=args.family)
