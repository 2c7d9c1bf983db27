"""Slow float64 twins of the measures: NumPy, one row, one rank, one group at a time."""

import itertools
import math

import numpy as np


def mean_and_scatter(rows):
    """Two passes over `(n, d)` rows: mean row, then the sum of outer products about it."""
    rows = np.asarray(rows, dtype=np.float64)
    mean = np.array([math.fsum(column) / len(rows) for column in rows.T])
    scatter = np.zeros((rows.shape[1], rows.shape[1]))
    for row in rows:
        scatter += np.outer(row - mean, row - mean)
    return mean, scatter


def covariance_spectrum(rows):
    """Squared singular values of the centred rows: no product is formed, so small eigenvalues keep their digits."""
    rows = np.asarray(rows, dtype=np.float64)
    mean = np.array([math.fsum(column) / len(rows) for column in rows.T])
    values = np.zeros(rows.shape[1])
    singular = np.linalg.svd(rows - mean, compute_uv=False)
    values[: len(singular)] = singular**2 / (len(rows) - 1)
    return values


def power_law(values, first, last):
    """Least squares of ln value on ln rank over ranks first to last: exponent and r2."""
    points = [(math.log(rank), math.log(values[rank - 1])) for rank in range(first, last + 1) if values[rank - 1] > 0]
    mean_x = math.fsum(x for x, _ in points) / len(points)
    mean_y = math.fsum(y for _, y in points) / len(points)
    xx = math.fsum((x - mean_x) ** 2 for x, _ in points)
    xy = math.fsum((x - mean_x) * (y - mean_y) for x, y in points)
    slope = xy / xx
    residual = math.fsum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    total = math.fsum((y - mean_y) ** 2 for _, y in points)
    return -slope, 1 - residual / total


def rankme(values):
    total = math.fsum(values)
    return math.exp(-math.fsum(value / total * math.log(value / total) for value in values if value > 0))


def head_share(values, k):
    return math.fsum(values[:k]) / math.fsum(values)


def js_divergence(p, q):
    """Jensen-Shannon divergence in nats, as the mean of two Kullback-Leibler divergences to the middle."""
    total_p, total_q = math.fsum(p), math.fsum(q)
    terms = []
    for a, b in zip((x / total_p for x in p), (x / total_q for x in q), strict=True):
        terms += [a / 2 * math.log(2 * a / (a + b))] if a > 0 else []
        terms += [b / 2 * math.log(2 * b / (a + b))] if b > 0 else []
    return math.fsum(terms)


def jackknife(statistic, groups):
    """Corrected estimate and standard error of a statistic of rows, by deleting each group of rows in turn."""
    whole = statistic(np.concatenate(groups))
    without = [
        statistic(np.concatenate([group for other, group in enumerate(groups) if other != deleted]))
        for deleted in range(len(groups))
    ]
    mean = math.fsum(without) / len(groups)
    pseudo = [len(groups) * whole - (len(groups) - 1) * value for value in without]
    variance = (len(groups) - 1) / len(groups) * math.fsum((value - mean) ** 2 for value in without)
    return math.fsum(pseudo) / len(groups), math.sqrt(variance)


def gradient_moments(rows):
    """Unbiased squared norm of the mean row, pair by pair of different rows, and trace of NumPy's covariance."""
    rows = np.asarray(rows, dtype=np.float64)
    products = [math.fsum(a * b) for m, a in enumerate(rows) for n, b in enumerate(rows) if m != n]
    return math.fsum(products) / len(products), math.fsum(rows.var(0, ddof=1))


def contiguous_groups(samples, num_groups):
    """Samples in groups of neighbours, one sample at a time, as if nobody knew how many will come."""
    slots, unit = [], 1
    for sample in samples:
        if num_groups > 1 and slots and len(slots[-1]) >= unit and len(slots) > num_groups:
            slots = _join_shortest(slots)
            if min(map(len, slots)) >= 2 * unit:
                unit *= 2
        if not slots or (num_groups > 1 and len(slots[-1]) >= unit):
            slots.append([])
        slots[-1].append(sample)
    return _join_shortest(slots) if len(slots) > num_groups else slots


def _join_shortest(slots):
    lengths = [len(first) + len(second) for first, second in itertools.pairwise(slots)]
    at = lengths.index(min(lengths))
    return [*slots[:at], slots[at] + slots[at + 1], *slots[at + 2 :]]


def spread_samples(samples, num_rows):
    """Samples spread over a pass: each that begins when no more of the rows were taken than of the pass has gone by."""
    taken, rows = [], 0
    for index, sample in enumerate(samples):
        if rows / num_rows > index / len(samples) + 1e-12:
            continue
        if rows and rows + len(sample) > num_rows:
            break
        taken.append(sample)
        rows += len(sample)
    return taken
