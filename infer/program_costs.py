"""What a program costs a chip, read from what jax traces and XLA compiles: FLOPs, and bytes that chips send each other.

XLA's own count takes the body of a loop once; here it counts as often as it runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np

from infer.chips import GIB

WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
SCATTERS = "all-reduce-scatter"  # how XLA for TPU names the fusion that a reduce-scatter becomes

_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(rf" ((?:{'|'.join(COLLECTIVES)})(?:-start)?|send|while|fusion|call|conditional|async-start)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation|branch_computations)=\{?([%\w.\-, ]+)")
_BETWEEN = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]")


def needed_bytes(error: Exception) -> int:
    """HBM that a program needs which the compiler refuses because it exceeds a chip's; any other error is raised
    again."""
    needed = re.search(r"\(([\d.]+)([GM])\) exceeds available HBM", str(error))
    if needed is None:
        raise error
    return round(float(needed[1]) * (GIB if needed[2] == "G" else GIB >> 10))


def matmul_flops(jaxpr: Any, trips: float | None = None) -> float:
    """FLOPs of all matrix products of a jaxpr on all devices together; those of a loop times its length.

    In a `shard_map` every device does what is written once, in a Pallas kernel every step of the grid. Of the branches
    of a conditional the most expensive one counts.

    trips  of a loop whose length only a run tells, on average; ValueError for one if this is None
    """
    total: float = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
            continue
        inner = [matmul_flops(each, trips) for each in jax.core.jaxprs_in_params(params)]
        if not any(inner):
            continue
        total += _times(name, params, trips) * (max(inner) if name == "cond" else sum(inner))
    return total


def _times(name: str, params: Mapping[str, Any], trips: float | None) -> float:
    if name == "while":
        if trips is None:
            raise ValueError("the program has a loop whose length only a run tells: say how often it runs")
        return trips
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        return params["mesh"].size
    return math.prod(params["grid_mapping"].grid) if name == "pallas_call" else 1


@dataclass(frozen=True)
class Sent:
    """Bytes that a chip sends in one collective operation of a program, as often as it runs, and whether they cross
    the network between slices."""

    kind: str
    size: float
    between_slices: bool


class CompiledText:
    """A compiled program as XLA prints it, for a mesh of `devices` in so many slices."""

    def __init__(self, text: str, devices: int, slices: int = 1):
        self.devices, self.slices = devices, slices
        self.computations: dict[str, list[str]] = {}
        self.entry = name = ""
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header:
                name = header[2]
                self.computations[name] = []
                self.entry = name if header[1] else self.entry
            elif name:
                self.computations[name].append(line)

    @cached_property
    def sent(self) -> list[Sent]:
        """What a chip sends in every collective of the program.

        One that is spread over several fusions, so as to overlap with them, has one channel and counts once.
        """
        found: dict[tuple[bool, str], Sent] = {}
        for name, times in self._run(self.entry, 1):
            for line in self.computations[name]:
                operation = _OPERATION.search(line)
                if operation is None:
                    continue
                between = _BETWEEN.search(line) if operation[1] == "send" else None
                if between is not None:
                    sent = self._sent_between(between[1].lower().replace("_", "-"), line[: operation.start()], times)
                elif operation[1].startswith(COLLECTIVES):
                    sent = self._sent(operation[1].removesuffix("-start"), line, operation.start(), name, times)
                else:
                    continue
                # Between slices channels are numbered anew.
                channel = re.search(r"channel_id=(\d+)", line)
                place = (between is not None, channel[1] if channel else line)
                found[place] = max(found.get(place, sent), sent, key=lambda each: each.size)
        return list(found.values())

    def _run(self, name: str, times: int) -> Iterator[tuple[str, int]]:
        """(computation, how often it runs), of this one and all that it calls."""
        yield name, times
        for line in self.computations.get(name, ()):
            operation = _OPERATION.search(line)
            if operation is None:
                continue
            trips = self._trips(line) if operation[1] == "while" else 1
            for called in _CALLED.findall(line):
                for each in re.findall(r"%([\w.\-]+)", called):
                    if each in self.computations:
                        yield from self._run(each, times * trips)

    def _trips(self, line: str) -> int:
        """How often a loop runs: the largest number that its condition knows."""
        condition = re.search(r"condition=%([\w.\-]+)", line)
        lines = self.computations[condition[1]] if condition else []
        return max((int(number) for each in lines for number in re.findall(r"constant\((\d+)\)", each)), default=1)

    def _sent(self, kind: str, line: str, before: int, computation: str, times: int) -> Sent:
        if computation.startswith(SCATTERS):
            kind = "reduce-scatter"
        group = self._group(line)
        count = max(len(group), 1)
        sizes = [_bytes(dtype, shape) for dtype, shape in _ARRAY.findall(line[:before])]
        size: float = max(sizes) if "-start(" in line else sum(sizes)
        if kind == "reduce-scatter" and not computation.startswith(SCATTERS):
            size *= count  # the line shows a chip's part; that of a fusion what is summed, still whole
        size *= _ring(kind, count)
        per_slice = self.devices // self.slices
        return Sent(kind, size * times, len({device // per_slice for device in group}) > 1)

    def _sent_between(self, kind: str, arrays: str, times: int) -> Sent:
        """What a chip hands to the network between slices, which runs the ring of one chip of each."""
        size = sum(_bytes(dtype, shape) for dtype, shape in _ARRAY.findall(arrays)[:1])
        if kind == "all-gather":
            size *= self.slices  # the line shows a chip's part
        return Sent(kind, size * _ring(kind, self.slices) * times, True)

    def _group(self, line: str) -> list[int]:
        """Devices of the first group of a collective, as the mesh counts them."""
        if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
            return [int(number) for number in listed[1].split(",")]
        if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
            groups, sizes = _numbers(iota[1]), _numbers(iota[2])
            devices = np.arange(math.prod(sizes)).reshape(sizes)
            devices = devices.transpose(_numbers(iota[3])) if iota[3] else devices
            return devices.reshape(groups)[0].tolist()
        if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
            axes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
            named = re.findall(r"'(\w+)'", mesh[2])
            devices = np.arange(math.prod(map(int, axes.values()))).reshape([int(size) for size in axes.values()])
            return devices[tuple(slice(None) if axis in named else 0 for axis in axes)].ravel().tolist()
        if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
            return [int(pairs[1]), int(pairs[2])]
        return list(range(self.devices))


def _ring(kind: str, count: int) -> float:
    """What each of `count` chips sends in the ring algorithm of a collective, as a share of the whole array."""
    part = (count - 1) / count
    return {"all-gather": part, "all-reduce": 2 * part, "reduce-scatter": part, "all-to-all": part}.get(kind, 1.0)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _bytes(dtype: str, shape: str) -> int:
    return WIDTHS.get(dtype, 0) * math.prod(_numbers(shape) if shape else [1])
