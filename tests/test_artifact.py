"""Files on disk: whole or not there, and never trusted."""

import dataclasses
import json
import os
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from personalize.trainers.artifact import FORMAT, HEADER, Header, Personalization, atomic
from personalize.trainers.edits import LowRank, RankReduction
from personalize.trainers.errors import InputError
from tests.tiny import noise, same

HEADER_OF_A_RUN = Header(
    method="lora",
    step=7,
    settings={"steps": 7, "learning_rate": 1e-4},
    base={"family": "stable-diffusion-v1", "geometry": "00ff", "weights": "ff00"},
    instance_prompt="a photo of sks person, ünïcode",
    class_prompt="",
    data="0123456789abcdef",
)
EDITS = {"a.b": LowRank(noise(2, 6), noise(5, 2), 2.0), "c": RankReduction(noise(5, 2))}


@pytest.fixture
def learned() -> Personalization:
    return Personalization.of(HEADER_OF_A_RUN, EDITS, 7)


@pytest.fixture
def path(tmp_path, learned):
    """A good file."""
    learned.save(tmp_path / "good.safetensors")
    return tmp_path / "good.safetensors"


def refusal(path) -> str:
    """Return why a file is refused; the message names the file and not its folder."""
    with pytest.raises(InputError) as error:
        Personalization.load(path)
    assert error.value.input_name == "checkpoint"
    assert path.name in str(error.value) and str(path.parent) not in str(error.value)
    return str(error.value)


def rewritten(path, metadata: dict[str, str] | None, tensors: dict | None = None):
    """Write another header, or other tensors, in the place of a good file's."""
    with safe_open(path, "pt") as file:
        old = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(old if tensors is None else tensors, path, metadata)
    return path


# Round trips


def test_a_file_comes_back_bit_for_bit(path, learned):
    loaded = Personalization.load(path)
    assert loaded.header == learned.header and same(loaded.tensors, learned.tensors)


def test_what_is_counted_is_what_was_learned(learned):
    assert learned.parameters == 2 * 6 + 5 * 2 + 5 * 2  # without alpha


def test_model_managers_find_their_fields(path):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.title"] == HEADER_OF_A_RUN.instance_prompt
    assert json.loads(metadata[HEADER])["format"] == FORMAT


# Writing


def test_a_failed_write_leaves_the_old_file_and_nothing_else(path, learned, monkeypatch):
    before = path.read_bytes()

    def half(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(before[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr("personalize.trainers.artifact.save_file", half)
    with pytest.raises(OSError, match="no space"):
        learned.save(path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_an_interrupted_block_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_readers_never_see_a_half_written_file(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")
    with atomic(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
        assert temporary.parent == tmp_path  # the same file system, so that replacing is atomic
        assert temporary.name.startswith(".")
    assert target.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


# Reading what is not as it should be


def test_a_missing_file_is_named(tmp_path):
    assert "not there any more" in refusal(tmp_path / "gone.safetensors")


def test_a_folder_is_not_a_file(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    refusal(tmp_path / "folder.safetensors")


@pytest.mark.parametrize("length", [0, 1, 7, 8, 100, -1])
def test_a_truncated_file_is_damaged(path, length):
    path.write_bytes(path.read_bytes()[:length])
    assert "damaged" in refusal(path)


def test_a_text_file_is_damaged(path):
    path.write_text("not safetensors at all, but long enough to have a length")
    assert "damaged" in refusal(path)


def test_a_header_that_claims_to_be_huge_is_damaged(path):
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    assert "damaged" in refusal(path)


def test_flipped_bits_give_a_file_or_a_refusal_and_nothing_else(path):
    """Two hundred files with one flipped bit in the header: no other exception escapes."""
    good, refused, rng = path.read_bytes(), 0, random.Random(0)
    header_length = 8 + int.from_bytes(good[:8], "little")
    for _ in range(200):
        flipped = bytearray(good)
        flipped[rng.randrange(header_length)] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            Personalization.load(path)
        except InputError as error:
            assert path.name in str(error) and str(path.parent) not in str(error)
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"ss_network_dim": "8"}])
def test_a_foreign_file_is_sent_to_the_stock_loader(path, metadata):
    assert "Load LoRA" in refusal(rewritten(path, metadata))


def test_a_newer_format_asks_for_an_update(path):
    newer = dataclasses.asdict(HEADER_OF_A_RUN) | {"format": FORMAT + 1, "unknown": 1}
    reason = refusal(rewritten(path, {HEADER: json.dumps(newer)}))
    assert reason == (
        f"'checkpoint' names {path.name} of format {FORMAT + 1}; "
        f"this version reads up to {FORMAT}. Update Personalize."
    )


GOOD = dataclasses.asdict(HEADER_OF_A_RUN)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "{",
        "null",
        "[]",
        '"text"',
        "1e999",
        "[" * 100_000,
        json.dumps({"format": 1}),
        json.dumps({**GOOD, "surplus": 1}),
        json.dumps({**GOOD, "format": "1"}),
        json.dumps({**GOOD, "format": 0}),
        json.dumps({**GOOD, "format": None}),
        json.dumps({**GOOD, "method": ["lora"]}),
        json.dumps({**GOOD, "method": None}),
        json.dumps({**GOOD, "step": "7"}),
        json.dumps({**GOOD, "step": -1}),
        json.dumps({**GOOD, "step": True}),
        json.dumps({**GOOD, "base": "sd15"}),
        json.dumps({**GOOD, "settings": []}),
        json.dumps({**GOOD, "instance_prompt": {"a": 1}}),
        json.dumps({**GOOD, "data": 3}),
    ],
    ids=lambda text: text[:12] + "…" + text[-30:] if len(text) > 42 else text,
)
def test_a_hostile_header_is_refused(path, header):
    assert "header" in refusal(rewritten(path, {HEADER: header}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(path, learned, value):
    name = next(iter(learned.tensors))
    tensors = learned.tensors | {name: torch.full_like(learned.tensors[name], value)}
    metadata = {HEADER: json.dumps(GOOD)}
    assert "finite" in refusal(rewritten(path, metadata, tensors))


def test_a_file_without_tensors_is_refused(path):
    assert "no tensors" in refusal(rewritten(path, {HEADER: json.dumps(GOOD)}, {}))


def test_tensors_that_do_not_belong_together_are_an_input_error(learned):
    name = next(name for name in learned.tensors if name.endswith("up.weight"))
    odd = dataclasses.replace(learned, tensors=learned.tensors | {name: noise(5, 3)})
    with pytest.raises(InputError, match=r"'checkpoint' .*\(5, 3\)"):
        odd.edits(["a.b", "c"])
