"""Small pipelines with all that methods need, written by `dit-convert to-torch`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "infer"))


@pytest.fixture(
    scope="session",
    params=[
        "text-to-video",
        "flux",
        pytest.param("image-to-video", marks=pytest.mark.long),
        pytest.param("first-frame", marks=pytest.mark.long),
    ],
)
def written(request, tmp_path_factory):
    """A pipeline of each kind, pruned, with a router, adapters and ratios."""
    from torch_models import Written

    return Written(request.param, tmp_path_factory.mktemp(request.param))
