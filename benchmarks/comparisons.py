"""Means over subjects and seeds, and paired differences with their intervals."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .configurations import BASE, BASELINE
from .gain import interval
from .scores import Scores

LADDER = (BASE, "lora-slow", BASELINE, "lora-fast")
Table = dict[str, dict[tuple[int, int], Scores]]  # method -> (subject, seed) -> scores


def mean_scores(cells: Mapping[tuple[int, int], Scores]) -> Scores:
    """Return the means over subjects of the means over seeds."""
    per_subject = by_subject(cells)
    names = dict.fromkeys(name for row in per_subject.values() for name in row)
    return {name: mean(row[name] for row in per_subject.values() if name in row) for name in names}


def by_subject(cells: Mapping[tuple[int, int], Scores]) -> dict[int, Scores]:
    """Return each subject's means over its seeds."""
    groups: defaultdict[int, list[Scores]] = defaultdict(list)
    for (subject, _), row in cells.items():
        groups[subject].append(row)
    return {
        subject: {name: mean(row[name] for row in rows if name in row) for name in rows[0]}
        for subject, rows in groups.items()
    }


def paired(
    cells: Mapping[tuple[int, int], Scores], others: Mapping[tuple[int, int], Scores]
) -> dict[str, dict[str, float]]:
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


def at_equal_similarity(table: Table, name: str) -> dict[str, dict[str, float]]:
    """Compare a row with LoRA trained just as far: differences as in `paired`."""
    alike = {
        key: found
        for key, row in table[name].items()
        if (found := interpolated(ladder_of(table, key), row["subject_similarity"])) is not None
    }
    return paired(table[name], alike)


def ladder_of(table: Table, key: tuple[int, int]) -> list[Scores]:
    """Return the base and the LoRAs of one subject and seed."""
    return [table[rung][key] for rung in LADDER if key in table.get(rung, {})]


def interpolated(ladder: Sequence[Scores], similarity: float) -> Scores | None:
    """Return the scores between those of a ladder; None where none is as similar."""
    rungs = sorted(ladder, key=lambda row: row["subject_similarity"])
    places = [row["subject_similarity"] for row in rungs]
    if not rungs or not places[0] <= similarity <= places[-1]:
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
