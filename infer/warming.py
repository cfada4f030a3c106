"""Compiling all that a server offers before it says that it is ready."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed

from infer.buckets import Buckets
from infer.caches import cache_folder
from infer.pipeline import Pipeline
from infer.program_store import ProgramStore
from infer.programs import Programs
from infer.request import Job

logger = logging.getLogger(__name__)
MOST_THREADS = 8
STORE_LIMIT = 16 * 2**30


def with_store(pipelines: Mapping[str, Pipeline]) -> None:
    """Lets pipelines that have compiled nothing yet take their programs from the user's store, and keep them there."""
    store = ProgramStore(cache_folder("executables") / "programs", limit_bytes=STORE_LIMIT)
    for pipe in pipelines.values():
        pipe.programs = Programs(store)


def warm(
    pipelines: Mapping[str, Pipeline],
    buckets: Buckets,
    told: Callable[[int, int], None] = lambda done, total: None,
    stopping: Callable[[], bool] = lambda: False,
) -> float:
    """Compiles every program, several at a time, or takes it from the store, until it is to stop; the seconds taken."""
    began = time.perf_counter()
    work = [(name, job) for name, pipe in pipelines.items() for job in buckets[name].jobs(pipe)]
    for name, job in dict(work).items():
        pipelines[name].encode_ahead(job)  # once: a tokenizer is for one thread
    threads = min(os.cpu_count() or 1, MOST_THREADS)
    done = itertools.count(1)

    def compile_one(item: tuple[str, Job]) -> None:
        name, job = item
        if not stopping():
            pipelines[name].compile(job)
            told(next(done), len(work))

    with ThreadPoolExecutor(threads, "compiling") as pool:
        try:
            for finished in as_completed([pool.submit(compile_one, item) for item in work]):
                finished.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    seconds = time.perf_counter() - began
    programs = [pipe.programs for pipe in pipelines.values()]
    compiled, loaded = sum(one.compiled_count for one in programs), sum(one.loaded_count for one in programs)
    logger.info("ready in %.1f s: %d programs compiled, %d from the store", seconds, compiled, loaded)
    return seconds
