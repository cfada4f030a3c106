"""Writes a demo model as a complete pipeline in diffusers' layout."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from convert.transfer import staged, write_model
from dit_jax.config import UserError
from dit_jax.parameters import Precision, cast


@dataclass(frozen=True, kw_only=True)
class Part:
    """A model of a pipeline with its diffusers or transformers config; it is written in bf16 but for `exact` leaves."""

    model: nnx.Module
    settings: Mapping[str, Any]
    exact: tuple[str, ...] = ()
    dtype: Any = jnp.bfloat16


@dataclass(frozen=True, kw_only=True)
class DemoPipeline:
    """All that a folder holds: models and tokenizers by the names of their folders, and JSON files by their places."""

    parts: Mapping[str, Part]
    tokenizers: Mapping[str, Path]
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def write(self, folder: str | Path, most_bytes: int) -> int:
        """Replaces `folder` as a whole or not at all; returns the bytes on disk, UserError above `most_bytes`."""
        with staged(Path(folder), overwrite=Path(folder).exists()) as partial:
            for name, part in self.parts.items():
                precision = Precision(weights=part.dtype, exact=part.exact)
                write_model(partial / name, cast(part.model, precision), dict(part.settings))
            for name, tokenizer in self.tokenizers.items():
                shutil.copytree(tokenizer, partial / name)
            for place, content in self.files.items():
                path = partial / place
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(content, indent=2) + "\n")
            size = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
            if size > most_bytes:
                raise UserError(f"The pipeline takes {size:,} bytes, expected at most {most_bytes:,}; shrink a model.")
        return size


def export_command(prog: str, runs: Mapping[str, str], out: Path, arguments: list[str] | None, export: Callable) -> int:
    """Runs `export(options)`, which writes `options.out` and returns its bytes; 2 for bad input.

    runs  option -> the run that it names unless another is given
    """
    parser = argparse.ArgumentParser(f"python -m {prog}", description=sys.modules[export.__module__].__doc__)
    for name, default in runs.items():
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--out", default=str(out))
    options = parser.parse_args(arguments)
    try:
        size = export(options)
    except UserError as error:
        print(f"{prog.rpartition('.')[2]}: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {size / 1e6:.1f} MB")
    return 0
