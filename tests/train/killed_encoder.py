"""Run by test_encoding.py: encodes pictures again and again, each time killed (SIGKILL) one system call later.

Prints how many times it was killed. After every kill, what has a name must be whole, and a run that nothing stops must
leave the very files of one that nothing ever stopped.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import fake_encoders

from train import encoding, shards
from train.buckets import Bucket
from train.captions_file import read_captions

encoding.encoder_hashes = fake_encoders.hashes


def encode(media, out):
    job = encoding.Job(
        out=out,
        media=media,
        captions=read_captions(media / "metadata.jsonl"),
        buckets=(Bucket(width=32, height=32, frames=1), Bucket(width=48, height=32, frames=1)),
        batch=2,
        portion=3,
        fps=0.0,
    )
    return encoding.Encoding(job, fake_encoders.FakeEncoders()).run(job.portions)


def kill_at(count):
    """Kills this process before the count-th of all calls that change the folder; a write is torn in two."""
    left = [count]

    def due():
        left[0] -= 1
        return left[0] == 0

    def torn(self, content, write=Path.write_bytes):
        if due():
            write(self, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, content)

    Path.write_bytes = torn

    def counted(call):
        def instead(self, *arguments, **options):
            if due():
                os.kill(os.getpid(), signal.SIGKILL)
            return call(self, *arguments, **options)

        return instead

    for owner, names in ((Path, ("replace", "unlink")), (shards.ShardWriter, ("write", "close"))):
        for name in names:
            setattr(owner, name, counted(getattr(owner, name)))


def in_child(work):
    """The exit code of `work` in a process of its own, or minus the signal that ended it.

    All that starts threads is done so: a process that has some must not fork.
    """
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def whole(folder):
    """Everything that has a name can be read."""
    for file in folder.glob(f"*{shards.SUFFIX}"):
        assert shards._records(file) > 0, file
    if (folder / shards.MANIFEST).exists():
        shards.open_shards(folder)


def age(folder):
    """An hour goes by for what is half-written: before, it could be another's that is at work."""
    for file in folder.rglob(".*.partial"):
        os.utime(file, (time.time() - 3700,) * 2)


def main(media, work):
    assert in_child(lambda: encode(media, work / "straight")) == 0
    expected = contents(work / "straight")
    kills = 0
    while True:
        out = work / "killed"
        shutil.rmtree(out, ignore_errors=True)

        def killed(out=out, count=kills + 1):
            kill_at(count)
            encode(media, out)

        code = in_child(killed)
        if code == 0:
            break
        assert code == -signal.SIGKILL, code
        kills += 1
        assert in_child(lambda out=out: whole(out)) == 0
        # The second run is killed too, a little later than the first; only the third comes to its end.
        again = in_child(lambda out=out, count=kills // 2 + 1: (kill_at(count), encode(media, out)))
        assert again in (0, -signal.SIGKILL), again
        assert in_child(lambda out=out: whole(out)) == 0
        age(out)
        assert in_child(lambda out=out: encode(media, out)) == 0
        assert contents(out) == expected, (kills, set(contents(out)) ^ set(expected))
    print(kills)


main(Path(sys.argv[1]), Path(sys.argv[2]))
