"""Memory and time of conversions with true shapes: `python -m convert.benchmark [--model NAME] [--folder F]`.

Writes 2.5 to 2.9 GB of random bfloat16 weights (all of Wan2.1-1.3B; a few of the blocks of Wan 14B and of FLUX, whose
memory does not grow with their number); then, in several rounds, copies the file and converts it to native and back in
processes of their own, all flushed to disk. Prints the highest peak of anonymous memory (RssAnon) of each and its
median time as a multiple of the copy's: a machine that has to find memory for its file cache may take ten times as long
for one copy as for the next.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import ml_dtypes
import numpy as np

from convert.components import Settings, component_of
from convert.flux import flux_settings
from convert.safetensors_files import Outgoing, write_safetensors
from convert.wan import wan_settings
from dit_jax.models.flux import FLUX_DEV
from dit_jax.models.wan import WAN_1_3B, WAN_14B

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_CYCLE = 1 << 24  # random values that are repeated to fill a tensor
MODELS = {
    "wan2.1-t2v-1.3b": wan_settings(WAN_1_3B),
    "wan2.1-t2v-14b": wan_settings(replace(WAN_14B, blocks=3)),
    "flux.1-dev": flux_settings(replace(FLUX_DEV, double_blocks=2, single_blocks=4)),
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured; bytes and seconds."""

    file_bytes: int
    largest_leaf_bytes: int
    copy_seconds: float
    to_native_seconds: float
    to_native_anonymous_bytes: int
    to_diffusers_seconds: float
    to_diffusers_anonymous_bytes: int

    @property
    def allowed_anonymous_bytes(self) -> int:
        """Twice the largest stacked leaf plus 1 GB."""
        return 2 * self.largest_leaf_bytes + 10**9

    def lines(self) -> list[str]:
        rows = [
            f"file {self.file_bytes / 1e9:.2f} GB, largest leaf {self.largest_leaf_bytes / 1e9:.2f} GB, "
            f"copied in {self.copy_seconds:.1f} s"
        ]
        for name in ("to_native", "to_diffusers"):
            seconds, peak = getattr(self, f"{name}_seconds"), getattr(self, f"{name}_anonymous_bytes")
            rows.append(
                f"{name}: RssAnon peak {peak / 1e9:.2f} GB (allowed {self.allowed_anonymous_bytes / 1e9:.2f} GB), "
                f"{seconds:.1f} s = {seconds / self.copy_seconds:.1f} x copying (allowed 5)"
            )
        return rows


def measure(folder: Path, settings: Settings, rounds: int = 3) -> Result:
    """Converts random weights of a model to native and back inside `folder`, which must be empty."""
    source, largest = _random_checkpoint(folder / "diffusers", settings)
    file, native, again = source / "diffusion_pytorch_model.safetensors", folder / "native", folder / "again"
    copies, there, back = [], [], []
    for _ in range(rounds):
        copies.append(_copied(file, folder / "copy.safetensors"))
        there.append(_converted("to-jax", source, native))
        back.append(_converted("to-torch", native, again))
        written = (again / file.name).stat().st_size
        shutil.rmtree(native)
        shutil.rmtree(again)
    return Result(
        file_bytes=written,
        largest_leaf_bytes=largest,
        copy_seconds=median(copies),
        to_native_seconds=median(seconds for seconds, _ in there),
        to_native_anonymous_bytes=max(peak for _, peak in there),
        to_diffusers_seconds=median(seconds for seconds, _ in back),
        to_diffusers_anonymous_bytes=max(peak for _, peak in back),
    )


def _random_checkpoint(folder: Path, settings: Settings) -> tuple[Path, int]:
    """(folder of a lone transformer, bytes of its largest leaf)."""
    component = component_of(settings, folder)
    # Without the exponent's top bit every value is finite.
    values = (np.random.default_rng(0).integers(0, 1 << 16, _CYCLE, np.uint16) & 0xBFFF).view(_BFLOAT16)
    shapes = {}
    for row in component.rows:
        shape = component.shapes[row.ours]
        for block in range(shape[0]) if row.stacked("diffusers") else [None]:
            outside = row.outside_shape(shape if block is None else shape[1:], "diffusers")
            shapes[row.key("diffusers", block)] = outside
    tensors = [Outgoing(key, _BFLOAT16, shape, partial(np.resize, values, shape)) for key, shape in shapes.items()]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    write_safetensors(folder / f"{component.stem}.safetensors", tensors)
    return folder, max(int(np.prod(shape)) for shape in component.shapes.values()) * _BFLOAT16.itemsize


def _copied(source: Path, target: Path) -> float:
    start = time.perf_counter()
    shutil.copyfile(source, target)
    with open(target, "rb+") as stream:
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def _converted(command: str, source: Path, target: Path) -> tuple[float, int]:
    """(seconds, highest RssAnon in bytes) of dit-convert in a process of its own."""
    start, peak = time.perf_counter(), 0
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-m", "convert.cli", command, str(source), str(target)], env=environment
    )
    while process.poll() is None:
        peak = max(peak, _anonymous_bytes(process.pid))
        time.sleep(0.01)
    if process.returncode:
        raise RuntimeError(f"dit-convert {command} ended with status {process.returncode}")
    return time.perf_counter() - start, peak


def _anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
    return int(found[0]) * 1024 if found else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to write about 9 GB; removed again")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", choices=MODELS, default="wan2.1-t2v-1.3b")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        print("\n".join(measure(Path(folder), MODELS[arguments.model], arguments.rounds).lines()))


if __name__ == "__main__":
    main()
