"""Which models convert from and to what, read off the converter tables: `python -m convert.compatibility`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from convert.components import COMPONENTS, Settings, class_name
from convert.encoders import clip_text_settings, clip_vision_settings, t5_settings
from convert.flux import flux_settings
from convert.fp8 import FP8, WIDER
from convert.kinds import KINDS, PREFIXES, Kind
from convert.summary import PRESETS
from convert.vae_kl import config_to_diffusers as vae_kl_settings
from convert.vae_wan import config_to_diffusers as vae_wan_settings
from convert.wan import wan_settings
from convert.weight_files import TORCH_SUFFIXES
from dit_jax.models.clip import CLIPVisionConfig
from dit_jax.models.clip_text import CLIPTextConfig
from dit_jax.models.flux import FluxConfig
from dit_jax.models.t5 import T5Config
from dit_jax.models.vae_kl import AutoencoderKLConfig
from dit_jax.models.vae_wan import WanVAEConfig
from dit_jax.models.wan import WanConfig

START, END = "<!-- compatibility: made by `python -m convert.compatibility` -->", "<!-- /compatibility -->"
_FLOATS = ("fp32", "bf16", "fp16")
_HEADER = ("class", "published", "folder", "single file", "written as")
_SETTINGS: dict[type, Callable[[Any], Settings]] = {
    WanConfig: wan_settings,
    FluxConfig: flux_settings,
    WanVAEConfig: vae_wan_settings,
    AutoencoderKLConfig: vae_kl_settings,
    T5Config: t5_settings,
    CLIPTextConfig: clip_text_settings,
    CLIPVisionConfig: clip_vision_settings,
}


def table() -> str:
    """The table in Markdown, a row for each class with a converter; ⇄ reads and writes, → only reads."""
    rows = [_HEADER, ("---",) * len(_HEADER), *(_row(name) for name in COMPONENTS)]
    suffixes = " or ".join(f"`{suffix}`" for suffix in TORCH_SUFFIXES)
    notes = (
        "⇄ is read and written, → only read; every row also goes to and from native. A folder is one of diffusers or "
        f"transformers; a file may also be {suffixes} (with the `torch` extra, to read), and have its keys under "
        f"{', '.join(f'`{prefix}`' for prefix in PREFIXES)}. {', '.join(_FLOATS)} pass as they are; fp8 ({_formats()}, "
        f"with or without scales) becomes {WIDER.name}."
    )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{notes}"


def _row(name: str) -> tuple[str, ...]:
    kinds = [kind for kind in KINDS if name in kind.classes]
    published = [preset for preset, config in PRESETS.items() if class_name(_SETTINGS[type(config)](config)) == name]
    written = [f"`{stem}`" for kind in kinds for stem in _stems(kind)]
    return (
        f"`{name}`",
        ", ".join(published) or "–",
        "⇄",
        ", ".join(f"{'⇄' if kind.stem else '→'} {_keys(kind)}" for kind in kinds) or "–",
        ", ".join(written) or "–",
    )


def _keys(kind: Kind) -> str:
    return "transformers' keys" if kind.layout == "diffusers" else "the authors' keys"


def _stems(kind: Kind) -> list[str]:
    """The names that a kind is written under: FLUX's tells whether guidance is embedded, Wan's VAE which one it is."""
    if kind.stem is None:
        return []
    told = ({"guidance_embeds": True, "is_residual": False}, {"guidance_embeds": False, "is_residual": True})
    return list(dict.fromkeys(kind.stem(settings) for settings in told))


def _formats() -> str:
    return " or ".join(sorted(dtype.name.removeprefix("float8_").removesuffix("fn") for dtype in FP8))


def main() -> None:
    print(table())


if __name__ == "__main__":
    main()
