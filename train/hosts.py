"""Several processes of one run, one a host: how they find each other."""

from __future__ import annotations

import os

import jax

from dit_jax.config import UserError

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

# Set by what launches a pod: the addresses of a slice's hosts, and that of the first slice where there are several.
HOSTS, FIRST_SLICE = "TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS"


def join() -> None:
    """Joins the other processes of the run, if there are any; must come before anything that asks for devices.

    On a TPU pod or a cluster that jax knows they find each other; anywhere else by the environment variables
    JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID. UserError for only some of
    them, or for what is no number.
    """
    if ADDRESS in os.environ:
        count, number = (_number(name) for name in (COUNT, NUMBER))
        if not 0 <= number < count:
            raise UserError(
                f"{NUMBER} is {number}, expected 0 to {COUNT} - 1 = {count - 1}: number the processes from 0"
            )
        jax.distributed.initialize(os.environ[ADDRESS], count, number)
    elif "," in os.environ.get(HOSTS, "") or FIRST_SLICE in os.environ:
        jax.distributed.initialize()


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{ADDRESS} is set and {name} is {text!r}, expected a whole number: set all three variables")
    return int(text)
