"""Damage for safetensors files: what disks, downloads and enemies do to them, seeded."""

import json
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

from personalize.trainers import state
from personalize.trainers.artifact import HEADER
from personalize.trainers.monitor import Evaluation

Tensors = dict[str, dict[str, Any]]  # a safetensors header without its metadata

DTYPES = (
    *("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64"),
    *("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "f32", "", "F128", None, 7),
)
NUMBERS = (0, 1, -1, 2, 7, 255, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64, 10**30, 1.5, None, "8")
WORDS = (
    *("", "\0", "..", "../../etc/passwd", "/", "C:\\", "nul", "keys", "pop", "__class__", "a.b"),
    *("time_aware", "time_aware.", "time_aware.scaling.keys.expand.bias", "time_aware.fusion.8.x"),
    *("lora_unet_conv_in.diff", "lora_unet_conv_in.para_basis", "lora_unet_conv_in.oft_skew"),
    *(
        "<img src=x onerror=alert(1)>",
        "\x1b[2J\x1b]0;owned\x07",
        "\u202egnp.exe",
        "\ud800",
        "€" * 9,
    ),
    "x" * 100_000,
)
FOREIGN = (
    b"",
    b"\x89PNG\r\n\x1a\n" + b"\0" * 100,
    b"PK\x03\x04" + b"\0" * 100,
    b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    b"GGUF\x03\0\0\0" + b"\0" * 100,
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    b"<!doctype html><title>404</title>",
    b"\0" * 4096,
    b"\xff" * 4096,
    b"{" * 70_000,
)


def parts(file: bytes) -> tuple[dict[str, Any], bytes]:
    """Split a good file into its header and its data."""
    (length,) = struct.unpack("<Q", file[:8])
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def joined(header: Any, data: bytes) -> bytes:
    """Put a file together; the header may say anything."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def cut(file: bytes, rng: random.Random) -> bytes:
    return file[: rng.randrange(len(file))]


def flip_header(file: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", file[:8])
    return flipped(file, rng, 0, 8 + length)


def flip_data(file: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", file[:8])
    return flipped(file, rng, 8 + length, len(file))


def flipped(file: bytes, rng: random.Random, start: int, end: int) -> bytes:
    found = bytearray(file)
    for _ in range(rng.choice((1, 1, 1, 2, 8, 64))):
        found[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
    return bytes(found)


def header_length(file: bytes, rng: random.Random) -> bytes:
    length = rng.choice((0, 1, 7, len(file), 2**20, 10**8, 2**31, 2**63, 2**64 - 1))
    return struct.pack("<Q", length) + file[8:]


def splice(file: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(file)), rng.choice((1, 4, 8, 100, 5000))
    how = rng.randrange(3)
    noise = rng.randbytes(size) if how else b""
    return file[:at] + noise + file[at + (size if how < 2 else 0) :]


def other_numbers(file: bytes, rng: random.Random) -> bytes:
    """Put NaN, infinities, denormals and huge numbers among the data."""
    header, data = parts(file)
    found = bytearray(data)
    odd = ("nan", "inf", "-inf", "3e38", "-3e38", "1e-45", "1e30", "0")
    for _ in range(rng.choice((1, 1, 5))):
        at = rng.randrange(len(data) // 4) * 4
        found[at : at + 4] = struct.pack("<f", float(rng.choice(odd)))
    return joined(header, bytes(found))


def one_tensor(file: bytes, rng: random.Random) -> bytes:
    """Lie about a tensor: its type, shape, place or name."""
    header, data = parts(file)
    name = rng.choice([key for key in header if key != "__metadata__"])
    lie = rng.choice((lie_of_type, lie_of_shape, lie_of_place, lie_of_name, lie_of_all))
    lie(header, name, rng)
    return joined(header, data)


def lie_of_type(header: Tensors, name: str, rng: random.Random) -> None:
    header[name]["dtype"] = rng.choice(DTYPES)


def lie_of_shape(header: Tensors, name: str, rng: random.Random) -> None:
    shape = header[name]["shape"]
    size = 1
    for side in shape:
        size *= side
    half = [2, size // 2] if size % 2 == 0 else [size]
    lies = (shape[::-1], [size], [1, *shape], [*shape, 1], half, [], [0], [0, 2**40], [2**32] * 2)
    header[name]["shape"] = rng.choice((*lies, [rng.choice(NUMBERS) for _ in range(3)], None, "x"))


def lie_of_place(header: Tensors, name: str, rng: random.Random) -> None:
    other = rng.choice([key for key in header if key != "__metadata__"])
    start, end = header[name]["data_offsets"]
    lies = ([end, start], [start, end + 4], header[other]["data_offsets"], [0, 2**63], [-4, end])
    header[name]["data_offsets"] = rng.choice((*lies, [], None, "0"))


def lie_of_name(header: Tensors, name: str, rng: random.Random) -> None:
    tensor = header.pop(name)
    kept, _, suffix = name.rpartition(".")
    others = [key.rpartition(".")[2] for key in header if key != "__metadata__"] or ["diff"]
    renamed = (rng.choice(WORDS), f"{kept}.{rng.choice(others)}", f"{rng.choice(WORDS)}.{suffix}")
    header[rng.choice(renamed)] = tensor


def lie_of_all(header: Tensors, name: str, rng: random.Random) -> None:
    """Make every tensor empty, however large it claims to be: the file is valid and tiny."""
    for key, tensor in header.items():
        if key != "__metadata__":
            shape = [0, rng.choice((2**20, 2**40, 2**50)), *tensor["shape"][2:]]
            tensor |= {"data_offsets": [0, 0], "shape": rng.sample(shape, len(shape))}


def our_header(file: bytes, rng: random.Random) -> bytes:
    """Lie in the pack's own JSON."""
    header, data = parts(file)
    ours = json.loads(header["__metadata__"][HEADER])
    key = rng.choice([*ours, rng.choice(WORDS)])
    lies: tuple[Any, ...] = (*NUMBERS, *WORDS, [], {}, True, 10**400, float("nan"), nested(60))
    ours[key] = rng.choice(lies)
    if rng.random() < 0.2:
        ours.pop(rng.choice([*ours]))
    text: Any = json.dumps(ours)
    text = rng.choice((text, text, text, text, text[:-2], text + "}", "[" * 60_000, None, 3, ours))
    header["__metadata__"][HEADER] = text
    return joined(header, data)


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth else []


def newer(file: bytes, rng: random.Random) -> bytes:
    """Claim a format of the future, with fields and tensors that nobody knows yet."""
    header, data = parts(file)
    ours = json.loads(header["__metadata__"][HEADER])
    ours |= {"format": rng.choice((2, 3, 99, 2**40, 10**400)), "unheard_of": rng.choice(WORDS)}
    header["__metadata__"][HEADER] = json.dumps(ours)
    return joined(header, data)


def foreign(_: bytes, rng: random.Random) -> bytes:
    return rng.choice((*FOREIGN, rng.randbytes(rng.randrange(5000))))


def lying_state(file: bytes, rng: random.Random) -> bytes:
    """Lie anywhere in the JSON of a run's state."""
    header, data = parts(file)
    ours = json.loads(header["__metadata__"][state.HEADER])
    *way, last = rng.choice([place for place in places(ours) if place])
    inner = ours
    for step in way:
        inner = inner[step]
    lies: tuple[Any, ...] = (*NUMBERS, *WORDS, [], {}, True, nested(60), {"list": [3]}, {"map": 7})
    inner[last] = rng.choice((*lies, {"tensor": "x"}, {"map": [[[], 1]]}, float("nan")))
    if rng.random() < 0.2:
        del inner[last]
    header["__metadata__"][state.HEADER] = json.dumps(ours)
    return joined(header, data)


def places(value: Any, way: tuple = ()) -> Iterator[tuple]:
    """Name every place in a nested JSON value by the keys that lead there."""
    yield way
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*way, key))


Damage = Callable[[bytes, random.Random], bytes]
DAMAGES: tuple[Damage, ...] = (
    *(cut, flip_header, flip_header, flip_data, header_length, splice, other_numbers),
    *(one_tensor, one_tensor, one_tensor, our_header, our_header, newer, foreign),
)
STATE_DAMAGES: tuple[Damage, ...] = (
    *(cut, flip_header, flip_data, header_length, splice, other_numbers, one_tensor, one_tensor),
    *(lying_state, lying_state, lying_state, lying_state, foreign),
)


# Runs


LINE = {"step": 1, "loss": 0.5, "learning_rate": 1e-4}
TENTHS = tuple(n / 10 for n in range(10))
MEASURED = {
    **Evaluation(1, 0.5, 0.6, TENTHS, TENTHS, 1.0, 0.5, 0.6, TENTHS, 0.5, 0.6, TENTHS).as_line(),
    **{"rules": {"best": "train", "patience": 3, "early_stop": True}, "seconds": 1.0},
}
END = {"end": True, "step": 2, "reason": "finished", "best_step": 1}


FACTS = {
    "method": "lora",
    "settings": {"steps": 3, "precision": "auto"},
    "base": {"family": "a", "geometry": "b", "weights": "c", "patches": "", "schedule": "d"},
    "data": "0" * 16,
    "run": "x",
    **{"instance_prompt": "a zib", "class_prompt": "", "computed_in": "fp32"},
    "monitor": {"every": 2},
    "dataset": {"sizes": ["64x64"]},
    "encoded": {"training latent": [0.5, 1.0], "training text": [0.25]},
}


def lying_line(rng: random.Random) -> str:
    """Return a line of a history in which one thing is wrong, or which is none."""
    line: dict[str, Any] = dict(rng.choice((LINE, MEASURED, END)))
    lies: tuple[Any, ...] = (*NUMBERS, *WORDS[:-1], [], {}, True, [None], {"step": 1}, float("nan"))
    lies = (*lies, nested(900))
    line[rng.choice([*line, rng.choice(WORDS[:-1])])] = rng.choice(lies)
    if rng.random() < 0.3:
        line.pop(rng.choice([*line]))
    text = json.dumps(line)
    return rng.choice((text, text, text, text, text[:-3], "[1]", "null", "\0", "[" * 50_000))


def lying_facts(rng: random.Random) -> str:
    """Return a run.json in which one thing is wrong, or which is none."""
    facts: dict[str, Any] = dict(FACTS)
    lies: tuple[Any, ...] = (
        *NUMBERS,
        *WORDS[:-1],
        [],
        {},
        True,
        {"steps": []},
        ["lora"],
        [10**400],
    )
    facts[rng.choice([*facts])] = rng.choice((*lies, None, nested(900), {"training latent": "a"}))
    if rng.random() < 0.2:
        facts.pop(rng.choice([*facts]))
    text = json.dumps(facts)
    return rng.choice((text, text, text, text[:-3], "[1]", "", "\0", "[" * 50_000, "\ud800"))


def lying_history(rng: random.Random) -> str:
    """Return a history.jsonl with some good lines among those that lie."""
    good = [json.dumps(line) for line in (LINE, MEASURED, MEASURED | {"step": 2})]
    lines = [*rng.sample(good, rng.randrange(4)), *(lying_line(rng) for _ in range(4))]
    return "".join(line + "\n" for line in rng.sample(lines, len(lines)))
