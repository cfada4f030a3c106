"""The layout of the authors: flat files of weights, one a component, alone or in a folder, known by their keys.

What diffusers keeps in configs the authors keep in code, so that a true release is described from its shapes and from
constants (convert/shapes.py). A folder that we wrote also has `diffusers_configs.json`, which is then believed
instead. Tokenizers lie in folders of their own, Wan's under the name that its authors gave it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.components import Settings, class_in_index, class_name, read_json, with_class
from convert.fp8 import MARKER
from convert.implied import pipeline_configs
from convert.kinds import BESIDE_ENCODERS, KINDS, PREFIXES, Kind, holds_lora, kind_of, kind_to_write
from convert.pruned import PRUNED
from convert.safetensors_files import Tensor
from convert.shapes import SIDECAR
from convert.wan import EXPERTS, LOW_NOISE, wan_config, wan_original_settings
from convert.weight_files import files_behind, read_weights, weights_in
from dit_jax.config import UserError

CONFIG = "config.json"
INDEX = "model_index.json"
TRANSFORMER = "transformer"
WAN_TOKENIZER = "google/umt5-xxl"


@dataclass(frozen=True)
class Found:
    """The weights of one component: their file (or index of shards), and the tensors under the authors' keys."""

    kind: Kind
    file: Path
    tensors: Mapping[str, Tensor]

    @property
    def files(self) -> list[Path]:
        return files_behind(self.file)

    @property
    def place(self) -> str:
        """Its component in a pipeline; Wan 2.2's experts are told apart by their folders."""
        experts = {folder: name for name, folder in EXPERTS.items()}
        return experts.get(self.file.parent.name, TRANSFORMER) if self.kind.place == TRANSFORMER else self.kind.place


@dataclass(frozen=True)
class Described:
    """What `checkpoint.Checkpoint` needs to know; a lone model is the component ""."""

    settings: dict[str, Settings]
    files: dict[str, Path | bytes]
    weights: dict[str, Found]


def describe_file(file: Path) -> Described:
    """A single file of the authors: one model, or several with ComfyUI's prefixes.

    Raises UserError for a file of no known kind, and for sizes that neither its shapes nor a config beside it tell.
    """
    found = find(file)
    if not found:
        known = ", ".join(dict.fromkeys(kind.name for kind in KINDS))
        raise UserError(
            f"{file} is no file of weights that we know by its keys; expected one of: {known}; if it belongs to a "
            "diffusers or transformers folder, give the folder."
        )
    return _described(file.parent, found, alone=True)


def describe_folder(folder: Path) -> Described | None:
    """A folder of such files; None when none of its files is of a known kind.

    Wan 2.2's experts lie in folders of their own in it. Raises UserError when two files are the same component, one of
    two experts is missing, or several files are no pipeline for want of a transformer.
    """
    experts = [folder / name for name in EXPERTS.values() if (folder / name).is_dir()]
    found = [part for place in (folder, *experts) for file in weights_in(place) for part in find(file)]
    if experts and {part.place for part in found if part.file.parent in experts} != set(EXPERTS):
        raise UserError(
            f"{folder} lacks one of Wan 2.2's two experts; expected weights in {' and '.join(EXPERTS.values())}; "
            "download the other, or give the folder of one alone."
        )
    return _described(folder, found, alone=False) if found else None


def find(file: Path) -> list[Found]:
    """The models in a file of weights; none when its keys are those of no kind.

    Raises UserError for a file that is damaged, that holds a LoRA, or some of whose keys belong to no model in it.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_weights(file).items():
        if BESIDE_ENCODERS.fullmatch(key):
            continue
        prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), "")
        groups.setdefault(prefix, {})[key.removeprefix(prefix)] = tensor
    keys = [key for group in groups.values() for key in group]
    if holds_lora(keys):
        raise UserError(f"{file} holds a LoRA, expected a whole model; merge it into one.")
    if len(groups) > 1 and groups.get("", {}).keys() <= {MARKER}:
        groups.pop("", None)
    kinds = {prefix: kind_of(group) for prefix, group in groups.items()}
    if not any(kinds.values()):
        return []
    for prefix, group in groups.items():
        if kinds[prefix] is None:
            key, tensor = next(iter(group.items()))
            raise UserError(
                f"{file}: unexpected tensor {prefix}{key} of shape {tensor.shape}; expected only those of one model, "
                f"or of several under the prefixes {', '.join(PREFIXES)}."
            )
    return [Found(kind, file, groups[prefix]) for prefix, kind in kinds.items() if kind]


def _described(folder: Path, found: Sequence[Found], alone: bool) -> Described:
    _refuse_two(folder, found)
    written, beside = _written_configs(folder), _beside(folder)
    tokenizers = dict(_tokenizers(folder))
    if alone and len(found) == 1:
        (part,) = found
        settings = _written_for(part, written or {CONFIG: beside}) or part.kind.settings(part.tensors, beside)
        return Described({"": settings}, {CONFIG: _json(settings)}, {"": part})
    weights = {part.place: part for part in found}
    if written and not alone:
        return _as_written(folder, written, weights, tokenizers)
    settings = {name: part.kind.settings(part.tensors, _beside(part.file.parent)) for name, part in weights.items()}
    if len(found) == 1:
        (name,) = settings
        return Described({"": settings[name]}, {CONFIG: _json(settings[name])}, {"": weights[name]})
    if TRANSFORMER not in weights:
        raise UserError(f"{folder} lacks a transformer beside {', '.join(weights)}; give one of its files, or add it.")
    configs = {f"{name}/{CONFIG}": config for name, config in settings.items()}
    configs |= pipeline_configs(settings, {place.partition("/")[0] for place in tokenizers})
    return Described(settings, {place: _json(config) for place, config in configs.items()} | tokenizers, weights)


def _refuse_two(folder: Path, found: Sequence[Found]) -> None:
    by_place: dict[str, Found] = {}
    for part in found:
        other = by_place.setdefault(part.place, part)
        if other is not part:
            raise UserError(
                f"{folder} has two files for the {part.place}, {other.file.name} and {part.file.name}; "
                "expected one; give one of the files, or move the other elsewhere."
            )


def _as_written(
    folder: Path, configs: dict[str, Any], weights: dict[str, Found], tokenizers: dict[str, Path]
) -> Described:
    """A folder that we wrote: `diffusers_configs.json` has every config, of a pipeline or of a lone model."""
    index = configs.get(INDEX, {})
    settings = {
        _parent(place): with_class(config, class_in_index(index.get(_parent(place))) or "")
        for place, config in configs.items()
        if Path(place).name == CONFIG
    }
    if set(settings) == {""} and len(weights) == 1:
        weights = {"": next(iter(weights.values()))}
    if set(settings) != set(weights):
        raise UserError(
            f"{folder} has weights for {', '.join(weights)}, but {SIDECAR} describes {', '.join(settings)}; "
            "expected the same components; convert again."
        )
    for name, part in weights.items():
        if class_name(settings[name]) not in part.kind.classes:
            raise UserError(
                f"{part.file} holds a {part.kind.name}, but {folder / SIDECAR} describes a "
                f"{class_name(settings[name])} there; expected the same; convert again."
            )
    return Described(settings, {place: _json(config) for place, config in configs.items()} | tokenizers, weights)


def _written_for(part: Found, configs: Mapping[str, Any]) -> Settings | None:
    """The config that lies beside the one file that was asked for, where one does."""
    index = configs.get(INDEX, {})
    for place in (part.kind.place, ""):
        config = configs.get(f"{place}/{CONFIG}" if place else CONFIG)
        if config is not None:
            config = with_class(config, class_in_index(index.get(place)) or "")
            if class_name(config) in part.kind.classes:
                return config
    return None


def _tokenizers(folder: Path) -> Iterator[tuple[str, Path]]:
    """Place in a diffusers folder -> file."""
    for source in (folder / WAN_TOKENIZER, folder / "tokenizer", folder / "tokenizer_2"):
        name = "tokenizer" if source == folder / WAN_TOKENIZER else source.name
        if source.is_dir():
            yield from ((f"{name}/{file.name}", file) for file in sorted(source.iterdir()) if file.is_file())


def side_files(settings: Mapping[str, Settings], files: Mapping[str, Path | bytes]) -> dict[str, Path | bytes]:
    """Everything but weights that a folder in this layout gets: the counterpart of `describe_folder`.

    Raises UserError for components that the layout has no place for.
    """
    for name, config in settings.items():
        kind = kind_to_write(config)
        if kind is None or name not in ("", kind.place, *(EXPERTS if kind.place == TRANSFORMER else ())):
            raise UserError(
                f"the original layout has no place for {name or class_name(config)}; use --layout diffusers."
            )
        if PRUNED in config:
            raise UserError(
                f"the original layout has no place for what {name or class_name(config)} keeps of a full model "
                f"({config[PRUNED]}); use --layout diffusers."
            )
    for where in files:
        if where.startswith("methods/"):
            raise UserError(f"the original layout has no place for {_parent(where)}; use --layout diffusers.")
    out: dict[str, Path | bytes] = {}
    transformer = settings.get(TRANSFORMER, settings.get("", {}))
    is_wan = class_name(transformer) == "WanTransformer3DModel"
    if is_wan:
        for name in EXPERTS if LOW_NOISE in settings else [TRANSFORMER]:
            out[str(Path(subfolder(name, settings), CONFIG))] = _json(wan_original_settings(wan_config(transformer)))
    configs: dict[str, Any] = {}
    for where, content in files.items():
        if is_wan and _parent(where) == "tokenizer":
            out[f"{WAN_TOKENIZER}/{Path(where).name}"] = content
        elif where.endswith(".json") and not where.startswith("tokenizer"):
            configs[where] = read_json(content)
        else:
            out[where] = content
    return out | {SIDECAR: _json(configs)}


def subfolder(name: str, settings: Mapping[str, Settings]) -> str:
    """Where in a folder of this layout a component's weights lie: "" for all but the experts of Wan 2.2."""
    return EXPERTS.get(name, "") if LOW_NOISE in settings else ""


def _parent(place: str) -> str:
    return place.rpartition("/")[0]


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _beside(folder: Path) -> Settings:
    file = folder / CONFIG
    return read_json(file) if file.is_file() else {}


def _written_configs(folder: Path) -> dict[str, Any]:
    file = folder / SIDECAR
    configs = read_json(file) if file.is_file() else {}
    odd = [place for place, config in configs.items() if not isinstance(config, dict) or not _inside(place)]
    if odd:
        raise UserError(f"{file}: {odd[0]!r} should be the place of a config inside the folder; convert again.")
    return configs


def _inside(place: str) -> bool:
    return not Path(place).is_absolute() and ".." not in Path(place).parts
