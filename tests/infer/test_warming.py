"""Every kind of model: what a server has warmed up runs without compiling, and can be asked for."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

from dit_jax.config import UserError
from dit_jax.methods.plan import Plan, parse_plan
from infer.api_types import VideoRequest
from infer.asked import asked_of
from infer.buckets import Frame, ModelBuckets, Offer
from infer.engine import Engine, EngineOptions
from infer.loading import load_pipeline
from infer.tickets import Ticket
from infer.warming import warm

IMAGE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (50, 70, 3), np.uint8))
LARGE = Frame(96, 64, 5)  # where a latent is 16x16 pixels
SMALL = Frame(48, 64, 5)


@pytest.fixture
def compiled():
    events = []

    def heard(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(heard)
    yield events
    jax.monitoring.unregister_event_duration_listener(heard)


@pytest.mark.parametrize(
    ("kind", "shape", "plans", "pictures"),
    [
        ("text_or_image", LARGE, ("dense",), (None, IMAGE)),
        ("image_to_video", SMALL, ("dense",), (IMAGE,)),
        ("text_experts", SMALL, ("teacache:0.3", "hsa:groups=40@8/60@4:window=0.5"), (None,)),
    ],
)
def test_what_is_warm_compiles_nothing(request, compiled, kind, shape, plans, pictures):
    pipe = load_pipeline(request.getfixturevalue(kind)[0])
    offers = {plan: Offer(plan=parse_plan(plan), steps=8) for plan in plans}
    pipelines, buckets = {"tiny": pipe}, {"tiny": ModelBuckets(shapes=(shape,), offers=offers, batches=(1, 2))}
    warm(pipelines, buckets)
    engine = Engine(pipelines, buckets, EngineOptions(window=0.2))
    engine.start()
    compiled.clear()
    for plan in plans:
        for picture in pictures:
            for count in (1, 2):
                told = [VideoRequest(prompt="a red cat", seed=seed, quality=plan) for seed in range(count)]
                jobs = [asked_of(one, pipelines, buckets, picture).job for one in told]
                tickets = [Ticket(model="tiny", job=job) for job in jobs]
                engine.submit(tickets)
                assert [ticket.result.result(300).batch for ticket in tickets] == [count] * count
    assert engine.stop(60) and compiled == []


def test_a_model_that_needs_two_pictures_is_not_served(image_to_video, monkeypatch):
    pipe = load_pipeline(image_to_video[0])
    offered = ModelBuckets(shapes=(SMALL,), offers={"high": Offer(plan=Plan(), steps=8)})
    with pytest.raises(UserError, match="none was given"):
        asked_of(VideoRequest(prompt="a red cat"), {"tiny": pipe}, {"tiny": offered})
    between = replace(pipe.limits, last_image="always")
    monkeypatch.setattr(type(pipe), "limits", property(lambda _: between))
    with pytest.raises(UserError, match="draws between two pictures"):
        next(offered.jobs(pipe))
