"""Selective BP/ZO: the choice, the estimator, the step and its memory, against slow references."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from personalize.trainers.denoiser import Denoiser
from personalize.trainers.edits import to_tensors
from personalize.trainers.errors import InputError
from personalize.trainers.loop import adapt, draw_objectives, train
from personalize.trainers.memory import LiveBytes
from personalize.trainers.method import Draws, Objective
from personalize.trainers.methods.lora import LoRA
from personalize.trainers.methods.selective_zo import (
    Branched,
    Directions,
    Point,
    SelectiveZO,
    one_sided,
    shrunk,
    spsa,
)
from tests.tiny import (
    WIDTH,
    distance,
    encode,
    example,
    make,
    noise,
    run,
    same,
    sd_alphas,
    tiny_data,
    tiny_denoiser,
    tiny_unet,
)

# The choice: P_ZO(t, s) = sigmoid(10 (t/T - 1.2 + 0.9 s))


@pytest.mark.parametrize(
    "progress, expected",
    [(0.0, (0.000, 0.001, 0.119)), (0.5, (0.001, 0.076, 0.924)), (1.0, (0.047, 0.881, 0.999))],
)
def test_the_probability_has_the_values_of_its_table(progress, expected):
    share = torch.tensor([0.0, 0.5, 1.0])
    found = make(SelectiveZO).p_zo(share, progress).tolist()
    assert [round(p, 3) for p in found] == [pytest.approx(p, abs=1e-3) for p in expected]
    naive = [1 / (1 + 2.718281828 ** (-10 * (t - (1.2 - 0.9 * progress)))) for t in (0, 0.5, 1)]
    assert found == pytest.approx(naive, rel=1e-4)


def grid() -> Tensor:
    """P_ZO, (progress, timestep), at the centres of 1000 x 1000 cells."""
    centres = (torch.arange(1000) + 0.5) / 1000
    return torch.stack([make(SelectiveZO).p_zo(centres, float(s)) for s in centres])


def test_the_probability_rises_with_the_timestep_and_with_progress():
    p = grid()
    assert ((p > 0) & (p < 1)).all()
    assert (p.diff(dim=0) > 0).all() and (p.diff(dim=1) > 0).all()


def test_zo_takes_29_percent_of_the_steps_on_average():
    assert float(grid().mean()) == pytest.approx(0.288, abs=5e-4)


def batches(chosen: SelectiveZO, data=None, parts: int = 1) -> list[Branched]:
    """Draw every batch of a run."""
    denoiser, data = tiny_denoiser(), data or tiny_data()
    seed, steps = chosen.settings.seed, chosen.settings.steps
    return [
        chosen.draw(data, denoiser, Draws(seed, i, part, parts))
        for i in range(steps)
        for part in range(parts)
    ]


def test_branches_come_as_often_as_their_probability_says():
    """Over all steps, and of the likely and the unlikely ones alone: within 3 sigma."""
    drawn = batches(make(SelectiveZO, steps=1500, batch_size=1))
    p = torch.tensor([batch.p_zo for batch in drawn])
    zo = torch.tensor([batch.zeroth_order for batch in drawn]).float()
    for which in (p >= 0, p < 0.5, p >= 0.5):
        sigma = (p * (1 - p))[which].sum().sqrt()
        assert (zo - p)[which].sum().abs() < 3 * sigma
    assert abs(float(zo.mean()) - 0.288) < 3 * (0.288 * 0.712 / 1500) ** 0.5


def test_the_probability_is_that_of_the_timesteps_shown():
    chosen = make(SelectiveZO, steps=40, batch_size=3)
    for index, batch in enumerate(batches(chosen, tiny_data(prior=2))):
        subject = batch.timesteps[:3] / 1000
        expected = sum(float(chosen.p_zo(t, index / 40)) for t in subject) / 3
        assert len(batch.timesteps) == 6 and batch.p_zo == pytest.approx(expected, rel=1e-5)


def test_all_batches_of_a_step_take_one_branch_and_keep_their_own_timesteps():
    chosen = make(SelectiveZO, steps=60, batch_size=1, gradient_accumulation=3)
    drawn = batches(chosen, parts=3)
    steps = [drawn[i : i + 3] for i in range(0, len(drawn), 3)]
    assert all(len({(b.zeroth_order, b.p_zo) for b in step}) == 1 for step in steps)
    assert all(len({int(b.timesteps) for b in step}) > 1 for step in steps)
    assert {b.zeroth_order for b in drawn} == {True, False}
    first = [float(chosen.p_zo(step[0].timesteps / 1000, i / 60)) for i, step in enumerate(steps)]
    assert [step[0].p_zo for step in steps] == pytest.approx(first, rel=1e-5)


def test_a_kappa_of_zero_is_a_coin():
    drawn = batches(make(SelectiveZO, steps=400, batch_size=1, kappa=0.0))
    assert {batch.p_zo for batch in drawn} == {0.5}
    assert abs(sum(batch.zeroth_order for batch in drawn) - 200) < 3 * 10


@pytest.mark.parametrize(
    "branches, side, zeroth_order",
    [("bp-low", 4, False), ("zo-high", 8, True), ("bp-high", 8, False)],
)
def test_a_branch_can_be_fixed(branches, side, zeroth_order):
    for batch in batches(make(SelectiveZO, steps=10, branches=branches)):
        assert batch.latents.shape[-1] == batch.noise.shape[-1] == side
        assert batch.zeroth_order == zeroth_order and batch.p_zo == zeroth_order


# What is shown


def test_zo_sees_the_latents_themselves_and_bp_those_of_smaller_pictures():
    data, low = tiny_data(1, prior=1), []
    for picture in (*data.training, *data.prior):
        small = nn.functional.interpolate(
            picture.pixels[None], (32, 32), mode="bicubic", antialias=True
        )
        low.append(encode(small.clamp(-1, 1))[0])
    high = [picture.latent for picture in (*data.training, *data.prior)]
    drawn = batches(make(SelectiveZO, steps=60, batch_size=1), data)
    assert {batch.zeroth_order for batch in drawn} == {True, False}
    for batch in drawn:
        for found, expected in zip(batch.latents, high if batch.zeroth_order else low, strict=True):
            assert torch.equal(found, expected)


def test_small_pictures_are_encoded_once_per_run():
    asked = []
    data = dataclasses.replace(
        tiny_data(3, prior=2, held_out=1), encode=lambda x: asked.append(x.shape) or encode(x)
    )
    chosen = make(SelectiveZO, steps=30)
    run(chosen, tiny_denoiser(), data)
    assert asked == [(1, 3, 32, 32)] * 5
    run(make(SelectiveZO, branches="zo-high"), tiny_denoiser(), data)
    assert len(asked) == 5


def test_pictures_that_are_not_square_keep_their_shape():
    picture = dataclasses.replace(
        example(0), pixels=noise(3, 64, 96).clamp(-1, 1), latent=noise(4, 8, 12)
    )
    data = dataclasses.replace(tiny_data(), training=(picture,))
    assert shrunk(data, 0, 2).training[0].latent.shape == (4, 4, 6)
    assert shrunk(data, 32, 2).training[0].pixels.shape == (3, 32, 48)


@pytest.mark.parametrize("side", [24, 40, 80, 8])
def test_a_low_resolution_that_the_base_does_not_take_is_refused(side):
    with pytest.raises(InputError, match=rf"'low_resolution' is {side}, .* a multiple of 16"):
        run(make(SelectiveZO, low_resolution=side), tiny_denoiser())


@pytest.mark.parametrize("side, expected", [(0, 4), (16, 2), (32, 4), (48, 6), (64, 8)])
def test_the_low_resolution_is_in_pixels(side, expected):
    batch = batches(make(SelectiveZO, steps=1, low_resolution=side))[0]
    assert not batch.zeroth_order and batch.latents.shape[-1] == expected


def test_half_is_rounded_down_to_what_the_base_takes():
    sides = {64: 32, 80: 32, 96: 48, 16: 16, 32: 16}
    for full, half in sides.items():
        picture = dataclasses.replace(
            example(0), pixels=noise(3, full, full), latent=noise(4, full // 8, full // 8)
        )
        data = dataclasses.replace(tiny_data(), training=(picture,))
        assert shrunk(data, 0, 2).training[0].pixels.shape[-1] == half


# BP steps are a plain LoRA's


def test_without_zo_it_is_a_plain_run_at_low_resolution_bit_for_bit():
    never = make(SelectiveZO, steps=6, threshold_start=1000.0, threshold_end=1000.0)
    fixed = make(SelectiveZO, steps=6, branches="bp-low")
    plain = make(LoRA, steps=6)
    results = [run(never, tiny_denoiser())[-1], run(fixed, tiny_denoiser())[-1]]
    reference = run(plain, tiny_denoiser(), shrunk(tiny_data(), 0, 2))[-1]
    for result in results:
        assert same(to_tensors(result.learned()), to_tensors(reference.learned()))
        assert result.loss == reference.loss
    assert results[0].facts == {"branch": 0.0, "p_zo": 0.0}


def test_bp_high_is_a_plain_run_bit_for_bit():
    high = run(make(SelectiveZO, steps=4, branches="bp-high"), tiny_denoiser())[-1]
    plain = run(make(LoRA, steps=4), tiny_denoiser())[-1]
    assert same(to_tensors(high.learned()), to_tensors(plain.learned()))


# The estimator


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(noise(*shape, seed=i)) for i, shape in enumerate(shapes)]


def flat(tensors) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@pytest.mark.parametrize("signs", [False, True])
def test_a_direction_is_the_same_whenever_it_is_made(signs):
    theta = parameters((30, 40), (50, 60))
    z = [flat(Directions(theta, 7, index, signs)) for index in (0, 0, 1)]
    other = flat(Directions(theta, 8, 0, signs))
    assert torch.equal(z[0], z[1])
    for independent in (z[2], other):
        assert abs(float(torch.corrcoef(torch.stack([z[0], independent]))[0, 1])) < 4 / 4200**0.5
    first, second = z[0][:1200], z[0][1200:2400]
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 4 / 1200**0.5
    assert float(z[0].mean()) == pytest.approx(0, abs=4 / 4200**0.5)
    assert float(z[0].square().mean()) == pytest.approx(1, abs=4 * (2 / 4200) ** 0.5)
    if signs:
        assert set(z[0].tolist()) == {-1.0, 1.0}


def quadratic(theta: list[nn.Parameter]) -> tuple[Callable[[], Tensor], Tensor, Tensor]:
    """Return L = x^T A x / 2 + b x of all parameters as one vector, A, and its gradient here."""
    x = flat(theta).double()
    half = noise(len(x), len(x), seed=50).double()
    a, b = half @ half.T / len(x), noise(len(x), seed=51).double()

    def loss() -> Tensor:
        now = flat(theta).double()
        return now @ a @ now / 2 + b @ now

    return loss, a, a @ x + b


COUNT = 4000


@torch.no_grad()
def estimates(estimate, signs: bool, epsilon: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (slopes, directions, A, gradient) on the quadratic of 20 numbers."""
    theta = [nn.Parameter(p.double()) for p in parameters((3, 4), (8,))]
    loss, a, gradient = quadratic(theta)
    directions = [Directions(theta, 1, index, signs) for index in range(COUNT)]
    _, slopes = estimate(loss, Point(theta, copy=True), directions, epsilon)
    return slopes, torch.stack([flat(z) for z in directions]).double(), a, gradient


def test_spsa_is_exact_on_a_quadratic_and_one_side_is_off_by_the_curvature():
    slopes, z, _, gradient = estimates(spsa, False, 1e-2)
    assert (slopes - z @ gradient).abs().max() < 1e-9
    slopes, z, a, gradient = estimates(one_sided, True, 1e-2)
    curvature = torch.einsum("ni,ij,nj->n", z, a, z)
    assert (slopes - z @ gradient - 1e-2 / 2 * curvature).abs().max() < 1e-9


@pytest.mark.parametrize("estimate, signs", [(spsa, False), (one_sided, True)])
def test_the_estimate_is_unbiased(estimate, signs):
    """The mean of g z over 4000 directions is the gradient, each of 20 numbers within 4 sigma."""
    slopes, z, _, gradient = estimates(estimate, signs, 1e-4)
    each = slopes[:, None] * z
    sigma = each.std(0) / COUNT**0.5
    assert ((each.mean(0) - gradient).abs() < 4 * sigma).all()
    assert sigma.max() < 0.1 * gradient.norm()  # otherwise nothing was shown


@pytest.mark.parametrize("signs, factor", [(False, 22), (True, 20)])
def test_the_squared_length_is_that_of_the_gradient_times_d_plus_2(signs, factor):
    """E |g z|^2 = (d + 2) |grad|^2 for normal z, and d |grad|^2 for signs; d = 20."""
    slopes, z, _, gradient = estimates(spsa, signs, 1e-2)
    ratio = (slopes[:, None] * z).square().sum(1) / gradient.square().sum()
    assert abs(float(ratio.mean()) - factor) < 3 * float(ratio.std()) / COUNT**0.5
    assert float(ratio.std()) / COUNT**0.5 < 1  # the two factors can be told apart


# Coming back


@torch.no_grad()
def test_weights_come_back_from_a_copy_bit_for_bit_and_in_place_to_rounding():
    for copy in (True, False):
        theta = parameters((64, 8), (8, 64))
        before = flat(theta)
        directions = [Directions(theta, 3, index, False) for index in range(100)]
        spsa(lambda: torch.zeros(()), Point(theta, copy), directions, 1e-2)  # 200 looks
        error = float((flat(theta) - before).abs().max())
        print(f"copy={copy}: {error:.1e} after 200 looks")
        assert error == 0.0 if copy else 0 < error <= 1e-5


def test_a_look_is_taken_where_it_says():
    theta = parameters((5, 2), (3,))
    before, z = flat(theta), Directions(theta, 3, 0, False)
    seen = []
    with torch.no_grad():
        spsa(lambda: seen.append(flat(theta)) or theta[0].sum(), Point(theta, True), [z], 0.25)
    assert torch.allclose(seen[0], before + 0.25 * flat(z), atol=1e-6)
    assert torch.allclose(seen[1], before - 0.25 * flat(z), atol=1e-6)


# The step


@dataclasses.dataclass
class Bench:
    """A method on a tiny network, about to take steps by hand; its base is a bit past the start."""

    chosen: SelectiveZO
    denoiser: Denoiser
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer

    def objectives(self, step: int = 0, data=None) -> list[Objective]:
        return list(draw_objectives(self.chosen, self.denoiser, data or tiny_data(), step))


def bench(**settings) -> Bench:
    chosen, denoiser = (
        make(SelectiveZO, **{"steps": 10, "branches": "zo-high"} | settings),
        tiny_denoiser(),
    )
    free = adapt(chosen, denoiser.unet)
    with torch.no_grad():
        for index, parameter in enumerate(free):
            parameter.add_(noise(*parameter.shape, seed=500 + index), alpha=0.05)
    return Bench(chosen, denoiser, free, torch.optim.AdamW(free, lr=chosen.settings.learning_rate))


def naive_losses(at: Bench, objectives: list[Objective], z: Tensor, lengths) -> list[float]:
    """The mean loss of the objectives at theta + length * z, for each length."""
    found, start = [], flat(at.parameters)
    with torch.no_grad():
        for length in lengths:
            nn.utils.vector_to_parameters(start + length * z, at.parameters)
            found.append(sum(float(objective()) for objective in objectives) / len(objectives))
        nn.utils.vector_to_parameters(start, at.parameters)
    return found


@pytest.mark.parametrize("dtype, epsilon", [(torch.float32, 0.01), (torch.bfloat16, 0.1)])
def test_how_far_it_looks_by_itself_depends_on_the_bases_numbers(dtype, epsilon):
    reached = []
    for chosen in (0.0, epsilon, 0.03):
        at = bench(zo_epsilon=chosen)
        at.denoiser.unet.to(dtype)
        for parameter in at.parameters:
            parameter.data = parameter.data.float()
        at.chosen.update(at.objectives(), at.optimizer)
        reached.append(flat(at.parameters))
    assert torch.equal(reached[0], reached[1]) and not torch.equal(reached[0], reached[2])


@pytest.mark.parametrize("restore", ["copy", "in place"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_goes_along_z_by_rate_times_slope(restore, parts):
    """theta <- theta - rate * (L+ - L-) / 2 eps * z, the loss of all parts together."""
    at = bench(zo_restore=restore, gradient_accumulation=parts, zo_learning_rate=1e-2)
    objectives, before = at.objectives(), flat(at.parameters)
    z = flat(Directions(at.parameters, objectives[0].batch.seed, 0, False))
    ahead, behind = naive_losses(at, objectives, z, (1e-2, -1e-2))
    slope = (ahead - behind) / 2e-2
    loss = float(at.chosen.update(objectives, at.optimizer))
    moved = flat(at.parameters) - before
    assert loss == pytest.approx((ahead + behind) / 2, rel=1e-5)
    assert at.chosen.facts()["projected_gradient"] == pytest.approx(abs(slope), rel=1e-2)
    assert float(moved.norm()) == pytest.approx(1e-2 * abs(slope) * float(z.norm()), rel=1e-2)
    against = float(torch.nn.functional.cosine_similarity(moved, z, dim=0))
    assert against == pytest.approx(-1 if slope > 0 else 1, abs=1e-4)


@pytest.mark.parametrize("estimator, looks", [("spsa", 6), ("one-sided", 4)])
def test_several_directions_are_averaged_at_one_point(estimator, looks):
    at = bench(zo_estimator=estimator, perturbations=3, zo_learning_rate=1e-2)
    objectives, before = at.objectives(), flat(at.parameters)
    expected = torch.zeros_like(before)
    signs = estimator == "one-sided"
    for index in range(3):
        z = flat(Directions(at.parameters, objectives[0].batch.seed, index, signs))
        ahead, here, behind = naive_losses(at, objectives, z, (1e-2, 0.0, -1e-2))
        slope = (ahead - here) / 1e-2 if signs else (ahead - behind) / 2e-2
        expected -= 1e-2 * slope * z / 3
    forwards = []
    at.denoiser.register_forward_hook(lambda *_: forwards.append(1))
    at.chosen.update(objectives, at.optimizer)
    assert len(forwards) == looks
    assert distance(flat(at.parameters) - before, expected) < 1e-2


def test_the_estimate_is_the_directional_derivative_of_back_propagation():
    at = bench(zo_epsilon=1e-3)
    objectives = at.objectives()
    sum(objective() for objective in objectives).backward()
    z = flat(Directions(at.parameters, objectives[0].batch.seed, 0, False))
    expected = float(flat(p.grad for p in at.parameters) @ z)
    at.chosen.update(objectives, at.optimizer)
    assert at.chosen.facts()["projected_gradient"] == pytest.approx(abs(expected), rel=2e-2)


def test_a_zo_step_has_no_autograd_graph_and_leaves_no_gradients():
    at = bench(branches="selective", threshold_start=0.0, threshold_end=0.0, kappa=1000.0)
    low = make(SelectiveZO, branches="bp-low")
    batch = low.draw(tiny_data(), at.denoiser, Draws(0, 0, 0, 1))
    at.chosen.update([Objective(at.chosen, at.denoiser, batch)], at.optimizer)
    assert all(p.grad is not None for p in at.parameters)
    seen = []
    for module in at.denoiser.modules():
        module.register_forward_hook(
            lambda _, __, out: seen.extend(
                t.requires_grad for t in tree_leaves(out) if isinstance(t, Tensor)
            )
        )
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = at.chosen.update(at.objectives(), at.optimizer)
    assert at.chosen.facts()["branch"] == 1.0
    assert seen and not any(seen) and not saved and not loss.requires_grad
    assert all(p.grad is None and p.requires_grad for p in at.parameters)


def test_a_zo_step_leaves_the_optimizers_state_alone():
    at = bench()
    low = make(SelectiveZO, branches="bp-low")
    batch = low.draw(tiny_data(), at.denoiser, Draws(0, 0, 0, 1))
    at.chosen.update([Objective(at.chosen, at.denoiser, batch)], at.optimizer)

    def state() -> dict[str, Tensor]:
        values = at.optimizer.state_dict()["state"]
        return {f"{i}.{k}": v.clone() for i, of in values.items() for k, v in of.items()}

    before, weights = state(), flat(at.parameters)
    at.chosen.update(at.objectives(1), at.optimizer)
    assert len(before) == 3 * len(at.parameters) and same(state(), before)
    assert not torch.equal(flat(at.parameters), weights)


def test_the_rate_of_zo_follows_the_schedule_in_proportion():
    moved = []
    for scale in (1.0, 0.25, 0.0):
        at = bench(zo_learning_rate=1e-2)
        at.optimizer.param_groups[0]["lr"] *= scale
        before = flat(at.parameters)
        at.chosen.update(at.objectives(), at.optimizer)
        moved.append(flat(at.parameters) - before)
    assert distance(moved[1], moved[0] / 4) < 1e-3
    assert not moved[2].any()


@pytest.mark.parametrize("estimator", ["spsa", "one-sided"])
def test_a_loss_that_is_not_finite_is_reported_and_moves_nothing(estimator):
    at = bench(zo_estimator=estimator, perturbations=2)
    bad = dataclasses.replace(example(7), latent=torch.full((4, 8, 8), float("nan")))
    before = flat(at.parameters)
    data = dataclasses.replace(tiny_data(), training=(bad,))
    assert at.chosen.update(at.objectives(data=data), at.optimizer).isnan()
    assert torch.equal(flat(at.parameters), before)
    with pytest.raises(FloatingPointError, match="step 1"):
        run(make(SelectiveZO, branches="zo-high", non_finite="stop"), tiny_denoiser(), data)


def test_at_the_start_of_a_lora_half_of_it_has_no_slope():
    """B = 0, so dL/dA is exactly 0 and looking along A shows nothing: BP has to begin."""
    denoiser, chosen = tiny_denoiser(), make(SelectiveZO, branches="zo-high")
    adapt(chosen, denoiser.unet)
    objective = Objective(chosen, denoiser, chosen.draw(tiny_data(), denoiser, Draws(0, 0, 0, 1)))
    objective().backward()
    halves = {half: [] for half in "AB"}
    for name, parameter in denoiser.unet.named_parameters():
        if parameter.requires_grad:
            halves["A" if "lora_A" in name else "B"].append(parameter)
    assert not flat(p.grad for p in halves["A"]).any()
    assert flat(p.grad for p in halves["B"]).any()
    with torch.no_grad():
        slopes = {
            half: float(
                spsa(objective, Point(free, True), [Directions(free, 1, 0, False)], 1e-2)[1]
            )
            for half, free in halves.items()
        }
    assert slopes["A"] == 0.0 and abs(slopes["B"]) > 1e-3


def test_a_run_tells_its_branches():
    steps = run(make(SelectiveZO, steps=30, batch_size=1), tiny_denoiser())
    branches = [step.facts["branch"] for step in steps]
    assert set(branches) == {0.0, 1.0}
    for step in steps:
        assert 0 < step.facts["p_zo"] < 1
        assert ("projected_gradient" in step.facts) == (step.facts["branch"] == 1.0)


# Memory


def wide():
    """Return (a denoiser of 64 and 128 channels, one picture of 256 x 256 pixels)."""
    unet = tiny_unet(block_out_channels=(64, 128), layers_per_block=2, attention_head_dim=8)
    picture = dataclasses.replace(
        example(0), pixels=noise(3, 256, 256).clamp(-1, 1), latent=noise(4, 32, 32)
    )
    data = dataclasses.replace(tiny_data(), training=(picture,))
    return Denoiser(unet, sd_alphas(), "epsilon"), data


def peak(branches: str, steps: int = 2, **settings) -> tuple[int, int]:
    """Return peak live bytes of (an update, a bare forward pass) at 256 x 256 pixels.

    The first step is not counted: the optimiser has its state from the second on.
    """
    denoiser, data = wide()
    chosen = make(SelectiveZO, branches=branches, batch_size=1, **settings)
    optimizer = torch.optim.AdamW(adapt(chosen, denoiser.unet), lr=1e-4)
    highest = 0
    for step in range(steps):
        objectives = list(draw_objectives(chosen, denoiser, data, step))
        with LiveBytes() as update:
            chosen.update(objectives, optimizer)
        highest = max(highest, update.peak if step else 0)
    with LiveBytes() as forward, torch.no_grad():
        denoiser(noise(1, 4, 32, 32), torch.tensor([500]), noise(1, 7, WIDTH))
    return highest, forward.peak


@pytest.fixture(scope="module")
def peaks() -> dict[str, int]:
    """Peak live bytes of a step in every branch, and of inference."""
    measured = {branches: peak(branches) for branches in ("zo-high", "bp-low", "bp-high")}
    found = {branches: update for branches, (update, _) in measured.items()}
    found["in place"] = peak("zo-high", zo_restore="in place")[0]
    found["inference"] = measured["zo-high"][1]
    print({name: f"{size / 2**20:.2f} MiB" for name, size in found.items()})
    return found


def test_zo_high_needs_less_memory_than_bp_low_and_that_less_than_bp_high(peaks):
    """On a U-Net of 64 and 128 channels: a half and a quarter; ZO-high is at inference level."""
    assert peaks["zo-high"] < 0.6 * peaks["bp-low"]
    assert peaks["bp-low"] < 0.3 * peaks["bp-high"]
    assert peaks["in place"] <= peaks["zo-high"] < 1.05 * peaks["inference"]


def whole(branches: str, steps: int, **settings) -> int:
    """Return the peak of live bytes of a run, from its first draw to its last step."""
    denoiser, data = wide()
    chosen = make(SelectiveZO, branches=branches, batch_size=1, steps=steps, **settings)
    with LiveBytes() as seen:
        taken = [step.facts["branch"] for step in train(chosen, denoiser, data)]
    assert len(taken) == steps and set(taken) == ({0.0, 1.0} if branches == "selective" else {0.0})
    return seen.peak


def test_a_selective_run_never_needs_the_memory_of_bp_high():
    """Of all that a run allocates: drawing, encoding, the optimiser's state, both branches."""
    low, high = whole("bp-low", 3), whole("bp-high", 3)
    assert whole("selective", 12, kappa=0.0) <= 1.02 * low < 0.5 * high
