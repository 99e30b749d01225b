"""How a matrix is cut into the groups of weights that share a learned codebook.

    columns -->   band 0      band 1
                [ c_00   ]  [ c_10  ]   tile 0: rows of one codebook
                [ c_01   ]  [ c_11  ]   tile 1
                [  ...   ]  [  ...  ]

Bands and tiles are as even as can be, so that a matrix of 576 columns, in groups of 256, has two
of 288 and none of 64, whose codebook would cost as much as the others.
"""

import math
from dataclasses import dataclass

from quip.codebooks.base import tile_count


@dataclass(frozen=True)
class Grouping:
    """`weights` weights share a codebook, those of about `columns` columns.

    None: all rows, all columns. `unit` is a number of columns that no group may cut.
    """

    weights: int | None
    columns: int | None
    unit: int

    def band(self, n: int) -> int:
        """The columns of a group in a matrix of n; the last group may have fewer."""
        if self.columns is None or self.columns >= n:
            return n
        count = max(1, round(n / self.columns))
        return min(n, math.ceil(n / count / self.unit) * self.unit)

    def bands(self, n: int) -> int:
        """Groups of columns."""
        return math.ceil(n / self.band(n))

    def tiles(self, m: int, n: int) -> int:
        """Groups of rows: one, where `weights` are more than there are in a group of columns."""
        if self.weights is None:
            return 1
        return tile_count(m, max(1, round(self.weights / self.band(n))))

    def fewest(self, m: int, n: int) -> int:
        """The weights of the smallest group of an m x n matrix."""
        band = self.band(n)
        return (m // self.tiles(m, n)) * (n - (self.bands(n) - 1) * band)
