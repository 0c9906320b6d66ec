"""How the columns of a left-padded batch become tokens of sequences.

An engine's batch is a rectangle: a row for each sequence, a column for each token, and padding at
the left of the shorter ones. A sequence of the pool holds tokens alone, so that padding is neither
stored nor attended to. `Rows` says which columns are tokens, for every row.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Rows:
    """columns: that the cache has seen, of every row; pads: of each row, how many of those are
    padding (all at its beginning)."""

    columns: int = 0
    pads: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.pads)

    def lengths(self, columns: int | None = None) -> list[int]:
        """Tokens that each row has in the first `columns` columns (None: in all)."""
        n = self.columns if columns is None else columns
        return [max(0, n - min(pad, n)) for pad in self.pads]

    def check_pads(self, pads: list[int]) -> None:
        """pads: of each row, over all columns, new ones included. ValueError: what was stored as a
        token is padding now, or the other way round."""
        for row, (had, has) in enumerate(zip(self.pads, pads)):
            if min(has, self.columns) != had:
                raise ValueError(f"attention_mask: row {row} has {has} columns of padding, and had "
                                 f"{had} of its {self.columns} when they were stored")

    def new_tokens(self, pads: list[int], new: int) -> list[int]:
        """Of each row, how many of `new` further columns are tokens."""
        total = self.columns + new
        return [min(new, total - min(pad, total)) for pad in pads]

    def add(self, pads: list[int], new: int) -> None:
        """`new` columns were stored; `pads` is over all columns."""
        self.columns += new
        self.pads = [min(pad, self.columns) for pad in pads]

    def cut(self, count: int) -> list[int]:
        """Drops the last `count` columns; the lengths that the rows have then. ValueError: there
        are fewer."""
        if not 0 <= count <= self.columns:
            raise ValueError(f"{count} columns to remove; the cache has {self.columns}")
        self.columns -= count
        self.pads = [min(pad, self.columns) for pad in self.pads]
        return self.lengths()

    def pick(self, picks: list[int]) -> None:
        """Goes on with some rows, in this order; a row may be picked several times."""
        self.pads = [self.pads[pick] for pick in picks]

    def copy(self) -> "Rows":
        return Rows(self.columns, list(self.pads))


def match_columns(pads: list[int], found: list[int]) -> int:
    """How many columns of a left-padded batch the tokens that were found cover in every row: an
    engine goes on at the same column of all of them."""
    return min((pad + tokens for pad, tokens in zip(pads, found)), default=0)

