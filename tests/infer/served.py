"""A server that runs inside the tests, with tiny models."""

import contextlib
import socket
import threading
import time

import httpx
import uvicorn
from tiny_flux import pipeline as tiny_flux

from dit_jax.methods.plan import Plan
from infer import video_jobs
from infer.access import Access, KeyLimits
from infer.buckets import Frame, ModelBuckets, Offer
from infer.engine import Engine, EngineOptions
from infer.journal import Journal
from infer.loading import load_pipeline
from infer.server import Server, build_app
from infer.server_metrics import ServerMetrics
from infer.warming import warm


def small_models(video, folder):
    """(pipelines, buckets) of a tiny Wan that is in a folder and a tiny FLUX, all compiled."""
    tiny_flux(dev=True).save_pretrained(folder / "tiny-flux")
    pipelines = {"tiny-video": load_pipeline(video), "tiny-flux": load_pipeline(folder / "tiny-flux")}
    offers = {"high": Offer(plan=Plan(), steps=8), "fast": Offer(plan=Plan(), steps=4)}
    sizes = [(48, 32), (32, 32)]
    video = tuple(Frame(*size, frames) for size in _fitting(pipelines["tiny-video"], sizes[:1]) for frames in (5, 9))
    image = tuple(Frame(*size) for size in _fitting(pipelines["tiny-flux"], sizes))
    buckets = {
        "tiny-video": ModelBuckets(shapes=video, offers=offers, batches=(1, 2)),
        "tiny-flux": ModelBuckets(shapes=image, offers=offers, batches=(1, 2)),
    }
    warm(pipelines, buckets)
    return pipelines, buckets


def _fitting(pipe, sizes):
    space = pipe.limits.space
    return [tuple(-(-side // space) * space for side in size) for size in sizes]


@contextlib.contextmanager
def serving(models, folder, *, keys=None, options=None, limits=None, ready=True, warm=None):
    """(url, server) of a server that runs inside."""
    metrics = ServerMetrics()
    server = Server(
        engine=Engine(*models, options or EngineOptions(), metrics.observe),
        journal=Journal(folder / "data", quota_bytes=2**30, lifetime_seconds=3600),
        access=Access(keys, limits or KeyLimits()),
        metrics=metrics,
    )
    go = threading.Event()
    if ready:
        go.set()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = uvicorn.Config(build_app(server, warm or (lambda: go.wait(60) and None)), port=port, log_level="error")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health/{'ready' if ready else 'live'}").status_code == 200:
                    break
            time.sleep(0.05)
        yield url, server
    finally:
        go.set()
        running.should_exit = True
        thread.join(120)


def remember_frames(monkeypatch):
    """A list that gets the frames of every video that is made, as they are before the codec."""
    made, files = [], video_jobs._files

    def remembering(sample, fps):
        made.append(sample.frames)
        return files(sample, fps)

    monkeypatch.setattr(video_jobs, "_files", remembering)
    return made
