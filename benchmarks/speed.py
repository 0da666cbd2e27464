"""How long does a step take, and how much memory? Ours beside others', and methods beside LoRA.

    python -m benchmarks.speed --quick
    python -m benchmarks.speed --geometry sd15 --device cuda --json speed.json

In one process, on one base of random weights, two contestants make a step each in turn; a ratio is
the median over such pairs, with a 95 % interval by bootstrap. What is compared with what:

{comparisons}

`small` is two levels of SD 1.5 at its widths, of one block each, for two CPU cores; `thin` has all
of SD 1.5's layers at a tenth of the widths, which leaves what a layer costs whatever its size, as
on a GPU that waits for Python; `sd15` and `sdxl` are whole.

Pictures and captions are encoded beforehand for all: diffusers' script runs its encoders in every
step, which is left out. Stock's node adapts every weight and bias that there is, and ours the
attention, unless it says otherwise; both have the same rank and dtype. On a CPU, ComfyUI has an
attention of its own, and the others torch's; with --torch-attention it has torch's, too. The views
that APT draws when it sees over-fitting are "encoded" by averaging pixels: each costs a picture's
preparation more (see costs). A cached APT goes through two batches, which its teacher has answered
before the clock runs. A ZO step is that of zo-high, beside one forward pass of such a network over
such a batch.

Memory is what a side needs besides the base's weights, which are the same for all: `kept` from step
to step (what is learned, and the optimiser's state), and `step`, the peak of all other tensors in a
step. On a GPU the allocator is asked, which also counts what operators need inside.

Costs, in LoRA steps: `picture` prepares one (fit, Stable Diffusion's VAE, the demo base's small
text encoder), `apply` patches a LoRA into all weights of a MODEL that it changes, `evaluation` is
one look of the monitor at four pictures.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .comfyui import comfyui
from .gain import machine
from .pairs import Pair, Ratio, interleaved, meter, ratio_of, timed

if TYPE_CHECKING:
    from .contestants import Base, Contestant

WARM_UP = 4  # steps: optimisers have their state, teachers have answered
# ratio -> (what is above, what is below the line)
RATIOS = {
    "lora_vs_bare": ("lora", "bare loop"),
    "lora_vs_stock": ("lora", "stock"),
    "lora_vs_diffusers": ("lora", "diffusers"),
    "apt_vs_lora": ("apt", "lora"),
    "apt_cached_vs_lora": ("apt, cached", "lora"),
    "bnn_vs_lora": ("bnn", "lora"),
    "para_vs_lora": ("para", "lora, para's layers"),
    "a3ft_vs_attention": ("a3ft", "attention"),
    "zo_vs_forward": ("zo", "forward"),
}
MORE = {
    "lora_everywhere_vs_stock": ("lora, all layers", "stock"),
    "lora_vs_stock_checkpointed": ("lora, checkpointed", "stock, checkpointed"),
    "para_vs_lora_at_defaults": ("para", "lora"),
}
COSTS = {
    "picture": ("picture", "lora"),
    "apply": ("apply", "lora"),
    "evaluation": ("evaluation", "lora"),
}
TARGETS = {  # at most
    "lora_vs_bare": 1.05,
    "lora_vs_stock": 1.0,
    "lora_everywhere_vs_stock": 1.0,
    "apt_vs_lora": 1.6,
    "apt_cached_vs_lora": 1.3,
    "bnn_vs_lora": 1.1,
    "para_vs_lora": 1.15,
    "a3ft_vs_attention": 1.35,
    "zo_vs_forward": 2.1,
}
PACKAGES = ("torch", "diffusers", "peft", "accelerate")


def contestants() -> "dict[str, Callable[[Base], Contestant]]":
    """Return what makes each contestant, by name."""
    from .contestants import Forward, Ours
    from .costs import Apply, Evaluate, Picture
    from .rivals import Bare, Diffusers, Stock

    return {
        "lora": partial(Ours, method="lora"),
        "bare loop": Bare,
        "stock": Stock,
        "diffusers": Diffusers,
        "apt": partial(Ours, method="apt"),
        "apt, cached": partial(Ours, method="apt", teacher_cache=2),
        "bnn": partial(Ours, method="bnn"),
        "para": partial(Ours, method="para", rank=4),
        "lora, para's layers": partial(Ours, method="lora", layers="all but cross-attention"),
        "attention": partial(Ours, method="attention"),
        "a3ft": partial(Ours, method="a3ft"),
        "zo": partial(Ours, method="selective_zo", branches="zo-high"),
        "forward": Forward,
        "lora, all layers": partial(Ours, method="lora", layers="all"),
        "lora, checkpointed": partial(Ours, method="lora", checkpointed=True),
        "stock, checkpointed": partial(Stock, gradient_checkpointing=True),
        "picture": Picture,
        "apply": Apply,
        "evaluation": Evaluate,
    }


@dataclass(frozen=True)
class Measured:
    """What a run of the benchmark found."""

    pairs: Mapping[str, Sequence[Pair]]
    memory: Mapping[str, Mapping[str, int]]
    trained: Mapping[str, int]  # numbers that learn

    def ratios(self, names: Iterable[str]) -> dict[str, Ratio]:
        """Return the ratios of some comparisons that were made."""
        return {name: ratio_of(self.pairs[name]) for name in names if name in self.pairs}


def measure(base: "Base", comparisons: Mapping[str, tuple[str, str]], rounds: int) -> Measured:
    """Warm all contestants up, measure their memory, and time them in turn."""
    device, makers = base.plan.device, contestants()
    made: dict[str, Contestant] = {}
    try:
        for name in dict.fromkeys(name for pair in comparisons.values() for name in pair):
            say(f"warming up: {name}")
            made[name] = makers[name](base)
            for _ in range(WARM_UP):
                made[name].step()
        memory = {name: memory_of(each, device) for name, each in made.items()}

        def seconds(name: str) -> float:
            return timed(made[name].step, device)

        pairs = interleaved(comparisons, seconds, rounds, say)
        return Measured(pairs, memory, {name: each.trained() for name, each in made.items()})
    finally:
        for each in made.values():
            each.close()


def memory_of(contestant: "Contestant", device: torch.device) -> dict[str, int]:
    """Return the bytes that a contestant keeps, and the peak of those of a step."""
    contestant.rest()
    follow = meter(device)
    contestant.step(follow)
    kept = contestant.kept()
    return {"kept": kept, "step": follow.peak, "peak": kept + follow.peak}


def report(measured: Measured, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is written as JSON."""
    ratios, more = measured.ratios(RATIOS), measured.ratios(MORE)
    costs = measured.ratios(COSTS)
    return {
        **facts,
        "ratios": {name: ratio.median for name, ratio in ratios.items()},
        "intervals": {n: [r.low, r.high] for n, r in (ratios | more | costs).items()},
        "more_ratios": {name: ratio.median for name, ratio in more.items()},
        "costs": {name: ratio.median for name, ratio in costs.items()},
        "seconds": {n: list(r.seconds) for n, r in (ratios | more | costs).items()},
        "memory": measured.memory,
        "trained": measured.trained,
        "pairs": {name: len(pairs) for name, pairs in measured.pairs.items()},
    }


def table(result: Mapping[str, Any]) -> str:
    """Write the Markdown tables: times and memory."""
    lines = ["| | steps take | 95 % interval | seconds | target |", "|---|---|---|---|---|"]
    every = {**result["ratios"], **result["more_ratios"], **result["costs"]}
    for name, ratio in every.items():
        low, high = result["intervals"][name]
        above, below = {**RATIOS, **MORE, **COSTS}[name]
        seconds = " : ".join(f"{value:.3g}" for value in result["seconds"][name])
        target = TARGETS.get(name)
        wanted = "" if target is None else f"{'met' if ratio <= target else 'MISSED'}: {target:g}"
        lines.append(
            f"| {above} : {below} | {ratio:.3f} | {low:.3f} to {high:.3f} | {seconds} | {wanted} |"
        )
    lines += ["", "| MiB besides the base | kept | in a step | together | trained |"]
    lines += ["|---|---|---|---|---|"]
    for name, memory in result["memory"].items():
        cells = " | ".join(f"{memory[key] / 2**20:.1f}" for key in ("kept", "step", "peak"))
        lines.append(f"| {name} | {cells} | {result['trained'][name]:,} |")
    return "\n".join(lines)


def say(text: str) -> None:
    """Tell how far it is."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; defaults depend on the device."""
    about = "\n".join(f"    {name:20}{a} : {b}" for name, (a, b) in {**RATIOS, **MORE}.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=(__doc__ or "").format(comparisons=about),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--geometry", choices=("demo", "thin", "small", "sd15", "sdxl"))
    parser.add_argument("--device", default=usual)
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU")
    parser.add_argument("--rank", type=int, default=16, help="of all LoRAs; PaRa's is 4")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--resolution", type=int, help="default: the geometry's own")
    parser.add_argument("--pairs", type=int, help="rounds; default: 30, with --quick 10")
    parser.add_argument("--only", help="comparisons, with commas between; default: all")
    parser.add_argument("--quick", action="store_true", help="pictures of half the size, 10 pairs")
    parser.add_argument(
        "--torch-attention", action="store_true", help="for ComfyUI's own node, as on a GPU"
    )
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args(arguments)
    gpu = options.device != "cpu"
    options.geometry = options.geometry or ("sd15" if gpu else "small")
    options.precision = options.precision or ("bf16" if gpu else "fp32")
    options.pairs = options.pairs or (10 if options.quick else 30)
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the command line asks for."""
    from .contestants import Base, Plan
    from .stock import GEOMETRIES, silent

    silent()
    geometry = GEOMETRIES[options.geometry]
    resolution = options.resolution or geometry.resolution // (2 if options.quick else 1)
    plan = Plan(
        geometry,
        torch.device(options.device),
        options.precision,
        options.rank,
        options.batch,
        resolution,
    )
    known = {**RATIOS, **MORE, **COSTS}
    chosen = options.only.split(",") if options.only else list(known)
    say(f"building {options.geometry} at {resolution} pixels on {options.device}")
    measured = measure(Base.of(plan), {name: known[name] for name in chosen}, options.pairs)
    asked = {name: getattr(options, name) for name in ("geometry", "device", "rank", "batch")}
    facts = {
        "machine": f"{machine()}, {torch.get_num_threads()} threads",
        "command": "",
        "versions": {name: version(name) for name in PACKAGES} | {"comfyui": comfyui_version()},
        "plan": asked | {"precision": options.precision, "resolution": resolution},
    }
    return report(measured, facts)


def comfyui_version() -> str:
    """Return ComfyUI's version."""
    from comfyui_version import __version__

    return __version__


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and save."""
    options = parsed(arguments)
    with comfyui(options.device == "cpu", options.torch_attention):
        result = run(options)
    words = sys.argv[1:] if arguments is None else arguments
    result["command"] = " ".join(["python -m benchmarks.speed", *words])
    print(table(result))
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
