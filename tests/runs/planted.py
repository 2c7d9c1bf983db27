"""Real tiny runs whose difference is known: seeds alone, a slow loader, a better learning rate, or both."""

import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything

from lightning_spectral import ActivationSpectrum, GradientSpectrum, RunRecord
from lightning_spectral.nanogpt import NanoGPT, TextData
from tests.models import tiny_trainer

SETTINGS: dict[str, dict[str, Any]] = {
    "base": {},
    "same": {},
    "slow": {"is_slow": True},
    "better": {"learning_rate": 4e-3},
    "both": {"learning_rate": 4e-3, "is_slow": True},
}
SEEDS = {"base": (0, 1, 2), "same": (3, 4, 5), "slow": (6, 7, 8), "better": (9, 10, 11), "both": (12, 13, 14)}
NUM_STEPS = 200


def write_text(path: Path) -> None:
    """A language of 400 words, each of which prefers some to follow; the same on every machine."""
    generator = random.Random(0)
    signs = string.ascii_letters + string.digits + ".,:-()"
    words = ["".join(generator.choices(signs, k=generator.randint(2, 7))) for _ in range(400)]
    followers = [generator.choices(range(400), k=8) for _ in words]
    word, text = 0, []
    for _ in range(40_000):
        word = generator.choice(followers[word]) if generator.random() < 0.9 else generator.randrange(400)
        text.append(words[word])
    path.write_text(" ".join(text))


class Waiting:
    """A loader that makes training wait for each batch."""

    def __init__(self, loader: Any, wait: Callable[[], None]) -> None:
        self.loader = loader
        self.wait = wait

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            self.wait()
            yield batch

    def __len__(self) -> int:
        return len(self.loader)


def train(folder: Path, name: str, seed: int, wait: Callable[[bool], None], **kwargs: Any) -> Path:
    """One run; returns its log directory.

    Args:
        folder: Where runs go.
        name: One of the settings.
        seed: Of initialisation and data order.
        wait: Called with ``is_slow`` before each batch.
        kwargs: Of the Trainer, where they differ.
    """
    settings = {"learning_rate": 1e-3, "is_slow": False, **SETTINGS[name]}
    seed_everything(seed, verbose=False)
    model = NanoGPT(
        num_layers=2, num_heads=2, width=32, block_size=32, warmup_steps=10, learning_rate=settings["learning_rate"]
    )
    text = folder / "text.txt"
    if not text.exists():
        write_text(text)
    data = TextData(str(text), block_size=32, batch_size=16, seed=seed)
    spectrum = ActivationSpectrum(stage="validate", every_n_steps=20, num_tokens=4096)
    gradients = GradientSpectrum(stage="validate", every_n_steps=20, num_samples=32, method="hooks")
    callbacks = [spectrum, gradients, RunRecord(tags={"setting": name})]
    path = folder / name / str(seed)
    defaults = {
        "max_steps": NUM_STEPS,
        "val_check_interval": 20,
        "limit_val_batches": 8,
        "check_val_every_n_epoch": None,
    }
    trainer = tiny_trainer(path, callbacks=callbacks, **(defaults | kwargs))
    data.setup()
    loader = Waiting(data.train_dataloader(), lambda: wait(settings["is_slow"]))
    trainer.fit(model, loader, data.val_dataloader())
    return path
