"""Several subjects in one MODEL, through ComfyUI's own patching."""

import dataclasses
import itertools

import pytest
import torch

from headless import Graph, fill_defaults
from personalize.nodes import bridge, load
from personalize.nodes.combine import Combine, combined
from personalize.trainers.artifact import Header, Personalization
from personalize.trainers.edits import (
    WAYS,
    Difference,
    LowRank,
    RankReduction,
    Rotation,
    combine,
    to_tensors,
)
from personalize.trainers.errors import InputError
from personalize.trainers.time_aware import SITE, TimeAware, block_of
from tests import stock
from tests.test_bridge import question
from tests.test_load import sites_of, weights_when_loaded
from tests.test_para import naive, rank
from tests.tiny import comfy_model, comfy_output, geometry, noise, same, snapshot
from tests.waiting import PATIENCE

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
QUERY, KEY = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_k"  # 32 x 32
WIDE = f"{BLOCK}.ff.net.2"  # 32 x 128
CONV = "down_blocks.0.resnets.0.conv1"  # 32 x 32 x 3 x 3


def personalization(method: str, edits: dict, base=None, words="a zib totem") -> Personalization:
    fingerprint = bridge.fingerprint(base) if base else {"family": "stable-diffusion-v1"}
    return Personalization(
        Header(method, 7, {}, fingerprint, words, "", "0" * 16), to_tensors(edits)
    )


def para(seed: int, **ranks: int) -> Personalization:
    """Make a PaRa file; ranks by the names above, all layers are 32 wide."""
    sites = {"query": QUERY, "key": KEY, "wide": WIDE, "conv": CONV}
    edits = {
        sites[name]: RankReduction(noise(32, r, seed=seed * 10 + i))
        for i, (name, r) in enumerate(ranks.items())
    }
    return personalization("para", edits, words=f"subject {seed}")


def lora(seed: int, rank: int = 2) -> Personalization:
    def edit(*shape: int) -> LowRank:
        ones = [1] * (len(shape) - 2)
        down, up = noise(rank, *shape[1:], seed=seed), noise(32, rank, *ones, seed=seed + 1)
        return LowRank(down, up, float(rank))

    edits = {QUERY: edit(32, 32), CONV: edit(32, 32, 3, 3)}
    return personalization("lora", edits, words=f"style {seed}")


@pytest.fixture
def base():
    return comfy_model()


def weights(model, *sites: str) -> list[torch.Tensor]:
    """The weights that ComfyUI computes with."""
    names, found = bridge.twin_names(model), weights_when_loaded(model)
    return [found[names[f"{site}.weight"]] for site in sites]


def combined_weights(base, learned, how: str, *sites: str, strength: float = 1.0):
    inputs = {f"personalized{i}": one for i, one in enumerate(learned)}
    return weights(combined(base, inputs, how, strength)[0], *sites)


# The equations, in the MODEL's weights


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_the_models_weights_are_the_naive_reference(base, how, strength):
    """Linear, wide and convolution; ranks that differ; layers of one subject, two and three."""
    subjects = [para(1, query=3, wide=2), para(2, query=2, conv=4), para(3, query=1, conv=2)]
    sites = (QUERY, WIDE, CONV, KEY)
    before = weights(base, *sites)
    after = combined_weights(base, subjects, how, *sites, strength=strength)
    edits = [subject.edits(sites_of(base))[0] for subject in subjects]
    for site, old, new in zip(sites, before, after, strict=True):
        reductions = [of[site] for of in edits if site in of]
        assert len(reductions) == {QUERY: 3, WIDE: 1, CONV: 2, KEY: 0}[site]
        expected = naive(old, reductions, how, strength) if reductions else old
        assert (new - expected).abs().max() < 1e-5, site


def test_ranks_drop_by_what_the_algebra_says(base):
    """3 and 2 of 32 directions: one after the other 3, together 5, and the sum 1 (generically)."""
    subjects = [para(1, query=3), para(2, query=2)]
    ranks = {how: rank(combined_weights(base, subjects, how, QUERY)[0]) for how in WAYS}
    assert ranks == {"sequential": 29, "concat": 27, "sum": 31}


def test_concat_does_not_care_about_the_order_of_the_inputs_and_sequential_does(base):
    subjects = [para(seed, query=seed) for seed in (1, 2, 3)]
    found = {how: [] for how in ("concat", "sequential")}
    for order in itertools.permutations(subjects):
        for how, results in found.items():
            results += combined_weights(base, order, how, QUERY)
    assert max((w - found["concat"][0]).abs().max() for w in found["concat"]) < 1e-5
    assert (found["sequential"][0] - found["sequential"][-1]).abs().max() > 0.01


def test_sequential_is_one_apply_after_the_other(base):
    subjects = [para(1, query=3, conv=2), para(2, query=2, wide=1)]
    stacked = base
    for subject in subjects:
        stacked, _ = load.personalize(stacked, subject, 0.7)
    expected = weights(stacked, QUERY, CONV, WIDE)
    found = combined_weights(base, subjects, "sequential", QUERY, CONV, WIDE, strength=0.7)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_three_ways_agree_when_subjects_are_orthogonal(base):
    frame = torch.linalg.qr(noise(32, 32, seed=4)).Q
    subjects = [
        personalization("para", {QUERY: RankReduction(frame[:, :3])}),
        personalization("para", {QUERY: RankReduction(frame[:, 3:5] @ noise(2, 2, seed=5))}),
    ]
    one, *others = [combined_weights(base, subjects, how, QUERY)[0] for how in WAYS]
    assert max((one - other).abs().max() for other in others) < 1e-5


@pytest.mark.parametrize("how", WAYS)
def test_one_subject_combined_is_that_subject_applied(base, how):
    subject = para(1, query=3, conv=2)
    alone = weights(load.personalize(base, subject, 1.0)[0], QUERY, CONV)
    for a, b in zip(combined_weights(base, [subject], how, QUERY, CONV), alone, strict=True):
        assert (a - b).abs().max() < 1e-5


def test_the_same_subject_twice_is_that_subject(base):
    subject = para(1, query=3)
    once = weights(load.personalize(base, subject, 1.0)[0], QUERY)[0]
    for how in ("concat", "sequential"):
        twice = combined_weights(base, [subject, subject], how, QUERY)[0]
        assert (twice - once).abs().max() < 1e-5, how


# PaRa, then LoRA


@pytest.mark.parametrize("how", WAYS)
def test_loras_are_added_after_the_reductions_whatever_the_order_of_the_inputs(base, how):
    """W' = reduced(W) + s D1 + s D2: by hand."""
    one, two, style, other = para(1, query=3, conv=2), para(2, query=2), lora(3), lora(5, rank=1)
    edits = {id(p): p.edits(sites_of(base))[0] for p in (one, two, style, other)}
    sites, before = (QUERY, CONV), weights(base, QUERY, CONV)
    for order in ([one, two, style, other], [style, one, other, two]):
        after = combined_weights(base, order, how, *sites, strength=0.8)
        for site, old, new in zip(sites, before, after, strict=True):
            reductions = [edits[id(p)][site] for p in (one, two) if site in edits[id(p)]]
            expected = combine(reductions, how).apply(old, 0.8)
            for added in (style, other):
                expected = expected + 0.8 * edits[id(added)][site].delta().reshape(old.shape)
            assert (new - expected).abs().max() < 1e-5, site


def test_a_lora_survives_here_and_is_hurt_by_a_reduction_that_comes_after_it(base):
    """What is left of the LoRA in the directions that PaRa removes: all of it, and nothing."""
    subject, style = para(1, query=8), lora(3)
    q = subject.edits(sites_of(base))[0][QUERY].directions()
    delta = style.edits(sites_of(base))[0][QUERY].delta()
    kept = combined_weights(base, [style, subject], "concat", QUERY)[0]
    first, _ = load.personalize(base, style, 1.0)
    lost = weights(load.personalize(first, subject, 1.0)[0], QUERY)[0]
    assert (q.T @ kept - q.T @ delta).abs().max() < 1e-5 < (q.T @ delta).abs().max()
    assert (q.T @ lost).abs().max() < 1e-5


def test_trained_weights_are_added_after_the_reductions_too(base):
    change = noise(32, 32, seed=9)
    full = personalization("dreambooth", {QUERY: Difference(change)})
    subject = para(1, query=3)
    reduced = weights(load.personalize(base, subject, 1.0)[0], QUERY)[0]
    after = combined_weights(base, [full, subject], "sequential", QUERY)[0]
    assert (after - reduced - change).abs().max() < 1e-5


def test_rotations_turn_what_is_left_before_anything_is_added(base):
    """W' = reduced(W) R^T + D, whatever the order of the inputs."""
    turn = Rotation(noise(4, 28, seed=4))  # 4 blocks of 8 x 8
    subject, oft, style = para(1, query=3), personalization("bnn", {QUERY: turn}), lora(3)
    reduced = weights(load.personalize(base, subject, 1.0)[0], QUERY)[0]
    delta = style.edits(sites_of(base))[0][QUERY].delta()
    expected = reduced @ torch.block_diag(*turn.blocks()).mT + delta
    for order in itertools.permutations([subject, oft, style]):
        after = combined_weights(base, order, "concat", QUERY)[0]
        assert (after - expected).abs().max() < 1e-5


def test_loras_alone_are_added_up(base):
    styles = [lora(3), lora(5)]
    before = weights(base, QUERY)[0]
    deltas = [style.edits(sites_of(base))[0][QUERY].delta() for style in styles]
    after = combined_weights(base, styles, "concat", QUERY)[0]
    assert (after - before - sum(deltas)).abs().max() < 1e-5


# The node


def test_the_incoming_model_is_untouched_and_strength_zero_is_the_base(base):
    subjects = {"personalized0": para(1, query=3), "personalized1": lora(3)}
    before, uuid, plain = snapshot(base.model), base.patches_uuid, comfy_output(base, *question())
    patched, _ = combined(base, subjects, "concat", 1.0)
    changed = comfy_output(patched, *question())
    assert not base.patches and base.patches_uuid == uuid != patched.patches_uuid
    assert torch.equal(comfy_output(base, *question()), plain) and not torch.equal(changed, plain)
    assert same(snapshot(base.model), before)
    none, _ = combined(base, subjects, "concat", 0.0)
    assert torch.equal(comfy_output(none, *question()), plain)


def test_the_node_says_what_it_did(base):
    inputs = {"personalized0": lora(3), "personalized1": para(1, query=3, conv=1)}
    inputs["personalized2"] = para(2, query=2)
    output = Combine.execute(base, inputs, "sequential", 0.5)
    patched, text = output.args
    assert text.splitlines() == [
        "3 personalisations, strength 0.5:",
        "personalized0: LoRA after 7 steps, 'style 3'",
        "personalized1: PaRa after 7 steps, 'subject 1'",
        "personalized2: PaRa after 7 steps, 'subject 2'",
        "Reductions of 2 layers first, by sequential: personalized1, personalized2.",
        "Then added, so that no reduction takes them away: personalized0.",
    ]
    assert output.ui == {"text": [text]} and patched.patches
    upstream, _ = load.personalize(base, lora(5), 1.0)
    warned = Combine.execute(upstream, inputs, "concat", 1.0).args[1]
    assert "carried patches already" in warned


def test_comfyui_grows_the_inputs_and_hands_them_over_by_name():
    """As its executor does it: {"personalized.personalized0": …} in a prompt becomes one dict."""
    from comfy_api.latest import _io

    live = {"personalized.personalized0": 0, "personalized.personalized1": 1, "how": "sum"}
    types = Combine.INPUT_TYPES()
    described, _, paths = _io.get_finalized_class_inputs(types, live)
    grown = {name for group in described.values() for name in group}
    assert {"personalized.personalized0", "personalized.personalized1", "model"} <= grown
    nested = _io.build_nested_inputs(live, paths)
    assert nested == {"personalized": {"personalized0": 0, "personalized1": 1}, "how": "sum"}


# What does not go together


def test_what_does_not_fit_is_named(base):
    other = comfy_model(geometry((64, 128)))
    inputs = {"personalized0": para(1, query=3), "personalized1": lora(3)}
    with pytest.raises(InputError, match="'personalized0' does not fit: this para file"):
        combined(other, inputs, "concat", 1.0)
    foreign = {"lora_te_x.para_basis": torch.ones(32, 1)}
    inputs["personalized1"] = dataclasses.replace(inputs["personalized1"], tensors=foreign)
    with pytest.raises(ValueError, match=r"^Combine Personalizations: 'personalized1' does not"):
        Combine.execute(base, inputs, "concat", 1.0)


def test_subjects_that_ask_for_a_whole_layer_are_refused(base):
    """Only where all that any of them gives up is gone: 12 and 24 directions are left otherwise."""
    inputs = {"personalized0": para(1, query=20, key=32), "personalized1": para(2, query=12)}
    with pytest.raises(InputError, match=rf"gives up 20 \+ 12 .* of {QUERY}, which has 32"):
        combined(base, inputs, "concat", 1.0)
    left = {
        how: rank(combined_weights(base, inputs.values(), how, QUERY)[0])
        for how in ("sequential", "sum")
    }
    assert left == {"sequential": 12, "sum": 24}
    inputs["personalized1"] = para(2, query=11)
    combined(base, inputs, "concat", 1.0)


def test_what_is_more_than_weights_is_refused_by_name(base):
    adapter = {SITE: TimeAware({block_of(f"{BLOCK}.attn1.to_out.0"): 32}, 128)}
    inputs = {"personalized0": para(1, query=3), "personalized1": personalization("a3ft", adapter)}
    with pytest.raises(InputError, match=r"'personalized1' is \S+, which adds modules"):
        combined(base, inputs, "concat", 1.0)


# On a server


@pytest.mark.server
def test_a_prompt_trains_two_subjects_and_a_lora_and_combines_them(server, comfy):
    stock.write_checkpoints(server.base / "models" / "checkpoints")
    stock.write_photographs(server.input_dir / "photographs")
    graph = Graph()
    base = stock.load_checkpoint(graph)
    folder = graph.add("PersonalizeImageFolder", folder="photographs")
    data = stock.dataset(graph, base, (folder, 0))
    trained = [("LoRA", {}), ("PaRa", {"rank": 2}), ("PaRa", {"rank": 1, "seed": 1})]
    nodes = [
        stock.train(graph, method, (base, 0), (data, 0), **{"steps": 1, "name": "c"} | how)
        for method, how in trained
    ]
    wires = {f"personalized.personalized{i}": (node, 1) for i, node in enumerate(nodes)}
    node = graph.add("PersonalizeCombine", model=(base, 0), how="concat", strength=1.0, **wires)
    stock.sample(graph, base, (node, 0))
    result = comfy.run(fill_defaults(graph, comfy.object_info()), timeout=PATIENCE)
    (text,) = result.texts(node)
    assert text.startswith("3 personalisations, strength 1:")
    assert "by concat: personalized1, personalized2." in text
    assert text.endswith("takes them away: personalized0.") and result.files()
