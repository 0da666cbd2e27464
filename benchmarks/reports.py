"""What all cells that are there say together: means, paired differences, and the way there."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cells import Plan, Task, memory_file
from .comparisons import Table, at_equal_similarity, ladder, mean, mean_scores, paired
from .configurations import BASE, BASELINE, configuration
from .gain import machine
from .scores import scores, subject_scores

Tasks = Mapping[tuple[str, int, int], Task]  # by row, subject, seed
History = list[dict[str, float]]


@dataclass(frozen=True)
class Judged:
    """What is known of the cells that are there."""

    table: Table = field(default_factory=lambda: {BASE: {}})
    on_the_way: dict[int, Table] = field(default_factory=lambda: defaultdict(dict))  # by step
    histories: dict[str, list[History]] = field(default_factory=lambda: defaultdict(list))
    codes: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, tasks: Tasks, cache: Path) -> "Judged":
        """Judge every cell beside the base's of the same noise."""
        found, bases = cls(), {task.seed: task.base.load(cache) for task in tasks.values()}
        for (name, *_), task in tasks.items():
            cell, base, key = task.load(cache), bases[task.seed], (task.subject, task.seed)
            if cell is None or base is None:
                continue
            if key not in found.table[BASE]:
                found.table[BASE][key] = scores(base, base, task)
            found.table.setdefault(name, {})[key] = scores(cell, base, task)
            for step in task.plan.steps_on_the_way:
                row = subject_scores(cell, base, task, step)
                found.on_the_way[step].setdefault(name, {})[key] = row
            found.histories[name].append(cell.history)
            found.codes[cell.code] += 1
        return found


def report(tasks: Tasks, cache: Path) -> dict[str, Any]:
    """Compare all cells that are there, as JSON."""
    found = Judged.of(tasks, cache)
    table, plan = found.table, next(iter(tasks.values())).plan
    methods = {name: {"cells": len(cells)} | mean_scores(cells) for name, cells in table.items()}
    for name, task in of_each_name(tasks).items():
        kept = memory_file(task, cache)
        if name in methods and kept.exists():
            methods[name] |= json.loads(kept.read_text())
    return {
        "machine": machine(),
        "cells": f"{found.codes.total()} trainings; {describe(plan)}",
        "code": dict(found.codes),
        "methods": methods,
        **differences(table),
        "gamma": {
            name: gammas(histories)
            for name, histories in found.histories.items()
            if any("gamma_0" in line for line in histories[0])
        },
        **on_the_way(found),
    }


def on_the_way(found: Judged) -> dict[str, Any]:
    """Return means and differences at every step of a trajectory."""
    steps = {str(step): table for step, table in found.on_the_way.items()}
    names, both = (found.histories, pairs(found.table)) if steps else ((), ())
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
    variants = [(name, configuration(name).against) for name in names]
    with_baseline = [(name, BASELINE) for name in names if BASELINE in table]
    return with_baseline + [pair for pair in variants if pair[1] in table.keys() - {BASELINE}]


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


def gammas(histories: Sequence[History]) -> dict[str, list[float]]:
    """Return APT's indicator in every bin of timesteps, low ones first, over the steps."""
    steps = [[line for line in history if "gamma_0" in line] for history in histories]
    count = min(map(len, steps))
    result = {}
    for tenths in (1, 2, 5, 10):
        lines = [of_run[max(0, count * tenths // 10 - 1)] for of_run in steps]
        bins = sum(key.startswith("gamma_") for key in lines[0])
        result[str(int(lines[0]["step"]))] = [
            mean(line[f"gamma_{bin}"] for line in lines) for bin in range(bins)
        ]
    return result


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
    return None if isinstance(value, float) and not math.isfinite(value) else value
