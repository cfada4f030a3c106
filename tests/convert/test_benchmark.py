"""Memory of converting the true shapes of Wan2.1-1.3B; `python -m convert.benchmark` prints the time too."""

import pytest

from convert.benchmark import measure
from dit_jax.models.wan import PRESETS


@pytest.mark.long
def test_memory_of_the_true_shapes(tmp_path):
    result = measure(tmp_path, PRESETS["wan2.1-t2v-1.3b"], rounds=1)
    print("\n".join(result.lines()))
    assert result.file_bytes > 2.8e9 and result.largest_leaf_bytes == 30 * 1536 * 8960 * 2
    assert result.to_native_anonymous_bytes < result.allowed_anonymous_bytes
    assert result.to_diffusers_anonymous_bytes < result.allowed_anonymous_bytes
