"""What changes from one showing of a picture to the next: its side and its words."""

import dataclasses
from collections import Counter
from itertools import pairwise

import torch

from personalize.trainers.data import Wording
from personalize.trainers.loop import draw_objectives
from personalize.trainers.method import Draws
from personalize.trainers.methods.apt import APT, place_of
from personalize.trainers.methods.lora import LoRA
from personalize.trainers.methods.selective_zo import SelectiveZO
from tests.test_dataset import pictures, prepared, refusal, states, vae  # noqa: F401
from tests.tiny import make, noise, rich_data, tiny_data, tiny_denoiser

SHOWN = 400


def turned(one):
    """Give an example a mirrored one."""
    pixels, latent = one.pixels.flip(-1), noise(*one.latent.shape, seed=77)
    return dataclasses.replace(one, mirrored=dataclasses.replace(one, pixels=pixels, latent=latent))


def worded(one, count: int = 4):
    words = tuple(Wording(f"words {i}", noise(7, 32, seed=800 + i)) for i in range(count))
    return dataclasses.replace(one, wordings=words)


def showings(change, count: int = 2):
    """Return what is shown of a few changed pictures, one by one."""
    plain = tiny_data(count)
    data = dataclasses.replace(plain, training=tuple(map(change, plain.training)))
    return data, [Draws(0, step, 0, 1).shown(data, 1)[0][0] for step in range(SHOWN)]


# Mirrored


def test_a_picture_is_mirrored_in_half_of_its_showings_by_a_coin_of_its_own():
    data, shown = showings(turned)
    mirrored = [any(e.latent is one.mirrored.latent for one in data.training) for e in shown]
    assert abs(sum(mirrored) - SHOWN / 2) < 3 * (SHOWN / 4) ** 0.5
    runs = sum(a != b for a, b in pairwise(mirrored))
    assert abs(runs - SHOWN / 2) < 3 * (SHOWN / 4) ** 0.5  # no rhythm
    plain = [Draws(0, step, 0, 1).shown(tiny_data(2), 1)[0][0].caption for step in range(SHOWN)]
    assert [e.caption for e in shown] == plain  # the order of the pictures is as without


def test_mirroring_changes_neither_noise_nor_timesteps_nor_order():
    plain, change = tiny_data(3), tiny_data(3)
    change = dataclasses.replace(change, training=tuple(map(turned, change.training)))
    for step in range(5):
        a, b = (
            next(draw_objectives(make(LoRA), tiny_denoiser(), data, step)).batch
            for data in (plain, change)
        )
        assert torch.equal(a.noise, b.noise) and torch.equal(a.timesteps, b.timesteps)
        assert torch.equal(a.context, b.context)


def test_mirrored_pictures_are_encoded_and_not_mirrored_latents(vae):  # noqa: F811
    data = prepared(vae, flip=True, hold_out=1, prior_images=[pictures(1)], class_prompt="a totem")
    for one in data.training:
        assert torch.equal(one.mirrored.pixels, one.pixels.flip(-1))
        encoded = vae.encode((one.pixels.flip(-1).movedim(0, -1)[None] + 1) / 2)[0]
        assert torch.allclose(one.mirrored.latent, encoded.float(), atol=1e-5)
        assert (one.mirrored.latent - one.latent.flip(-1)).abs().max() > 1e-2
        assert one.mirrored.mirrored is None and one.mirrored.caption == one.caption
    assert [e.mirrored for e in (*data.held_out, *data.prior)] == [None, None]
    assert len(data.training) == 2 and data.traits()["mirrored pictures"] == 2


def test_apt_keeps_the_views_of_a_mirrored_picture_apart():
    data = tiny_data(3)
    data = dataclasses.replace(data, training=tuple(map(turned, data.training)))
    views = [*data.training, *(one.mirrored for one in data.training)]
    assert [place_of(data, view) for view in views] == list(range(6))
    shown = []
    seen = dataclasses.replace(data, encode=lambda x: shown.append(x[0]) or data.encode(x))
    method = make(APT, batch_size=3, p_max=1.0, view_pool=1, pad="edge")
    method.indicator.ema_base.fill_(1.0)
    for step in range(20):
        method.draw(seen, tiny_denoiser(), Draws(0, step, 0, 1))
    assert len(shown) == 6  # every picture and every mirrored one, once


def test_the_low_resolution_has_mirrored_pictures_too():
    data = tiny_data(2)
    data = dataclasses.replace(data, training=tuple(map(turned, data.training)))
    asked = []
    counting = dataclasses.replace(data, encode=lambda x: asked.append(x) or data.encode(x))
    method = make(SelectiveZO, branches="bp-low", batch_size=1)
    latents = {
        method.draw(counting, tiny_denoiser(), Draws(0, step, 0, 1)).latents.numpy().tobytes()
        for step in range(20)
    }
    assert len(latents) == len(asked) == 4


# Worded


def test_every_wording_has_its_turn_by_chance_and_the_caption_none():
    data, shown = showings(worded)
    counts = Counter(e.caption for e in shown)
    assert set(counts) == {f"words {i}" for i in range(4)}
    assert all(abs(n - SHOWN / 4) < 3 * (SHOWN * 3 / 16) ** 0.5 for n in counts.values())
    for e in shown[:20]:
        wording = next(w for w in data.training[0].wordings if w.caption == e.caption)
        assert torch.equal(e.context, wording.context)


def test_captions_drop_out_of_wordings_as_of_captions():
    plain = tiny_data(2)
    data = dataclasses.replace(plain, training=tuple(map(worded, plain.training)))
    contexts = torch.cat(
        [
            next(draw_objectives(method, tiny_denoiser(), data, step)).batch.context
            for method in [make(LoRA, batch_size=50, caption_dropout=0.3)]
            for step in range(4)
        ]
    )
    empty = [torch.equal(context, data.empty.context) for context in contexts]
    assert abs(sum(empty) - 60) < 3 * (200 * 0.21) ** 0.5
    known = {w.context.numpy().tobytes() for w in data.training[0].wordings}
    said = {c.numpy().tobytes() for c, e in zip(contexts, empty, strict=True) if not e}
    assert said == known


def test_templates_take_the_caption_in_and_are_encoded_once(vae):  # noqa: F811
    templates = "a photo of {}\n\n  {}, a drawing  \n"
    data = prepared(vae, captions="one\ntwo\none", caption_templates=templates, hold_out=0)
    words = [[w.caption for w in e.wordings] for e in data.training]
    assert words[1] == ["a photo of two", "two, a drawing"] and words[0] == words[2]
    assert [e.caption for e in data.training] == ["one", "two", "one"]
    for wording in data.training[1].wordings:
        assert torch.allclose(wording.context, states(wording.caption).float(), atol=1e-5)
    first, third = data.training[0].wordings[0], data.training[2].wordings[0]
    assert first.context is third.context
    assert data.traits()["wordings"] == 6


def test_templates_go_with_the_instance_prompt_and_not_with_prior_or_held_out(vae):  # noqa: F811
    prior = {"prior_images": [pictures(1)], "class_prompt": "a totem"}
    data = prepared(vae, caption_templates=["so: {}", "{}!"], hold_out=1, **prior)
    assert [w.caption for w in data.training[0].wordings] == ["so: a zib totem", "a zib totem!"]
    assert [e.wordings for e in (*data.held_out, *data.prior)] == [(), ()]
    assert all(e.wordings == () for e in prepared(vae).training)


def test_lines_without_a_place_for_the_caption_are_all_named():
    text = "a photo\na photo of {}\n{} and {}\n{ }"
    assert refusal(None, caption_templates=text) == (
        "'caption_templates' has 'a photo', '{} and {}', '{ }'; write {} once in every line, where "
        "the caption of the picture goes."
    )


def test_templates_that_no_batch_could_hold_are_refused(vae):  # noqa: F811
    """Texts of 1, 7, 11 and 13 times 77 tokens."""
    long = "\n".join("{} " + "word " * (75 * n - 30) for n in (7, 11, 13))
    assert "which together no batch can hold" in refusal(vae, caption_templates=long)


def test_showings_are_part_of_the_fingerprint(vae):  # noqa: F811
    images = [pictures()]
    prints = [
        prepared(vae, images, **how).fingerprint()
        for how in (
            {},
            {"flip": True},
            {"caption_templates": "a {}"},
            {"caption_templates": "a {}\nb {}"},
        )
    ]
    assert len(set(prints)) == 4
    assert prepared(vae, images, flip=False, caption_templates="\n").fingerprint() == prints[0]


def test_nothing_but_the_choice_changes_what_an_example_is():
    data = rich_data()
    shown = Draws(0, 0, 0, 1).shown(data, 4)[0]
    for e in shown:
        source = next(
            view for one in data.training for view in one.views if view.pixels is e.pixels
        )
        assert e.mask is source.mask and e.subject == source.subject
        assert e.caption in [w.caption for w in source.wordings]


def test_choices_depend_on_the_seed():
    data = rich_data()
    one, other = (
        [[e.caption for e in Draws(s, i, 0, 1).shown(data, 2)[0]] for i in range(20)]
        for s in (0, 1)
    )
    assert one != other
