"""What a forward pass is given: which of its columns are tokens, and which ids they have."""

from __future__ import annotations

from typing import Any

import torch

from ..engines.geometry import Unsupported

_HARMLESS = frozenset((
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache", "past_key_values",
    "use_cache", "cache_position", "return_dict", "output_hidden_states", "logits_to_keep",
    "labels", "kwargs", "output_router_logits", "num_items_in_batch", "is_first_iteration"))


class Inputs:
    """rows, columns: of the rectangle that is new. pads: of each row, how many of all columns, old
    ones included, are padding. known: whether ids and positions say all that K and V depend on.
    copies: how many equal rows follow each other, throughout the batch."""

    def __init__(self, ids: list[list[int]], columns: int, pads: list[int], known: bool) -> None:
        self.ids, self.rows, self.columns = ids, len(pads), columns
        self.pads, self.known = pads, known
        self._device: Any = None

    @classmethod
    def of(cls, given: dict[str, Any], past: int, stored_pads: list[int]) -> "Inputs":
        """given: the arguments of the model's forward(). past: columns that the cache has;
        stored_pads: of those, padding. One copy to the host, and no other wait for a GPU."""
        refuse_others(given, _HARMLESS)
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if ids is None and embeds is None:
            raise ValueError("neither input_ids nor inputs_embeds")
        rows, new = (ids if ids is not None else embeds).shape[:2]
        total = past + new
        if stored_pads and rows % len(stored_pads) != 0:
            raise ValueError(f"a batch of {rows} rows; the cache has {len(stored_pads)} (use "
                             "batch_select_indices() to go on with some)")
        if mask is not None:
            check_mask(mask, rows, total)
        elif any(stored_pads):
            raise ValueError("attention_mask is missing, and the cache has padding")
        if positions is not None and (positions.ndim != 2 or positions.shape[1] != new or
                                      positions.shape[0] not in (1, rows)):
            raise Unsupported(f"position_ids of shape {list(positions.shape)}; only "
                              f"{[rows, new]}")
        device = (ids if ids is not None else embeds).device
        ids, mask, positions = _to_host(ids, mask, positions)
        pads = [0] * rows if mask is None else pads_of(mask)
        known = ids is not None and _usual(positions, pads, past, new)
        self = cls(ids.tolist() if ids is not None else [], new, pads, known)
        self._device = device
        return self

    @property
    def copies(self) -> int:
        """The largest number of equal rows that follow each other throughout the batch."""
        if not self.ids:
            return 1
        run = 1
        while run < self.rows and self._equal(0, run):
            run += 1
        return next(k for k in range(run, 0, -1) if self.rows % k == 0 and self.same(k))

    def _equal(self, a: int, b: int) -> bool:
        # Where positions were given, equal ids may stand for different rows.
        return self.known and self.pads[a] == self.pads[b] and self.ids[a] == self.ids[b]

    def same(self, copies: int) -> bool:
        """Whether each group of `copies` rows is one row repeated."""
        return bool(self.ids) and all(self._equal(i, i - i % copies) for i in range(self.rows)
                                      if i % copies != 0)

    def every(self, copies: int) -> "Inputs":
        """The first row of each group."""
        if copies == 1:
            return self
        few = Inputs(self.ids[::copies], self.columns, self.pads[::copies], self.known)
        few._device = self._device
        return few

    def tokens(self, counts: list[int]) -> list[int]:
        """The ids of the new tokens: of each row the last counts[row]."""
        return [t for row, n in zip(self.ids, counts) for t in row[self.columns - n:]]

    def index(self, counts: list[int]) -> torch.Tensor:
        """Where in the rectangle they lie."""
        width = self.columns
        return torch.tensor([row * width + column for row, n in enumerate(counts)
                             for column in range(width - n, width)], device=self._device)


def refuse_others(given: dict[str, Any], harmless: frozenset[str]) -> None:
    """Unsupported: there are arguments on which K and V may depend beside the tokens' ids."""
    if given.get("output_attentions"):
        raise Unsupported("output_attentions: attention weights aren't computed; use "
                          "attn_implementation=\"eager\" and another cache")
    for name, value in given.items():
        if name not in harmless and value is not None and value is not False:
            raise Unsupported(f"{name}: K and V would depend on more than token ids")


def _to_host(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The tensors of integers on the processor, by one copy."""
    there = [t for t in tensors if t is not None and t.device.type != "cpu"]
    if not there:
        return list(tensors)
    flat = torch.cat([t.reshape(-1).to(torch.int64) for t in there]).cpu()
    parts = iter(flat.split([t.numel() for t in there]))
    return [t if t is None or t.device.type == "cpu" else next(parts).view(t.shape)
            for t in tensors]


def check_mask(mask: Any, rows: int, columns: int) -> None:
    """Unsupported: it isn't a mask of padding. ValueError: it is one of other columns."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        kind = f"of {mask.ndim} dimensions" if isinstance(mask, torch.Tensor) else \
            type(mask).__name__
        raise Unsupported(f"attention_mask: {kind}; only [rows, columns] of padding")
    if tuple(mask.shape) != (rows, columns):
        raise ValueError(f"attention_mask of {list(mask.shape)}; with what the cache has, there "
                         f"are {[rows, columns]} rows and columns")


def pads_of(mask: torch.Tensor) -> list[int]:
    """Of each row of a mask on the processor, how many columns are padding. Unsupported: it isn't
    at the left."""
    there = mask if mask.dtype is torch.bool else mask != 0
    rows, columns = there.shape
    tokens = there.sum(1)
    pads: list[int] = (columns - tokens).tolist()
    most = max(pads, default=0)
    # All is there after the longest padding, and in each row from its own padding up to that.
    if int(there[:, most:].sum()) != rows * (columns - most) or \
            any(pad < most and not bool(there[row, pad:most].all())
                for row, pad in enumerate(pads)):
        raise Unsupported("attention_mask with holes: padding must be at the left")
    return pads


def _usual(positions: torch.Tensor | None, pads: list[int], past: int, new: int) -> bool:
    """Whether each token's position is the number of tokens before it."""
    if positions is None:  # then a model counts columns
        return not any(pads)
    said: list[list[int]] = positions.tolist()
    for row, pad in enumerate(pads):
        at = said[row if len(said) > 1 else 0]
        first = min(max(0, pad - past), new)
        if at[first:] != list(range(past + first - pad, past + new - pad)):
            return False
    return True
