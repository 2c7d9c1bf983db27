"""What stands in a batch for a part of it whose content nobody can give: it may lie there, and not be read."""

from typing import Any


class Unread:
    """Passes for an object of a class as long as nobody asks for more: whatever reads it meets a ValueError.

    Args:
        reason: In one line.
        kind: Class of what it stands for, as ``isinstance`` will say.
    """

    __slots__ = ("_kind", "_reason")

    def __init__(self, reason: str, kind: type) -> None:
        self._reason, self._kind = reason, kind

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What a step may branch on: its content does not matter there."""
        return self._kind

    def __getattr__(self, name: str) -> Any:
        self._refuse()

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise ValueError(self._reason)


# Python looks these up in the class.
for _name in (
    *("len", "iter", "getitem", "setitem", "delitem", "contains", "reversed", "bool", "hash", "array"),
    *("eq", "ne", "lt", "le", "gt", "ge", "str", "repr", "format", "int", "float", "index", "copy", "deepcopy"),
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "neg", "abs", "invert"),
    *("radd", "rsub", "rmul", "rtruediv", "rfloordiv", "rmod", "rpow", "rmatmul", "rand", "ror", "rxor"),
):
    setattr(Unread, f"__{_name}__", Unread._refuse)
