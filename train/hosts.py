"""Several processes of one run, one a host: how they find each other, and wait for each other."""

from __future__ import annotations

import os

import jax
from orbax.checkpoint import multihost

from dit_jax.config import UserError

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
TASKS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
ALONE = "coordinator_address should be defined"  # what jax says where it finds no cluster
DAY = 24 * 3600


def join() -> None:
    """Joins the other processes of the run, if there are any; must come before anything that asks for devices.

    On TPU machines and the clusters that jax knows they find each other (on Slurm and with Open MPI one task has one
    GPU, several tasks are one run); anywhere else by the environment variables JAX_COORDINATOR_ADDRESS (host:port of
    the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID. UserError for only some of them, or for what is no number.
    """
    if ADDRESS in os.environ:
        count, number = (_number(name) for name in (COUNT, NUMBER))
        if not 0 <= number < count:
            raise UserError(
                f"{NUMBER} is {number}, expected 0 to {COUNT} - 1 = {count - 1}: number the processes from 0"
            )
        jax.distributed.initialize(os.environ[ADDRESS], count, number, cluster_detection_method="deactivate")
        return
    if any(os.environ.get(name) == "1" for name in TASKS):
        return
    try:
        jax.distributed.initialize()
    except ValueError as error:
        if ALONE not in str(error):
            raise


def wait_for_all(name: str) -> None:
    """Returns when every process of the run has come here, a day later at most; the `name` is used once."""
    if jax.process_count() > 1:
        multihost.sync_global_processes(name, timeout=DAY, processes=set(range(jax.process_count())))


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{ADDRESS} is set and {name} is {text!r}, expected a whole number: set all three variables")
    return int(text)
