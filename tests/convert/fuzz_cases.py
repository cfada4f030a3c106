"""Damaged checkpoints of every layout, generated from small sound ones; the same for the same seed."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
from fuzz import BFLOAT16, E4M3, Damage, save
from tiny_checkpoints import FLUX_PIPELINE, WAN_PIPELINE, model_folder, pipeline_folder, single_file, tensors

from convert.checkpoint import open_checkpoint
from convert.transfer import convert

IT_RAN = "it-ran"  # a folder that malicious code would make


@dataclass(frozen=True)
class Case:
    """One damage of one sound checkpoint."""

    base: str
    damage: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.base}: {self.damage} #{self.seed}"

    def harm(self, folder: Path) -> Sequence[str]:
        """Damages a copy of the base in place; returns what the error must name."""
        return DAMAGES[self.base][self.damage](folder, random.Random(self.name))


def scaled(name: str) -> dict[str, np.ndarray]:
    """Matrices in fp8 with a scale each, as ComfyUI's files."""
    out = {"scaled_fp8": np.zeros(2, E4M3)}
    for key, array in tensors(name, dtype=BFLOAT16).items():
        matrix = array.ndim == 2 and key.endswith(".weight")
        out[key] = array.astype(E4M3) if matrix else array
        if matrix:
            out[f"{key.removesuffix('.weight')}.scale_weight"] = np.array(0.5, np.float32)
    return out


def _converted(folder: Path, parts: dict[str, str], layout: str, **options: Any) -> None:
    pipeline_folder(folder / "made", parts, BFLOAT16)
    convert(open_checkpoint(folder / "made"), folder / "model", layout, **options)
    shutil.rmtree(folder / "made")


def _torch_file(folder: Path) -> None:
    import torch

    folder.mkdir(exist_ok=True)
    state = {key: torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) for key, array in _t5().items()}
    torch.save(state, folder / "model.pth")


def _t5() -> dict[str, np.ndarray]:
    return tensors("t5", dtype=BFLOAT16)


def _scaled_file(folder: Path) -> None:
    folder.mkdir()
    save(folder / "model.safetensors", scaled("wan"))


def _prefixed_file(folder: Path) -> None:
    single_file(folder / "model.safetensors", "flux-schnell", BFLOAT16, prefix="model.diffusion_model.")


def _lora_file(folder: Path) -> None:
    """A LoRA of FLUX in ComfyUI's style, ranks 2 and 3."""
    rng, arrays = np.random.default_rng(0), {}
    for block in range(3):
        for module, outputs in (("img_attn.qkv", 24), ("txt_mlp.0", 16)):
            rank, name = 2 + block % 2, f"diffusion_model.double_blocks.{block}.{module}"
            arrays[f"{name}.lora_A.weight"] = rng.standard_normal((rank, 8)).astype(BFLOAT16)
            arrays[f"{name}.lora_B.weight"] = rng.standard_normal((outputs, rank)).astype(BFLOAT16)
    folder.mkdir()
    save(folder / "model.safetensors", arrays)


# Name -> (how to make it, what the command is given below its folder, command).
BASES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "diffusers": (lambda f: pipeline_folder(f / "model", WAN_PIPELINE, BFLOAT16), "model", "to-jax"),
    "sharded": (lambda f: _converted(f, FLUX_PIPELINE, "diffusers", max_shard_bytes=400_000), "model", "to-jax"),
    "transformers": (lambda f: model_folder(f / "model", "t5", BFLOAT16), "model", "to-jax"),
    "original folder": (lambda f: _converted(f, FLUX_PIPELINE, "original"), "model", "to-jax"),
    "original file": (lambda f: single_file(f / "model.safetensors", "wan", BFLOAT16), "model.safetensors", "to-jax"),
    "prefixed file": (_prefixed_file, "model.safetensors", "to-jax"),
    "VAE file": (lambda f: single_file(f / "model.safetensors", "flux-vae", BFLOAT16), "model.safetensors", "to-jax"),
    "fp8 file": (_scaled_file, "model.safetensors", "to-jax"),
    "torch file": (_torch_file, "model.pth", "to-jax"),
    "native": (lambda f: _converted(f, WAN_PIPELINE, "native"), "model", "to-torch"),
    "LoRA file": (_lora_file, "model.safetensors", "to-torch"),
}


# ---- what only some of them have ----


def a_wrong_scale(folder: Path, rng: random.Random) -> Sequence[str]:
    file = folder / "model.safetensors"
    arrays = fuzz.load(file)
    key = rng.choice(sorted(key for key in arrays if key.endswith(".scale_weight") and key.startswith("blocks.")))
    wrong = [np.ones(size, np.float32) for size in (3, (2, 2), (1, 256), 0, (255, 1), (1, 1, 2))]
    wrong += [np.array(value, np.float32) for value in (np.nan, np.inf, -1.0)]
    wrong += [np.array(1, np.int64), np.array(1).astype(E4M3), None]
    scale = wrong[rng.randrange(len(wrong))]
    del arrays[key]
    save(file, arrays if scale is None else arrays | {key: scale})
    return [str(file), key.removesuffix(".scale_weight")]


def a_scale_of_nothing(folder: Path, rng: random.Random) -> Sequence[str]:
    file = folder / "model.safetensors"
    key = rng.choice(
        ["blocks.0.self_attn.q.bias.scale_weight", "blocks.0.norm9.weight_scale", "head.head.weight_scale"]
    )
    save(file, fuzz.load(file) | {key: np.ones(1, np.float32)})
    return [str(file), key.rpartition(".")[0]]


class Spy:
    """What a malicious pickle would run."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return (os.mkdir, (str(self.place),))


def _state(change: Callable[[dict[str, Any], random.Random, Any], Any]) -> Damage:
    """Saves again what `change` makes of the tensors of the file of torch."""

    def damage(folder: Path, rng: random.Random) -> Sequence[str]:
        import torch

        file = folder / "model.pth"
        state = torch.load(file, weights_only=True)
        changed = change(state, rng, torch)
        torch.save(state if changed is None else changed, file)
        return [str(file)]

    return damage


def _torch_key_less(state: dict[str, Any], rng: random.Random, torch: Any) -> None:
    del state[rng.choice(sorted(state))]


def _torch_tensor(make: Callable[[Any, random.Random, Any], Any]) -> Damage:
    def change(state: dict[str, Any], rng: random.Random, torch: Any) -> None:
        key = rng.choice(sorted(key for key in state if "block.1." in key))
        state[key] = make(state[key], rng, torch)

    return _state(change)


def code_in_a_torch_file(folder: Path, rng: random.Random) -> Sequence[str]:
    import torch

    file = folder / "model.pth"
    spy = Spy(folder.parent / IT_RAN)
    state = torch.load(file, weights_only=True)
    torch.save(rng.choice([spy, [spy], state | {"spy": spy}, {"state_dict": state, "spy": spy}]), file)
    return [str(file)]


def bytes_of_a_torch_file(folder: Path, rng: random.Random) -> Sequence[str]:
    file = folder / "model.pth"
    raw = file.read_bytes()
    size = len(raw)
    junk = [
        b"",
        b"junk",
        b"\x80\x02.",
        raw[: size // 2],
        raw[: size - 1],
        raw[:100],
        raw[50:],
        b"PK\x03\x04" + raw[:50],
    ]
    file.write_bytes(rng.choice([*junk, raw[: rng.randrange(size)]]))
    return [str(file)]


def no_torch_file(folder: Path, rng: random.Random) -> Sequence[str]:
    (folder / "model.pth").unlink()
    if rng.random() < 0.5:
        (folder / "model.pth").mkdir()
    return [str(folder)]


def _native_file(folder: Path, rng: random.Random, pattern: str) -> Path:
    return rng.choice(sorted(file for file in folder.rglob(pattern) if file.is_file()))


def a_chunk_harmed(folder: Path, rng: random.Random) -> Sequence[str]:
    chunk = _native_file(folder, rng, "params/*/[0-9]*")
    kind = rng.randrange(3)
    if kind == 0:
        chunk.unlink()
    elif kind == 1:
        os.truncate(chunk, rng.randrange(chunk.stat().st_size))
    else:
        values = np.frombuffer(chunk.read_bytes(), BFLOAT16).copy()
        values[rng.randrange(values.size)] = rng.choice([np.nan, np.inf])
        chunk.write_bytes(values.tobytes())
    return [chunk.parent.name]


def an_array_less(folder: Path, rng: random.Random) -> Sequence[str]:
    array = _native_file(folder, rng, ".zarray").parent
    if rng.random() < 0.5:
        shutil.rmtree(array)
    else:
        (array / ".zarray").unlink()
    return [array.name]


def metadata_of_an_array(folder: Path, rng: random.Random) -> Sequence[str]:
    file = _native_file(folder, rng, ".zarray")
    content = json.loads(file.read_text())
    shape = content["shape"]
    texts = [file.read_text()[: rng.randrange(40)], "[]", json.dumps(content | {"dtype": rng.choice(["<i2", "q", 7])})]
    texts += [json.dumps(content | {"shape": [shape[0] + 1, *shape[1:]]}), json.dumps(content | {"shape": [*shape, 2]})]
    file.write_text(rng.choice(texts))
    return [file.parent.name]


def metadata_of_a_tree(folder: Path, rng: random.Random) -> Sequence[str]:
    file = _native_file(folder, rng, "_METADATA")
    content = json.loads(file.read_text())
    tree = content["tree_metadata"]
    less = {key: entry for key, entry in tree.items() if key != rng.choice(sorted(tree))}
    texts = [file.read_text()[: rng.randrange(200)], "[]", '{"tree_metadata": 3}', "", '{"tree_metadata": {"a": {}}}']
    texts += [json.dumps(content | {"tree_metadata": {}})]
    if len(less) < len(tree):
        texts.append(json.dumps(content | {"tree_metadata": less}))
    file.write_text(rng.choice(texts))
    return [str(folder)]


def _of_lora(change: Callable[[dict[str, np.ndarray], str, random.Random], Any]) -> Damage:
    """Saves again a LoRA file that `change` has harmed in a module's pair of factors."""

    def damage(folder: Path, rng: random.Random) -> Sequence[str]:
        file = folder / "model.safetensors"
        arrays = fuzz.load(file)
        module = rng.choice(sorted(arrays)).rpartition(".lora_")[0]
        change(arrays, module, rng)
        save(file, arrays)
        return [str(file), module.removeprefix("diffusion_model.")]

    return damage


def _half_a_pair(arrays: dict[str, np.ndarray], module: str, rng: random.Random) -> None:
    del arrays[f"{module}.lora_{rng.choice('AB')}.weight"]


def _ranks_that_differ(arrays: dict[str, np.ndarray], module: str, rng: random.Random) -> None:
    key = f"{module}.lora_B.weight"
    arrays[key] = rng.choice([arrays[key][:, :1], np.repeat(arrays[key], 2, axis=1), arrays[key].T.copy()])


def _another_number_of_axes(arrays: dict[str, np.ndarray], module: str, rng: random.Random) -> None:
    key = f"{module}.lora_{rng.choice('AB')}.weight"
    arrays[key] = rng.choice([arrays[key].reshape(-1), arrays[key][None], arrays[key][:0]])


def _a_strange_key(arrays: dict[str, np.ndarray], module: str, rng: random.Random) -> None:
    key = rng.choice(
        [f"{module}.hada_w1_a", f"{module}.dora_scale", f"{module}.lora_C.weight", f"{module}.lora_A.bias"]
    )
    arrays[key] = np.ones((2, 8), BFLOAT16)


def _an_alpha_of_nothing(arrays: dict[str, np.ndarray], module: str, rng: random.Random) -> None:
    arrays[f"{module}.alpha"] = rng.choice(
        [np.array(np.nan, np.float32), np.ones(2, np.float32), np.array(np.inf, np.float32)]
    )


TORCH: dict[str, Damage] = {
    "code": code_in_a_torch_file,
    "broken bytes": bytes_of_a_torch_file,
    "a tensor less": _state(_torch_key_less),
    "a tensor more": _state(lambda state, rng, torch: state | {"encoder.block.0.extra": torch.ones(2)}),
    "no tensors": _state(lambda state, rng, torch: rng.choice([{}, [], 3, {"a": 1}, {1: torch.ones(2)}, "text"])),
    "another shape": _torch_tensor(lambda tensor, rng, torch: torch.cat([tensor, tensor], rng.randrange(tensor.ndim))),
    "another dtype": _torch_tensor(
        lambda tensor, rng, torch: tensor.to(rng.choice([torch.int8, torch.float32, torch.complex64, torch.bool]))
    ),
    "a sparse tensor": _torch_tensor(lambda tensor, rng, torch: tensor.to_sparse()),
    "no number": _torch_tensor(lambda tensor, rng, torch: torch.full_like(tensor, rng.choice([np.nan, np.inf]))),
    "no file": no_torch_file,
}
NATIVE: dict[str, Damage] = {
    "a chunk": a_chunk_harmed,
    "an array less": an_array_less,
    "metadata of an array": metadata_of_an_array,
    "metadata of a tree": metadata_of_a_tree,
}
_READING = (
    *("truncated", "bytes to spare", "a false header length", "a header of no entries", "a key twice", "another dtype"),
    *(
        "another shape in the header",
        "other offsets",
        "a value that is no number",
        "a folder for a file",
        "a file less",
    ),
)
LORA: dict[str, Damage] = {name: fuzz.SAFETENSORS[name] for name in _READING} | {
    "half a pair": _of_lora(_half_a_pair),
    "ranks that differ": _of_lora(_ranks_that_differ),
    "another number of axes": _of_lora(_another_number_of_axes),
    "a strange key": _of_lora(_a_strange_key),
    "an alpha of nothing": _of_lora(_an_alpha_of_nothing),
}
_SCALES: dict[str, Damage] = {"a wrong scale": a_wrong_scale, "a scale of nothing": a_scale_of_nothing}
_PIPELINE: dict[str, Damage] = {"a damaged pipeline index": fuzz.a_damaged_pipeline_index}
DAMAGES: dict[str, dict[str, Damage]] = {
    "diffusers": fuzz.SAFETENSORS | fuzz.CONFIGS | _PIPELINE,
    "sharded": fuzz.SAFETENSORS | fuzz.INDEX | fuzz.CONFIGS | _PIPELINE,
    # A file of T5 without a config is told by its shapes: "a config less" is no damage.
    "transformers": fuzz.SAFETENSORS | {name: fuzz.CONFIGS[name] for name in fuzz.CONFIGS if name != "a config less"},
    "original folder": fuzz.SAFETENSORS | {"a damaged sidecar": fuzz.damaged_sidecar},
    "original file": fuzz.SAFETENSORS,
    "prefixed file": fuzz.SAFETENSORS,
    "VAE file": fuzz.SAFETENSORS,
    "fp8 file": fuzz.SAFETENSORS | _SCALES,
    "torch file": TORCH,
    "native": NATIVE | fuzz.CONFIGS | _PIPELINE,
    "LoRA file": LORA,
}


def cases(seeds: int) -> Iterator[Case]:
    """Every damage of every base, with `seeds` seeds each."""
    for base, damages in DAMAGES.items():
        for damage in damages:
            yield from (Case(base, damage, seed) for seed in range(seeds))
