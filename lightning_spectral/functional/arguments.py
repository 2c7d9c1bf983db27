"""Checks of what the functions are given; each refuses in one line that names the argument, the value and a remedy."""

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

RISE = 1e-6
"""Relative rise from one value to the next that passes for rounding, of interpolation and of float32."""

ASYMMETRY = 1e-3
"""By how much, of its largest number, a Gram matrix may differ from its transpose: products in bfloat16 do."""

GRAM_REMEDY = "give rows @ rows.T"


def describe(value: Any) -> str:
    """What an argument is, short enough for one line: of tensors type and shape, of others the beginning.

    Args:
        value: Anything.

    Returns:
        A phrase without line breaks.
    """
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # whatever a user's own class makes of it
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:76]} ..."


def check_real(**tensors: Any) -> None:
    """Refuse what is no dense tensor of real numbers.

    Args:
        tensors: By argument.

    Raises:
        ValueError: Naming the first.
    """
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got {describe(value)}: use torch.as_tensor")
        if value.dtype == torch.bool or value.is_complex() or value.is_quantized:
            raise ValueError(f"{name} must hold real numbers, got {describe(value)}: take .float(), or .abs()")
        if value.layout != torch.strided or value.is_meta or value.is_nested:
            kind = "meta" if value.is_meta else "nested" if value.is_nested else str(value.layout)
            raise ValueError(f"{name} must be a dense tensor with data, got a {kind} one: use .to_dense()")


def check_rows(name: str, rows: Any, num_axes: int | None = None) -> None:
    """Refuse what is no floating tensor of rows: ids, say, have no covariance that means something.

    Args:
        name: The argument's.
        rows: At least one axis, or as many as ``num_axes``.
        num_axes: How many; None for one or more.

    Raises:
        ValueError: Naming the argument.
    """
    check_real(**{name: rows})
    if not rows.is_floating_point():
        raise ValueError(f"{name} must be of a floating type, got {describe(rows)}: use .float()")
    if rows.ndim == 0 or (num_axes is not None and rows.ndim != num_axes):
        axes = "at least one axis" if num_axes is None else f"{num_axes} axes"
        raise ValueError(f"{name} must have {axes}, got shape {tuple(rows.shape)}: use .reshape")


def check_spectrum(is_ordered: bool = False, **spectra: Any) -> None:
    """Refuse what are no eigenvalues or singular values; NaN stands for those that could not be had.

    Args:
        is_ordered: Whether they must descend.
        spectra: ``(..., n)`` by argument.

    Raises:
        ValueError: Naming the first.
    """
    check_real(**spectra)
    for name, values in spectra.items():
        if values.ndim == 0 or (values.shape[-1] == 0 and values.shape[:-1].numel()):
            raise ValueError(f"{name} must hold at least one value in its last axis, got shape {tuple(values.shape)}")
        if bool((values < 0).any()):
            least = float(values.detach()[values < 0].min())
            raise ValueError(f"{name} must not be negative, got {least:.4g}: set what is rounding to 0")
        if is_ordered:
            first, second = values[..., :-1], values[..., 1:]
            if bool((second > first * (1 + RISE)).any()):
                raise ValueError(f"{name} must descend, got values that rise: sort them, largest first")


def check_parts(
    values: Any, leave_one_out: Any, vectors: Any | None = None, leave_one_out_vectors: Any | None = None
) -> None:
    """Refuse what are no parts of one spectrum.

    Args:
        values: ``(..., n)``, descending and finite, or NaN; empty for none.
        leave_one_out: ``(..., G, m)``, likewise.
        vectors: ``(..., n, k)``, or None.
        leave_one_out_vectors: ``(..., G, n, k)``, or None.

    Raises:
        ValueError: Naming the first that does not fit.
    """
    parts = {"values": values, "leave_one_out": leave_one_out}
    for name, part in parts.items():
        check_real(**{name: part})
        if _is_sound(part):
            continue
        if part.numel():
            check_spectrum(is_ordered=True, **{name: part})
        if bool(part.isinf().any()):
            raise ValueError(f"{name} must be finite, or NaN for a failed report, got infinity")
    if values.ndim < 1 or (leave_one_out.ndim != values.ndim + 1 and leave_one_out.numel()):
        shapes = f"{tuple(values.shape)} and {tuple(leave_one_out.shape)}"
        raise ValueError(f"values and leave_one_out must have the shapes (n,) and (G, m), got {shapes}")
    if leave_one_out.shape[-2:-1].numel() and not leave_one_out.shape[-1]:
        raise ValueError(f"leave_one_out must hold values of each group, got shape {tuple(leave_one_out.shape)}")
    for name, part, axes in (("vectors", vectors, 1), ("leave_one_out_vectors", leave_one_out_vectors, 2)):
        if part is None:
            continue
        check_real(**{name: part})
        if part.ndim != values.ndim + axes or part.shape[-2] != values.shape[-1] or part.shape[-1] > part.shape[-2]:
            shape = "(n, k)" if axes == 1 else "(G, n, k)"
            raise ValueError(
                f"{name} must have the shape {shape} with n = {values.shape[-1]} and k to n, got {tuple(part.shape)}"
            )


def _is_sound(values: Tensor) -> bool:
    """Whether values descend from a finite one to none below zero: most do, and are asked nothing more."""
    if values.ndim == 0 or not values.numel() or values.device.type != "cpu" or values.requires_grad:
        return False
    # For a handful of numbers NumPy takes a third of the time.
    numbers = values.numpy() if values.dtype.itemsize >= 4 else values.float().numpy()
    first, second = numbers[..., :-1], numbers[..., 1:]
    if not (numbers[..., 0].max() < math.inf and numbers[..., -1].min() >= 0):
        return False
    return bool((second <= first * (1 + RISE)).all())


def to_tensor(name: str, array: Any) -> Tensor:
    """What a record keeps, as a tensor.

    Args:
        name: Of the field.
        array: Real numbers.

    Returns:
        The same in float64.

    Raises:
        ValueError: Naming the field, if they are none.
    """
    kind = getattr(getattr(array, "dtype", None), "kind", "")
    if kind not in ("f", "i", "u"):
        raise ValueError(f"{name} must hold real numbers, got {getattr(array, 'dtype', type(array).__name__)}")
    return torch.as_tensor(array.astype("<f8"))


def to_count(name: str, number: Any) -> int:
    """A number of rows, as a record keeps it.

    Args:
        name: Of the field.
        number: An array of one number, or a number.

    Returns:
        The same as an int.

    Raises:
        ValueError: Naming the field, if it is none.
    """
    try:
        found = float(number)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not 0 <= found <= 2**53 or found != int(found):
        raise ValueError(f"{name} must be a number of rows, got {describe(number)}")
    return int(found)


def check_square(name: str, matrices: Any) -> None:
    """Refuse what are no square matrices of real numbers.

    Args:
        name: The argument's.
        matrices: ``(..., n, n)``.

    Raises:
        ValueError: Naming the argument.
    """
    check_real(**{name: matrices})
    if matrices.ndim < 2 or matrices.shape[-1] != matrices.shape[-2]:
        raise ValueError(f"{name} must be square in their last two axes, got shape {tuple(matrices.shape)}")


def check_symmetric(
    name: str, matrices: Tensor, tolerance: float = 1e-6, rounding: float = 0.0, remedy: str = "see .mT"
) -> None:
    """Refuse matrices that differ from their transposes; those that hold NaN, or infinity on both sides, pass.

    Args:
        name: The argument's.
        matrices: ``(..., n, n)`` real.
        tolerance: By how much they may, as a share of each matrix's largest number.
        rounding: By how much they may whatever their size.
        remedy: What to give.

    Raises:
        ValueError: Naming the argument.
    """
    if matrices.numel() == 0:
        return
    matrices = matrices.detach().to(torch.float64)
    skew = (matrices - matrices.mT).abs().amax((-2, -1))
    is_wrong = skew > tolerance * matrices.abs().amax((-2, -1)) + rounding
    if bool(is_wrong.any()):
        differ = float(skew[is_wrong].max())
        raise ValueError(f"{name} must be symmetric, got entries that differ by {differ:.3g}: {remedy}")


def check_positive_semidefinite(
    name: str,
    least: Tensor,
    largest: Tensor,
    tolerance: float = 1e-6,
    rounding: float = 0.0,
    remedy: str = "give covariances",
) -> None:
    """Refuse symmetric matrices with eigenvalues below zero beyond rounding.

    Args:
        name: The argument's.
        least: ``(...)`` smallest eigenvalue of each; NaN where it is not known.
        largest: ``(...)`` largest absolute eigenvalue.
        tolerance: How far below they may be, as a share of the largest.
        rounding: How far below they may be whatever their size.
        remedy: What to give.

    Raises:
        ValueError: Naming the argument.
    """
    is_wrong = least < -tolerance * largest - rounding
    if bool(is_wrong.any()):
        lowest = float(least.detach()[is_wrong].min())
        raise ValueError(f"{name} must have no negative eigenvalues, got {lowest:.3g}: {remedy}")


def check_gram(gram: Any, rounding: float = 0.0) -> None:
    """Refuse what can be no Gram matrix, whatever its eigenvalues; NaN and infinity are let through, to give NaN.

    Args:
        gram: ``(..., N, N)`` products of rows with each other.
        rounding: How far from symmetric, and below zero on the diagonal, numbers may be whatever their size.

    Raises:
        ValueError: If it is no dense real tensor, not square or symmetric, or a squared norm is negative.
    """
    check_square("gram", gram)
    check_symmetric("gram", gram, ASYMMETRY, rounding, GRAM_REMEDY)
    norms = gram.detach().diagonal(dim1=-2, dim2=-1).to(torch.float64).nan_to_num(0, 0, 0)
    if norms.numel() and (lowest := float(norms.min())) < -rounding:
        raise ValueError(f"gram must have squared norms on its diagonal, got {lowest:.4g}: {GRAM_REMEDY}")


def check_number(minimum: float | None = None, **numbers: Any) -> None:
    """Refuse what is no real number; NaN and infinity are for the function to judge.

    Args:
        minimum: The smallest allowed.
        numbers: By argument.

    Raises:
        ValueError: Naming the first.
    """
    for name, value in numbers.items():
        is_number = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
        if isinstance(value, bool) or not is_number:
            raise ValueError(f"{name} must be a number, got {describe(value)}: write e.g. 2.0")
        try:
            float(value)
        except OverflowError:
            raise ValueError(f"{name} must be within the floating-point range, got {describe(value)}") from None
        if minimum is not None and not value >= minimum:
            raise ValueError(f"{name} must be at least {minimum:g}, got {describe(value)}")


def check_int(minimum: int, maximum: int, **numbers: Any) -> None:
    """Refuse what is no int within bounds.

    Args:
        minimum: The smallest allowed.
        maximum: The largest allowed.
        numbers: By argument.

    Raises:
        ValueError: Naming the first.
    """
    for name, value in numbers.items():
        is_int = isinstance(value, Integral) and not isinstance(value, bool)
        if not is_int or not minimum <= value <= maximum:
            raise ValueError(f"{name} must be an int from {minimum} to {maximum}, got {describe(value)}")


def check_flag(**flags: Any) -> None:
    """Refuse what is neither True nor False: the string "false" would count as true.

    Args:
        flags: By argument.

    Raises:
        ValueError: Naming the first.
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {describe(value)}: give a bool")


def check_broadcast(**shapes: torch.Size) -> None:
    """Refuse leading axes that do not broadcast.

    Args:
        shapes: By argument.

    Raises:
        ValueError: Naming all.
    """
    try:
        torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        listed = " and ".join(str(tuple(shape)) for shape in shapes.values())
        raise ValueError(f"{' and '.join(shapes)} must have leading axes that broadcast, got {listed}") from None


def is_one_line(text: Any) -> bool:
    """Whether something is a text without line breaks and what else would command a terminal.

    Args:
        text: Anything.

    Returns:
        True or False.
    """
    if not isinstance(text, str) or len(text.splitlines()) > 1:
        return False
    return not any(sign < " " or "\x7f" <= sign < "\xa0" or "\ud800" <= sign <= "\udfff" for sign in text)


def is_finite_number(value: Any) -> bool:
    """Whether something is a real number, neither NaN nor infinite.

    Args:
        value: Anything.

    Returns:
        True or False.
    """
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int beyond the floating-point range
        return False
