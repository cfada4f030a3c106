"""A FLUX pipeline out of the authors' flat files draws what it draws out of a diffusers folder."""

import numpy as np
import tiny_flux

from convert.checkpoint import open_checkpoint
from convert.transfer import convert
from infer import load_pipeline


def test_flat_files_draw_the_same_picture(tmp_path):
    tiny_flux.pipeline(dev=True).save_pretrained(tmp_path / "diffusers")
    convert(open_checkpoint(tmp_path / "diffusers"), tmp_path / "original", "original")
    assert (tmp_path / "original" / "flux1-dev.safetensors").is_file()
    request = dict(size=(96, 64), steps=2, guidance=2.5, seed=3)
    drawn = [load_pipeline(tmp_path / name)("a red cat runs", **request) for name in ("diffusers", "original")]
    np.testing.assert_array_equal(drawn[0].latents, drawn[1].latents)
    np.testing.assert_array_equal(drawn[0].frames, drawn[1].frames)
