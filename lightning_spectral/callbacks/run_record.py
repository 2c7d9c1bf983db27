"""The callback by which a user says more of a run than can be seen of it."""

from typing import Any

from typing_extensions import override

from lightning_spectral.boards import boards_of
from lightning_spectral.callbacks.host import Host
from lightning_spectral.callbacks.session_callback import SessionCallback
from lightning_spectral.measurement import Session
from lightning_spectral.recording import Notes, RunRecorder
from lightning_spectral.warner import Warner


class RunRecord(SessionCallback):
    """Says what the record of a run is to hold, once for all callbacks of a Trainer.

    Every run with one of the measuring callbacks leaves a record in ``spectra/`` of its log directory, with or without
    this one. Alone it records the history of tokens, seconds and losses.

    Args:
        family: Name that comparable runs share; None for one made of the model's class and its configuration, without
            batch size, learning rate and seed.
        tags: Whatever else the record is to say, JSON-like.
        tokens_per_sample: How training tokens are counted: so many a sample, or the key of a tensor whose elements
            count, without those that are 0 in a mask or -100 in labels. None counts the elements of ``input_ids``, else
            of the first integer tensor of two or more axes, else samples.
        loss: Key of the validation loss. None takes the usual one, ``val_loss``, ``val/loss``, ``valid_loss``,
            ``eval_loss`` and the like, else the metric of validation that EarlyStopping or ModelCheckpoint monitors for
            its minimum; where neither says which it is, none is recorded, and a warning lists the candidates.
        vectors: Keep the leading eigenvectors that :class:`HeadDrift` measures, by far the largest part of a record.
        upload: At the end of ``fit``, send the record to each logger that takes artifacts: W&B, MLflow, Comet.
        enabled: False for no record at all.

    Raises:
        ValueError: For arguments out of range; at the start of ``fit`` for a second one of the same Trainer.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[RunRecord(family="small", tags={"idea": "a"})], logger=False)
    """

    def __init__(
        self,
        family: str | None = None,
        tags: dict[str, Any] | None = None,
        tokens_per_sample: int | str | None = None,
        loss: str | None = None,
        vectors: bool = True,
        upload: bool = False,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        self.notes = Notes(
            family=family,
            tags={} if tags is None else tags,
            tokens_per_sample=tokens_per_sample,
            loss=loss,
            vectors=vectors,
            upload=upload,
            enabled=enabled,
        )

    @override
    def join(self, host: Host) -> Session[RunRecorder]:
        session = super().join(host)
        session.recorder.note(self.notes)
        return session

    @override
    def end_fit(self, host: Host) -> None:
        super().end_fit(host)
        folder = None if self.session is None else self.session.recorder.folder
        if not self.notes.upload or folder is None:
            return
        try:
            for board in boards_of(host.loggers):
                board.artifact(folder, "spectra")
        except Exception as error:  # a service that is down is not a reason to fail a finished run
            Warner(type(self).__name__).warn(f"could not upload {str(folder)!r}: {error!r}")
