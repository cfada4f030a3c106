"""Memory of converting true shapes, streamed; `python -m convert.benchmark` prints the time too."""

import pytest

from convert.benchmark import MODELS, measure

LARGEST = {
    "wan2.1-t2v-1.3b": 30 * 1536 * 8960 * 2,
    "wan2.1-t2v-14b": 3 * 13824 * 5120 * 2,  # of three of the forty blocks
    "flux.1-dev": 4 * 3072 * 12288 * 2,
}


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
def test_memory_of_the_true_shapes(model, tmp_path):
    """A stack is read and written block by block, so the bound for a few blocks is the stricter one."""
    result = measure(tmp_path, MODELS[model], rounds=1)
    print("\n".join(result.lines()))
    assert result.file_bytes > 2.4e9 and result.largest_leaf_bytes == LARGEST[model]
    assert result.to_native_anonymous_bytes < result.allowed_anonymous_bytes
    assert result.to_diffusers_anonymous_bytes < result.allowed_anonymous_bytes
