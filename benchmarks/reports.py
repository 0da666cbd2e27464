"""What all cells that are there say together: means, paired differences, and the way there."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .cells import Cell, Plan, Task, memory_file
from .comparisons import Table, at_equal_similarity, ladder, mean, mean_scores, paired
from .configurations import BASE, BASELINE, configuration
from .gain import machine
from .scores import Scores, scores, subject_scores

Tasks = Mapping[tuple[str, int, int], Task]  # by row, subject, seed
History = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Judgement:
    """What a training's pictures and history say; the base's, for one subject and noise."""

    method: str  # the row's name
    subject: int
    seed: int
    key: str  # of the cell
    code: str  # hash of what made it
    scores: Scores
    on_the_way: dict[str, Scores]  # by step
    gamma: dict[str, list[float]]  # by step; {} where it was not measured

    @classmethod
    def of(cls, name: str, task: Task, cell: Cell, base: Cell) -> "Judgement":
        """Judge a cell beside the base's of the same noise."""
        steps = task.plan.steps_on_the_way if cell is not base else ()
        return cls(
            name,
            task.subject,
            task.seed,
            (task.base if cell is base else task).key,
            cell.code,
            scores(cell, base, task),
            {str(step): subject_scores(cell, base, task, step) for step in steps},
            gamma_of(cell.history),
        )


def judge(tasks: Tasks, cache: Path, known: Iterable[Judgement] = ()) -> list[Judgement]:
    """Judge every cell that is there, and the bases; of others return what is known."""
    before = {(one.key, one.subject): one for one in known}
    bases = {task.seed: task.base.load(cache) for task in tasks.values()}
    named = {(BASE, task.subject, task.seed): task for task in tasks.values()} | dict(tasks)
    found = list[Judgement]()
    for (name, *_), task in named.items():
        base, its = bases[task.seed], task.base if name == BASE else task
        cell = its.load(cache)
        if cell is not None and base is not None:
            found.append(Judgement.of(name, task, base if name == BASE else cell, base))
        elif (its.key, task.subject) in before:
            found.append(replace(before[its.key, task.subject], method=name))
    return found


def read_judgements(path: Path, plan: Plan) -> list[Judgement]:
    """Read what a report holds of each cell; it must be of the same plan."""
    kept = json.loads(path.read_text())
    if "judged" not in kept or kept.get("plan") != as_json(plan):
        raise SystemExit(f"--known: {path} does not hold cells of this plan: {describe(plan)}")
    return [Judgement(**with_nans(one)) for one in kept["judged"]]


def as_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as it is read back from JSON."""
    return json.loads(json.dumps(asdict(plan)))


def table_of(judged: Iterable[Judgement]) -> Table:
    """Sort the scores by row; the base's comes first."""
    table: Table = {BASE: {}}
    for one in judged:
        table.setdefault(one.method, {})[one.subject, one.seed] = one.scores
    return table


def report(tasks: Tasks, cache: Path, known: Iterable[Judgement] = ()) -> dict[str, Any]:
    """Compare all cells that are there, and those that are known from elsewhere, as JSON."""
    judged, plan = judge(tasks, cache, known), next(iter(tasks.values())).plan
    trained = [one for one in judged if one.method != BASE]
    codes, table = Counter(one.code for one in trained), table_of(judged)
    methods = {name: {"cells": len(cells)} | mean_scores(cells) for name, cells in table.items()}
    for name, task in of_each_name(tasks).items():
        kept = memory_file(task, cache)
        if name in methods and kept.exists():
            methods[name] |= json.loads(kept.read_text())
    return {
        "machine": machine(),
        "cells": f"{len(trained)} trainings; {describe(plan)}",
        "code": dict(codes),
        "methods": methods,
        **differences(table),
        "gamma": gammas(trained),
        **on_the_way(trained),
        "plan": as_json(plan),
        "judged": [asdict(one) for one in judged],
    }


def on_the_way(judged: Sequence[Judgement]) -> dict[str, Any]:
    """Return means and differences at every step of a trajectory."""
    steps: dict[str, Table] = defaultdict(lambda: defaultdict(dict))
    for one in judged:
        for step, row in one.on_the_way.items():
            steps[step][one.method][one.subject, one.seed] = row
    names = dict.fromkeys(one.method for one in judged if one.on_the_way)
    both = pairs({BASE: {}} | {name: {} for name in names})
    return {
        "trajectory": {
            name: {step: mean_scores(at[name]) for step, at in steps.items()} for name in names
        },
        "trajectory_differences": {
            f"{name} - {other}": {step: paired(at[name], at[other]) for step, at in steps.items()}
            for name, other in both
        },
    }


def of_each_name(tasks: Tasks) -> dict[str, Task]:
    """Return the first task of every row."""
    return {name: task for (name, _, _), task in reversed(list(tasks.items()))}


def pairs(table: Table) -> list[tuple[str, str]]:
    """Return who is compared with whom: all with the baseline, then with what each varies."""
    names = [name for name in table if name not in (BASE, BASELINE)]
    with_baseline = [(name, BASELINE) for name in names if BASELINE in table]
    others = {name: table.keys() - {BASELINE, name} for name in names}
    variants = [(name, other) for name in names for other in rivals(name) if other in others[name]]
    return with_baseline + variants


def rivals(name: str) -> list[str]:
    """Return what a row varies; for `bnn@sigma=0`, bnn, and what bnn varies so changed itself.

    What is not in the table is left out there.
    """
    row, _, changes = name.partition("@")
    varied = [configuration(name).against]
    return [*varied, f"{configuration(row).against}@{changes}"] if changes else varied


def differences(table: Table) -> dict[str, Any]:
    """Compare all pairs, as they are and at equal similarity."""
    found: dict[str, dict[str, Any]] = {"paired": {}, "variants": {}, "matched": {}}
    counts = {}
    for name, other in pairs(table):
        label = f"{name} - {other}"
        which = ("paired", name) if other == BASELINE else ("variants", label)
        found[which[0]][which[1]] = paired(table[name], table[other])
        alike, remain = at_equal_similarity(table, name, other)
        if remain and name not in ladder(other):
            found["matched"][label], counts[label] = alike, remain
    return found | {"matched_cells": counts}


def gammas(judged: Iterable[Judgement]) -> dict[str, dict[str, list[float]]]:
    """Return the mean of APT's indicator over the runs of each row, by step and bin."""
    runs: dict[str, list[dict[str, list[float]]]] = defaultdict(list)
    for one in judged:
        if one.gamma:
            runs[one.method].append(one.gamma)
    return {
        name: {
            step: list(map(mean, zip(*(of[step] for of in each), strict=True))) for step in each[0]
        }
        for name, each in runs.items()
    }


def gamma_of(history: History) -> dict[str, list[float]]:
    """Return APT's indicator in every bin of timesteps, low ones first, at parts of a run."""
    lines = [line for line in history if "gamma_0" in line]
    shown = [lines[max(0, len(lines) * tenths // 10 - 1)] for tenths in (1, 2, 5, 10) if lines]
    return {str(int(line["step"])): bins_of(line) for line in shown}


def bins_of(line: Mapping[str, float]) -> list[float]:
    """Return the indicator in every bin, as a line of the history has it."""
    return [line[f"gamma_{bin}"] for bin in range(sum(key.startswith("gamma_") for key in line))]


def describe(plan: Plan) -> str:
    """Say what all cells share."""
    return (
        f"{plan.steps} steps of batch {plan.batch_size} on {plan.pictures} pictures, "
        f"{plan.samples} samples of a prompt"
    )


def finite(value: Any) -> Any:
    """Return JSON values with null for what is not a number, as strict readers want it."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def with_nans(value: Any) -> Any:
    """Return what `finite` was given: NaN for null."""
    if isinstance(value, dict):
        return {key: with_nans(part) for key, part in value.items()}
    return math.nan if value is None else value
