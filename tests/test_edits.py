"""Edits against their equations, written out slowly."""

import pytest
import torch

from personalize.trainers.edits import (
    Difference,
    LowRank,
    RankReduction,
    Rotation,
    file_name,
    from_tensors,
    to_tensors,
)
from tests.tiny import noise, same

SHAPES = {"linear": (10, 6), "convolution": (10, 4, 3, 3), "1x1": (10, 6, 1, 1)}


def low_rank(shape: tuple[int, ...], rank: int = 3, alpha: float = 1.5) -> LowRank:
    """Make a LoRA for a weight of a shape."""
    ones = [1] * (len(shape) - 2)
    return LowRank(noise(rank, *shape[1:], seed=1), noise(shape[0], rank, *ones, seed=2), alpha)


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def weight(request):
    return noise(*request.param)


@pytest.mark.parametrize("strength", [1.0, 0.7, -1.0])
def test_lora_adds_scaled_up_times_down(weight, strength):
    edit = low_rank(weight.shape)
    expected = weight.clone()
    for out in range(weight.shape[0]):
        for r in range(3):
            expected[out] += strength * 1.5 / 3 * edit.up[out, r].flatten() * edit.down[r]
    assert torch.allclose(edit.apply(weight, strength), expected, atol=1e-5)


def test_lora_on_a_convolution_is_the_two_convolutions_of_peft():
    weight, x = noise(10, 4, 3, 3), noise(2, 4, 7, 7, seed=5)
    edit = low_rank(weight.shape)
    two = torch.conv2d(torch.conv2d(x, edit.down, padding=1), edit.up) * (1.5 / 3)
    one = torch.conv2d(x, edit.apply(weight), padding=1) - torch.conv2d(x, weight, padding=1)
    assert torch.allclose(one, two, atol=1e-4)


def test_para_removes_the_span_of_its_basis(weight):
    edit = RankReduction(noise(10, 3, seed=3))
    projector = edit.basis @ torch.linalg.inv(edit.basis.T @ edit.basis) @ edit.basis.T
    expected = (weight.flatten(1) - 0.7 * projector @ weight.flatten(1)).reshape(weight.shape)
    assert torch.allclose(edit.apply(weight, 0.7), expected, atol=1e-5)


def skew_matrices(rotation: Rotation) -> torch.Tensor:
    """Write out S_i entry by entry, (k, b, b) fp64."""
    b = rotation.block_size
    found = torch.zeros(len(rotation.skew), b, b, dtype=torch.float64)
    for i, triangle in enumerate(rotation.skew.tolist()):
        entries = iter(triangle)
        for row in range(b):
            for column in range(row + 1, b):
                found[i, row, column] = next(entries)
                found[i, column, row] = -found[i, row, column]
    return found


@pytest.mark.parametrize("strength", [1.0, 0.5, -1.0, 4.0])
@pytest.mark.parametrize("shape", [(10, 6), (10, 6, 1, 1), (10, 4, 3, 3)])
def test_oft_turns_the_inputs_block_by_block(shape, strength):
    weight = noise(*shape)
    edit = Rotation(noise(weight[0].numel() // 3, 3, seed=4))
    expected = weight.flatten(1).double()
    for i, s in enumerate(skew_matrices(edit)):
        eye = torch.eye(3, dtype=torch.float64)
        r = (eye - strength * s) @ torch.linalg.inv(eye + strength * s)
        expected[:, 3 * i : 3 * i + 3] = expected[:, 3 * i : 3 * i + 3] @ r.T
    assert (edit.apply(weight, strength).flatten(1) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("strength", [1.0, 0.3, -2.0])
def test_every_strength_of_oft_is_a_rotation(strength):
    edit, weight = Rotation(noise(3, 28, seed=4)), noise(10, 24)
    blocks = edit.blocks(strength)
    assert edit.block_size == 8 and blocks.shape == (3, 8, 8)
    assert (blocks @ blocks.mT - torch.eye(8)).abs().max() < 1e-5
    assert (torch.linalg.det(blocks) - 1).abs().max() < 1e-5  # no mirror
    after = edit.apply(weight, strength)
    assert (after.norm(dim=1) - weight.norm(dim=1)).abs().max() < 1e-5
    assert (after @ after.T - weight @ weight.T).abs().max() < 1e-4  # angles between neurons


def test_oft_at_strength_zero_and_at_its_start_is_the_weight():
    weight = noise(10, 24)
    assert Rotation(noise(3, 28)).apply(weight, 0.0) is weight
    assert torch.equal(Rotation(torch.zeros(3, 28)).apply(weight), weight)


EDITS = [low_rank((10, 6)), RankReduction(noise(10, 3)), Rotation(noise(2, 3))]


@pytest.mark.parametrize("edit", EDITS, ids=type)
def test_edits_know_what_they_fit(edit):
    assert edit.fits(torch.Size((10, 6)))
    assert isinstance(edit, Rotation) or not edit.fits(torch.Size((11, 6)))
    assert isinstance(edit, RankReduction) or not edit.fits(torch.Size((10, 7)))
    assert not edit.fits(torch.Size((10,)))


@pytest.mark.parametrize("edit", EDITS, ids=type)
def test_an_edit_never_writes_into_the_weight(edit):
    weight = noise(10, 6)
    before = weight.clone()
    edit.apply(weight, 1.0)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_edited_in_fp32(dtype):
    weight, edit = noise(10, 6).to(dtype), RankReduction(noise(10, 3))
    assert torch.equal(edit.apply(weight), edit.apply(weight.float()).to(dtype))


def test_names_are_those_of_lora_files():
    edits = {"down_blocks.0.attentions.1.proj_in": low_rank((10, 6))}
    assert set(to_tensors(edits)) == {
        "lora_unet_down_blocks_0_attentions_1_proj_in.lora_down.weight",
        "lora_unet_down_blocks_0_attentions_1_proj_in.lora_up.weight",
        "lora_unet_down_blocks_0_attentions_1_proj_in.alpha",
    }


def test_tensors_read_back_as_the_same_edits():
    edits = dict(zip(("a.b", "a.c", "a.d"), EDITS, strict=True))
    back, left = from_tensors(to_tensors(edits), ["a.b", "a.c", "a.d", "a.e"])
    assert not left and back.keys() == edits.keys()
    assert all(same(back[site].tensors(), edits[site].tensors()) for site in edits)


def test_keys_of_no_site_are_reported():
    tensors = to_tensors({"a.b": RankReduction(noise(10, 3))}) | {"lora_te_x.alpha": noise(1)}
    edits, left = from_tensors(tensors, ["z"])
    assert not edits and left == ["lora_te_x.alpha", "lora_unet_a_b.para_basis"]


def test_an_incomplete_lora_is_left_over():
    tensors = to_tensors({"a.b": low_rank((10, 6))})
    del tensors["lora_unet_a_b.lora_up.weight"]
    edits, left = from_tensors(tensors, ["a.b"])
    assert not edits and len(left) == 2


@pytest.mark.parametrize(
    "tensors",
    [
        {"lora_down.weight": noise(3, 6), "lora_up.weight": noise(10, 4), "alpha": noise(1)},
        {"lora_down.weight": noise(3), "lora_up.weight": noise(10, 3), "alpha": noise(1)},
        {"lora_down.weight": noise(3, 6), "lora_up.weight": noise(10, 3), "alpha": noise(2)},
        {"lora_down.weight": noise(0, 6), "lora_up.weight": noise(10, 0), "alpha": noise(1)},
        {"para_basis": noise(3)},
        {"para_basis": noise(10, 0)},
        {"para_basis": torch.zeros(10, 3)},
        {"para_basis": torch.ones(10, 3)},
        {"oft_skew": noise(6)},
        {"oft_skew": noise(2, 0)},
        {"oft_skew": noise(2, 5)},
    ],
    ids=[
        *("ranks differ", "vector", "two alphas", "rank 0", "no matrix", "empty", "zero basis"),
        *("dependent basis", "no blocks", "blocks of one", "no triangle"),
    ],
)
def test_malformed_tensors_are_refused_when_read(tensors):
    named = {file_name("a.b", suffix): tensor for suffix, tensor in tensors.items()}
    with pytest.raises(ValueError, match=r"^a\.b: "):
        from_tensors(named, ["a.b"])


def test_two_changes_of_one_layer_are_refused():
    """Either alone would be loaded as if it were all."""
    both = to_tensors({"a.b": LowRank(noise(2, 6), noise(5, 2), 2.0)})
    both |= to_tensors({"a.b": Difference(noise(5, 6))})
    with pytest.raises(ValueError, match=r"a\.b is changed in two ways"):
        from_tensors(both, ["a.b"])
