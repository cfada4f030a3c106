"""A model that draws what its prompts say."""

from types import SimpleNamespace

import numpy as np

from dit_jax.config import UserError
from infer.digit_grammar import parse
from infer.digit_scores import real_clips
from infer.request import Defaults, fill


class Drawer:
    """Stands in for a pipeline: draws the prompts in real glyphs, at will with a fault."""

    real, defaults = staticmethod(real_clips), Defaults(steps=12, guidance=4.0)
    hash, name = "drawn", "drawer"

    def __init__(self, fault=lambda clip: clip):
        self.calls, self.fault = [], fault

    def prepare(self, request):
        if request.solver not in (None, "unipc", "euler"):
            raise UserError(f"unknown solver {request.solver!r}: expected one of unipc, euler")
        return fill(request, self.defaults, "guidance")

    def __call__(self, prompts, **settings):
        self.calls.append((prompts, settings))
        clips = self.real([parse(prompt) for prompt in prompts], 0)
        return SimpleNamespace(frames=np.stack([self.fault(clip) for clip in clips]))
