"""Processes of one run, which find each other on a free port of this machine."""

import socket
import subprocess

from train.hosts import ADDRESS, COUNT, NUMBER


def joined(command, environment, count=2, cwd=None):
    """That many of a command, their output in pipes; a single one joins nobody."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for number in range(count):
        told = {ADDRESS: place, COUNT: str(count), NUMBER: str(number)} if count > 1 else {}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment | told, cwd=cwd, **pipes))
    return processes
