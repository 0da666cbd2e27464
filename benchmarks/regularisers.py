"""How large are APT's two regularisers beside the denoising loss, on the demo base?

    python -m benchmarks.regularisers --subjects 51,52,53
    python -m benchmarks.regularisers --subjects 51,52,53 --acting

Means over the 20 steps around step 100 (learning rate 1e-3, rank 16, 5 pictures, batches of 4):
L_DM, both distances, and their share of it with the default lambdas. Of a LoRA that no part of APT
holds back; with --acting of APT as its page advises it for this base, whose L_DM is weighed by
1 - gamma.
"""

import argparse
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from .comfyui import comfyui

if TYPE_CHECKING:
    from personalize.trainers.loop import Step

WINDOW = range(90, 110)  # steps
ADVISED = {"temperature": 50.0, "pad": "edge"}
HELD_BACK_BY_NOTHING = {"adaptive": False, "lambda_rs": 0.0, "lambda_aa": 0.0}


@dataclass(frozen=True)
class Sizes:
    """Means over the window, before lambdas."""

    denoising: float
    stabilization: float
    alignment: float


def measure(subject: int, acting: bool) -> Sizes:
    """Train on one subject; needs ComfyUI on the path."""
    from personalize.demo.world import subject_pictures
    from personalize.nodes.base import ModelBase
    from personalize.nodes.data import prepare
    from personalize.nodes.demo import BASE, load_base
    from personalize.nodes.request import Request
    from personalize.trainers.loop import train
    from personalize.trainers.methods.apt import APT, APTSettings

    model, clip, vae = load_base(BASE)
    drawn = subject_pictures(subject, 5)
    pictures = [torch.from_numpy(pixels).float() / 255 for pixels, _ in drawn]
    captions = ["\n".join(caption for _, caption in drawn)]
    request = Request(["zib"], captions, [""], resolution=[128], fit=["crop"], hold_out=[0])
    base = ModelBase(model)
    denoiser = base.denoiser("fp32")
    data = base.in_network_scale(prepare(request, pictures, [], clip, vae), denoiser)
    how = {"steps": WINDOW.stop, "learning_rate": 1e-3, "batch_size": 4, "rank": 16}
    settings = APTSettings(**how, **(ADVISED if acting else HELD_BACK_BY_NOTHING))
    steps = [step for step in train(APT(settings), denoiser, data) if step.index - 1 in WINDOW]
    return sizes(steps, settings.lambda_rs, settings.lambda_aa)


def sizes(steps: "list[Step]", lambda_rs: float, lambda_aa: float) -> Sizes:
    """Take the losses of steps apart."""
    rs, aa = (fmean(step.facts[name] for step in steps) for name in ("loss_rs", "loss_aa"))
    total = fmean(step.loss for step in steps)
    return Sizes(total - lambda_rs * rs - lambda_aa * aa, rs, aa)


def main() -> None:
    """Parse the command line, train, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.regularisers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--subjects", default="51,52,53")
    parser.add_argument("--acting", action="store_true", help="with all parts of APT")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with comfyui(cpu=True):
        from personalize.trainers.methods.apt import APTSettings

        defaults = APTSettings()
        print("| subject | L_DM | RS | AA | lambda RS / L_DM | lambda AA / L_DM |")
        print("|---" * 6 + "|")
        for subject in map(int, options.subjects.split(",")):
            found = measure(subject, options.acting)
            shares = (
                defaults.lambda_rs * found.stabilization / found.denoising,
                defaults.lambda_aa * found.alignment / found.denoising,
            )
            numbers = found.denoising, found.stabilization, found.alignment
            cells = [f"{x:.4f}" for x in numbers] + [f"{share:.1%}" for share in shares]
            print(f"| {subject} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
