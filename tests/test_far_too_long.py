"""Training far too long shows on the demo base: copied poses, lost prompts."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.overfit import run, scores
from benchmarks.servers import workers

pytestmark = pytest.mark.slow
LORA = {"rank": 32, "layers": "all", "batch_size": 2}


def test_a_lora_trained_far_too_long_copies_poses_and_loses_prompts():
    """In one run it takes 6,000 steps (README); two that are faster at one of it each stand in."""
    runs = [(600, 1.5e-3), (400, 3e-3)]
    with workers(len(runs)) as servers, ThreadPoolExecutor(len(runs)) as pool:

        def pictures(server, steps, rate):
            return run(server.comfy, 1, [steps], LORA | {"learning_rate": rate})

        copied, lost = pool.map(pictures, servers, *zip(*runs, strict=True))
    base, copies = scores(copied, "0"), scores(copied, "600")
    forgets = scores(lost, "400")
    print(base, copies, forgets, sep="\n")
    assert base["following_others"] == base["following_subject"] == 1.0
    assert abs(base["copying_training"] - base["copying_held_out"]) < 0.02
    assert copies["copying_training"] > base["copying_training"] + 0.15
    assert copies["copying_training"] > copies["copying_held_out"] + 0.05
    assert forgets["following_others"] < 0.8
