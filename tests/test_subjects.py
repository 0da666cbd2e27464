"""Several subjects in one run: whose turn it is, what belongs to whom, what does not fit."""

import dataclasses
from collections import Counter

import pytest
import torch

from personalize.nodes.join import JoinSubjects, joined
from personalize.nodes.monitor import Monitoring, MonitorSettings, leave_one_out
from personalize.trainers.data import Wording
from personalize.trainers.edits import to_tensors
from personalize.trainers.errors import InputError
from personalize.trainers.loop import train
from personalize.trainers.method import Draws
from personalize.trainers.methods.apt import APT
from personalize.trainers.methods.lora import LoRA
from personalize.trainers.methods.selective_zo import SelectiveZO
from personalize.trainers.subjects import summary
from tests.tiny import (
    example,
    make,
    mixed_data,
    noise,
    rich_data,
    run,
    same,
    tiny_data,
    tiny_denoiser,
)


def subject(name: str, first: int, count: int, prior: int = 0, held_out: int = 0, **more):
    """Make the data of a subject; pictures are numbered from `first` on."""
    return dataclasses.replace(
        tiny_data(1),
        training=tuple(example(first + i, **more) for i in range(count)),
        held_out=tuple(example(first + 50 + i) for i in range(held_out)),
        prior=tuple(example(first + 80 + i) for i in range(prior)),
        instance_prompt=f"a {name} totem",
        class_prompt="a totem" if prior else "",
    )


def cat_and_dog(balance: bool = True, **more):
    """A subject with seven pictures and one with two."""
    return joined(
        {"data0": subject("zib", 300, 7, **more), "data1": subject("mog", 400, 2, **more)}, balance
    )


def shown(data, count: int, batches: int) -> list[list[int]]:
    """Return whose pictures are in the batches."""
    return [
        [e.subject for e in Draws(0, step, 0, 1).shown(data, count)[0]] for step in range(batches)
    ]


# Whose turn it is


@pytest.mark.parametrize("count", [1, 3])
def test_subjects_take_turns_however_many_pictures_they_have(count):
    batches = shown(cat_and_dog(), count, 40)
    assert all(len(batch) == count and len(set(batch)) == 1 for batch in batches)
    for first in range(0, 40, 2):  # one turn each, in any order
        assert {batches[first][0], batches[first + 1][0]} == {0, 1}
    assert len({batches[first][0] for first in range(0, 40, 2)}) == 2


@pytest.mark.parametrize("data", ["one size", "mixed"])
def test_in_its_turns_every_picture_of_a_subject_is_shown_equally_often(data):
    if data == "mixed":
        parts = mixed_data(), dataclasses.replace(mixed_data(), instance_prompt="b")
        parts = [dataclasses.replace(p, held_out=()) for p in parts]
        shifted = tuple(example(900 + i, 12, 8) for i in range(4))
        together = joined(
            {"a": parts[0], "b": dataclasses.replace(parts[1], training=shifted)}, True
        )
        turns, times = 2 * 5 * 2, 2  # 5 batches show the first subject's 7 pictures once
    else:
        together, turns, times = cat_and_dog(), 2 * 7, 2
    counts = Counter(
        e.caption for i in range(turns) for e in Draws(0, i, 0, 1).shown(together, 2)[0]
    )
    first = [counts[e.caption] for e in together.training if e.subject == 0]
    assert set(first) == {times}
    second = [counts[e.caption] for e in together.training if e.subject == 1]
    assert max(second) - min(second) <= 1


def test_without_balance_all_pictures_are_mixed_and_shown_equally_often():
    together = cat_and_dog(balance=False)
    counts = Counter(e.caption for i in range(27) for e in Draws(0, i, 0, 1).shown(together, 2)[0])
    assert set(counts.values()) == {6} and len(counts) == 9
    assert any(len(set(batch)) == 2 for batch in shown(together, 2, 27))


def test_one_subject_alone_is_drawn_as_ever():
    """Turns are for several; two that are not balanced are drawn as one set of pictures."""
    together = cat_and_dog(balance=False)
    alone = dataclasses.replace(tiny_data(1), training=together.training)
    for step in range(9):
        a, b = (
            make(LoRA).draw(data, tiny_denoiser(), Draws(0, step, 0, 1))
            for data in (together, alone)
        )
        assert torch.equal(a.latents, b.latents) and torch.equal(a.noise, b.noise)


def test_prior_pictures_are_of_the_class_of_the_subject_shown():
    together = cat_and_dog(prior=3)
    for step in range(20):
        pictures, prior = Draws(0, step, 0, 1).shown(together, 2)
        assert {e.subject for e in prior} == {e.subject for e in pictures}
        assert len(prior) == 2
    mixed = cat_and_dog(balance=False, prior=2)
    for step in range(20):
        pictures, prior = Draws(0, step, 0, 1).shown(mixed, 2)
        assert {e.subject for e in prior} <= {e.subject for e in pictures}


def test_a_subject_without_prior_pictures_is_shown_with_those_of_the_others():
    parts = {"a": subject("zib", 300, 2, prior=2), "b": subject("mog", 400, 2)}
    together = joined(parts, True)
    for step in range(6):
        pictures, prior = Draws(0, step, 0, 1).shown(together, 2)
        assert len(pictures) == len(prior) == 2 and {e.subject for e in prior} == {0}


# What belongs to whom


def test_pictures_stay_with_their_subjects():
    together = cat_and_dog(prior=2, held_out=1)
    assert [e.subject for e in together.training] == [0] * 7 + [1] * 2
    assert [e.subject for e in together.held_out] == [0, 1]
    assert [e.subject for e in together.prior] == [0, 0, 1, 1]
    assert together.instance_prompt == "a zib totem; a mog totem"
    assert together.class_prompt == "a totem"
    assert together.subjects == ("a zib totem", "a mog totem")
    again = joined({"a": rich_data(), "b": cat_and_dog()}, True)
    assert {e.mirrored.subject for e in again.training if e.mirrored is not None} == {0, 1}


def test_what_was_joined_can_be_joined_again():
    three = joined({"a": cat_and_dog(), "b": subject("pim", 500, 1)}, True)
    assert three.subjects == ("a zib totem", "a mog totem", "a pim totem")
    assert [e.subject for e in three.training] == [0] * 7 + [1] * 2 + [2]
    assert Counter(b[0] for b in shown(three, 1, 30)) == {0: 10, 1: 10, 2: 10}


def test_one_picture_of_each_subject_is_left_out():
    left = leave_one_out(cat_and_dog(), seed=5)
    assert [e.subject for e in left.held_out] == [0, 1]
    assert [e.subject for e in left.training] == [0] * 6 + [1]
    captions = {e.caption for e in left.training}
    assert captions.isdisjoint(e.caption for e in left.held_out) and len(captions) == 7
    assert Counter(b[0] for b in shown(left, 1, 20)) == {0: 10, 1: 10}
    lonely = joined({"a": subject("zib", 300, 3), "b": subject("mog", 400, 1)}, True)
    with pytest.raises(InputError, match="there is only one picture of 'a mog totem'"):
        leave_one_out(lonely, seed=5)


def test_the_monitor_asks_for_words_of_pictures_of_its_own():
    monitoring = Monitoring(MonitorSettings(), held_out=(torch.rand(64, 64, 3),))
    with pytest.raises(InputError, match="'held_out_caption' is empty"):
        monitoring._held_out(cat_and_dog())


def test_turns_balance_and_subjects_are_part_of_the_fingerprint():
    parts = {"a": subject("zib", 300, 2), "b": subject("mog", 400, 2)}
    other = dataclasses.replace(parts["b"], instance_prompt="a pim totem")
    prints = {
        data.fingerprint()
        for data in (
            joined(parts, True),
            joined(parts, False),
            joined({"b": parts["b"], "a": parts["a"]}, True),
            joined(parts | {"b": other}, True),
            parts["a"],
        )
    }
    assert len(prints) == 5


@pytest.mark.parametrize("method", [LoRA, APT, SelectiveZO])
def test_a_run_on_such_data_goes_on_bit_for_bit(method):
    """Turns, sides, words and sizes follow from the number of the batch: nothing to save."""
    data, how = rich_data(), {"steps": 6, "gradient_accumulation": 2, "temperature": 1e6}
    whole = run(make(method, **how), tiny_denoiser(), data)[-1]
    steps = train(make(method, **how), tiny_denoiser(), data)
    for step in steps:
        if step.index == 3:
            state = step.state()
            break
    resumed = list(train(make(method, **how), tiny_denoiser(), data, state))[-1]
    assert same(to_tensors(whole.learned()), to_tensors(resumed.learned()))
    assert whole.loss == resumed.loss


# What does not go together


def test_one_dataset_is_not_several():
    with pytest.raises(InputError, match="'data' has 1 subjects; connect two or more"):
        joined({"data0": subject("zib", 300, 2)}, True)


def test_another_text_encoder_or_vae_is_refused_naming_the_input():
    one, other = subject("zib", 300, 2), subject("mog", 400, 2)
    wide = tuple(dataclasses.replace(e, context=noise(7, 64)) for e in other.training)
    with pytest.raises(InputError) as error:
        joined({"data0": one, "data1": dataclasses.replace(other, training=wide)}, True)
    assert str(error.value) == (
        "'data1' was encoded with text states of width 64 and 4 latent channels, 'data0' with text "
        "states of width 32 and 4 latent channels; give all Personal Datasets the CLIP and VAE of "
        "one checkpoint."
    )
    deep = tuple(dataclasses.replace(e, latent=noise(16, 8, 8)) for e in other.training)
    with pytest.raises(InputError, match="and 16 latent channels"):
        joined({"data0": one, "data1": dataclasses.replace(other, training=deep)}, True)
    another = dataclasses.replace(other, empty=Wording("", one.empty.context * 1.1))
    with pytest.raises(InputError, match="'data1' was encoded with another CLIP; give all"):
        joined({"data0": one, "data1": another}, True)
    rounded = dataclasses.replace(other, empty=Wording("", one.empty.context * 1.001))
    assert joined({"data0": one, "data1": rounded}, True).subjects


def test_a_picture_that_another_subject_trains_on_can_not_be_held_out():
    one, other = subject("zib", 300, 2), subject("mog", 400, 2)
    twice = dataclasses.replace(other, held_out=(example(600), one.training[1]))
    with pytest.raises(
        InputError, match=r"'data1' holds out a picture .number 2 .* 'data0' trains"
    ):
        joined({"data0": one, "data1": twice}, True)


def test_texts_that_no_batch_can_hold_are_refused():
    one, other = subject("zib", 300, 2), subject("mog", 400, 2)
    long = [Wording("x", noise(7 * n, 32)) for n in (7, 11, 13)]
    wordy = dataclasses.replace(
        other, training=tuple(dataclasses.replace(e, wordings=tuple(long)) for e in other.training)
    )
    with pytest.raises(InputError, match="'data' are of 1, 7, 11 and 13 times 7 tokens"):
        joined({"data0": one, "data1": wordy}, True)


# What it says


def test_it_says_who_is_in_it():
    assert summary(cat_and_dog(prior=2, held_out=1)).splitlines() == [
        "2 subjects:",
        "'a zib totem': 7 pictures, 1 held out, 2 prior",
        "'a mog totem': 2 pictures, 1 held out, 2 prior",
        "They take turns, so each is shown equally often.",
    ]
    assert summary(cat_and_dog(balance=False)).splitlines()[-1] == (
        "Each picture is shown equally often, so some subjects more than others."
    )
    alike = joined({"a": subject("zib", 300, 2), "b": subject("zib", 400, 2)}, True)
    assert "'a zib totem' is the prompt of several: they will melt into one." in summary(alike)


def test_the_node_hands_on_data_and_report():
    parts = {"data0": subject("zib", 300, 2), "data1": subject("mog", 400, 1)}
    with torch.inference_mode():
        output = JoinSubjects.execute(parts, True)
    data, report = output.args
    assert len(data.training) == 3 and report == output.ui["text"][0] == summary(data)
    with pytest.raises(ValueError, match="Join Subjects: 'data' has 1 subjects"):
        JoinSubjects.execute({"data0": parts["data0"]}, True)
