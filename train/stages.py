"""Studies of many commands: each makes a file or folder after others; what is there is not made again."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

from convert.progress import progress_bar
from convert.stopping import cleaned_up_when_stopped
from dit_jax.config import UserError

MODULES = {
    "dit-adapt": "infer.adapt",
    "dit-eval": "infer.evaluate",
    "dit-bench": "infer.plan_bench",
    "dit-prune": "infer.prune",
    "dit-calibrate": "infer.calibrate",
    "dit-convert": "convert.cli",
    "dit-encode": "train.encode",
    "dit-train": "train.cli",
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A command that makes a file or folder, after others."""

    name: str
    makes: Path
    command: tuple[str, ...]
    after: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        """The command by this Python."""
        first, *rest = self.command
        if first == "python":
            return [sys.executable, *rest]
        return [sys.executable, "-m", MODULES[first], *rest]


def chosen(all_stages: Sequence[Stage], names: str | None) -> list[Stage]:
    """These stages (all that no other comes after) and what they need, in order; none for the sake of what is there.
    UserError for a name that is none."""
    by_name = {stage.name: stage for stage in all_stages}
    before = {name for stage in all_stages for name in stage.after}
    waiting = [name for name in by_name if name not in before]
    if names is not None:
        waiting = [name.strip() for name in names.split(",")]
    wanted: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in by_name:
            raise UserError(f"--only names {name!r}: expected some of {', '.join(by_name)}")
        if name not in wanted and not by_name[name].makes.exists():
            wanted.add(name)
            waiting += by_name[name].after
    return [stage for stage in all_stages if stage.name in wanted]


def run_all(wanted: Sequence[Stage], jobs: int, logs: Path) -> str | None:
    """Runs what is not there yet, each after what it needs; a sentence about the first that failed, if one did.

    An interrupt or a polite kill stops the commands that run too, and raises SystemExit.
    """
    logs.mkdir(parents=True, exist_ok=True)
    processes: set[subprocess.Popen[bytes]] = set()
    by_name = {stage.name: stage for stage in wanted}
    order = TopologicalSorter({stage.name: [name for name in stage.after if name in by_name] for stage in wanted})
    order.prepare()
    running: dict[Future[int], str] = {}
    with (
        cleaned_up_when_stopped(),
        ThreadPoolExecutor(jobs) as pool,
        _stopped_with_us(pool, processes),
        progress_bar(total=len(wanted), unit="part") as bar,
    ):
        while order.is_active():
            for name in order.get_ready():
                running[pool.submit(_run, by_name[name], logs, processes)] = name
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                name = running.pop(future)
                if code := future.result():
                    for other in running:
                        other.cancel()
                    return f"{name} ended with {code}, expected 0: see {logs / name}.log, then run this again"
                order.done(name)
                bar.set_postfix_str(name)
                bar.update()
    return None


@contextlib.contextmanager
def _stopped_with_us(pool: ThreadPoolExecutor, processes: set[subprocess.Popen[bytes]]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(processes):
            process.terminate()
        raise


def _run(stage: Stage, logs: Path, processes: set[subprocess.Popen[bytes]]) -> int:
    if stage.makes.exists():
        return 0
    with (logs / f"{stage.name}.log").open("a") as log:
        print(shlex.join(stage.command), file=log, flush=True)
        process = subprocess.Popen(stage.arguments, stdout=log, stderr=subprocess.STDOUT)
        processes.add(process)
        code = process.wait()
        processes.discard(process)
        return code
