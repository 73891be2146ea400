"""What a slider does over its scales, in numbers: does it move one way, evenly, both ways alike."""

import math
from collections.abc import Sequence

import numpy as np


def spearman(scales: Sequence[float], values: Sequence[float]) -> float:
    """Rank correlation: 1 where a larger scale never gives a smaller value; NaN where one of them is constant."""
    x, y = _ranks(scales), _ranks(values)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} scales and {len(y)} values")
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / norm if norm else math.nan


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Places in order; equal values share the mean of theirs."""
    numbers = np.asarray(values, dtype=np.float64)
    below = (numbers[None] < numbers[:, None]).sum(1)
    equal = (numbers[None] == numbers[:, None]).sum(1)
    return np.asarray(below + (equal - 1) / 2, dtype=np.float64)


def linearity(scales: Sequence[float], values: Sequence[float]) -> float:
    """R^2 of the best straight line, at most 1; NaN where the values are constant."""
    x, y = np.asarray(scales, dtype=np.float64), np.asarray(values, dtype=np.float64)
    total = float(((y - y.mean()) ** 2).sum())
    if not total:
        return math.nan
    slope, height = np.polyfit(x, y, 1)
    return 1 - float(((y - slope * x - height) ** 2).sum()) / total


def symmetry(minus: float, zero: float, plus: float) -> float:
    """Change at scale -1 over change at scale 1, reversed: 1 where both are as large; NaN where scale 1 changes nothing."""
    return -(minus - zero) / (plus - zero) if plus != zero else math.nan


def switches(states: Sequence[bool]) -> int:
    """How often something goes on or off along the scales: once is right."""
    return sum(a != b for a, b in zip(states, states[1:], strict=False))
