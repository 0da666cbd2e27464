"""Several subjects in one run."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from .data import Example, PersonalData
from .errors import InputError, brief

SAME_TEXT = 0.02  # how far two encodings of the empty caption may be off: a GPU is not exact
BETWEEN = "; "  # prompts


def join(parts: Mapping[str, PersonalData], take_turns: bool) -> PersonalData:
    """Put the pictures of several subjects together, numbered in their order.

    parts: by the name of the input that they came from; each may have several subjects already.
    Raises InputError when they were encoded differently, or when a picture that one part trains on
    is held out by another.
    """
    check_encoding(parts)
    check_held_out(parts)
    subjects: list[str] = []
    numbered: list[PersonalData] = []
    for part in parts.values():
        numbered.append(renumbered(part, len(subjects)))
        subjects += subjects_of(part)
    classes = dict.fromkeys(part.class_prompt for part in numbered if part.class_prompt)
    return replace(
        numbered[0],
        training=tuple(chain.from_iterable(part.training for part in numbered)),
        held_out=tuple(chain.from_iterable(part.held_out for part in numbered)),
        prior=tuple(chain.from_iterable(part.prior for part in numbered)),
        instance_prompt=BETWEEN.join(subjects),
        class_prompt=BETWEEN.join(classes),
        subjects=tuple(subjects),
        take_turns=take_turns,
    )


def subjects_of(data: PersonalData) -> tuple[str, ...]:
    """Return the instance prompt of every subject."""
    return data.subjects or (data.instance_prompt,)


def renumbered(data: PersonalData, first: int) -> PersonalData:
    """Number the subjects from another number on."""
    return data.changed(lambda example: replace(example, subject=first + example.subject))


def check_encoding(parts: Mapping[str, PersonalData]) -> None:
    """Raise InputError unless all parts came from the same text encoder and kind of VAE."""
    (first_name, first), *others = parts.items()
    for name, part in others:
        if kind(part) != kind(first) or not near(part.empty.context, first.empty.context):
            here, there = described(part), described(first)
            said = f"{here}, '{first_name}' with {there}" if here != there else "another CLIP"
            raise InputError(
                name,
                f"was encoded with {said}; give all Personal Datasets the CLIP and VAE of one "
                "checkpoint.",
            )


def kind(data: PersonalData) -> tuple[int, int, int]:
    """Return text width, width of the pooled text, and latent channels."""
    first = data.training[0]
    return first.context.shape[-1], len(first.pooled), first.latent.shape[0]


def described(data: PersonalData) -> str:
    """Return the same in words."""
    width, pooled, channels = kind(data)
    text = f"text states of width {width}"
    return f"{text}{f' and {pooled}' if pooled else ''} and {channels} latent channels"


def near(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are the same but for what devices round."""
    return a.shape == b.shape and float((a - b).norm()) <= SAME_TEXT * float(b.norm())


def check_held_out(parts: Mapping[str, PersonalData]) -> None:
    """Refuse to measure on a picture that another part trains on."""
    trained = {digest(example): name for name, part in parts.items() for example in part.training}
    for name, part in parts.items():
        for number, example in enumerate(part.held_out, 1):
            if (other := trained.get(digest(example))) is not None:
                raise InputError(
                    name,
                    f"holds out a picture (number {number} of those held out) that '{other}' "
                    "trains on: what is measured on it would say nothing. Remove one of them.",
                )


def digest(example: Example) -> bytes:
    """Return a hash of a picture's pixels."""
    return hashlib.sha256(example.pixels.contiguous().numpy().tobytes()).digest()


def summary(data: PersonalData) -> str:
    """Say who is in the data, with how many pictures, and how they are shown."""
    lines = [f"{len(data.subjects)} subjects:"]
    for number, subject in enumerate(data.subjects):
        groups = {"pictures": data.training, "held out": data.held_out, "prior": data.prior}
        own = {name: sum(e.subject == number for e in group) for name, group in groups.items()}
        counts = [f"{count} {name}" for name, count in own.items() if count or name == "pictures"]
        lines.append(f"'{brief(subject)}': {', '.join(counts)}")
    counts = torch.tensor([e.subject for e in data.training]).bincount().tolist()
    if data.take_turns:
        lines.append("They take turns, so each is shown equally often.")
    elif len(set(counts)) > 1:
        lines.append("Each picture is shown equally often, so some subjects more than others.")
    twice = sorted({s for s in data.subjects if data.subjects.count(s) > 1})
    lines += [f"'{brief(s)}' is the prompt of several: they will melt into one." for s in twice]
    return "\n".join(lines)
