"""The torch modules are copied beside a user's own code: each is one file that needs nothing of this project."""

import subprocess
import sys
from pathlib import Path

import pytest

import convert.torch_modules

MODULES = sorted(path for path in Path(convert.torch_modules.__file__).parent.glob("*.py") if path.stem != "__init__")
ALONE = """
import importlib.abc, sys
class Refused(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("convert", "dit_jax", "infer", "train", "jax", "flax"):
            raise AssertionError(f"{name} is imported")
sys.meta_path.insert(0, Refused())
import %s
"""


def test_there_is_one_for_each_method():
    assert [path.stem for path in MODULES] == ["coredit", "ddit", "few_step", "pare"]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_a_copy_is_imported_without_this_project(module, tmp_path):
    (tmp_path / module.name).write_text(module.read_text())
    subprocess.run([sys.executable, "-c", ALONE % module.stem], check=True, cwd=tmp_path, timeout=300)
