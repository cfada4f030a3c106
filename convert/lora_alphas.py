"""The alphas that a LoRA file has beside its tensors: diffusers' metadata and PEFT's adapter_config.json.

Both hold PEFT's `LoraConfig`: one alpha for all modules, and `alpha_pattern` with exceptions by the module's name.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.components import read_json
from convert.safetensors_files import read_metadata
from dit_jax.config import UserError

METADATA = "lora_adapter_metadata"  # diffusers' name for it
CONFIG = "adapter_config.json"
LARGEST_ALPHA = 1e30


@dataclass(frozen=True)
class Alphas:
    """Component -> its LoraConfig; `source` is where they were found."""

    configs: dict[str, dict[str, Any]]
    source: Path

    def of(self, component: str, module: str, rank: int) -> float | None:
        """Alpha of a module of this rank; None where nothing is said, which stands for the rank."""
        config = self.configs.get(component, {})
        patterns = config.get("alpha_pattern") or {}
        named = [alpha for name, alpha in patterns.items() if _names(name, module)]
        alpha = named[0] if named else config.get("lora_alpha")
        if alpha is None:
            return None
        # Rank-stabilised LoRA divides by the root of the rank.
        return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)


def _names(pattern: str, module: str) -> bool:
    """Whether a pattern of PEFT's is the module's name or, without ^, its last parts."""
    name = pattern.removeprefix("^")
    return module == name or (name == pattern and module.endswith(f".{name}"))


def alphas_in(file: Path) -> Alphas:
    """What is said beside the tensors of a LoRA file. Raises UserError when it is damaged or describes no LoRA."""
    text = read_metadata(file).get(METADATA) if file.suffix == ".safetensors" else None
    if text is not None:
        source, content = file, _parsed(text, file)
    elif (file.parent / CONFIG).is_file() and file.name == "adapter_model.safetensors":
        source = file.parent / CONFIG
        content = {f"transformer.{name}": value for name, value in read_json(source).items()}
    else:
        return Alphas({}, file)
    configs: dict[str, dict[str, Any]] = {}
    for name, value in content.items():
        component, _, setting = name.partition(".")
        configs.setdefault(component, {})[setting] = value
    for config in configs.values():
        _check(config, source)
    return Alphas(configs, source)


def _parsed(text: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: its {METADATA} is not JSON ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: its {METADATA} should be a JSON object; download it again.")
    return content


def _check(config: dict[str, Any], source: Path) -> None:
    if config.get("use_dora"):
        raise UserError(f"{source} describes a DoRA; expected a plain LoRA; use another file.")
    patterns = config.get("alpha_pattern") or {}
    alphas = [config.get("lora_alpha"), *(patterns.values() if isinstance(patterns, dict) else [patterns])]
    if not all(alpha is None or _is_number(alpha) for alpha in alphas):
        raise UserError(
            f"{source}: lora_alpha and alpha_pattern should hold numbers below {LARGEST_ALPHA:g}; use another LoRA."
        )
    for name in patterns:
        if re.search(r"[^\w.^-]", name):
            raise UserError(f"{source}: alpha_pattern has {name!r}; expected names of modules; write them out.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST_ALPHA
