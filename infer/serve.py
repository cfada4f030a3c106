"""`dit-serve`: images and videos over HTTP, from programs that are compiled before the first request.

dit-serve --model demo-wan --model demo-flux
dit-serve --model ./wan --buckets buckets.json --mesh context=4 --host 0.0.0.0 --api-key-file keys.txt

It speaks OpenAI's API for images (`POST /v1/images/generations`) and videos (`POST /v1/videos`), shows a page at `/`,
and stops in order on SIGTERM: what runs is finished, what waits is taken up again by the next start.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from dit_jax.config import UserError

WRITING = 10  # seconds for results that are done to be written down


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        prog="dit-serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add(
        "--model", action="append", required=True, help="a checkpoint folder, hub id, demo-wan or demo-flux; repeatable"
    )
    add(
        "--buckets", default="demo", metavar="FILE",
        help="what is compiled and served: a JSON file, or a preset by name (default demo: of demo-wan and demo-flux)",
    )  # fmt: skip
    add("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1); any other needs --api-key-file")
    add("--port", type=int, default=8000, help="port to listen at (default 8000; 0 takes a free one)")
    add("--api-key-file", type=Path, metavar="FILE", help="keys that may ask, one a line; left out, anybody may")
    add("--per-minute", type=int, metavar="N", help="requests that one key may make a minute (default: no limit)")
    add("--data", type=Path, metavar="DIR", help="folder of jobs and results (default: in the user's cache)")
    add("--quota", type=float, default=10.0, metavar="GIB", help="of the results kept there (default 10 GiB)")
    add("--lifetime", type=float, default=24.0, metavar="HOURS", help="of a result (default 24)")
    add("--queue", type=int, default=64, metavar="N", help="samples that may wait (default 64); more get 429")
    add("--window", type=float, default=0.02, metavar="S", help="seconds a sample waits for others to share its batch")
    add("--active", type=int, default=2, metavar="N", help="batches that take turns on the devices (default 2)")
    add("--patience", type=float, default=30.0, metavar="S", help="seconds that running work has when it is to stop")
    add("--mesh", metavar="AXES", help="devices by axis, such as data=2,context=4")
    add("--no-store", action="store_true", help="compile at every start instead of keeping compiled programs on disk")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Entry point; exit code 2 and one sentence for bad input."""
    options = parser().parse_args(arguments)
    try:
        return serve(options)
    except UserError as error:
        print(f"dit-serve: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"dit-serve: {error.filename or options.host}: {error.strerror or error}.", file=sys.stderr)
        return 2


def serve(options: argparse.Namespace) -> int:
    """Runs until SIGTERM or SIGINT."""
    began = time.perf_counter()
    _check(options)
    _check_installed()
    import uvicorn

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    listening = _listening(options)
    server, warm = _server(options)
    from infer.server import build_app

    host, port = listening.getsockname()[:2]
    where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    logger = logging.getLogger(__name__)
    logger.info("models loaded in %.1f s; listening at %s", time.perf_counter() - began, where)
    config = uvicorn.Config(
        build_app(server, warm), log_level="warning", timeout_graceful_shutdown=int(options.patience) + WRITING
    )

    class Stopping(uvicorn.Server):
        """Says that it is not ready as soon as it is told to stop, and ends well: uvicorn would raise the signal again
        when all is over."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            for kind in (signal.SIGINT, signal.SIGTERM):
                signal.signal(kind, self.handle_exit)
            yield

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            server.stop()
            super().handle_exit(sig, frame)

    Stopping(config).run(sockets=[listening])
    code = 1 if server.failed else 0
    if any(thread.name in ("engine", "preparing") for thread in threading.enumerate()):
        # What the devices or the compiler are in the middle of cannot be stopped, and nobody waits for it.
        logging.shutdown()
        os._exit(code)
    return code


def _listening(options: argparse.Namespace) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot listen at {options.host}, port {options.port} ({error}): expected an address of this machine and "
            "a free port; name another --port, or stop what has it"
        ) from None


def _check(options: argparse.Namespace) -> None:
    if options.api_key_file is None and not _is_loopback(options.host):
        raise UserError(
            f"--host {options.host} can be reached from other machines: expected --api-key-file with it; name one, or "
            "leave out --host"
        )
    for name in ("queue", "active"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}: expected a whole number from 1; leave it out")
    if options.per_minute is not None and options.per_minute < 1:
        raise UserError(f"--per-minute is {options.per_minute}: expected a whole number from 1; leave it out")


def _check_installed() -> None:
    """UserError without the `serve` extra."""
    for name in ("uvicorn", "fastapi", "python_multipart", "prometheus_client"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f'a server needs {name}, which is not installed: pip install "dit-jax[serve]"')


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _server(options: argparse.Namespace):
    from functools import partial

    from convert.progress import progress_bar
    from dit_jax.sharding import make_mesh, parse_mesh
    from infer.access import Access, KeyLimits
    from infer.buckets import read_buckets
    from infer.caches import cache_folder
    from infer.engine import Engine, EngineOptions
    from infer.journal import Journal
    from infer.loading import load_pipeline
    from infer.server import Server
    from infer.server_metrics import ServerMetrics
    from infer.warming import warm, with_store

    buckets = read_buckets(options.buckets, options.model)
    access = Access(options.api_key_file, KeyLimits(per_minute=options.per_minute))
    mesh = make_mesh(parse_mesh(options.mesh)) if options.mesh else None
    pipelines = {name: load_pipeline(name, mesh=mesh) for name in options.model}
    if not options.no_store:
        with_store(pipelines)
    for name, pipe in pipelines.items():
        list(buckets[name].jobs(pipe))  # what cannot be served is told of now
    metrics = ServerMetrics()
    shared = EngineOptions(window=options.window, active=options.active, queue=options.queue)
    engine = Engine(pipelines, buckets, shared, metrics.observe)
    journal = Journal(
        options.data or cache_folder("jobs"), quota_bytes=int(options.quota * 2**30),
        lifetime_seconds=options.lifetime * 3600,
    )  # fmt: skip
    server = Server(engine=engine, journal=journal, access=access, metrics=metrics, patience=options.patience)
    bar = progress_bar(unit="program set", desc="compiling")

    def told(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return server, partial(warm, pipelines, buckets, told, server.stopping.is_set)


if __name__ == "__main__":
    sys.exit(main())
