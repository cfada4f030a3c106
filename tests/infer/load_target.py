"""A server for load tests whose every fault is known: it makes nothing and answers as it was told to."""

import asyncio
import base64
import contextlib
import io
import json
import secrets
import threading
import time

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image

MODELS = [
    {
        "id": "films",
        "kind": "video",
        "image_input": "optional",
        "shapes": ["64x64x17", "64x32x9"],
        "qualities": {"high": {"plan": "dense", "steps": 30}, "fast": {"plan": "dense", "steps": 4}},
    },
    {
        "id": "pictures",
        "kind": "image",
        "image_input": "never",
        "shapes": ["64x64"],
        "qualities": {"high": {"plan": "dense", "steps": 20}},
    },
]
FILM = b"\0\0\0\x18ftypisom" + bytes(100)
TIMINGS = {"queue": 0.25, "denoise": 0.5}
KNOWN = {"model", "prompt", "size", "quality", "seed", "frames", "output_format", "response_format", "stream"}
KNOWN |= {"partial_images", "input_reference"}


def picture():
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    return file.getvalue()


def refusal(status, message="this is refused", **headers):
    return JSONResponse({"error": {"message": message}}, status, headers)


class Target:
    """Answers after `seconds`, and not before so many requests have come as it is `expecting`; the other settings are
    its faults."""

    def __init__(self):
        self.seconds, self.expecting, self.fail_every, self.full_every = 0.02, 0, 0, 0
        self.hanging = self.trusting = self.hollow = self.deaf = self.cutting = self.failing = self.silent = False
        self.ready, self.compilations, self.waiting, self.keys = True, [3], 0, set()
        self.came, self.deleted, self.told, self.videos = 0, 0, [], {}

    async def met(self, told):
        """A refusal, where it is time for one."""
        self.came += 1
        self.told.append(told)
        if self.fail_every and self.came % self.fail_every == 0:
            return refusal(500, "the server failed")
        if self.full_every and self.came % self.full_every == 0:
            return refusal(429, "too much", **{"Retry-After": "1"})
        while self.came < self.expecting:
            await asyncio.sleep(0.02)
        return None

    async def read(self, request):
        """What is asked; None where that is malformed."""
        if request.headers.get("content-type", "").startswith("multipart"):
            try:
                async with request.form() as form:
                    told = dict(form)
                    if "input_reference" in told:
                        Image.open(io.BytesIO(await told["input_reference"].read())).load()
            except Exception:
                return None
        else:
            try:
                told = json.loads(await request.body())
            except (ValueError, RecursionError):
                return None
        return told if self.sound(told) else None

    def sound(self, told):
        if not isinstance(told, dict) or not set(told) <= KNOWN or isinstance(told.get("input_reference"), str):
            return False
        model = next((model for model in MODELS if model["id"] == told.get("model")), None)
        if model is None or told.get("quality") not in model["qualities"]:
            return False
        shape = f"{told.get('size')}x{told['frames']}" if "frames" in told else told.get("size")
        words, seed = told.get("prompt"), str(told.get("seed"))
        return (
            shape in model["shapes"] and isinstance(words, str) and 0 < len(words) < 4000
            and words.isascii() and seed.isdigit()
        )  # fmt: skip

    def view(self, id):
        video = self.videos[id]
        if video["status"] == "queued" and not self.hanging and time.monotonic() >= video["due"]:
            if self.failing:
                video |= {"status": "failed", "error": {"code": "server_error", "message": "it broke"}}
            else:
                video |= {"status": "completed", "timings": TIMINGS}
        return {name: value for name, value in video.items() if name != "due"}


def build(target):
    app = FastAPI()

    @app.middleware("http")
    async def keys(request: Request, call_next):
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        if target.keys and key not in target.keys and request.url.path.startswith("/v1/"):
            return refusal(401)
        return await call_next(request)

    @app.get("/health/ready")
    async def ready():
        return {"status": "ready"} if target.ready else refusal(503)

    @app.get("/metrics")
    async def metrics():
        if target.silent:
            return refusal(500)
        compilations = target.compilations.pop(0) if len(target.compilations) > 1 else target.compilations[0]
        told = {"dit_compilations_total": compilations, "dit_waiting_samples": target.waiting}
        lines = ["# HELP dit_compilations_total Programs compiled", 'dit_stage_seconds_sum{stage="text"} 1.5']
        return Response("\n".join([*lines, *(f"{name} {value}.0" for name, value in told.items())]) + "\n")

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": MODELS}

    _add_images(app, target)
    _add_videos(app, target)
    return app


def _add_images(app, target):
    @app.post("/v1/images/generations")
    async def generate(request: Request):
        told = await target.read(request)
        if told is None and not target.trusting:
            return refusal(400)
        if refused := await target.met(told):
            return refused
        made = {"b64_json": base64.b64encode(b"" if target.hollow else picture()).decode(), "timings": TIMINGS}
        if (told or {}).get("stream"):
            return StreamingResponse(events(made), media_type="text/event-stream")
        await asyncio.sleep(target.seconds)
        if told and told.get("response_format") == "url":
            made = {"url": str(request.base_url) + "pictures/1"}
        return {"data": [made], "timings": TIMINGS}

    async def events(made):
        yield ": a sign of life\n\n"
        yield f"data: {json.dumps({'type': 'image_generation.partial_image'})}\n\n"
        await asyncio.sleep(target.seconds)
        if not target.cutting:
            yield f"event: e\ndata: {json.dumps({'type': 'image_generation.completed', **made})}\n\n"

    @app.get("/pictures/1")
    async def fetched():
        return Response(b"" if target.hollow else picture(), media_type="image/png")


def _add_videos(app, target):
    @app.post("/v1/videos")
    async def create(request: Request):
        told = await target.read(request)
        if told is None and not target.trusting:
            return refusal(400)
        if refused := await target.met(told):
            return refused
        id = "video_" + secrets.token_hex(16)
        target.videos[id] = {"id": id, "status": "queued", "due": time.monotonic() + target.seconds}
        return target.view(id)

    @app.get("/v1/videos")
    async def page(limit: int = 20):
        return refusal(400) if limit > 100 else {"data": []}

    @app.get("/v1/videos/{id}")
    async def retrieve(id: str):
        return target.view(id) if id in target.videos else refusal(404)

    @app.delete("/v1/videos/{id}")
    async def delete(id: str):
        target.deleted += 1
        return {"deleted": target.videos.pop(id)["id"]}

    @app.post("/v1/videos/{id}/cancel")
    async def cancel(id: str):
        if id not in target.videos:
            return refusal(404)
        if target.view(id)["status"] == "queued" and not target.deaf:
            target.videos[id] |= {"status": "failed", "error": {"code": "cancelled", "message": "it was cancelled"}}
        return target.view(id)

    @app.get("/v1/videos/{id}/content")
    async def content(id: str):
        if id not in target.videos:
            return refusal(404)
        return Response(b"" if target.hollow else FILM, media_type="video/mp4")

    @app.get("/v1/videos/{id}/events")
    async def events(id: str):
        async def told():
            while (video := target.view(id))["status"] == "queued":
                yield f"data: {json.dumps({'type': 'video.progress', 'video': video})}\n\n"
                if target.cutting:
                    return
                await asyncio.sleep(0.05)
            yield f"data: {json.dumps({'type': 'video.' + video['status'], 'video': video})}\n\n"

        return StreamingResponse(told(), media_type="text/event-stream")


@contextlib.contextmanager
def served(target):
    """The address of a server on loopback."""
    config = uvicorn.Config(build(target), host="127.0.0.1", port=0, log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
