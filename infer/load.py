"""`dit-load`: sends a running server requests at a rate of its own, however slowly they are answered, and tells how
each ended."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from convert.progress import progress_bar
from dit_jax.config import UserError
from infer import load_report, media
from infer.access import keys_in
from infer.bench_page import check_plotting
from infer.load_client import ask, connected
from infer.load_loops import Ask, Capacity, Record, closed_loop, open_loop
from infer.load_mix import Mix, Shares, read_mix
from infer.load_watch import Memory, check_process, metric_changes, read_metrics, settled_metrics
from infer.prompts_file import read_prompts

EPILOG = """\
Requests come at random (a Poisson process) and are sent when they are due. They ask for every model, shape and quality
that /v1/models lists, as images (whole, by URL or streamed) and videos (JSON or forms, polled or by events).
With --rate 80% the server is first kept busy by --workers for --calibrate seconds, and sound requests (all but --bad)
then come at 80 % of what it did.

Exit code 1: something went wrong that is not the client's fault: a 5xx, a broken connection, a job that failed or never
ended, a malformed request that was accepted, a compilation during the load.

examples:
  dit-load http://127.0.0.1:8000 --rate 0.5 --minutes 30 --cancels 0.1 --bad 0.1 --json load.json --plot load.png
  dit-load http://127.0.0.1:8000 --rate 80% --minutes 30 --cancels 0.1 --bad 0.1 --pid 4711 --most-growth 5
  dit-load http://127.0.0.1:8000 --rate 2 --mix demo-wan:128x128x17:high=3,demo-flux=1
"""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Requests a second, or where `relative` is true a share of what the server can do."""

    value: float
    relative: bool


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a load test has seen."""

    rate: float
    capacity: Capacity | None
    records: Sequence[Record]
    memory: Memory
    metrics: dict[str, float] | None


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        prog="dit-load", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("server", metavar="URL", help="such as http://127.0.0.1:8000")
    add("--rate", default="80%", help="requests a second, or a share of the server's capacity (default 80%%)")
    add("--minutes", type=float, default=1.0, metavar="M", help="how long requests are sent (default 1)")
    add("--cancels", type=float, default=0.0, metavar="SHARE", help="of requests that are given up (default 0)")
    add("--bad", type=float, default=0.0, metavar="SHARE", help="of requests that are malformed (default 0)")
    add("--mix", metavar="LIST", help="MODEL[:SHAPE[:QUALITY]]=WEIGHT, joined by commas (default: all kinds alike)")
    add("--prompts", metavar="FILE", help="a file with one prompt a line (default: captions of digits)")
    add("--seed", type=int, default=0, metavar="N", help="of all that is drawn (default 0)")
    add("--limit", type=float, default=600.0, metavar="S", help="seconds that a request may take (default 600)")
    add("--calibrate", type=float, default=60.0, metavar="S", help="seconds to find the capacity in (default 60)")
    add("--workers", type=int, default=8, metavar="N", help="requests at a time to find it with (default 8)")
    add("--pid", type=int, metavar="N", help="the server's process, on this machine: watch its memory")
    add("--most-growth", type=float, metavar="PERCENT", help="memory may grow so much after the warm-up (with --pid)")
    add("--no-metrics", action="store_true", help="ask for no /metrics: where several servers share one address")
    add("--api-key-file", metavar="FILE", help="keys of the server, one a line; the first is sent")
    add("--json", metavar="FILE", help="write the report and every request there")
    add("--plot", metavar="FILE", help="draw latency over time: a .png")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Entry point; exit code 1 where something is not the client's fault, 2 and one sentence for bad input."""
    options = parser().parse_args(arguments)
    try:
        report = load(options)
    except UserError as error:
        print(f"dit-load: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"dit-load: {error.filename or options.server}: {error.strerror or error}.", file=sys.stderr)
        return 2
    print(load_report.table(report))
    return 1 if report["outcomes"]["error"] or report["problems"] else 0


def load(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the parsed command; returns what `--json` holds, but for the single requests."""
    rate = _rate(options)
    _check(options)
    found = asyncio.run(_run(options, rate))
    report = _report(options, found)
    if options.json:
        whole = report | {"memory_samples": found.memory.samples, "requests": load_report.rows(found.records)}
        Path(options.json).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        from infer.load_plot import write_plot

        answered = f"{report['outcomes']['ok']} of {report['sent']} answered"
        title = f"{found.rate:.3g} requests/s for {options.minutes:g} min: {answered}"
        write_plot(Path(options.plot), title, found.records, found.memory.samples)
    return report


def _report(options: argparse.Namespace, found: Findings) -> dict[str, Any]:
    memory, most = found.memory.summary(), options.most_growth
    problems = load_report.problems(memory, found.memory.gone, found.metrics, None if most is None else most / 100)
    capacity = found.capacity
    if found.metrics is None and not options.no_metrics:
        problems.append("/metrics told nothing: expected those of dit-serve")
    if capacity is not None and capacity.errors:
        problems.append(f"{len(capacity.errors)} errors while the capacity was found, such as {capacity.errors[0]}")
    return {
        "server": options.server,
        "rate": found.rate,
        "minutes": options.minutes,
        "seed": options.seed,
        "shares": {"cancels": options.cancels, "bad": options.bad},
        "capacity": None if capacity is None else asdict(capacity) | {"rate": capacity.rate},
        **load_report.summary(found.records, options.minutes * 60),
        "memory": memory,
        "metrics": found.metrics,
        "problems": problems,
    }


async def _run(options: argparse.Namespace, rate: Rate) -> Findings:
    prompts = read_prompts(options.prompts) if options.prompts else None
    rng, shares = random.Random(options.seed), Shares(cancels=options.cancels, bad=options.bad)
    key = next(iter(keys_in(Path(options.api_key_file)).values())) if options.api_key_file else None
    async with connected(options.server.rstrip("/"), key) as http:
        mix = read_mix(await _models(http), options.mix, prompts, options.seed)

        def asking(arrival, patience):
            return ask(http, arrival, options.limit, patience)

        capacity = await _capacity(mix, options, asking) if rate.relative else None
        each = rate.value if capacity is None else rate.value * capacity.rate / (1 - shares.bad)
        arrivals = mix.arrivals(rng, each, options.minutes * 60, shares)
        before, memory = None if options.no_metrics else await read_metrics(http), Memory()
        watching = None if options.pid is None else asyncio.create_task(memory.watch(options.pid))
        with progress_bar(total=len(arrivals), desc="requests", unit="request") as bar:
            records = await open_loop(arrivals, asking, _counting(bar))
        after = None if options.no_metrics else await settled_metrics(http)
        if watching is not None:
            watching.cancel()
    return Findings(rate=each, capacity=capacity, records=records, memory=memory, metrics=metric_changes(before, after))


def _counting(bar) -> Callable[[Record], None]:
    counts: dict[str, int] = {}

    def told(record: Record) -> None:
        counts[record.outcome] = counts.get(record.outcome, 0) + 1
        bar.set_postfix(counts, refresh=False)
        bar.update()

    return told


async def _capacity(mix: Mix, options: argparse.Namespace, asking: Ask) -> Capacity:
    """What the server can do; UserError where it can do nothing."""
    print(f"dit-load: {options.workers} requests at a time, to find the capacity …", file=sys.stderr)
    rng = random.Random(options.seed + 1)
    capacity = await closed_loop(mix, rng, asking, options.workers, options.calibrate)
    if not capacity.answers:
        first = f", the first with {capacity.errors[0]!r}" if capacity.errors else ""
        raise UserError(
            f"no request was answered within {10 * options.calibrate:g} s, {len(capacity.errors)} failed{first}: "
            "expected some, to tell the capacity from; mend the server, or give --rate a number"
        )
    print(f"dit-load: the capacity is {capacity.rate:.3g} requests a second", file=sys.stderr)
    return capacity


async def _models(http: httpx.AsyncClient) -> Any:
    """What the server lists, once it is known to be ready."""
    try:
        ready = await http.get("/health/ready", timeout=10.0)
        answer = await http.get("/v1/models", timeout=10.0)
        if ready.status_code == 503:
            raise UserError(f"{http.base_url} is not ready: expected it to have compiled all; wait and try again")
        if answer.status_code in (401, 403):
            raise UserError(f"{http.base_url} asks for an API key: expected one of its own; name --api-key-file")
        return answer.raise_for_status().json()
    except (httpx.HTTPError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{http.base_url} lists no models ({error or type(error).__name__}): expected a running dit-serve; start "
            "it, or mend the URL"
        ) from None


def _rate(options: argparse.Namespace) -> Rate:
    text = options.rate
    try:
        value, relative = float(text.removesuffix("%")), text.endswith("%")
    except ValueError:
        value, relative = 0.0, False
    if not 0 < value < float("inf"):
        raise UserError(f"--rate {text!r} is no rate: expected requests a second such as 0.5, or 80%; write one")
    if relative and options.bad >= 1:
        raise UserError("--bad leaves no sound request to measure the capacity with: expected less than 1; lower it")
    return Rate(value=value / 100 if relative else value, relative=relative)


def _check(options: argparse.Namespace) -> None:
    if not options.server.startswith(("http://", "https://")):
        raise UserError(f"{options.server!r} is no server: expected a URL such as http://127.0.0.1:8000; write one")
    for name in ("minutes", "limit", "calibrate", "workers"):
        if not 0 < getattr(options, name) < float("inf"):
            raise UserError(f"--{name} is {getattr(options, name)}: expected a number above 0; leave it out")
    if min(options.cancels, options.bad) < 0 or options.cancels + options.bad > 1:
        raise UserError(
            f"--cancels {options.cancels:g} and --bad {options.bad:g} are no shares of all requests: expected numbers "
            "from 0 whose sum is at most 1; change them"
        )
    if options.most_growth is not None and options.pid is None:
        raise UserError("--most-growth is of a process' memory: expected --pid with it; name the server's process")
    if options.pid is not None:
        check_process(options.pid)
    if options.plot:
        if Path(options.plot).suffix.lower() != ".png":
            raise UserError(f"cannot draw {options.plot!r}: expected a name that ends in .png; change it")
        check_plotting()
    for path in filter(None, (options.json, options.plot)):
        media.make_room(path)


if __name__ == "__main__":
    sys.exit(main())
