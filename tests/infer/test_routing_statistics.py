"""Shares of the runs in which a block is active."""

import numpy as np

from infer import load_pipeline
from infer.adapt import main
from infer.routing_statistics import plot_routing, routing_shares


def test_shares_by_block_and_timestep(text_experts, tmp_path):
    assert main(["--model", str(text_experts[0]), "--add", "router", "--out", str(tmp_path / "adapted")]) == 0
    pipe = load_pipeline(tmp_path / "adapted")
    prompts = ["a red cat", "the dog sleeps"]
    shares, timesteps = routing_shares(pipe, prompts, plan="routing:min=2:max=2", size=(32, 32), frames=5, steps=4)
    # Two blocks a model, both of which always run.
    np.testing.assert_array_equal(shares, np.ones((4, 2)))
    assert (np.diff(timesteps) < 0).all()
    plot_routing(shares, timesteps, tmp_path / "shares.png")
    assert (tmp_path / "shares.png").read_bytes().startswith(b"\x89PNG")
