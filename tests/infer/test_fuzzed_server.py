"""What its own OpenAPI document allows, and what it forbids, thrown at the server."""

import contextlib

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode
from served import serving, small_models

from infer.engine import EngineOptions


@pytest.fixture(scope="module")
def url(text_or_image, tmp_path_factory):
    models = small_models(text_or_image[0], tmp_path_factory.mktemp("flux"))
    with serving(models, tmp_path_factory.mktemp("fuzzed"), options=EngineOptions(queue=4)) as (url, _):
        yield url


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_breaks_the_server(url, mode):
    operations = [one.ok() for one in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations()]
    statuses = set()
    assert len(operations) >= 10
    for operation in operations:

        @settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def no_error(case):
            answer = case.call(timeout=60)
            statuses.add(answer.status_code)
            assert answer.status_code < 500, (case.as_curl_command(), answer.text)
            if answer.status_code >= 400:
                assert answer.json()["error"]["message"]

        with contextlib.suppress(Unsatisfiable):  # of what has nothing that could be wrong
            no_error()
    assert statuses & {400, 404, 422}


def test_it_still_serves(url):
    assert httpx.get(f"{url}/health/ready").status_code == 200
    asked = {"prompt": "a cat", "quality": "fast"}
    for _ in range(100):
        answer = httpx.post(f"{url}/v1/images/generations", json=asked, timeout=60)
        if answer.status_code != 429:
            break
    assert answer.status_code == 200
