"""Means over subjects and seeds, and paired differences with their intervals."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .configurations import BASE
from .gain import interval
from .scores import Scores

Key = tuple[Any, int]  # subject (or subjects), seed
Table = dict[str, dict[Key, Scores]]  # by method
Differences = dict[str, dict[str, float]]  # by score: mean, low and high of 95 %, n subjects


def mean_scores(cells: Mapping[Key, Scores]) -> Scores:
    """Return the means over subjects of the means over seeds."""
    per_subject = by_subject(cells)
    names = dict.fromkeys(name for row in per_subject.values() for name in row)
    return {name: mean(row[name] for row in per_subject.values() if name in row) for name in names}


def by_subject(cells: Mapping[Key, Scores]) -> dict[Any, Scores]:
    """Return each subject's means over its seeds."""
    groups: defaultdict[Any, list[Scores]] = defaultdict(list)
    for (subject, _), row in cells.items():
        groups[subject].append(row)
    return {
        subject: {name: mean(row[name] for row in rows if name in row) for name in rows[0]}
        for subject, rows in groups.items()
    }


def paired(cells: Mapping[Key, Scores], others: Mapping[Key, Scores]) -> Differences:
    """Compare two methods on the subjects and seeds that both have: mean difference, 95 % interval.

    Student's t over subjects, each the mean of its seeds. n is the number of subjects; one alone
    has no interval (NaN).
    """
    both = cells.keys() & others.keys()
    differences = by_subject(
        {
            key: {
                name: cells[key][name] - others[key][name]
                for name in cells[key]
                if name in others[key]
            }
            for key in sorted(both)
        }
    )
    names = dict.fromkeys(name for row in differences.values() for name in row)
    result = {}
    for name in names:
        values = [row[name] for row in differences.values() if name in row]
        middle, low, high = interval(values)
        result[name] = {"mean": middle, "low": low, "high": high, "n": len(values)}
    return result


def ladder(name: str) -> tuple[str, ...]:
    """Return the rows between which a row that was learned at three rates is interpolated."""
    return BASE, f"{name}-slow", name, f"{name}-fast"


def at_equal_similarity(table: Table, name: str, other: str) -> tuple[Differences, dict[str, int]]:
    """Compare a row with another one trained just as far: differences as in `paired`, and counts.

    Cells that are more (or less) similar than the whole ladder of the other row are left out; the
    counts say how many of the cells and subjects remain. Both are {} without that ladder.
    """
    if not set(ladder(other)) <= table.keys():
        return {}, {}
    rungs = [table[rung] for rung in ladder(other)]
    keys = [key for key in table[name] if all(key in rung for rung in rungs)]
    places = {key: table[name][key]["subject_similarity"] for key in keys}
    found = {key: interpolated([rung[key] for rung in rungs], places[key]) for key in keys}
    alike = {key: row for key, row in found.items() if row is not None}
    counts = {
        "cells": len(alike),
        "of_cells": len(keys),
        "subjects": len({subject for subject, _ in alike}),
        "of_subjects": len({subject for subject, _ in keys}),
    }
    return paired(table[name], alike), counts


def interpolated(rungs: Sequence[Scores], similarity: float) -> Scores | None:
    """Return the scores between those of a ladder; None where none is as similar."""
    rungs = sorted(rungs, key=lambda row: row["subject_similarity"])
    places = [row["subject_similarity"] for row in rungs]
    if not places[0] <= similarity <= places[-1]:
        return None
    return {
        name: float(np.interp(similarity, places, [row[name] for row in rungs]))
        for name in rungs[0]
        if all(name in row for row in rungs)
    }


def mean(values: Iterable[float]) -> float:
    """Return the mean of what is a number; NaN when nothing is."""
    numbers = [value for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan
