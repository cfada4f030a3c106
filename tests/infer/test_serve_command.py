"""`dit-serve` before it serves: what it says where its extra is not installed."""

import sys

import pytest

from infer import serve


@pytest.mark.parametrize("missing", ["uvicorn", "fastapi", "python_multipart", "prometheus_client"])
def test_without_the_extra_it_is_named(missing, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    assert serve.main(["--model", "demo-wan"]) == 2
    assert f'needs {missing}, which is not installed: pip install "dit-jax[serve]"' in capsys.readouterr().err
