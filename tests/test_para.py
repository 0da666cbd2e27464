"""PaRa against its equations (arXiv 2406.05641): what rank reduction is, layer by layer."""

import itertools

import pytest
import torch
from torch import nn

from personalize.trainers.edits import WAYS, RankReduction, combine, to_tensors
from personalize.trainers.loop import adapt
from personalize.trainers.methods.para import (
    PaRa,
    ReducedConv2d,
    bottom_directions,
    reduced_layers,
)
from personalize.trainers.sites import sites
from tests.tiny import make, noise, run, tiny_denoiser, tiny_unet


def rank(matrix: torch.Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix.double(), rtol=1e-5))


def reduction(out: int, r: int, seed: int = 1) -> RankReduction:
    return RankReduction(noise(out, r, seed=seed))


# One reduction


def test_directions_are_orthonormal():
    q = reduction(40, 7).directions()
    assert (q.T @ q - torch.eye(7)).abs().max() < 1e-5


def test_nothing_is_left_in_the_removed_directions():
    edit, weight = reduction(40, 7), noise(40, 60)
    assert (edit.directions().T @ edit.apply(weight)).abs().max() < 1e-5


def test_removing_twice_is_removing_once():
    edit, weight = reduction(40, 7), noise(40, 60)
    once = edit.apply(weight)
    assert (edit.apply(once) - once).abs().max() < 1e-5


@pytest.mark.parametrize(
    "shape, r, expected",
    [((16, 16), 3, 13), ((6, 20), 2, 4), ((20, 6), 2, 6), ((20, 6), 18, 2), ((8, 4, 3, 3), 3, 5)],
    ids=["square", "wide", "tall", "tall, but nothing else is left", "convolution"],
)
def test_rank_drops_by_what_the_span_shares_with_the_columns(shape, r, expected):
    """rank W' = rank W - dim(span Q ∩ col W): r when rows are independent, else what must meet."""
    weight = noise(*shape)
    assert rank(reduction(shape[0], r).apply(weight).flatten(1)) == expected


def test_directions_inside_the_columns_of_a_tall_weight_cost_rank():
    weight = noise(20, 6)
    inside = RankReduction(weight @ noise(6, 2, seed=9))
    assert rank(inside.apply(weight)) == 4


def test_strength_is_linear_and_zero_is_exact():
    edit, weight = reduction(12, 3), noise(12, 9)
    assert torch.equal(edit.apply(weight, 0.0), weight)
    halfway = (weight + edit.apply(weight, 1.0)) / 2
    assert (edit.apply(weight, 0.5) - halfway).abs().max() < 1e-6


def test_only_the_span_of_the_basis_matters():
    edit, weight = reduction(16, 3), noise(16, 16)
    mixed = RankReduction(edit.basis @ noise(3, 3, seed=8))
    assert (mixed.apply(weight) - edit.apply(weight)).abs().max() < 1e-5


@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(10, 6), (10, 4, 3, 3)])
def test_a_stock_lora_does_the_same_to_the_same_weight(shape, strength):
    edit, weight = reduction(10, 3), noise(*shape)
    lora = edit.as_low_rank(weight)
    assert lora.rank == 3 and lora.alpha == 3.0 and lora.fits(weight.shape)
    assert (lora.apply(weight, strength) - edit.apply(weight, strength)).abs().max() < 1e-6


@pytest.mark.parametrize("basis", [torch.zeros(10, 3), torch.full((10, 3), float("nan"))])
def test_a_basis_without_directions_is_refused(basis):
    with pytest.raises(ValueError, match=r"basis \(10, 3\) has columns without a direction"):
        RankReduction.from_tensors(basis)


TWO = noise(640, 2)


@pytest.mark.parametrize(
    "third", [TWO[:, 1], -0.3 * TWO[:, 0], TWO[:, 0] + 7 * TWO[:, 1], 1e-6 * TWO.sum(1)]
)
def test_columns_that_depend_on_each_other_are_refused(third):
    """A QR would take a third direction away that nobody learned."""
    basis = torch.cat([TWO, third[:, None]], 1)
    with pytest.raises(ValueError, match=r"basis \(640, 3\) has columns that depend"):
        RankReduction.from_tensors(basis)
    wide = noise(3, 4)
    with pytest.raises(ValueError, match=r"basis \(3, 4\) has columns that depend"):
        RankReduction.from_tensors(wide)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_columns_that_are_only_near_each_other_are_read(scale):
    near = TWO[:, :1] + 1e-3 * noise(640, 1, seed=3)
    basis = scale * torch.cat([TWO, near], 1)
    q = RankReduction.from_tensors(basis).directions()
    assert (q.mT @ q - torch.eye(3)).abs().max() < 1e-5
    whole = torch.linalg.qr(noise(8, 8)).Q
    assert RankReduction.from_tensors(whole).basis is whole


# Subjects combined


def combined(weight: torch.Tensor, reductions, how: str) -> torch.Tensor:
    return combine(list(reductions), how).apply(weight)


def naive(weight: torch.Tensor, reductions, how: str, strength: float = 1.0) -> torch.Tensor:
    """The three ways with explicit projectors, in double precision."""

    def projector(columns: torch.Tensor) -> torch.Tensor:
        return columns @ torch.linalg.pinv(columns)

    bases = [reduction.basis.double() for reduction in reductions]
    result = weight.flatten(1).double()
    if how == "sequential":
        for basis in bases:
            result = result - strength * projector(basis) @ result
    if how == "concat":
        result = result - strength * projector(torch.cat(bases, dim=1)) @ result
    if how == "sum":
        result = result - strength * sum(projector(b) for b in bases) @ result
    return result.reshape(weight.shape)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("shape", [(16, 16), (20, 6), (16, 4, 3, 3)])
def test_combining_is_its_naive_reference(how, strength, shape):
    weight, subjects = noise(*shape), [reduction(shape[0], r, seed=r) for r in (1, 2, 3)]
    change = combine(subjects, how)
    error = change.apply(weight, strength) - naive(weight, subjects, how, strength)
    assert error.abs().max() < 1e-5
    assert change.apply(weight, 0.0) is weight
    assert change.fits(weight.shape) and not change.fits(torch.Size((shape[0] + 1, 6)))
    half = change.apply(weight.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16 and half.shape == weight.shape


@pytest.mark.parametrize("how", WAYS)
def test_one_subject_combined_is_that_subject(how):
    weight, alone = noise(16, 9), reduction(16, 3)
    assert (combined(weight, [alone], how) - alone.apply(weight)).abs().max() < 1e-5


def test_combining_random_subjects_costs_what_the_algebra_says():
    weight, both = noise(16, 16), [reduction(16, 3, seed=1), reduction(16, 2, seed=2)]
    ranks = {how: rank(combined(weight, both, how)) for how in ("sequential", "concat", "sum")}
    assert ranks == {"sequential": 13, "concat": 11, "sum": 15}


def test_concat_does_not_care_about_the_order_and_sequential_does():
    weight = noise(16, 16)
    subjects = [reduction(16, r, seed=r) for r in (1, 2, 3)]
    for order in itertools.permutations(subjects):
        error = combined(weight, order, "concat") - combined(weight, subjects, "concat")
        assert error.abs().max() < 1e-5
    one, other = subjects[1:], subjects[:0:-1]
    assert (
        combined(weight, one, "sequential") - combined(weight, other, "sequential")
    ).abs().max() > 0.1


def test_the_three_ways_agree_exactly_when_spans_are_orthogonal():
    weight, frame = noise(16, 16), torch.linalg.qr(noise(16, 16, seed=4)).Q
    apart = [RankReduction(frame[:, :3]), RankReduction(frame[:, 3:5] @ noise(2, 2, seed=5))]
    ways = [combined(weight, apart, how) for how in ("sequential", "concat", "sum")]
    assert max((ways[0] - other).abs().max() for other in ways[1:]) < 1e-5
    slanted = [RankReduction(frame[:, :3]), RankReduction(frame[:, 2:4] + frame[:, 3:5])]
    ways = [combined(weight, slanted, how) for how in ("sequential", "concat", "sum")]
    pairs = itertools.combinations(ways, 2)
    assert min((a - b).abs().max() for a, b in pairs) > 0.1


def test_concat_counts_shared_directions_once():
    """The very same subject twice, and the same span by another basis: nothing else may go."""
    weight, once = noise(16, 16), reduction(16, 3)
    mixed = RankReduction(once.basis @ noise(3, 3, seed=8))
    overlapping = RankReduction(torch.cat([once.basis[:, :1], noise(16, 1, seed=9)], dim=1))
    for others, size in {(once,): 3, (mixed,): 3, (mixed, once): 3, (overlapping,): 4}.items():
        (q,) = combine([once, *others], "concat").factors
        assert q.shape == (16, size)
        assert (q.T @ q - torch.eye(size)).abs().max() < 1e-5
    assert (combined(weight, [once, mixed], "concat") - once.apply(weight)).abs().max() < 1e-5


def test_an_unknown_way_to_combine_is_an_error():
    with pytest.raises(ValueError, match="concat, sequential, sum"):
        combined(noise(4, 4), [reduction(4, 1)], "mean")


# The layers that train


@pytest.fixture(scope="module", params=["bottom", "random"])
def adapted(request):
    """A U-Net with PaRa in all of its layers, as at step 0."""
    unet, method = tiny_unet(), make(PaRa, layers="all", rank=3, init=request.param)
    adapt(method, unet)
    return unet, method


def test_every_trained_layer_computes_its_merged_weight(adapted):
    """Linear (peft's) and convolution (ours), bias included, at 1e-5."""
    unet, method = adapted
    edits = method.learned(unet)
    worst = {nn.Linear: 0.0, nn.Conv2d: 0.0}
    for site, layer in reduced_layers(unet).items():
        base = layer.get_base_layer()
        assert base.bias is None or base.bias.abs().max() > 0
        x = (
            noise(2, base.in_features)
            if isinstance(base, nn.Linear)
            else noise(2, base.in_channels, 5, 5)
        )
        weight = edits[site].apply(base.weight)
        with torch.no_grad():
            if isinstance(base, nn.Linear):
                merged = nn.functional.linear(x, weight, base.bias)
            else:
                merged = nn.functional.conv2d(x, weight, base.bias, base.stride, base.padding)
            error = float((layer(x) - merged).abs().max())
        worst[type(base)] = max(worst[type(base)], error)
    assert max(worst.values()) < 1e-5, worst
    assert set(edits) == set(sites(tiny_unet(), "all"))


def test_what_is_learned_is_rank_numbers_per_output():
    unet = tiny_unet()
    expected = sum(3 * unet.get_submodule(s).weight.shape[0] for s in sites(unet, "all"))
    free = adapt(make(PaRa, layers="all", rank=3), unet)
    assert sum(parameter.numel() for parameter in free) == expected


def test_bottom_starts_with_the_least_change_there_is():
    unet, method = tiny_unet(), make(PaRa, layers="all", rank=3)
    adapt(method, unet)
    for site, edit in method.learned(unet).items():
        weight = tiny_unet().get_submodule(site).weight
        change = (edit.apply(weight) - weight).double().square().sum()
        sigma = torch.linalg.svdvals(weight.double().flatten(1)).square()
        sigma = torch.cat([sigma, torch.zeros(weight.shape[0] - len(sigma))])
        assert abs(change - sigma[-3:].sum()) < 1e-5 * sigma.sum(), site


def test_bottom_of_a_tall_weight_starts_at_the_identity():
    weight = noise(20, 6)
    edit = RankReduction(bottom_directions(weight, 4))
    assert (edit.apply(weight) - weight).abs().max() < 1e-5


def test_random_starts_as_peft_does():
    unet, method = tiny_unet(), make(PaRa, layers="all", rank=8, init="random")
    adapt(method, unet)
    kinds = {nn.Linear: [], nn.Conv2d: []}
    for layer in reduced_layers(unet).values():
        kinds[type(layer.get_base_layer())].append(layer.deft_P["default"].detach().flatten())
    for values in map(torch.cat, kinds.values()):  # some 10,000 numbers each
        assert values.std() == pytest.approx(0.02, rel=0.04)
        assert abs(values.mean()) < 4 * 0.02 / len(values) ** 0.5


def test_the_seed_sets_the_random_start():
    starts = []
    for seed in (0, 0, 1):
        unet, method = tiny_unet(), make(PaRa, init="random", seed=seed)
        adapt(method, unet)
        starts.append(torch.cat([t.flatten() for t in to_tensors(method.learned(unet)).values()]))
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_gradients_of_the_basis_are_orthogonal_to_it():
    """Only the span matters, so the loss is flat along B itself: B^T dL/dB = 0."""
    layer = ReducedConv2d(nn.Conv2d(4, 12, 3).requires_grad_(False), rank=3)
    layer(noise(2, 4, 6, 6)).pow(3).sum().backward()
    basis = layer.deft_P["default"]
    assert (basis.T @ basis.grad).abs().max() < 1e-4 * (basis.norm() * basis.grad.norm())


def test_a_convolutions_gradient_is_that_of_its_merged_weight():
    base, x = nn.Conv2d(4, 12, 3).requires_grad_(False), noise(2, 4, 6, 6)
    layer = ReducedConv2d(base, rank=3)
    layer(x).square().mean().backward()
    basis = layer.deft_P["default"].detach().clone().requires_grad_()
    q = torch.linalg.qr(basis).Q
    weight = (base.weight.flatten(1) - q @ (q.T @ base.weight.flatten(1))).reshape(
        base.weight.shape
    )
    nn.functional.conv2d(x, weight, base.bias).square().mean().backward()
    assert torch.allclose(layer.deft_P["default"].grad, basis.grad, rtol=1e-3, atol=1e-6)


def test_weight_decay_does_not_change_what_is_learned():
    """AdamW's decay shrinks B, whose length is of no matter; only rounding is left of it."""
    spans = []
    for decay in (0.0, 0.5):
        step = run(make(PaRa, weight_decay=decay, optimizer="sgd", steps=1), tiny_denoiser())[-1]
        edits = step.learned()
        spans.append(
            torch.cat([(e.directions() @ e.directions().T).flatten() for e in edits.values()])
        )
    assert (spans[0] - spans[1]).abs().max() < 1e-3
