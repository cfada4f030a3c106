"""What a LoRA file is: backbone, style, layers, ranks and alphas."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from convert.lora_backbones import recognise


@dataclass(frozen=True, kw_only=True)
class LoraSummary:
    """A LoRA at a glance.

    layers         component -> outside modules that it adds to
    ranks, alphas  values, the commonest first; a layer without an alpha has its rank
    unmatched      keys that name no layer of the backbone
    """

    path: str
    backbone: str
    styles: list[str]
    layers: dict[str, int]
    ranks: list[int]
    alphas: list[float]
    parameters: int
    dtypes: list[str]
    hash: str
    unmatched: list[str]
    kind: str = "LoRA"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The summary for people."""
        ranks, alphas = (", ".join(f"{value:g}" for value in values) for values in (self.ranks, self.alphas))
        rows = [
            f"{self.path}: LoRA of {self.backbone} in {' and '.join(self.styles)} style, rank {ranks}, alpha {alphas}",
            f"{self.parameters:,} parameters, {', '.join(self.dtypes)}, hash {self.hash}",
        ]
        rows += [f"  {component:<16} {count:>5} layers" for component, count in self.layers.items()]
        if self.unmatched:
            rows.append(f"  {len(self.unmatched)} keys match no layer: {', '.join(self.unmatched[:10])}")
        return rows


def summarise_lora(path: str) -> LoraSummary:
    """What a LoRA file is. Raises UserError as `recognise` does."""
    backbone, opened = recognise(path)
    pairs = [layer for layer in opened.layers if layer.rank]
    tensors = [tensor for layer in opened.layers for role, tensor in layer.tensors.items() if role != "alpha"]

    def commonest(values) -> list[Any]:
        return [value for value, _ in Counter(values).most_common()]

    return LoraSummary(
        path=str(opened.file),
        backbone=backbone,
        styles=opened.styles,
        layers=dict(Counter(layer.component for layer in opened.layers)),
        ranks=commonest(layer.rank for layer in pairs),
        alphas=commonest(layer.scale * layer.rank for layer in pairs),
        parameters=sum(int(np.prod(tensor.shape)) for tensor in tensors),
        dtypes=commonest(tensor.dtype.name for tensor in tensors),
        hash=opened.hash,
        unmatched=opened.unmatched,
    )
