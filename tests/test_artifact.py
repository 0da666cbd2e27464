"""Files on disk: whole or not there, and never trusted."""

import dataclasses
import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from personalize.trainers.artifact import FORMAT, HEADER, Header, Personalization, atomic
from personalize.trainers.edits import LowRank, RankReduction, of_weights
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


def test_a_file_that_was_read_may_be_overwritten(path, learned):
    """Of tensors that are a view of their file, a shorter file makes reading them kill us."""
    loaded = Personalization.load(path)
    assert str(path) not in Path("/proc/self/maps").read_text()
    path.write_bytes(b"")
    assert same(loaded.tensors, learned.tensors)


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


def test_numbers_that_nothing_can_be_computed_with_are_refused(path, learned):
    name = next(iter(learned.tensors))
    tensors = learned.tensors | {name: torch.full_like(learned.tensors[name], -3e38)}
    assert "as large as 3e+38" in refusal(rewritten(path, {HEADER: json.dumps(GOOD)}, tensors))


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_numbers_of_another_type_are_refused(path, learned, kind):
    tensors = {name: tensor.to(kind) for name, tensor in learned.tensors.items()}
    reason = refusal(rewritten(path, {HEADER: json.dumps(GOOD)}, tensors))
    assert reason.endswith(f"which has numbers of type {str(kind)[6:]}; choose another.")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_halves_and_doubles_are_read(path, learned, kind):
    tensors = {name: tensor.to(kind) for name, tensor in learned.tensors.items()}
    loaded = Personalization.load(rewritten(path, {HEADER: json.dumps(GOOD)}, tensors))
    assert len(loaded.edits(list(EDITS))[0]) == len(EDITS)


HOSTILE = "\x1b[2J\n<b>" + "x" * 100_000


@pytest.mark.parametrize(
    "header",
    [{"format": 10**4000}, {"step": 10**4000}, {HOSTILE: 1}, {"method": [HOSTILE]}],
    ids=["format", "step", "surplus", "kind"],
)
def test_a_hostile_header_is_told_in_one_short_line(path, header):
    reason = refusal(rewritten(path, {HEADER: json.dumps(GOOD | header)}))
    assert len(reason) < 500 and reason.isprintable()


def test_a_foreign_file_is_told_before_its_numbers_are_read(path):
    """A checkpoint of gigabytes: sparse here, so that reading it would be noticed."""
    import resource

    count = 1 << 30
    shape = {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "model.weight": shape}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + 4 * count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "Load LoRA" in refusal(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_a_file_without_tensors_is_refused(path):
    assert "no tensors" in refusal(rewritten(path, {HEADER: json.dumps(GOOD)}, {}))


LONELY = {
    "lora_unet_a_b.lora_down.weight": noise(2, 6),
    "lora_unet_a_b.lora_up.weight": noise(5, 2),
}
BLOCK = "time_aware.scaling.{}.expand.bias"


@pytest.mark.parametrize(
    "tensors",
    [
        LONELY | {"lora_unet_a_b.alpha": noise(2)},
        {BLOCK.format("keys"): noise(8), "time_aware.scaling.keys.reduce.weight": noise(32, 16)},
        {BLOCK.format(""): noise(8), "time_aware.scaling..reduce.weight": noise(32, 16)},
        {BLOCK.format("x"): noise(8)},
        {
            BLOCK.format("x"): torch.empty(0, 2**50),
            "time_aware.scaling.x.reduce.weight": torch.empty(0, 2**50),
        },
    ],
    ids=["two alphas", "a method's name", "no name", "no times", "sizes beyond memory"],
)
def test_tensors_of_no_layer_are_an_input_error(learned, tensors):
    odd = dataclasses.replace(learned, tensors=tensors)
    with pytest.raises(InputError, match="'checkpoint' is damaged"):
        odd.edits(["a.b", "c"])


def test_tensors_that_do_not_belong_together_are_an_input_error(learned):
    name = next(name for name in learned.tensors if name.endswith("up.weight"))
    odd = dataclasses.replace(learned, tensors=learned.tensors | {name: noise(5, 3)})
    with pytest.raises(InputError, match=r"'checkpoint' .*\(5, 3\)"):
        odd.edits(["a.b", "c"])


# Files of the past


FORMATS = Path(__file__).parent / "formats"
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
SHAPES = {QUERY: (8, 8), "conv_in": (8, 4, 3, 3), "conv_in.bias": (8,)}


@pytest.mark.parametrize(
    "name, method, kinds",
    [
        ("lora", "lora", {"LowRank"}),
        ("para", "para", {"RankReduction"}),
        ("free_weights", "dreambooth", {"Difference"}),
        ("oft", "selective_zo", {"Rotation"}),
        ("a3ft", "a3ft", {"Difference", "TimeAware"}),
    ],
)
def test_files_of_every_format_are_read(name, method, kinds):
    """tests/formats/<format>/ was written by the first version that knew each kind of edit."""
    loaded = Personalization.load(FORMATS / "1" / f"{name}.safetensors")
    header = loaded.header
    assert (header.method, header.step, header.run, header.format) == (method, 3, "", 1)
    edits, unknown = loaded.edits([QUERY, "conv_in", "conv_in.bias"])
    assert not unknown and {type(edit).__name__ for edit in edits.values()} == kinds
    for site, edit in of_weights(edits).items():
        weight = torch.ones(SHAPES[site])
        assert edit.fits(weight.shape)
        changed = edit.apply(weight)
        assert changed.isfinite().all() and not torch.equal(changed, weight)


def test_there_is_a_file_of_every_format():
    assert {folder.name for folder in FORMATS.iterdir()} == set(map(str, range(1, FORMAT + 1)))
