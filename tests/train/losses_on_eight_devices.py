"""What `test_losses_on_meshes.py` runs in a process of its own: losses of distillation and their gradients on eight
fake CPU devices, whose tokens are padded, and on one.

The devices must exist before jax starts, hence the process. Prints one JSON object: relative errors by loss, model and
mesh, of the value and of the gradients.
"""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from torch_twins import as_jax, batch_of, random_adapters, relative, router_of, twin

from dit_jax.methods.routing import Routing
from dit_jax.models import flux, wan
from dit_jax.sharding import batch_shardings, make_mesh, parse_mesh, replicated, shardings
from train.coredit_loss import CoreditSettings, coredit
from train.ddit_loss import ddit
from train.losses import FlowSettings
from train.pare_loss import PareSettings, pare
from train.step_distill_loss import StepDistillSettings, fake_score, step_distill

CASES = (
    ("pare", "wan", "fsdp=2,context=2,tensor=2"),
    ("held", "wan", "data=2,fsdp=2,context=2"),
    ("coredit", "flux", "data=2,context=4"),
    ("step_distill", "wan", "data=2,context=4"),
    ("fake_score", "flux", "data=2,fsdp=2,tensor=2"),
    ("ddit", "wan", "data=2,context=2,tensor=2"),
    ("ddit", "flux", "fsdp=2,context=4"),
)
AXES = {"wan": wan.AXES, "flux": flux.AXES}
ALIKE = ("router", "adapters")
KEY = jax.random.key(3)
ROUTING = Routing(least=2, most=3)
PARE = PareSettings(routing=ROUTING, sampled_blocks=2)
LOSSES = {
    "pare": partial(pare, settings=PARE),
    "held": partial(pare, settings=replace(PARE, flow=FlowSettings(first_frame_conditioning=0.5))),
    "coredit": partial(coredit, settings=CoreditSettings()),
    "step_distill": partial(step_distill, settings=StepDistillSettings(routing=ROUTING)),
    "fake_score": partial(fake_score, settings=StepDistillSettings(routing=ROUTING)),
    "ddit": partial(ddit, scale=2, settings=FlowSettings()),
}


def arguments(name, kind):
    """(trained, frozen, batch) of a loss."""
    student, batch = {"student": twin(kind, 1).model}, as_jax(batch_of(kind, empty=True))
    frozen = {"teacher": twin(kind, 0).model}
    if name == "coredit":
        return student, frozen, batch | {"skipped": jnp.arange(sum(frozen["teacher"].stacks))}
    if name == "ddit":
        return {"adapters": random_adapters(kind)}, frozen, batch
    routed = student | {"router": router_of(kind)}
    if name == "fake_score":
        return {"fake": twin(kind, 2).model}, routed, batch
    if name == "step_distill":
        frozen |= {"fake": twin(kind, 2).model}
    return routed, frozen, batch


def on_mesh(kind, mesh, models):
    """Models at their places; a router and adapters everywhere."""
    return {
        name: jax.device_put(model, replicated(mesh) if name in ALIKE else shardings(model, AXES[kind], mesh))
        for name, model in models.items()
    }


def main():
    errors = {}
    for name, kind, axes in CASES:
        trained, frozen, batch = arguments(name, kind)
        run = jax.jit(jax.value_and_grad(LOSSES[name], has_aux=True))
        (alone, _), gradients = run(trained, frozen, batch, KEY)
        mesh = make_mesh(parse_mesh(axes))
        with jax.set_mesh(mesh):
            rows = batch_shardings(batch, mesh) | ({"skipped": replicated(mesh)} if "skipped" in batch else {})
            models = on_mesh(kind, mesh, trained), on_mesh(kind, mesh, frozen)
            (found, _), sharded = run(*models, jax.device_put(batch, rows), KEY)
        errors[f"{name} {kind} {axes}"] = [relative(found, alone), relative(sharded, gradients)]
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
