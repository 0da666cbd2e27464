"""Every method on several unseen subjects and seeds: one table, one picture grid.

    python -m benchmarks.quality --subjects 101,102,103,104 --seeds 0,1,2 --json quality.json

Each (method, subject, seed) is trained and sampled once by a headless ComfyUI and kept under
benchmarks/work/quality/, so an interrupted run goes on where it was, and a table can grow. Prints
a Markdown table of means, and one of the differences to LoRA on the same subjects and seeds: their
mean with its 95 % interval (Student's t over subjects, each the mean of its seeds). Who learns less
drifts less; so a third table compares each with LoRA at equal subject similarity, interpolated
between the base and LoRAs of three learning rates; PaRa with such LoRAs of its own rank and layers,
too. Cells that are more similar than all of these are left out: the table says how many remain.

The sampling noise follows from the seed of training, so that it is in the intervals as well.

    subject similarity   of "a zib totem …" with held-out pictures of the subject, mean cosine; its
                         prompts name backgrounds that it was not trained on
    class leak           the same similarity of "a totem …", with and without named parts
    subject following    share of what the subject's prompts name that their samples show
    other following      the same for prompts of other sprites
    prior drift          energy distance from the base's samples of "a totem …", prompt by prompt;
                         that of the base itself, from other noise, is its floor
    other drift          the same for other sprites
    diversity            mean distance of two samples of one prompt of the subject (LPIPS-like)
    nearest training     mean correlation of a sample's silhouette with the most alike training one
    nearest held-out     the same with as many held-out pictures: the difference is copying
    loss gap             stable loss on held-out pictures - on training ones, over the base's
                         held-out loss, less the same of the base
    corruption           log2 of the high-frequency energy of the subject's samples over that of
                         the base's samples from the same noise
    corruption, one step the same of latents predicted in one step, on held-out pictures
    noise                standard deviation of the grain in the subject's samples, in 1/255
    dead sigmas          share of BNN's sigmas that fell so low that they learn no more
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import torch
from PIL import Image

from headless import OverrideError, PromptFailed

from .cells import (
    CLASS_PROMPTS,
    MOST_PICTURES,
    OTHER_PROMPTS,
    Plan,
    Task,
    drawn,
    measure_memory,
    memory_file,
)
from .configurations import (
    ABLATIONS,
    BASE,
    BASELINE,
    CONFIGURATIONS,
    MAIN,
    TUNING_SUBJECTS,
    configuration,
)
from .options import number, numbers
from .provenance import warn_of_mixed
from .reports import Judgement, Tasks, finite, of_each_name, read_judgements, report
from .servers import Worker, share_out, workers
from .tables import markdown, sheet

CACHE = Path(__file__).parent / "work" / "quality"
TUNING = {"subjects": ",".join(map(str, TUNING_SUBJECTS)), "seeds": "0"}
QUICK = {"subjects": "101", "seeds": "0", "steps": 80, "samples": 2}


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, compute what is missing, print and save."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parsed(arguments)
    plan = Plan(
        steps=options.steps,
        batch_size=options.batch_size,
        pictures=options.pictures,
        samples=options.samples,
        trajectory=tuple(numbers(options.trajectory)) if options.trajectory else (),
    )
    tasks = {
        (name, subject, seed): Task(configuration(name), subject, seed, plan)
        for seed, subject in product(numbers(options.seeds), numbers(options.subjects))
        for name in chosen(options)
    }
    known = read_judgements(options.known, plan) if options.known else []
    unknown = {label: task for label, task in tasks.items() if not is_known(task, known)}
    failed = []
    if not options.only_kept:
        failed = compute(unknown, options.cache, options.servers)
        measure_memories(tasks, options.cache, options.servers)
    result = report(tasks, options.cache, known)
    if not result["code"]:
        raise SystemExit(f"{options.cache} holds none of these cells: run without --only-kept")
    result["command"] = shlex.join(["python", "-m", "benchmarks.quality", *arguments])
    warn_of_mixed(result["code"])
    text = markdown(result)
    print(text)
    if options.json:
        options.json.write_text(json.dumps(finite(result), indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(text)
    if options.sheet:
        picture(tasks, options.cache).save(options.sheet, optimize=True)
    return 1 if failed else 0


def parsed(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; what it gives counts more than what --quick and --tuning stand for."""
    known = parser()
    asked = known.parse_args(arguments)
    known.set_defaults(**(QUICK if asked.quick else {}) | (TUNING if asked.tuning else {}))
    return known.parse_args(arguments)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--subjects", default="101,102,103,104", help="seeds of the characters")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of training")
    parser.add_argument(
        "--methods",
        help="instead of the main ones, and LoRA; what is compared at equal similarity needs "
        f"lora-slow and lora-fast too. Of: {', '.join(CONFIGURATIONS)}; with other settings: "
        "bnn@sigma=0.1+learning_rate=1e-4, which goes beside lora@learning_rate=1e-4",
    )
    parser.add_argument(
        "--no-lora", action="store_true", help="with --methods: these alone, without LoRA"
    )
    parser.add_argument("--ablations", action="store_true", help="the variants of methods as well")
    parser.add_argument("--steps", type=int, default=Plan.steps, help="training steps")
    parser.add_argument("--batch-size", type=int, default=Plan.batch_size)
    parser.add_argument(
        "--pictures",
        type=number(1, MOST_PICTURES),
        default=Plan.pictures,
        help=f"to train on, up to {MOST_PICTURES}: the other backgrounds are asked for",
    )
    parser.add_argument(
        "--samples", type=number(2, 64), default=Plan.samples, help="pictures of each prompt"
    )
    parser.add_argument(
        "--trajectory", metavar="STEPS", help="sample at these steps too, multiples of the first"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"a small version, under 10 minutes: {said(QUICK)}, where not given",
    )
    parser.add_argument(
        "--tuning",
        action="store_true",
        help=f"on subjects that are never reported: {said(TUNING)}, where not given",
    )
    parser.add_argument(
        "--only-kept", action="store_true", help="train nothing: show what is there"
    )
    parser.add_argument("--servers", type=int, default=default_servers(), help="at a time")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where cells are kept")
    parser.add_argument(
        "--known",
        type=Path,
        metavar="FILE",
        help="take cells that are in this result (--json) from it: a table grows elsewhere",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--sheet", type=Path, help="where to save a picture of the samples (PNG)")
    return parser


def said(options: dict[str, object]) -> str:
    """Write options as on the command line."""
    return " ".join(f"--{name} {value}" for name, value in options.items())


def default_servers() -> int:
    """Return one server per core, or one alone on a GPU."""
    return 1 if torch.cuda.is_available() else min(4, os.cpu_count() or 1)


def chosen(options: argparse.Namespace) -> list[str]:
    """Return the names of the rows to compute; the baseline too, if asked for no other."""
    default = [*MAIN, *(ABLATIONS if options.ablations else ())]
    names = options.methods.split(",") if options.methods else default
    unknown = [name for name in names if name.partition("@")[0] not in CONFIGURATIONS]
    if unknown:
        raise SystemExit(f"--methods: no {', '.join(unknown)}; of: {', '.join(CONFIGURATIONS)}")
    if not options.no_lora and not any(name.startswith(f"{BASELINE}@") for name in names):
        names = [BASELINE, *names]
    return [name for name in dict.fromkeys(names) if name != BASE]


def compute(tasks: Tasks, cache: Path, servers: int) -> list[str]:
    """Make the cells that are missing; return what failed, which is said and does not end it."""
    named = {f"base {task.seed}": task.base for task in tasks.values()}
    named |= {" ".join(map(str, label)): task for label, task in tasks.items()}
    wanted = {task.key: (label, task) for label, task in named.items()}  # rows may be alike
    missing = {label: task for label, task in wanted.values() if task.load(cache) is None}
    if not missing:
        return []
    print(f"{len(wanted) - len(missing)} cells are there, {len(missing)} to do", file=sys.stderr)

    def one(worker: Worker, label: str) -> tuple[str, str]:
        try:
            missing[label].make(worker, cache)
        except (PromptFailed, OverrideError) as error:
            return label, str(error)
        return label, ""

    failed = []
    with workers(min(servers, len(missing))) as started:
        for number, (label, error) in enumerate(share_out(started, one, missing), 1):
            note = f": FAILED: {error}" if error else ""
            print(
                f"{time.strftime('%H:%M:%S')} {number}/{len(missing)} {label}{note}",
                file=sys.stderr,
            )
            failed += [label] if error else []
    return failed


def measure_memories(tasks: Tasks, cache: Path, servers: int) -> None:
    """Measure the peak memory of every row once; a GPU's is in each cell."""
    if torch.cuda.is_available():
        return
    missing = {
        name: task
        for name, task in of_each_name(tasks).items()
        if task.load(cache) is not None and not memory_file(task, cache).exists()
    }

    def one(name: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} memory of {name}", file=sys.stderr)
        measure_memory(missing[name], cache)

    with ThreadPoolExecutor(servers) as pool:
        list(pool.map(one, missing))


def is_known(task: Task, known: Iterable[Judgement]) -> bool:
    """Tell whether a cell was judged elsewhere."""
    return any(one.key == task.key for one in known)


def picture(tasks: Tasks, cache: Path) -> Image.Image:
    """Draw the sheet of the first subject and seed that are there: two samples of a prompt."""
    there = {label: task for label, task in tasks.items() if task.load(cache) is not None}
    (_, subject, seed), task = next(iter((there or tasks).items()))
    plan = task.plan
    prompts = [*plan.subject_prompts(subject)[:2], *CLASS_PROMPTS[1:3], *OTHER_PROMPTS[:2]]
    heads = [short(text) for text in prompts for _ in range(2)]
    rows = {}
    named = {(BASE, subject, seed): task.base} | dict(tasks)
    for (name, *which), task in named.items():
        cell = task.load(cache) if which == [subject, seed] else None
        if cell is not None:
            step = 0 if name == BASE else plan.steps
            samples = cell.pictures(step, prompts).unflatten(0, (len(prompts), -1))
            rows[name] = samples[:, :2].flatten(0, 1)
    return sheet(rows, drawn(subject, plan.pictures), heads)


def short(prompt: str) -> str:
    """Return the words of a prompt that tell it from others, for a narrow column."""
    words = prompt.replace("background", "").replace("a ", "", 1).split()
    return " ".join(words[:3]) + (" …" if len(words) > 3 else "")


if __name__ == "__main__":
    sys.exit(main())
