"""Hyperparameters that a sweep sweeps, by their names: what tells runs of one family apart, but for seeds."""

import re

OF_THE_RUN = re.compile(
    r"(^|_)(lrs?|learning_rates?|seed|batch_?(size|tokens)|warm_?up|(max|total)_(steps|epochs)|stop_at_loss)(_|$)",
    re.IGNORECASE,
)
"""Settings that differ between runs of one family: what a sweep sweeps, not what the model is. Among them are lengths
of the schedule, which are given in steps and follow the batch size."""

OF_A_SEED = re.compile(r"(^|_)(seed|stop_at_loss)(_|$)", re.IGNORECASE)
"""Of these, what differs between seeds of one setting, or does not change how a run gets where it gets."""
