"""Which of Wan's pipelines a checkpoint is, and what that pipeline is usually run with."""

from __future__ import annotations

from dataclasses import dataclass

from convert.checkpoint import INDEX, Checkpoint
from convert.wan import HIGH_NOISE, LOW_NOISE
from dit_jax.config import UserError
from dit_jax.sampling.schedules import TRAIN_STEPS
from infer.request import Defaults, Given
from infer.side_files import read_settings

# As the authors run them (guidance: high, low).
TEXT_EXPERTS = Defaults(steps=40, guidance=(4.0, 3.0))
IMAGE_EXPERTS = Defaults(steps=40, guidance=(3.5, 3.5))
TEXT_OR_IMAGE = Defaults(size=(1280, 704), frames=121, fps=24)


@dataclass(frozen=True, kw_only=True)
class WanVariant:
    """A pipeline of Wan's.

    image       whether a first frame is refused, may be given, or must be
    last_image  likewise a last frame
    boundary    timestep below which the low-noise expert runs; None for a model of one transformer
    usual       what it is run with unless the model or the request says otherwise
    """

    image: Given
    last_image: Given
    boundary: float | None
    usual: Defaults


def wan_variant(checkpoint: Checkpoint) -> WanVariant:
    """The variant of a Wan pipeline; UserError for one that this library does not run."""
    boundary, image = _boundary(checkpoint), _image(checkpoint)
    if boundary is None:
        usual = TEXT_OR_IMAGE if image == "optional" else Defaults()
    else:
        usual = IMAGE_EXPERTS if image == "always" else TEXT_EXPERTS
    return WanVariant(image=image, last_image=_last_image(checkpoint, image), boundary=boundary, usual=usual)


def _boundary(checkpoint: Checkpoint) -> float | None:
    folder, ratio = checkpoint.folder, read_settings(checkpoint, INDEX).get("boundary_ratio")
    two = LOW_NOISE in checkpoint.settings
    if ratio is None and not two:
        return None
    if not (two and isinstance(ratio, int | float) and 0 <= ratio <= 1):
        found = f"{LOW_NOISE} with" if two else f"no {LOW_NOISE} and"
        raise UserError(
            f"{folder / INDEX}: a model of two experts has a {LOW_NOISE} and a boundary_ratio from 0 to 1, found "
            f"{found} the boundary_ratio {ratio!r}; download it again"
        )
    if checkpoint.component(LOW_NOISE).config != checkpoint.component(HIGH_NOISE).config:
        raise UserError(
            f"{folder} has experts of two sizes: expected one config in {HIGH_NOISE} and {LOW_NOISE}; download it again"
        )
    return ratio * TRAIN_STEPS


def _last_image(checkpoint: Checkpoint, image: Given) -> Given:
    """The image encoder of FLF2V sees both frames; without one, both may be given as channels."""
    transformer = checkpoint.component(HIGH_NOISE).config
    if transformer.image_positions is not None:
        return "always"
    return "optional" if image == "always" and transformer.image_width is None else "never"


def _image(checkpoint: Checkpoint) -> Given:
    folder = checkpoint.folder
    transformer, vae = checkpoint.component(HIGH_NOISE).config, checkpoint.component("vae").config
    text, with_image = vae.z_dim, vae.z_dim + vae.time_factor + vae.z_dim
    has_image_branch = transformer.image_width is not None
    if transformer.in_channels == with_image:
        return "always"
    if transformer.in_channels == text and not has_image_branch:
        return "optional" if read_settings(checkpoint, INDEX).get("expand_timesteps") else "never"
    branch, expected = ("with", with_image) if has_image_branch else ("without", f"{text} or {with_image}")
    raise UserError(
        f"{folder} has a transformer {branch} an image encoder that takes {transformer.in_channels} channels: "
        f"expected {expected}; check that it belongs to this VAE"
    )
