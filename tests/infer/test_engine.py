"""The engine: what shares a batch and what does not, and that nobody sees whom he shared it with."""

import threading
import time
from concurrent.futures import wait
from dataclasses import replace

import jax
import numpy as np
import pytest
from beside_diffusers import FRAMES, SIZE
from PIL import Image
from test_patch_schedules import random_part

from dit_jax.config import UserError
from dit_jax.methods.plan import parse_plan
from infer.buckets import Frame, ModelBuckets, Offer
from infer.denoising import Denoising
from infer.engine import Engine, EngineOptions
from infer.loading import load_pipeline
from infer.request import Request, joined
from infer.tickets import CancelledError, QueueFullError, StoppedError, Ticket
from infer.warming import warm

STEPS = 8
PROMPTS = ["a red cat runs", "a blue dog sleeps", "a fish under the moon", "the moon"]
PLANS = {"high": "dense", "cached": "teacache:0.3", "half": "hsa:groups=40@8/60@4:window=0.5", "sized": "ddit:tau=0.02"}


@pytest.fixture(scope="module")
def pipe(text_to_video):
    loaded = load_pipeline(text_to_video[0])
    loaded.parts["transformer"]["ddit"] = random_part(loaded.transformer_config)
    return loaded


@pytest.fixture(scope="module")
def buckets():
    offers = {name: Offer(plan=parse_plan(plan), steps=STEPS) for name, plan in PLANS.items()}
    return {"tiny": ModelBuckets(shapes=(Frame(*SIZE, FRAMES),), offers=offers, batches=(1, 2, 4))}


@pytest.fixture
def engine(pipe, buckets):
    made = Engine({"tiny": pipe}, buckets, EngineOptions(window=0.2, queue=8))
    made.start()
    yield made
    made.stop(30)


def ticket(pipe, prompt=PROMPTS[0], seed=0, plan="dense", **told):
    job = pipe.prepare(Request(prompt=prompt, seed=seed, plan=plan, size=SIZE, frames=FRAMES, steps=STEPS))
    return Ticket(model="tiny", job=job, **told)


def results(engine, tickets):
    engine.submit(tickets)
    return [one.result.result(300) for one in tickets]


def test_a_sample_does_not_see_its_batch(engine, pipe):
    for plan in PLANS.values():
        alone = [results(engine, [ticket(pipe, text, seed, plan)])[0] for seed, text in enumerate(PROMPTS[:3])]
        shared = results(engine, [ticket(pipe, text, seed, plan) for seed, text in enumerate(PROMPTS[:3])])
        assert [one.batch for one in alone] == [1, 1, 1]
        for one, other in zip(alone, shared, strict=True):
            assert one.metadata == other.metadata
            assert np.abs(one.frames.astype(int) - other.frames).max() <= 1, plan
        if plan != PLANS["sized"]:
            assert [one.batch for one in shared] == [3, 3, 3]


def test_another_shift_is_another_batch(engine, pipe):
    alike, other = ticket(pipe), ticket(pipe, seed=1)
    shifted = ticket(pipe, seed=2)
    shifted.job = replace(shifted.job, shift=7.0)
    assert [one.batch for one in results(engine, [alike, shifted, other])] == [2, 1, 2]


def test_a_batch_is_torn_where_its_latents_disagree(pipe):
    jobs = [ticket(pipe, text, seed, "ddit:tau=1e9").job for seed, text in enumerate(PROMPTS[:2])]
    run, alone = Denoising(pipe, joined(jobs)), [pipe.denoise(job) for job in jobs]
    while run.done < 3:
        run.advance()
    assert run.agreeing() == [[0, 1]]
    parts = [run.of([1]), run.of([0, 0])]
    for part in parts:
        while not part.finished:
            part.advance()
    np.testing.assert_allclose(parts[0].final()[0], alone[1][0], atol=1e-5)
    np.testing.assert_allclose(parts[1].final()[1], alone[0][0], atol=1e-5)
    assert np.abs(alone[0] - alone[1]).max() > 0.1


def test_a_part_of_a_batch_is_told_what_the_batch_was_told(image_to_video, pictures):
    pipe = load_pipeline(image_to_video[0])
    pipe.parts["transformer"]["ddit"] = random_part(pipe.transformer_config)
    images = [Image.open(file) for file in pictures[:2]]
    asked = Request(prompt=PROMPTS[:2], image=images, size=SIZE, frames=5, steps=3, plan="ddit:tau=0:sizes=2p")
    whole, names, run = Denoising(pipe, pipe.prepare(asked)), [], pipe.programs.run
    whole.advance()
    pipe.programs.run = lambda name, *arguments, **options: names.append(name) or run(name, *arguments, **options)
    part = whole.of([1, 0])
    for one in (whole, part):
        while not one.finished:
            one.advance()
    assert not {"image", "encode", "text"} & set(names)
    np.testing.assert_array_equal(part.final(), whole.final()[[1, 0]])
    assert np.abs(np.diff(whole.final(), axis=0)).max() > 0.1


def test_what_a_cache_keeps_goes_with_its_sample(pipe):
    jobs = [ticket(pipe, text, seed, "ddit:tau=0+teacache:0.3").job for seed, text in enumerate(PROMPTS[:3])]
    run, alone = Denoising(pipe, joined(jobs)), pipe.denoise(jobs[2])
    while run.done < 5:
        run.advance()
    part = run.of([2, 2])
    while not part.finished:
        part.advance()
    np.testing.assert_allclose(part.final()[0], alone[0], atol=1e-5)


def test_nothing_compiles_after_warming(pipe, buckets):
    warm({"tiny": pipe}, buckets)
    events = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: events.append(event) if event.endswith("backend_compile_duration") else None
    )
    made = Engine({"tiny": pipe}, buckets, EngineOptions(window=0.05))
    made.start()
    tickets = [
        ticket(pipe, text, seed, plan, told=lambda progress: None, previews=seed == 1)
        for plan in PLANS.values()
        for seed, text in enumerate(PROMPTS)
    ]
    results(made, tickets)
    results(made, tickets[:0] + [ticket(pipe, "a cat on the moon", 77, plan) for plan in PLANS.values()])
    assert made.stop(30)
    assert events == []


def test_progress_and_previews(engine, pipe):
    seen = []
    sample = results(engine, [ticket(pipe, told=seen.append, previews=True)])[0]
    assert [one.done for one in seen] == [0, 4, 8]
    assert seen[0].preview is None and seen[1].preview.shape == (SIZE[1], SIZE[0], 3)
    assert sample.frames.shape == (FRAMES, SIZE[1], SIZE[0], 3)
    assert set(sample.seconds) == {"queue", "text", "denoise", "decode"}


def test_a_sample_is_told_of_its_turn_before_any_work_is_done(engine, pipe, monkeypatch):
    pipe.texts.clear()
    events, encode = [], pipe.encode_text
    monkeypatch.setattr(pipe, "encode_text", lambda prompts: events.append("text") or encode(prompts))
    results(engine, [ticket(pipe, told=lambda progress: events.append(progress.done))])
    assert events == [0, "text", "text", 4, 8]


def test_a_preview_nears_the_result(engine, pipe):
    seen = []
    sample = results(engine, [ticket(pipe, told=seen.append, previews=True)])[0]
    noise = np.random.default_rng(0).integers(0, 256, sample.frames[0].shape)
    first = sample.frames[0].astype(int)
    assert np.abs(seen[1].preview - first).mean() < 0.5 * np.abs(noise - first).mean()


def test_one_that_fails_fails_alone(engine, pipe, monkeypatch):
    encode = pipe.encode_text

    def failing(prompts):
        if "a dog" in prompts:
            raise RuntimeError("no dogs")
        return encode(prompts)

    monkeypatch.setattr(pipe, "encode_text", failing)
    good, bad = ticket(pipe), ticket(pipe, "a dog")
    engine.submit([good, bad])
    assert good.result.result(300).batch == 1
    with pytest.raises(RuntimeError, match="no dogs"):
        bad.result.result(300)
    assert results(engine, [ticket(pipe)])[0].batch == 1


def test_a_sample_that_is_no_number_fails_alone(engine, pipe, monkeypatch):
    final = Denoising.final

    def broken(run):
        latents = final(run).copy()
        latents[1] = np.nan
        return latents

    monkeypatch.setattr(Denoising, "final", broken)
    good, bad = ticket(pipe), ticket(pipe, PROMPTS[1])
    engine.submit([good, bad])
    assert np.isfinite(good.result.result(300).frames).all()
    with pytest.raises(UserError, match="NaN"):
        bad.result.result(300)


def test_what_is_cancelled_leaves_the_rest_alone(engine, pipe):
    entered, go = threading.Event(), threading.Event()

    def told(progress):
        entered.set()
        go.wait(30)

    first, second = ticket(pipe, told=told), ticket(pipe, PROMPTS[1], seed=4)
    engine.submit([first, second])
    entered.wait(60)
    third = ticket(pipe, PROMPTS[2])
    engine.submit([third])
    assert first.cancel() and third.cancel() and not first.cancel()
    go.set()
    with pytest.raises(CancelledError):
        first.result.result(0)
    alone = results(engine, [ticket(pipe, PROMPTS[1], seed=4)])[0]
    assert np.abs(second.result.result(300).frames.astype(int) - alone.frames).max() <= 1
    assert engine.waiting == 0


def test_short_work_does_not_wait_for_long(engine, pipe):
    order = []
    long = [ticket(pipe, text, told=lambda progress: time.sleep(0.2)) for text in PROMPTS]
    engine.submit(long)
    time.sleep(0.3)
    job = pipe.prepare(Request(prompt=PROMPTS[0], size=SIZE, frames=FRAMES, steps=2, solver="euler"))
    short = Ticket(model="tiny", job=job)
    engine.submit([short])
    for name, one in [("short", short), *(("long", one) for one in long)]:
        one.result.add_done_callback(lambda _, name=name: order.append(name))
    wait([one.result for one in (short, *long)], 120)
    assert order[0] == "short"


def test_what_was_begun_in_time_is_no_longer_waited_for(pipe, buckets):
    made = Engine({"tiny": pipe}, buckets, EngineOptions(window=0.0))
    begun, go = threading.Event(), threading.Event()

    def told(progress):
        begun.set()
        go.wait(60)

    held = ticket(pipe, told=told)
    made.submit([held])
    made.start()
    begun.wait(60)
    before = time.monotonic()
    assert not made.stop(0.2) and time.monotonic() - before < 5
    with pytest.raises(StoppedError):
        held.result.result(0)
    go.set()
    made._thread.join(60)
    assert not made._thread.is_alive() and made.running == 0


def test_a_result_that_is_given_up_is_counted(pipe, buckets):
    told = []
    made = Engine({"tiny": pipe}, buckets, EngineOptions(), lambda name, value: told.append(name))
    one = ticket(pipe)
    made.submit([one])
    assert one.result.cancel() and told == ["cancelled"]


def test_a_part_that_fails_leaves_the_others_where_they_are(engine, pipe, monkeypatch):
    advance, begun = Denoising.advance, []

    def failing(run):
        if len(run.job.prompts) == 1 and run.job.prompts[0] == PROMPTS[1] and not begun:
            begun.append(run.done)
            raise RuntimeError("this part is lost")
        return advance(run)

    monkeypatch.setattr(Denoising, "advance", failing)
    monkeypatch.setattr(Denoising, "agreeing", lambda run: [[row] for row in range(len(run.job.prompts))])
    seen: list[list[int]] = [[], []]
    tickets = [
        ticket(pipe, text, told=lambda progress, row=row: seen[row].append(progress.done))
        for row, text in enumerate(PROMPTS[:2])
    ]
    engine.submit(tickets)
    assert tickets[0].result.result(300).frames.shape[0] == FRAMES
    with pytest.raises(RuntimeError, match="this part is lost"):
        tickets[1].result.result(300)
    assert seen == [[0, 4, 8], [0]]


def test_text_is_encoded_while_others_are_on_the_devices(engine, pipe, monkeypatch):
    pipe.texts.clear()
    ahead = []
    encode_ahead = pipe.encode_ahead
    monkeypatch.setattr(pipe, "encode_ahead", lambda job: ahead.append(job.prompts) or encode_ahead(job))
    first = [ticket(pipe, PROMPTS[0], told=lambda progress: time.sleep(0.3), alone=True) for _ in range(2)]
    second = ticket(pipe, "a fish that was never seen", alone=True)
    results(engine, [*first, second])
    assert [second.job.prompts[0]] in ahead


def test_no_more_wait_than_may(pipe, buckets):
    made = Engine({"tiny": pipe}, buckets, EngineOptions(queue=2))
    made.submit([ticket(pipe), ticket(pipe)])
    with pytest.raises(QueueFullError, match="2 samples are waiting") as full:
        made.submit([ticket(pipe)])
    assert full.value.retry_after >= 1
    assert made.waiting == 2
    with pytest.raises(UserError, match="3 samples were asked for: expected at most 2"):
        made.submit([ticket(pipe) for _ in range(3)])


def test_what_is_given_up_while_it_waits_is_forgotten():
    made = Engine({}, {})
    tickets = [Ticket(model="tiny", job=None) for _ in range(3)]
    made.submit(tickets)
    assert tickets[0].cancel() and tickets[1].result.cancel()
    assert list(made._waiting) == [tickets[2]]


def test_what_is_given_up_is_not_tried_again():
    made = Engine({}, {})
    tickets = [Ticket(model="tiny", job=None) for _ in range(2)]
    made.submit(tickets)
    made._waiting.clear()  # they run
    tickets[0].cancel()
    made._failed(tickets, RuntimeError("both are lost"))
    assert list(made._waiting) == [tickets[1]]


def test_what_hears_of_a_stop_may_take_its_time():
    made, seen = Engine({}, {}), []
    one = Ticket(model="tiny", job=None)
    made.submit([one])

    def slow(_):
        asking = threading.Thread(target=lambda: seen.append(made.waiting), daemon=True)
        asking.start()
        asking.join(5)

    one.result.add_done_callback(slow)
    made.stop(0)
    assert seen == [0]


def test_stopping_finishes_what_runs_and_hands_back_the_rest(pipe, buckets):
    made = Engine({"tiny": pipe}, buckets, EngineOptions(window=0.0, active=1))
    begun = threading.Event()
    running = ticket(pipe, told=lambda progress: begun.set())
    made.submit([running])
    made.start()
    begun.wait(60)
    waiting = ticket(pipe, PROMPTS[1], alone=True)
    made.submit([waiting])
    assert made.stop(60)
    assert running.result.result(0).frames.shape[0] == FRAMES
    with pytest.raises(StoppedError):
        waiting.result.result(0)
    with pytest.raises(StoppedError):
        made.submit([ticket(pipe)])


FULL = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")


@pytest.mark.parametrize("most", [0, 1])
def test_where_decoding_takes_too_much_memory_it_is_done_apart(engine, pipe, monkeypatch, most):
    decoding, job = pipe.decoding, ticket(pipe).job
    [alone] = pipe.decode(job, pipe.denoise(job), tiled=not most).frames

    def full(job, latents, *, tiled=False):
        if not tiled and len(latents) > most:
            raise FULL
        return decoding(job, latents, tiled=tiled)

    monkeypatch.setattr(pipe, "decoding", full)
    apart = results(engine, [ticket(pipe), ticket(pipe, PROMPTS[1])])
    assert all(("one by one" if most else "in tiles") in one.notes[0] for one in apart)
    assert np.abs(apart[0].frames.astype(int) - alone).max() <= 1


def test_memory_may_run_out_when_frames_are_fetched(engine, pipe, monkeypatch):
    frames, tries = pipe.frames, []

    def full(decoded):
        tries.append(len(decoded))
        if len(tries) == 1:
            raise FULL
        return frames(decoded)

    monkeypatch.setattr(pipe, "frames", full)
    found = results(engine, [ticket(pipe), ticket(pipe, PROMPTS[1])])
    assert tries == [2, 1, 1] and all("one by one" in one.notes[0] for one in found)
