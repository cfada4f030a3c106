"""Damages of checkpoints, as random generators pick them.

A damage takes the folder of a sound checkpoint and a generator, does its harm, and returns what the error must name.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.safetensors_files import Outgoing, read_safetensors, write_safetensors

BFLOAT16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
Damage = Callable[[Path, random.Random], Sequence[str]]


def save(file: Path, arrays: dict[str, np.ndarray]) -> None:
    file.unlink(missing_ok=True)
    write_safetensors(file, [Outgoing(key, a.dtype, a.shape, lambda a=a: a) for key, a in arrays.items()])


def load(file: Path) -> dict[str, np.ndarray]:
    return {key: np.array(tensor.read()) for key, tensor in read_safetensors(file).items()}


def _file(folder: Path, rng: random.Random, pattern: str = "*.safetensors") -> Path:
    return rng.choice(sorted(file for file in folder.rglob(pattern) if file.is_file()))


def _header(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _write_header(file: Path, text: bytes, data: bytes, length: int | None = None) -> None:
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def truncated(folder: Path, rng: random.Random) -> Sequence[str]:
    file = _file(folder, rng)
    size = file.stat().st_size
    header = int.from_bytes(file.read_bytes()[:8], "little")
    at = rng.choice([0, 1, 7, 8, 9, 8 + header // 2, 7 + header, 8 + header, size - 1, rng.randrange(size)])
    os.truncate(file, at)
    return [str(file)]


def bytes_to_spare(folder: Path, rng: random.Random) -> Sequence[str]:
    file = _file(folder, rng)
    with open(file, "ab") as stream:
        stream.write(b"\0" * rng.choice([1, 8, 4096]))
    return [str(file)]


def a_false_header_length(folder: Path, rng: random.Random) -> Sequence[str]:
    file = _file(folder, rng)
    raw = file.read_bytes()
    true = int.from_bytes(raw[:8], "little")
    length = rng.choice([0, 1, true - 1, true + 1, len(raw), 10**8, 2**32, 2**63, 2**64 - 1])
    file.write_bytes(length.to_bytes(8, "little") + raw[8:])
    return [str(file)]


def a_header_of_no_entries(folder: Path, rng: random.Random) -> Sequence[str]:
    file = _file(folder, rng)
    _, data = _header(file)
    text = rng.choice([b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe{}", b"{}", b"[" * 100_000, b"", b"\0" * 64])
    _write_header(file, text, data)
    return [str(file)]


def a_byte_of_the_header_changed(folder: Path, rng: random.Random) -> Sequence[str]:
    """A brace or quotation mark lost, or a byte that is no UTF-8."""
    file = _file(folder, rng)
    header, data = _header(file)
    text = bytearray(json.dumps(header).encode())
    places = [i for i, byte in enumerate(text) if byte in b'{}[]":']
    text[rng.choice(places)] = rng.choice([0xFF, 0x00, ord("!")])
    _write_header(file, bytes(text), data)
    return [str(file)]


def a_key_twice(folder: Path, rng: random.Random) -> Sequence[str]:
    file = _file(folder, rng)
    header, data = _header(file)
    key = rng.choice(_weights(header))
    again = json.dumps({key: header[key]})[1:-1]
    _write_header(file, json.dumps(header)[:-1].encode() + f", {again}}}".encode(), data)
    return [str(file), key]


def _weights(header: dict[str, Any]) -> list[str]:
    """Keys of weights: neither of scales nor of the header's notes."""
    return sorted(key for key in header if "scale_weight" not in key and "scaled_fp8" not in key and key[0] != "_")


def _edited(field: str, values: Callable[[Any, random.Random], Any]) -> Damage:
    def damage(folder: Path, rng: random.Random) -> Sequence[str]:
        file = _file(folder, rng)
        header, data = _header(file)
        key = rng.choice(_weights(header))
        header[key][field] = values(header[key][field], rng)
        _write_header(file, json.dumps(header).encode(), data)
        return [str(file)]

    return damage


def _another_dtype(dtype: str, rng: random.Random) -> Any:
    same_size = {"BF16": ["I16"], "F32": ["I32"], "F8_E4M3": ["I8", "U8", "BOOL"]}[dtype]
    return rng.choice([*same_size, "F64", "C64", "Q4_K", "", 7, None, ["F32"]])


def _another_shape(shape: list[int], rng: random.Random) -> Any:
    axis = rng.randrange(len(shape) or 1)
    off = [size + (i == axis) for i, size in enumerate(shape)]
    return rng.choice([off, [*shape, 2], [-size for size in off], [2**62, 8], [10**30], [0.5], "4", None, [[1]]])


def _other_offsets(offsets: list[int], rng: random.Random) -> Any:
    begin, end = offsets
    move = rng.randrange(1, 9)
    return rng.choice(
        [
            *([begin + move, end + move], [begin - move, end - move], [end + 1, begin], [begin, end + 2**40], [begin]),
            *([-end - 1, -begin - 1], [begin, end - 1], [0.0, 1.0], None, "0", [begin, 2**70]),
        ]
    )


def a_tensor_less(folder: Path, rng: random.Random) -> Sequence[str]:
    file = _file(folder, rng)
    arrays = load(file)
    key = rng.choice(_weights(arrays))
    del arrays[key]
    save(file, arrays)
    return [key.removeprefix("model.diffusion_model.")]


def a_tensor_more(folder: Path, rng: random.Random) -> Sequence[str]:
    file = _file(folder, rng)
    arrays = load(file)
    key = rng.choice(_weights(arrays)).rpartition(".")[0] + rng.choice([".extra", ".weight_v", ".bias.bias"])
    save(file, arrays | {key: np.ones(3, BFLOAT16)})
    return [key.removeprefix("model.diffusion_model.")]


def a_shape_off_by_one(folder: Path, rng: random.Random) -> Sequence[str]:
    """Of a tensor inside a block, where no sizes can be made to fit."""
    file = _file(folder, rng)
    arrays = load(file)
    inside = [key for key in _weights(arrays) if ("block" in key or "layers" in key) and arrays[key].ndim]
    key = rng.choice(inside)
    axis = rng.randrange(arrays[key].ndim)
    more = np.concatenate([arrays[key], arrays[key].take([0], axis)], axis)
    arrays[key] = more if rng.random() < 0.5 else np.delete(arrays[key], 0, axis)
    save(file, arrays)
    return [str(folder)]


def a_value_that_is_no_number(folder: Path, rng: random.Random) -> Sequence[str]:
    file = _file(folder, rng)
    arrays = load(file)
    key = rng.choice(_weights(arrays))
    value = np.nan if arrays[key].dtype == E4M3 else rng.choice([np.nan, np.inf, -np.inf])
    arrays[key].reshape(-1)[rng.randrange(arrays[key].size)] = value
    save(file, arrays)
    return [str(file), key.removeprefix("model.diffusion_model.")]


def a_folder_for_a_file(folder: Path, rng: random.Random) -> Sequence[str]:
    file = _file(folder, rng)
    file.unlink()
    file.mkdir()
    return [str(folder)]


def a_file_less(folder: Path, rng: random.Random) -> Sequence[str]:
    _file(folder, rng).unlink()
    return [str(folder)]


SAFETENSORS: dict[str, Damage] = {
    "truncated": truncated,
    "bytes to spare": bytes_to_spare,
    "a false header length": a_false_header_length,
    "a header of no entries": a_header_of_no_entries,
    "a byte of the header changed": a_byte_of_the_header_changed,
    "a key twice": a_key_twice,
    "another dtype": _edited("dtype", _another_dtype),
    "another shape in the header": _edited("shape", _another_shape),
    "other offsets": _edited("data_offsets", _other_offsets),
    "a tensor less": a_tensor_less,
    "a tensor more": a_tensor_more,
    "a shape off by one": a_shape_off_by_one,
    "a value that is no number": a_value_that_is_no_number,
    "a folder for a file": a_folder_for_a_file,
    "a file less": a_file_less,
}


def _of_index(change: Callable[[dict[str, Any], random.Random], Any]) -> Damage:
    def damage(folder: Path, rng: random.Random) -> Sequence[str]:
        file = _file(folder, rng, "*.index.json")
        content = json.loads(file.read_text())
        changed = change(content, rng)
        file.write_text(changed if isinstance(changed, str) else json.dumps(content if changed is None else changed))
        return [str(file.parent)]

    return damage


def _mapped_to(*names: Any) -> Damage:
    def change(content: dict[str, Any], rng: random.Random) -> None:
        content["weight_map"][rng.choice(sorted(content["weight_map"]))] = rng.choice(names)

    return _of_index(change)


def _forgotten(content: dict[str, Any], rng: random.Random) -> None:
    del content["weight_map"][rng.choice(sorted(content["weight_map"]))]


def _promised(content: dict[str, Any], rng: random.Random) -> None:
    content["weight_map"]["promised.weight"] = rng.choice(sorted(content["weight_map"].values()))


INDEX: dict[str, Damage] = {
    "an index to a missing shard": _mapped_to("missing.safetensors", "model-00009-of-00009.safetensors"),
    "an index to another folder": _mapped_to("../x.safetensors", "a/b.safetensors", "..", ".", ""),
    "an index to an absolute place": _mapped_to("/etc/passwd", "/x.safetensors"),
    "an index to no name": _mapped_to(7, None, ["x"], {}, True),
    "an index without a key": _of_index(_forgotten),
    "an index with a key too many": _of_index(_promised),
    "an index of no JSON": _of_index(lambda content, rng: json.dumps(content)[: rng.randrange(200)]),
    "an index without a map": _of_index(lambda content, rng: rng.choice([{}, [], {"weight_map": []}, 3])),
}

# Settings that shapes depend on.
SIZES = {
    "WanTransformer3DModel": (
        *("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "text_dim", "freq_dim", "ffn_dim"),
        "patch_size",
    ),
    "FluxTransformer2DModel": (
        *("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim", "in_channels"),
        *("joint_attention_dim", "pooled_projection_dim"),
    ),
    "AutoencoderKLWan": ("base_dim", "z_dim", "dim_mult", "num_res_blocks"),
    "AutoencoderKL": ("block_out_channels", "layers_per_block", "latent_channels"),
    "UMT5EncoderModel": ("num_layers", "d_model", "num_heads", "d_kv", "d_ff", "vocab_size"),
    "T5EncoderModel": ("num_layers", "d_model", "num_heads", "d_kv", "d_ff", "vocab_size"),
    "CLIPTextModel": ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"),
}


def _class(config: dict[str, Any]) -> str:
    return config.get("_class_name") or config["architectures"][0]


def a_wrong_setting(folder: Path, rng: random.Random) -> Sequence[str]:
    file = _file(folder, rng, "config.json")
    config = json.loads(file.read_text())
    name = rng.choice(SIZES[_class(config)])
    value = config[name]
    more = value + 1 if isinstance(value, int) else [*value, 1]
    wrong = [0, -1, more, 10**9, 10**30, 0.5, 1e300, "3", "", None, [], {}, [0], [-3], [None], "x" * 100]
    config[name] = rng.choice(wrong)
    file.write_text(json.dumps(config))
    return [str(file.parent)]


def a_config_of_nothing(folder: Path, rng: random.Random) -> Sequence[str]:
    file = _file(folder, rng, "config.json")
    text = file.read_bytes()
    file.write_bytes(
        rng.choice([b"", b"[]", b"null", b"3", b"\xff\xfe", b"[" * 100_000, text[: rng.randrange(len(text) - 2)]])
    )
    return [str(file.parent)]


def a_config_less(folder: Path, rng: random.Random) -> Sequence[str]:
    file = _file(folder, rng, "config.json")
    file.unlink()
    if rng.random() < 0.5:
        file.mkdir()
    return [str(file.parent)]


def another_class(folder: Path, rng: random.Random) -> Sequence[str]:
    file = _file(folder, rng, "config.json")
    config = json.loads(file.read_text())
    own = _class(config)
    others = [name for name in [*SIZES, "UNet2DModel", "", 7] if name != own and {name, own} != T5_CLASSES]
    config.pop("architectures", None)
    config["_class_name"] = rng.choice(others) or "Nothing"
    file.write_text(json.dumps(config))
    return [str(file.parent)]


T5_CLASSES = {"T5EncoderModel", "UMT5EncoderModel"}  # model_type tells them apart
CONFIGS: dict[str, Damage] = {
    "a wrong setting": a_wrong_setting,
    "a config of nothing": a_config_of_nothing,
    "a config less": a_config_less,
    "another class": another_class,
}


def a_damaged_pipeline_index(folder: Path, rng: random.Random) -> Sequence[str]:
    file = _file(folder, rng, "model_index.json")
    content = json.loads(file.read_text())
    entry = ["diffusers", "AutoencoderKL"]
    outside = rng.choice(["../x", "/etc", "a/b", "..", "absent"])
    texts = [json.dumps(content)[: rng.randrange(len(file.read_bytes()) // 2)], "[]", json.dumps({outside: entry})]
    file.write_text(rng.choice(texts))
    return [str(folder)]


def damaged_sidecar(folder: Path, rng: random.Random) -> Sequence[str]:
    file = _file(folder, rng, "diffusers_configs.json")
    content = json.loads(file.read_text())
    place = rng.choice([place for place in content if place.endswith("/config.json")])
    kind = rng.randrange(5)
    if kind == 0:
        file.write_text(file.read_text()[: rng.randrange(500)])
    elif kind == 1:
        file.write_text(json.dumps(content | {rng.choice(["../config.json", "/etc/config.json"]): {}}))
    elif kind == 2:
        file.write_text(json.dumps(content | {place: rng.choice([3, None, [], "x"])}))
    elif kind == 3:
        file.write_text(json.dumps({name: config for name, config in content.items() if name != place}))
    else:
        config = content[place]
        config[rng.choice(SIZES[_class(config)])] = rng.choice([0, -1, 10**30, "x", None, {}])
        file.write_text(json.dumps(content))
    return [str(folder)]
