"""What `test_stored_programs.py` runs in processes of its own, on eight fake devices: programs that come from a store.
Writes what each case did to OUT.json and its numbers to OUT.npz."""

import json
import logging
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dit_jax.sharding import make_mesh, parse_mesh
from infer import load_pipeline, program_keys
from infer.program_keys import Call
from infer.program_store import ProgramStore
from infer.programs import Programs
from infer.request import Request

RUN = dict(seed=7, steps=4, size=(48, 64), frames=5, guidance=3.0)
PLANS = {"": "dense", "data=2,context=4": "teacache:0.1"}  # by mesh


def step(weights, state):
    return jnp.tanh(state @ weights) + state.mean(0)


def on_part(programs: Programs) -> np.ndarray:
    """Of the eight devices the last four, backwards; the state is donated."""
    mesh = Mesh(np.array(jax.devices()[:3:-1]).reshape(2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    rows, columns = NamedSharding(mesh, PartitionSpec("a", None)), NamedSharding(mesh, PartitionSpec(None, "b"))
    with jax.set_mesh(mesh):
        weights = jax.device_put(np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8), columns)
        state = jax.device_put(np.linspace(0, 1, 32, dtype=np.float32).reshape(4, 8), rows)
        for _ in range(3):
            given, state = state, programs.run("step", step, weights, state, donate=(1,), out_shardings=rows)
            assert given.is_deleted() and state.sharding == rows
    return np.asarray(state)


def latents(folder: str, mesh: str, programs: Programs) -> np.ndarray:
    pipe = load_pipeline(folder, mesh=make_mesh(parse_mesh(mesh)) if mesh else None)
    pipe.programs = programs
    return pipe.denoise(pipe.prepare(Request(prompt="a red cat runs", plan=PLANS[mesh], **RUN)))


def main(folder: str, store: str, out: str) -> None:
    program_keys._sources = lambda: "sources"  # that someone may be editing
    logged: list[str] = []
    lowered: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logging.getLogger("infer").addHandler(handler)
    logging.getLogger("infer").setLevel(logging.INFO)
    key = Call.lowered_key
    Call.lowered_key = lambda call, program: lowered.append(str(call.name)) or key(call, program)
    told, numbers = {}, {}
    for case in ("part", *PLANS):
        programs = Programs(ProgramStore(store, limit_bytes=1 << 30))
        numbers[case] = on_part(programs) if case == "part" else latents(folder, case, programs)
        told[case] = dict(
            programs=len(programs), compiled=programs.compiled_count, loaded=programs.loaded_count,
            peak_bytes=programs.peak_bytes(), lowered=lowered[:], logged=logged[:],
        )  # fmt: skip
        lowered.clear()
        logged.clear()
    np.savez(f"{out}.npz", **numbers)
    with open(f"{out}.json", "w") as file:
        json.dump(told, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
