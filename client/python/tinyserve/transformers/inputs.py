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
        device = (ids if ids is not None else embeds).device
        total = past + new
        if stored_pads and rows % len(stored_pads) != 0:
            raise ValueError(f"a batch of {rows} rows; the cache has {len(stored_pads)} (use "
                             "batch_select_indices() to go on with some)")
        flags = []
        if mask is not None:
            mask = check_mask(mask, rows, total)
            pads_there = total - mask.sum(1, dtype=torch.long)
            ordered = mask == (torch.arange(total, device=device) >= pads_there[:, None])
            flags.append(ordered.all().reshape(1))
        else:
            if any(stored_pads):
                raise ValueError("attention_mask is missing, and the cache has padding")
            pads_there = torch.zeros(rows, dtype=torch.long, device=device)
        flags.append(_usual_positions(positions, pads_there, past, new, rows))
        flags_there = torch.cat([f.to(torch.long) for f in flags])
        parts = [flags_there, pads_there]
        if ids is not None:
            parts.append(ids.reshape(-1).to(torch.long))
        host = torch.cat(parts).tolist()
        if mask is not None and not host[0]:
            raise Unsupported("attention_mask with holes: padding must be at the left")
        known = bool(host[len(flags) - 1]) and ids is not None
        at = len(flags)
        pads, flat = host[at:at + rows], host[at + rows:]
        self = cls([flat[i * new:(i + 1) * new] for i in range(rows)] if ids is not None else [],
                   new, pads, known)
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
        return self.pads[a] == self.pads[b] and self.ids[a] == self.ids[b]

    def same(self, copies: int) -> bool:
        """Whether each group of so many rows is one row repeated."""
        return bool(self.ids) and all(self._equal(i, i - i % copies) for i in range(self.rows))

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


def check_mask(mask: Any, rows: int, columns: int) -> torch.Tensor:
    """The mask as booleans. Unsupported: it isn't one of padding."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        kind = f"of {mask.ndim} dimensions" if isinstance(mask, torch.Tensor) else \
            type(mask).__name__
        raise Unsupported(f"attention_mask: {kind}; only [rows, columns] of padding")
    if tuple(mask.shape) != (rows, columns):
        raise ValueError(f"attention_mask of {list(mask.shape)}; with what the cache has, there "
                         f"are {[rows, columns]} rows and columns")
    return mask if mask.dtype is torch.bool else mask != 0


def _usual_positions(positions: Any, pads: torch.Tensor, past: int, new: int,
                     rows: int) -> torch.Tensor:
    """Whether each token's position is the number of tokens before it: a tensor of one boolean."""
    if positions is None:  # then a model counts columns
        return (pads == 0).all().reshape(1)
    if positions.ndim != 2 or positions.shape[1] != new:
        raise Unsupported(f"position_ids of shape {list(positions.shape)}; only [rows, {new}]")
    usual = torch.arange(past, past + new, device=pads.device) - pads[:, None]
    return ((positions == usual) | (usual < 0)).all().reshape(1)
