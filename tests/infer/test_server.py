"""The server over HTTP, as clients meet it: OpenAI's own, and others that are less kind."""

import asyncio
import base64
import gc
import io
import json
import re
import socket
import time
from pathlib import Path

import av
import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from served import remember_frames, serving, small_models

from infer.access import KeyLimits
from infer.engine import EngineOptions
from infer.media import save
from infer.video_jobs import VideoJobs

KEY, OTHER = "a-key-of-the-first-kind", "a-key-of-another-kind"


@pytest.fixture(scope="module")
def models(text_or_image, tmp_path_factory):
    return small_models(text_or_image[0], tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def url(models, tmp_path_factory):
    with serving(models, tmp_path_factory.mktemp("served")) as (url, _):
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as made:
        yield made


def png(size=(20, 10), colour="red", kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def picture(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def frames_of(data):
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def ended(client, video):
    while video.status not in ("completed", "failed"):
        time.sleep(0.1)
        video = client.videos.retrieve(video.id)
    return video


def problem(answer, status, words):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert re.search(words, error["message"]), error
    return error


def test_openais_client_draws(client, models):
    pipe, shape = models[0]["tiny-flux"], models[1]["tiny-flux"].shapes[0]
    answer = client.images.generate(
        prompt="a cat", model="tiny-flux", n=2, size=str(shape), extra_body={"seed": 5, "num_inference_steps": 8}
    )
    expected = pipe(["a cat", "a cat"], size=shape.size, seed=5, steps=8)
    assert len(answer.data) == 2 and answer.data[0].url is None
    for one, frames in zip(answer.data, expected.frames, strict=True):
        found = picture(base64.b64decode(one.b64_json))
        assert np.abs(found.astype(int) - frames).max() <= 1
    again = Image.open(io.BytesIO(base64.b64decode(answer.data[1].b64_json)))
    assert json.loads(again.info["Comment"])["seed"] == 6


@pytest.mark.parametrize(("kind", "name"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_images_come_as_they_are_asked_for(client, kind, name):
    answer = client.images.generate(prompt="a cat", output_format=kind, quality="fast")  # type: ignore[arg-type]
    assert Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))).format == name
    assert answer.output_format == kind


def test_images_can_be_fetched_by_url(client, url):
    answer = client.images.generate(prompt="a cat", response_format="url", quality="fast")
    assert answer.data[0].b64_json is None and answer.data[0].url.startswith(url)
    assert picture(httpx.get(answer.data[0].url).content).shape[2] == 3


def test_openais_client_sees_an_image_come(client):
    stream = client.images.generate(prompt="a cat", quality="high", stream=True, partial_images=3)
    events = list(stream)
    assert [event.type for event in events] == ["image_generation.partial_image", "image_generation.completed"]
    shapes = [picture(base64.b64decode(event.b64_json)).shape for event in events]
    assert shapes[0] == shapes[1] and events[0].partial_image_index == 0


def test_openais_client_makes_a_video(client, models, tmp_path):
    pipe, shape = models[0]["tiny-video"], models[1]["tiny-video"].shapes[1]
    video = client.videos.create_and_poll(
        prompt="a red cat", model="tiny-video", size=f"{shape.width}x{shape.height}",  # type: ignore[arg-type]
        seconds="0.5", extra_body={"seed": 3, "fps": 16}, poll_interval_ms=100,
    )  # fmt: skip
    assert video.status == "completed" and video.progress == 100, video.error
    assert video.completed_at >= video.created_at and video.expires_at > video.completed_at
    found = frames_of(client.videos.download_content(video.id).read())
    expected = pipe("a red cat", size=shape.size, frames=shape.frames, seed=3, steps=8).frames[0]
    assert len(found) == shape.frames == 9
    save(tmp_path / "same.mp4", expected, 16, {})
    same = np.stack(frames_of((tmp_path / "same.mp4").read_bytes()))
    assert np.abs(np.stack(found).astype(int) - same).mean() < 1
    for variant in ("thumbnail", "spritesheet"):
        assert picture(client.videos.download_content(video.id, variant=variant).read()).ndim == 3  # type: ignore[arg-type]


def test_a_video_begins_with_a_picture(client, url, monkeypatch):
    asked = {"prompt": "a cat", "quality": "fast", "seed": "7", "frames": "5"}
    data_url = "data:image/png;base64," + base64.b64encode(png()).decode()
    made = remember_frames(monkeypatch)
    for create in (
        lambda: httpx.post(f"{url}/v1/videos", json=asked).json()["id"],
        lambda: httpx.post(f"{url}/v1/videos", data=asked, files={"input_reference": ("x.png", png())}).json()["id"],
        lambda: httpx.post(f"{url}/v1/videos", json=asked | {"input_reference": {"image_url": data_url}}).json()["id"],
        lambda: client.videos.create(
            prompt="a cat", input_reference=("x.png", png(), "image/png"),
            extra_body={"quality": "fast", "seed": 7, "frames": 5},
        ).id,
    ):  # fmt: skip
        assert ended(client, client.videos.retrieve(create())).status == "completed"
    bare, *held = (frames.astype(int) for frames in made)
    assert len(held) == 3 and np.abs(held[0] - bare).mean() > 1
    for other in held[1:]:
        assert np.abs(other - held[0]).max() <= 1


def test_videos_are_listed_and_deleted(client):
    made = [client.videos.create(prompt=f"a cat {index}", extra_body={"quality": "fast"}) for index in range(3)]
    newest = [video.id for video in client.videos.list(limit=2)]
    assert newest[:3] == [video.id for video in reversed(made)]  # the client turns the pages itself
    page = client.videos.list(after=made[2].id, limit=1)
    assert [video.id for video in page.data] == [made[1].id] and page.has_more
    for video in made:
        ended(client, video)
        assert client.videos.delete(video.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(video.id)
    with pytest.raises(openai.NotFoundError):
        client.videos.delete(made[0].id)


def test_a_cancelled_video_has_failed(client, url):
    blocker = client.videos.create(prompt="a cat", extra_body={"quality": "high", "seed": 1})
    video = client.videos.create(prompt="a dog", extra_body={"quality": "high", "seed": 2})
    cancelled = httpx.post(f"{url}/v1/videos/{video.id}/cancel").json()
    assert cancelled["status"] == "failed" and cancelled["error"]["code"] == "cancelled"
    problem(httpx.get(f"{url}/v1/videos/{video.id}/content"), 409, "is failed")
    assert ended(client, blocker).status == "completed"
    again = httpx.post(f"{url}/v1/videos/{blocker.id}/cancel").json()
    assert again["status"] == "completed"


def test_events_tell_of_a_video(models, tmp_path):
    events = []
    with serving(models, tmp_path) as (url, server):
        begin, decode = server.engine._begin, server.engine._decode
        server.engine._begin = lambda tickets: (time.sleep(0.5), begin(tickets))
        server.engine._decode = lambda batch: (time.sleep(0.5), decode(batch))
        video = httpx.post(f"{url}/v1/videos", json={"prompt": "a cat", "quality": "high"}).json()
        with httpx.stream("GET", f"{url}/v1/videos/{video['id']}/events", timeout=60) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    events.append(json.loads(line[6:]))
    assert [event["type"] for event in events[:-1]] == ["video.progress"] * (len(events) - 1)
    assert events[-1]["type"] == "video.completed" and events[-1]["video"]["progress"] == 100
    previews = [event["preview_b64_json"] for event in events if "preview_b64_json" in event]
    assert previews and picture(base64.b64decode(previews[0])).ndim == 3


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "prompt: field required"),
        ({"prompt": ""}, "prompt: string should have at least 1"),
        ({"prompt": "a cat", "size": "640x480"}, "640x480 is not served.*nearest are"),
        ({"prompt": "a cat", "size": "big"}, "size 'big' is not understood"),
        ({"prompt": "a cat", "size": "0x128"}, "size '0x128' is not understood"),
        ({"prompt": "a cat", "size": "²x²"}, "is not understood"),
        ({"prompt": "a cat", "size": f"1{'0' * 400}x128"}, "is not understood"),
        ({"prompt": "a cat", "steps": 4}, "steps: extra inputs are not permitted"),
        ({"prompt": "a cat", "num_inference_steps": 7}, "7 steps of dense are not served"),
        ({"prompt": "a cat", "plan": "hsa:50"}, "plan 'hsa:50' is not served: expected one of high"),
        ({"prompt": "a cat", "plan": "nonsense"}, "nonsense"),
        ({"prompt": "a cat", "plan": "coredit:/dev/zero"}, "plan 'coredit:/dev/zero' is not served"),
        ({"prompt": "a cat", "plan": "magcache:1:ratios=/etc/passwd"}, "is not served"),
        ({"prompt": "a cat", "quality": "best"}, "quality 'best' is not served"),
        ({"prompt": "a cat", "model": "another"}, "no model 'another' makes images here"),
        ({"prompt": "a cat", "model": "tiny-video"}, "no model 'tiny-video' makes images here"),
        ({"prompt": "a cat", "n": 11}, "n: input should be less than or equal to 10"),
        ({"prompt": "a cat", "seed": -1}, "seed: input should be greater"),
        ({"prompt": "a cat", "seed": 2**32 - 1, "n": 2}, "seed is"),
        ({"prompt": "a" * 5000}, "prompt: string should have at most"),
        ({"prompt": " \n"}, "the prompt is empty"),
    ],
)
def test_what_is_not_served_is_refused_in_a_sentence(url, asked, words):
    error = problem(httpx.post(f"{url}/v1/images/generations", json=asked), 400, words)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [
        ({"content": b"{"}, 400, "no JSON"),
        ({"content": b"[1]"}, 400, "JSON list"),
        ({"content": b"[" * 90}, 400, "no JSON"),
        ({"content": b"[" * 100_000}, 400, "more than 100 objects and lists"),
        ({"content": b"x" * 10**8}, 413, "at most"),
        (
            {"json": {"prompt": "x", "input_reference": {"image_url": "http://127.0.0.1:1/x.png"}}},
            400,
            "fetches no URLs",
        ),
        ({"json": {"prompt": "x", "input_reference": {"image_url": "file:///etc/passwd"}}}, 400, "fetches no URLs"),
        ({"json": {"prompt": "x", "input_reference": {"image_url": "data:image/png;base64,@@"}}}, 400, "base64"),
        ({"data": {"prompt": "x"}, "files": {"input_reference": ("a.png", png()[:30])}}, 400, "PNG|picture|upload"),
        ({"data": {"prompt": "x"}, "files": {"other": ("a.png", png())}}, 400, "sent as 'other'"),
        ({"data": {"prompt": "x", "seconds": "nan"}, "files": {}}, 400, "no JSON"),
        ({"json": {"prompt": "x", "seconds": 1, "frames": 5}}, 400, "both given"),
        ({"json": {"prompt": "x", "frames": 6}}, 400, "x6 is not served"),
        ({"json": {"prompt": "x", "seconds": 1e9}}, 400, "seconds"),
    ],
)
def test_bad_videos_are_refused(url, sent, status, words):
    problem(httpx.post(f"{url}/v1/videos", **sent, timeout=60), status, words)


@pytest.mark.parametrize("id", ["video_x", "..%2f..%2fetc%2fpasswd", "video_" + "0" * 33])
def test_ids_are_no_paths(url, id):
    assert httpx.get(f"{url}/v1/videos/{id}/content").status_code in (400, 404)


def test_models_tell_what_is_served(client, url):
    assert {model.id for model in client.models.list()} == {"tiny-ti2v", "tiny-flux"}
    told = {model["id"]: model for model in httpx.get(f"{url}/v1/models").json()["data"]}
    assert told["tiny-flux"]["qualities"]["fast"] == {"plan": "dense", "steps": 4}
    assert told["tiny-ti2v"]["kind"] == "video" and told["tiny-ti2v"]["image_input"] == "optional"


def test_metrics_hold_numbers_alone(client, url):
    secret = "a cat that nobody may know of"
    client.images.generate(prompt=secret, quality="fast")
    text = httpx.get(f"{url}/metrics").text
    assert secret not in text
    for name in ("dit_waiting_samples", "dit_stage_seconds_bucket", "dit_batch_samples", "dit_compilations_total"):
        assert name in text
    assert 'dit_requests_total{route="/v1/images/generations",status="200"}' in text


def test_nothing_compiles_while_serving(models, tmp_path):
    with serving(models, tmp_path) as (url, server):

        def compiled():
            return float(re.search(r"^dit_compilations_total (\S+)", httpx.get(f"{url}/metrics").text, re.M)[1])

        httpx.post(f"{url}/v1/images/generations", json={"prompt": "warm", "quality": "fast"}, timeout=60)
        before = compiled()
        for quality in ("high", "fast"):
            for shape in models[1]["tiny-flux"].shapes:
                asked = {"prompt": f"a {quality} cat", "size": str(shape), "quality": quality, "n": 3}
                assert httpx.post(f"{url}/v1/images/generations", json=asked, timeout=60).status_code == 200
        video = httpx.post(f"{url}/v1/videos", json={"prompt": "a dog", "frames": 5}).json()
        while server.videos.get(video["id"], "").status != "completed":
            time.sleep(0.1)
        assert compiled() == before


def test_keys_part_what_is_whose(models, tmp_path):
    (tmp_path / "keys").write_text(f"{KEY}\n{OTHER}  # of another\n")
    with serving(models, tmp_path, keys=tmp_path / "keys", limits=KeyLimits(per_minute=3)) as (url, _):
        mine, other = ({"Authorization": f"Bearer {key}"} for key in (KEY, OTHER))
        problem(httpx.get(f"{url}/v1/videos"), 401, "no known API key")
        problem(httpx.get(f"{url}/v1/videos", headers={"Authorization": f"Basic {KEY}"}), 401, "no known")
        problem(httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {KEY}x"}), 401, "no known")
        made = httpx.post(f"{url}/v1/videos", json={"prompt": "a cat", "quality": "fast"}, headers=mine).json()
        assert httpx.get(f"{url}/v1/videos/{made['id']}", headers=other).status_code == 404
        assert httpx.post(f"{url}/v1/videos/{made['id']}/cancel", headers=other).status_code == 404
        assert httpx.get(f"{url}/v1/videos", headers=other).json()["data"] == []
        assert httpx.get(f"{url}/health/live").status_code == 200
        asked = {"prompt": "a cat", "quality": "fast"}
        codes = [httpx.post(f"{url}/v1/videos", json=asked, headers=mine).status_code for _ in range(4)]
        assert codes == [200, 200, 429, 429]
        assert httpx.post(f"{url}/v1/videos", json=asked, headers=other).status_code == 200


def test_too_many_are_told_to_come_back(models, tmp_path):
    with serving(models, tmp_path, options=EngineOptions(queue=2, window=50.0)) as (url, _):
        problem(httpx.post(f"{url}/v1/images/generations", json={"prompt": "a cat", "n": 3}), 400, "ask for fewer")
        for quality in ("high", "fast"):  # which share no batch, and so wait
            assert httpx.post(f"{url}/v1/videos", json={"prompt": "a cat", "quality": quality}).status_code == 200
        for route in ("images/generations", "videos"):
            answer = httpx.post(f"{url}/v1/{route}", json={"prompt": "a cat"})
            problem(answer, 429, "2 samples are waiting, which is as many as may")
            assert int(answer.headers["retry-after"]) >= 1


def test_a_page_of_another_origin_may_not_ask(url):
    asked = {"prompt": "a cat", "quality": "fast"}
    answer = httpx.post(f"{url}/v1/images/generations", json=asked, headers={"Origin": "http://evil.example"})
    problem(answer, 403, "may not ask")
    own = httpx.post(f"{url}/v1/images/generations", json=asked, headers={"Origin": url}, timeout=60)
    assert own.status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""])
def test_a_name_that_was_bent_to_this_machine_is_refused(url, host):
    for path in ("/", "/v1/videos"):
        problem(httpx.get(f"{url}{path}", headers={"Host": host, "Origin": f"http://{host}"}), 403, "localhost alone")
    for known in ("localhost", "LOCALHOST:80", "[::1]:8000"):
        assert httpx.get(f"{url}/v1/videos", headers={"Host": known}).status_code == 200


def test_with_keys_any_name_will_do(models, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    with serving(models, tmp_path, keys=keys) as (url, _):
        headers = {"Host": "videos.example", "Authorization": f"Bearer {KEY}"}
        assert httpx.get(f"{url}/v1/videos", headers=headers).status_code == 200


def test_nothing_is_taken_before_all_is_compiled(models, tmp_path):
    with serving(models, tmp_path, ready=False) as (url, _):
        assert httpx.get(f"{url}/health/ready").status_code == 503
        answer = httpx.post(f"{url}/v1/images/generations", json={"prompt": "a cat"})
        problem(answer, 503, "compiling")
        assert answer.headers["retry-after"]
        assert httpx.get(f"{url}/").status_code == 200


def test_whoever_hangs_up_gives_up(models, tmp_path, caplog):
    with serving(models, tmp_path, options=EngineOptions(window=2.0)) as (url, server):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/images/generations", json={"prompt": "a cat", "quality": "high"}, timeout=0.3)
        began = time.monotonic()
        while b'dit_samples_total{outcome="cancelled"} 1.0' not in server.metrics.text():
            assert time.monotonic() - began < 10
            time.sleep(0.05)
        assert server.engine.waiting == 0
    gc.collect()
    assert "exception calling callback" not in caplog.text and "never retrieved" not in caplog.text


def test_jobs_outlive_the_server(models, tmp_path, monkeypatch):
    asked = {"prompt": "a dog sleeps", "seed": 11, "quality": "high"}
    made = remember_frames(monkeypatch)
    with serving(models, tmp_path) as (url, server):
        first = httpx.post(f"{url}/v1/videos", json=asked).json()
        while server.videos.get(first["id"], "").status != "completed":
            time.sleep(0.05)
        content = httpx.get(f"{url}/v1/videos/{first['id']}/content").content
        # Never begun, when the server stops.
        server.engine.options = EngineOptions(window=100.0)
        left = httpx.post(f"{url}/v1/videos", json=asked).json()
    with serving(models, tmp_path) as (url, server):
        assert httpx.get(f"{url}/v1/videos/{first['id']}/content").content == content
        began = time.monotonic()
        while server.videos.get(left["id"], "").status != "completed":
            assert time.monotonic() - began < 60
            time.sleep(0.05)
        again = frames_of(httpx.get(f"{url}/v1/videos/{left['id']}/content").content)
        assert np.stack(again).shape == made[1].shape
    np.testing.assert_allclose(made[0].astype(int), made[1], atol=1)


def test_what_a_stop_refuses_is_never_made(models, tmp_path):
    with serving(models, tmp_path) as (url, server):
        server.engine.stop(60)
        problem(httpx.post(f"{url}/v1/videos", json={"prompt": "a cat"}), 503, "is stopping")
        assert server.journal.unfinished() == [] and httpx.get(f"{url}/v1/videos").json()["data"] == []


def test_a_plan_is_never_read(url, monkeypatch):
    def read(*_, **__):
        raise AssertionError("a file was read")

    monkeypatch.setattr(Path, "read_text", read)
    for plan in ("coredit:/etc/passwd", "ddit:/x.json", "magcache:1:ratios=/etc/passwd", "magcache:1:k=inf"):
        problem(httpx.post(f"{url}/v1/videos", json={"prompt": "a cat", "plan": plan}), 400, "is not served")


def test_a_result_may_go_while_it_is_asked_for(client, url, monkeypatch):
    video = ended(client, client.videos.create(prompt="a cat", extra_body={"quality": "fast"}))
    monkeypatch.setattr(VideoJobs, "file", lambda *_: (Path("/nowhere/video.mp4"), "video/mp4"))
    problem(httpx.get(f"{url}/v1/videos/{video.id}/content"), 404, "there is no video")


def test_faults_of_the_server_are_counted(models, tmp_path, monkeypatch):
    with serving(models, tmp_path) as (url, server):

        def broken(*_):
            raise RuntimeError("a bug")

        monkeypatch.setattr(server.videos, "page", broken)
        problem(httpx.get(f"{url}/v1/videos"), 500, "see its log")
        assert b'dit_requests_total{route="/v1/videos",status="500"} 1.0' in server.metrics.text()


def test_what_could_not_be_written_down_is_tried_again(models, tmp_path, monkeypatch):
    with serving(models, tmp_path) as (url, server):

        def full(*_):
            raise OSError("the disk is full")

        monkeypatch.setattr(server.journal, "completed", full)
        monkeypatch.setattr(server.journal, "failed", full)
        made = remember_frames(monkeypatch)
        id = httpx.post(f"{url}/v1/videos", json={"prompt": "a cat", "quality": "fast"}).json()["id"]
        while server.videos._live.get(id) or not made:
            time.sleep(0.05)
        monkeypatch.undo()
        server.sweep()
        assert "the disk is full" in httpx.get(f"{url}/v1/videos/{id}").json()["error"]["message"]


def test_a_body_must_come_in_time(url, monkeypatch):
    monkeypatch.setattr("infer.reading.PATIENCE", 0.2)
    port = int(url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as slow:
        slow.sendall(b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
        answer = slow.makefile("rb").readline()
    assert answer.split()[1] == b"408"


def test_many_at_once(url):
    async def all_of():
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            asked = [{"prompt": f"cat {index}", "quality": "fast", "seed": index % 2} for index in range(12)]
            return await asyncio.gather(*(client.post("/v1/images/generations", json=one) for one in asked))

    answers = asyncio.run(all_of())
    assert [answer.status_code for answer in answers] == [200] * 12
    prompts = [
        json.loads(Image.open(io.BytesIO(base64.b64decode(a.json()["data"][0]["b64_json"]))).info["Comment"])
        for a in answers
    ]
    assert [one["prompt"] for one in prompts] == [f"cat {index}" for index in range(12)]


def test_a_server_that_cannot_start_says_so(models, tmp_path, monkeypatch, caplog):
    killed = []
    monkeypatch.setattr("infer.server.os.kill", lambda *told: killed.append(told))

    def warm():
        raise RuntimeError("no such program")

    with serving(models, tmp_path, ready=False, warm=warm) as (_, server):
        while not killed:
            time.sleep(0.05)
        assert server.failed and "the server cannot start" in caplog.text
