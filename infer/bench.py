"""Speed beside PyTorch on this machine: `python -m infer.bench dit|vae|compile [--rounds N] [--random SIZES] [--json]`.

Every figure is a ratio of two programs timed in turn in one process, by their medians, warm. Needs the `dev` extra
(torch, diffusers).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.tables import assign
from dit_jax.models.network import Conditioning, NetworkCall, layout, network
from dit_jax.models.wan import WAN_1_3B, Wan, WanConfig
from infer.random_pipeline import sized_model

DIT = replace(WAN_1_3B, blocks=6), (4, 16, 32)  # a transformer, and its tokens
VAE_LATENTS = (1, 3, 16, 16, 16)  # 9 frames of 128 x 128
TEXT = (1, 512, 4096)


def alternate(programs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each program, run in turn after one warm-up of each."""
    for program in programs.values():
        program()
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            began = time.perf_counter()
            program()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def bench_dit(rounds: int, model: tuple[WanConfig, tuple[int, int, int]] = DIT) -> dict[str, float]:
    """One step of a Wan on a grid of tokens, fp32: ours against diffusers in torch eager."""
    import torch
    from diffusers import WanTransformer3DModel

    from convert.wan import wan_rows, wan_settings

    config, (t, y, x) = model
    settings = {k: v for k, v in wan_settings(config).items() if k != "_class_name"}
    theirs: Any = WanTransformer3DModel(**settings)
    ours = assign(
        nnx.eval_shape(lambda: Wan(config, nnx.Rngs(0))),
        wan_rows(config),
        {k: v.numpy() for k, v in theirs.state_dict().items()},
    )
    seen = (1, t, 2 * y, 2 * x, config.in_channels)
    latents, text = (np.random.default_rng(0).standard_normal(shape, np.float32) for shape in (seen, TEXT))
    times = np.array([500.0], np.float32)

    @jax.jit
    def step(model, latents, t, text):
        return network(model, NetworkCall(), layout(latents, config.patch), t, Conditioning(text))[0]

    torch_inputs = torch.tensor(latents).permute(0, 4, 1, 2, 3), torch.tensor(times), torch.tensor(text)

    def run_theirs() -> None:
        with torch.inference_mode():
            theirs(*torch_inputs)

    arguments = [jax.tree.map(jnp.asarray, value) for value in (ours, latents, times, text)]
    return alternate({"ours": lambda: jax.block_until_ready(step(*arguments)), "torch": run_theirs}, rounds)


def bench_vae(rounds: int) -> dict[str, float]:
    """Decoding 9 frames of 128x128 with the published VAE's sizes, fp32, chunk by chunk on both sides."""
    import torch
    from diffusers import AutoencoderKLWan

    from convert.vae_wan import config_from_diffusers, vae_wan_rows
    from dit_jax.models.vae_wan import WanVAE

    theirs: Any = AutoencoderKLWan()
    config = config_from_diffusers(dict(theirs.config))
    ours = assign(
        nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0))),
        vae_wan_rows(config),
        {k: v.numpy() for k, v in theirs.state_dict().items()},
    )
    noise = np.random.default_rng(0).standard_normal(VAE_LATENTS, np.float32)
    decode = jax.jit(lambda vae, latents: vae.decode(latents, chunk=1))
    theirs_latents = torch.tensor(noise).permute(0, 4, 1, 2, 3)

    def run_theirs() -> None:
        with torch.inference_mode():
            theirs.decode(theirs_latents)

    latents = jnp.asarray(noise)
    return alternate({"ours": lambda: jax.block_until_ready(decode(ours, latents)), "torch": run_theirs}, rounds)


def bench_compile(rounds: int) -> dict[str, float]:
    """Compiling one step of a 40-block model against that of a 4-block one (the ratio is 40 blocks over 4)."""

    def compile_with(blocks: int) -> Callable[[], object]:
        config = replace(WAN_1_3B, blocks=blocks, width=192, heads=6, head_width=32, mlp_width=384, text_width=64)
        model = nnx.eval_shape(lambda: Wan(config, nnx.Rngs(0)))
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 3, 16, 16, 16), (1,), (1, 32, 64))]

        def step(model, latents, t, text):
            return network(model, NetworkCall(), layout(latents, config.patch), t, Conditioning(text))[0]

        def run() -> None:
            jax.clear_caches()
            jax.jit(step).lower(model, *shapes).compile()

        return run

    return alternate({"40 blocks": compile_with(40), "4 blocks": compile_with(4)}, rounds)


BENCHES = {"dit": bench_dit, "vae": bench_vae, "compile": bench_compile}
AGAINST = {"dit": "torch eager", "vae": "torch eager", "compile": "the 4-block model"}


def main() -> None:
    """Prints a line, or with `--json` an object, for each benchmark named."""
    options = argparse.ArgumentParser(prog="python -m infer.bench", description=__doc__)
    options.add_argument("what", nargs="*", choices=list(BENCHES), help="which to run (default: all)")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--random", metavar="WIDTHxBLOCKSxTOKENS", help="sizes of dit (default: 6 blocks of the 1.3B)")
    options.add_argument("--json", action="store_true")
    chosen = options.parse_args()
    benches = BENCHES
    if chosen.random:
        benches = BENCHES | {"dit": partial(bench_dit, model=sized_model(chosen.random))}
    for name in chosen.what or benches:
        seconds = benches[name](chosen.rounds)
        measured, reference = seconds.values()
        ratio = measured / reference
        if chosen.json:
            print(json.dumps({"bench": name, "ratio": round(ratio, 3)} | {k: round(v, 4) for k, v in seconds.items()}))
        else:
            print(f"{name}: {ratio:.2f} x {AGAINST[name]} ({measured:.3f} s / {reference:.3f} s)")


if __name__ == "__main__":
    main()
