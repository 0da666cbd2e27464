"""Sprite world: seeded, captioned toy pictures of single shapes ("sprites") and of "totems".

Totems are composite characters. Everything is drawn from scratch with numpy and Pillow. A `Sprite`
or a `Portrait` says *what* is in a picture, the random generator says *how* (pose, jitter), and the
caption says it in words. Lengths are fractions of the picture, so a scene can be drawn at any size.
Random generators are `random.Random` throughout.
"""

import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from .drawing import (
    COLOURS,
    INK,
    PLAIN_BACKGROUNDS,
    PUPIL,
    SUPERSAMPLING,
    Frame,
    draw_background,
    draw_shape,
    finished,
    jittered,
)

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "moon")
PATTERNS = ("plain", "striped", "dotted", "checkered")
SIZES = ("small", "big")
SCENES = {"meadow": "in a meadow", "night": "at night", "sunset": "at sunset"}
BACKGROUNDS = (*PLAIN_BACKGROUNDS, *SCENES)
POSITIONS = {
    "left": ("on the left", (-1, 0)),
    "right": ("on the right", (1, 0)),
    "top": ("at the top", (0, -1)),
    "bottom": ("at the bottom", (0, 1)),
    "middle": ("in the middle", (0, 0)),
}

BODIES = ("block", "oval", "triangle", "hexagon")
HEADS = ("circle", "square", "triangle", "star", "heart")
EARS = ("circle", "triangle", "moon", "cross", "no")
MARKS = ("star", "heart", "ring", "cross", "moon", "no")
ARMS = {"raised": -0.42, "level": 0.0, "lowered": 0.42, "no": 0.0}
KIND = "totem"

SHIPPED_SUBJECTS = tuple(range(1, 9))
RESERVED_SEEDS = range(1000)  # identities of these seeds are never drawn in pre-training
PRETRAINING_SEEDS = range(1_000_000, 2_000_000)
"""Seeds of the subjects that the base and the judges are trained on."""

PATTERN_WORDS = {"striped": "stripes", "dotted": "dots", "checkered": "checks"}


# ----------------------------------------------------------------------------------- what is drawn


@dataclass(frozen=True)
class Sprite:
    """One patterned shape. Big sprites are always in the middle."""

    shape: str
    colour: str
    pattern: str
    size: str
    position: str
    background: str


@dataclass(frozen=True)
class Subject:
    """The identity of a totem: all that stays the same from picture to picture."""

    body: str
    body_colour: str
    body_pattern: str
    head: str
    head_colour: str
    ears: str
    ears_colour: str
    mark: str
    mark_colour: str
    arms: str
    eyes: int


@dataclass(frozen=True)
class Portrait:
    """One subject before one background."""

    subject: Subject
    background: str


Scene = Sprite | Portrait


def random_sprite(rng: random.Random) -> Sprite:
    """Draw a sprite with every attribute uniform (big ones: position "middle")."""
    size = rng.choice(SIZES)
    return Sprite(
        shape=rng.choice(SHAPES),
        colour=rng.choice(list(COLOURS)),
        pattern=rng.choice(PATTERNS),
        size=size,
        position=rng.choice(list(POSITIONS)) if size == "small" else "middle",
        background=rng.choice(BACKGROUNDS),
    )


def subject(seed: int) -> Subject:
    """Return the identity that belongs to any integer seed, the same in every process."""
    rng = random.Random(f"subject {seed}")
    body_colour, head_colour, ears_colour, mark_colour = rng.sample(list(COLOURS), 4)
    return Subject(
        body=rng.choice(BODIES),
        body_colour=body_colour,
        body_pattern=rng.choice(("plain", "plain", "striped", "dotted")),
        head=rng.choice(HEADS),
        head_colour=head_colour,
        ears=rng.choice(EARS),
        ears_colour=ears_colour,
        mark=rng.choice(MARKS),
        mark_colour=mark_colour,
        arms=rng.choice(list(ARMS)),
        eyes=rng.choice((1, 2, 2, 3)),
    )


@cache
def reserved_identities() -> frozenset[Subject]:
    """Return the identities of `RESERVED_SEEDS`, the shipped ones among them."""
    return frozenset(subject(seed) for seed in RESERVED_SEEDS)


def pretraining_subject(rng: random.Random) -> Subject:
    """Draw a subject of `PRETRAINING_SEEDS` whose identity equals no reserved one."""
    while True:
        drawn = subject(rng.randrange(PRETRAINING_SEEDS.start, PRETRAINING_SEEDS.stop))
        if drawn not in reserved_identities():
            return drawn


def random_scene(rng: random.Random, totem_share: float = 0.25) -> Scene:
    """Draw a sprite or, with probability `totem_share`, a portrait of a pre-training subject."""
    if rng.random() < totem_share:
        return Portrait(pretraining_subject(rng), rng.choice(BACKGROUNDS))
    return random_sprite(rng)


# ------------------------------------------------------------------------------------------- words


def random_name(rng: random.Random) -> str:
    """Make up a word such as "dax" or "wogul"; never "zib", which is kept for personalising."""
    consonants, vowels = "bdfgklmnprstvwxz", "aeiou"
    pattern = rng.choice(("cvc", "cvc", "cvcv", "cvcvc"))
    name = "".join(rng.choice(consonants if kind == "c" else vowels) for kind in pattern)
    return random_name(rng) if name == "zib" else name


def background_words(background: str) -> str:
    """Say a background: "at night", "on a pink background"."""
    return SCENES.get(background) or f"on a {background} background"


def vocabulary() -> list[str]:
    """Return every word that a caption can hold, made-up names apart, sorted."""
    attributes = (COLOURS, SHAPES, PATTERNS, SIZES, BACKGROUNDS, BODIES, HEADS, EARS, MARKS)
    phrases = [*SCENES.values(), *(phrase for phrase, _ in POSITIONS.values())]
    phrases += [word for values in attributes for word in values]
    phrases += [f"a picture of an shape with and body head ears mark {KIND} on a background"]
    phrases += list(PATTERN_WORDS.values())
    return sorted({word for phrase in phrases for word in phrase.split()} - {"no"})


def _sentence(words: list[str]) -> str:
    return re.sub(r"\ba (?=[aeiou])", "an ", " ".join(words))


def caption_sprite(sprite: Sprite, rng: random.Random | None = None) -> str:
    """Say every attribute or, given a generator, a random subset in a random phrasing."""

    def said(share: float = 0.9) -> bool:
        return rng is None or rng.random() < share

    rephrased = rng is not None and rng.random() < 0.2
    words = ["a picture of a" if rephrased and said(0.5) else "a"]
    if said():
        words.append(sprite.size)
    pattern_said = said(0.5 if sprite.pattern == "plain" else 0.9)
    with_pattern = rephrased and pattern_said and sprite.pattern != "plain"
    if pattern_said and not with_pattern:
        words.append(sprite.pattern)
    if said():
        words.append(sprite.colour)
    words.append(sprite.shape if said(0.95) else "shape")
    if with_pattern:
        words.append(f"with {PATTERN_WORDS[sprite.pattern]}")
    if sprite.size == "small" and said(0.6):
        words.append(POSITIONS[sprite.position][0])
    if said():
        words.append(background_words(sprite.background))
    return _sentence(words)


def caption_portrait(portrait: Portrait, rng: random.Random) -> str:
    """Say a random subset of a totem's parts; 40 % of captions name it with a made-up word."""
    who, parts = portrait.subject, []
    if rng.random() < 0.6:
        parts.append(f"a {who.body_colour} {who.body} body")
    if rng.random() < 0.6:
        parts.append(f"a {who.head_colour} {who.head} head")
    if who.ears != "no" and rng.random() < 0.3:
        parts.append(f"{who.ears_colour} {who.ears} ears")
    if who.mark != "no" and rng.random() < 0.3:
        parts.append(f"a {who.mark_colour} {who.mark} mark")
    name = f"{random_name(rng)} " if rng.random() < 0.4 else ""
    words = [f"a {name}{KIND}"]
    if parts:
        words.append("with " + " and ".join(parts))
    if rng.random() < 0.9:
        words.append(background_words(portrait.background))
    return _sentence(words)


def caption_scene(scene: Scene, rng: random.Random) -> str:
    """Say a random subset of what is in a scene."""
    if isinstance(scene, Sprite):
        return caption_sprite(scene, rng)
    return caption_portrait(scene, rng)


def subject_caption(background: str, name: str = "zib") -> str:
    """Say a named subject: "a zib totem on a pink background"."""
    return f"a {name} {KIND} {background_words(background)}"


def named_attributes(prompt: str) -> dict[str, str]:
    """Read the attributes that a prompt names, e.g. {"shape": "star", "background": "pink"}.

    Totem prompts name the kind and the background; their parts are not read.
    """
    text, named = f" {prompt.lower()} ", {}
    for background in BACKGROUNDS:
        if background_words(background) in text:
            named["background"] = background
            text = text.replace(background_words(background), " ")
    for position, (phrase, _) in POSITIONS.items():
        if phrase in text:
            named["position"] = position
    words = re.findall(r"[a-z]+", text)
    if KIND in words:
        return {"kind": KIND} | {k: v for k, v in named.items() if k == "background"}
    vocabularies = {"shape": SHAPES, "colour": COLOURS, "pattern": PATTERNS, "size": SIZES}
    synonyms = {noun: pattern for pattern, noun in PATTERN_WORDS.items()}
    for word in (synonyms.get(word, word) for word in words):
        named |= {key: word for key, values in vocabularies.items() if word in values}
    return named


# ---------------------------------------------------------------------------------------- pictures


def render_sprite(sprite: Sprite, rng: random.Random, size: int = 128) -> np.ndarray:
    """Draw a sprite in a random pose: (size, size, 3) uint8."""
    n = size * SUPERSAMPLING
    image = draw_background(n, sprite.background, rng)
    small = sprite.size == "small"
    radius = n * (rng.uniform(0.22, 0.27) if small else rng.uniform(0.34, 0.41))
    room = 0.035 if small else 0.05
    x, y = (n * (0.5 + 0.18 * d + rng.uniform(-room, room)) for d in POSITIONS[sprite.position][1])
    frame = Frame(x, y, radius, math.radians(rng.uniform(-12, 12)))
    period = n * (0.145 if small else 0.19) * rng.uniform(0.9, 1.1)
    turn = math.pi / 4 if sprite.pattern == "striped" else 0.0
    colour = jittered(COLOURS[sprite.colour], rng, 10)
    draw_shape(image, sprite.shape, frame, colour, sprite.pattern, period, turn)
    return finished(image)


def render_subject(
    identity: Subject, background: str, rng: random.Random, size: int = 128
) -> np.ndarray:
    """Draw a totem in a random place, scale and pose: (size, size, 3) uint8."""
    n = size * SUPERSAMPLING
    image = draw_background(n, background, rng)
    x, y = (n * (0.5 + rng.uniform(-0.07, 0.07)) for _ in range(2))
    turn = math.radians(rng.uniform(-25, 25))
    pose = Frame(x, y, n * rng.uniform(0.31, 0.40), turn, rng.choice((1, -1)))
    _draw_arms(image, identity, pose, rng)
    head = pose.inner(0, -0.14, 1.0, math.radians(rng.uniform(-12, 12)))  # turns about the neck
    ears_colour, mark_colour = COLOURS[identity.ears_colour], COLOURS[identity.mark_colour]
    for side in (-1, 1) if identity.ears != "no" else ():
        draw_shape(
            image, identity.ears, head.inner(side * 0.37, -0.82, 0.25, side * 0.35), ears_colour
        )
    body, body_colour = pose.inner(0, 0.42, 0.62), COLOURS[identity.body_colour]
    period = 0.36 * pose.scale
    draw_shape(image, identity.body, body, body_colour, identity.body_pattern, period, math.pi / 2)
    draw_shape(image, identity.head, head.inner(0, -0.36, 0.47), COLOURS[identity.head_colour])
    if identity.mark != "no":
        draw_shape(image, identity.mark, pose.inner(0, 0.48, 0.29), mark_colour)
    _draw_eyes(image, identity.eyes, head)
    return finished(image)


def _draw_arms(image: Image.Image, identity: Subject, pose: Frame, rng: random.Random) -> None:
    for side in (-1, 1) if identity.arms != "no" else ():
        hand = pose.at(side * 0.95, 0.35 + ARMS[identity.arms] + rng.uniform(-0.15, 0.15))
        line = [pose.at(side * 0.3, 0.35), hand]
        width = max(2, round(0.17 * pose.scale))
        ImageDraw.Draw(image).line(line, fill=COLOURS[identity.ears_colour], width=width)


def _draw_eyes(image: Image.Image, count: int, head: Frame) -> None:
    for i in range(count):
        x, y = head.at(0.25 * (i - (count - 1) / 2), -0.36)
        for share, colour in ((0.125, INK), (0.068, PUPIL)):
            r = share * head.scale
            ImageDraw.Draw(image).ellipse([x - r, y - r, x + r, y + r], fill=colour)


def render_scene(scene: Scene, rng: random.Random, size: int = 128) -> np.ndarray:
    """Draw a sprite or a portrait: (size, size, 3) uint8."""
    if isinstance(scene, Sprite):
        return render_sprite(scene, rng, size)
    return render_subject(scene.subject, scene.background, rng, size)


# ---------------------------------------------------------------------------------------- subjects


def _subject_scenes(seed: int, split: str) -> Iterator[tuple[str, random.Random]]:
    """Yield backgrounds (each once per round of nine) and the generator of each picture."""
    order = random.Random(f"subject {seed} {split}")
    index = 0
    while True:
        for background in order.sample(BACKGROUNDS, len(BACKGROUNDS)):
            yield background, random.Random(f"subject {seed} {split} {index}")
            index += 1


def subject_pictures(
    seed: int, count: int, split: str = "training", size: int = 128, name: str = "zib"
) -> list[tuple[np.ndarray, str]]:
    """Return `count` captioned pictures of a subject; "training" and "held-out" share none.

    Pictures are (size, size, 3) uint8. A longer list begins with the shorter one.
    """
    if split not in ("training", "held-out"):
        raise ValueError(f"subject_pictures: split is {split!r}; give 'training' or 'held-out'.")
    identity = subject(seed)
    scenes = zip(range(count), _subject_scenes(seed, split), strict=False)
    return [
        (render_subject(identity, background, rng, size), subject_caption(background, name))
        for _, (background, rng) in scenes
    ]
