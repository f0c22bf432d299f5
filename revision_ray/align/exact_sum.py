"""Sums of float64 arrays that merge exactly: fixed point is associative, so no order has to be kept.

What is added is rounded once, to a grid of 2^-52. For the sum of a block of unit rows that is below what
float64 itself rounds when it makes that sum.

Shapes: D embedding dim.
"""

from dataclasses import dataclass

import numpy as np

_FRACTION_BITS = 52
# Rows of a symmetric matrix that are added at a time: what that takes stays in the L2 cache.
_TILE_ROWS = 16


@dataclass
class ExactSum:
    """A sum of float64 arrays in fixed point: value = high + low * 2^-52, 0 <= low < 2^52.

    Addition is associative and commutative to the bit. Range: 2^63, at a resolution of 2.2e-16.
    """

    high: np.ndarray  # int64
    low: np.ndarray  # int64

    @staticmethod
    def zeros(shape: tuple[int, ...]) -> "ExactSum":
        return ExactSum(np.zeros(shape, np.int64), np.zeros(shape, np.int64))

    def add(self, values: np.ndarray, index: slice | tuple[slice, slice] = slice(None)) -> None:
        """`values` (float64, finite) are part of the sum, at `index`."""
        whole = np.trunc(values)  # what is left of the value is then exact, and rounded once
        self._add(
            whole.astype(np.int64), np.rint((values - whole) * 2.0**_FRACTION_BITS).astype(np.int64), index
        )

    def merge(self, other: "ExactSum") -> None:
        """What `other` holds is part of this sum."""
        self._add(other.high, other.low, slice(None))

    def add_lower(self, values_DD: np.ndarray) -> None:
        """The lower triangle of the symmetric `values_DD` is part of this sum's; see `mirror_lower`."""
        for start in range(0, len(values_DD), _TILE_ROWS):
            end = start + _TILE_ROWS
            index = (slice(start, end), slice(0, end))
            self.add(values_DD[index], index)

    def mirror_lower(self) -> None:
        """What lies above the diagonal is what lies below it."""
        above_DD = ~np.tri(len(self.high), dtype=bool)
        for part_DD in (self.high, self.low):
            np.copyto(part_DD, part_DD.T, where=above_DD)

    def _add(self, high: np.ndarray, low: np.ndarray, index: slice | tuple[slice, slice]) -> None:
        total = self.low[index] + low
        self.high[index] += high + (total >> _FRACTION_BITS)
        self.low[index] = total & ((1 << _FRACTION_BITS) - 1)

    def value(self, index: int | slice = slice(None)) -> np.ndarray:
        """The sum (or what is at `index` of its first axis), rounded to float64."""
        return self.high[index].astype(np.float64) + self.low[index].astype(np.float64) * 2.0**-_FRACTION_BITS

    def total(self) -> "ExactSum":
        """The sum over the first axis, exactly."""
        result = ExactSum.zeros(self.high.shape[1:])
        for high, low in zip(self.high, self.low, strict=True):
            result._add(high, low, slice(None))
        return result
