"""Compilers kept out for a while, in every torch that we run on, and whether they are."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


def eager() -> AbstractContextManager[Any]:
    """A context in which whatever ``torch.compile`` was put around runs as it is written."""
    # Without dynamo in the process nothing is compiled, and importing it takes seconds.
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return nullcontext()
    if hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")
    return _nothing_taken_over(dynamo.eval_frame)


def is_eager() -> bool:
    """Whether :func:`eager`, ``torch.compiler.set_stance("force_eager")`` or dynamo's configuration keeps them out."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return False
    stance = getattr(getattr(dynamo.eval_frame, "_stance", None), "stance", "default")
    is_refused = getattr(dynamo.eval_frame, _asked(dynamo.eval_frame), None) is _take_nothing_over
    return stance == "force_eager" or is_refused or bool(getattr(dynamo.config, "disable", False))


@contextmanager
def _nothing_taken_over(eval_frame: Any) -> Iterator[None]:
    """What a stance does, for torch 2.4 and 2.5: compiled code asks dynamo to take frames over, and it does not."""
    name = _asked(eval_frame)
    asked = getattr(eval_frame, name)
    prior = asked(None)
    setattr(eval_frame, name, _take_nothing_over)
    try:
        yield
    finally:
        setattr(eval_frame, name, asked)
        asked(prior)


def _asked(eval_frame: Any) -> str:
    """The function by which frames are taken over, as torch 2.5 calls it, or 2.4."""
    return "_maybe_set_eval_frame" if hasattr(eval_frame, "_maybe_set_eval_frame") else "set_eval_frame"


def _take_nothing_over(callback: Any) -> Any:
    return torch._C._dynamo.eval_frame.set_eval_frame(None)
