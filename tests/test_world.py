"""The sprite world, its base and its judges keep what demo/README.md says of them."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from personalize.demo import world
from personalize.demo.judges import ATTRIBUTES, AttributeReader, SubjectJudge

torch.set_num_threads(1)
DEMO = Path(world.__file__).parent
MEGABYTE = 2**20


def as_images(pictures: list[np.ndarray]) -> torch.Tensor:
    """Turn uint8 pictures into ComfyUI's IMAGE: (N, H, W, 3) float in [0, 1]."""
    return torch.from_numpy(np.stack(pictures)).float() / 255


def sprites(count: int, seed: str) -> list[tuple[world.Sprite, np.ndarray]]:
    rngs = [random.Random(f"test {seed} {i}") for i in range(count)]
    drawn = [(world.random_sprite(rng), rng) for rng in rngs]
    return [(sprite, world.render_sprite(sprite, rng)) for sprite, rng in drawn]


# ------------------------------------------------------------------------------- pictures


DIGEST = """
import hashlib, random
from demo import world
h = hashlib.sha256()
for picture, caption in world.subject_pictures(7, 3) + world.subject_pictures(-7, 2, "held-out"):
    h.update(picture.tobytes() + caption.encode())
for i in range(5):
    rng = random.Random(i)
    scene = world.random_scene(rng)
    h.update(world.render_scene(scene, rng).tobytes() + world.caption_scene(scene, rng).encode())
print(h.hexdigest())
"""


def test_the_same_seeds_draw_the_same_pictures_in_every_process():
    digests = set()
    for hash_seed in ("0", "1"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        digests.add(
            subprocess.check_output(
                [sys.executable, "-c", DIGEST], cwd=DEMO.parent, env=environment, text=True
            )
        )
    assert len(digests) == 1


@pytest.mark.parametrize("size", [64, 96, 128])
def test_scenes_are_drawn_at_the_size_asked_for(size):
    rng = random.Random(0)
    for scene in (world.random_scene(rng, 0.0), world.random_scene(rng, 1.0)):
        picture = world.render_scene(scene, rng, size)
        assert picture.shape == (size, size, 3)
        assert picture.dtype == np.uint8


def test_training_and_held_out_pictures_share_none():
    for seed in (*world.SHIPPED_SUBJECTS, -3, 10**12):
        splits = [world.subject_pictures(seed, 12, split) for split in ("training", "held-out")]
        training, held_out = ({p.tobytes() for p, _ in pictures} for pictures in splits)
        assert len(training) == len(held_out) == 12
        assert not training & held_out


def test_a_longer_list_of_pictures_begins_with_the_shorter():
    short, long = world.subject_pictures(3, 4), world.subject_pictures(3, 11)
    for (a, caption_a), (b, caption_b) in zip(short, long, strict=False):
        assert np.array_equal(a, b)
        assert caption_a == caption_b


def test_nine_pictures_show_every_background_once():
    captions = [caption for _, caption in world.subject_pictures(5, 9, name="dax")]
    expected = {world.subject_caption(b, "dax") for b in world.BACKGROUNDS}
    assert set(captions) == expected


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'test'; give 'training' or 'held-out'"):
        world.subject_pictures(1, 1, "test")


# ------------------------------------------------------------------------------- identities


def test_reserved_subjects_are_never_drawn_in_pretraining():
    assert set(world.SHIPPED_SUBJECTS) <= set(world.RESERVED_SEEDS)
    assert not set(world.RESERVED_SEEDS) & set(world.PRETRAINING_SEEDS)
    reserved = {world.subject(seed) for seed in world.RESERVED_SEEDS}

    class Adversary(random.Random):
        """Draws a pre-training seed that maps to a reserved identity before any other."""

        def __init__(self, seeds):
            super().__init__(0)
            self.seeds = list(seeds)

        def randrange(self, *_):
            return self.seeds.pop(0)

    drawn = world.pretraining_subject(Adversary([1, 2, 999, 1_000_000]))
    assert drawn == world.subject(1_000_000)
    rng = random.Random("test")
    assert not {world.pretraining_subject(rng) for _ in range(2000)} & reserved


def test_shipped_subjects_all_differ_and_show_every_colour_once():
    identities = [world.subject(seed) for seed in world.SHIPPED_SUBJECTS]
    assert len(set(identities)) == len(identities)
    for who in identities:
        assert len({who.body_colour, who.head_colour, who.ears_colour, who.mark_colour}) == 4


def test_negative_seeds_are_subjects_of_their_own():
    assert world.subject(-1) != world.subject(1)


# ------------------------------------------------------------------------------- words


def test_full_captions_name_every_attribute():
    for i in range(200):
        sprite = world.random_sprite(random.Random(i))
        named = world.named_attributes(world.caption_sprite(sprite))
        expected = vars(sprite).copy()
        if sprite.size == "big":
            del expected["position"]
        assert named == expected


def test_random_captions_name_nothing_false():
    for i in range(500):
        rng = random.Random(i)
        sprite = world.random_sprite(rng)
        named = world.named_attributes(world.caption_sprite(sprite, rng))
        assert named.items() <= vars(sprite).items()


def test_subject_captions_name_kind_and_background_only():
    assert world.subject_caption("pink") == "a zib totem on a pink background"
    for background in world.BACKGROUNDS:
        named = world.named_attributes(world.subject_caption(background))
        assert named == {"kind": "totem", "background": background}
    for i in range(100):
        rng = random.Random(i)
        portrait = world.random_scene(rng, totem_share=1.0)
        named = world.named_attributes(world.caption_scene(portrait, rng))
        assert named.keys() <= {"kind", "background"}
        assert named["kind"] == "totem"


def test_names_are_never_zib_and_captions_keep_to_the_vocabulary():
    rng = random.Random(0)
    assert "zib" not in {world.random_name(rng) for _ in range(20_000)}
    words = set(world.vocabulary())
    for _ in range(2000):
        caption = world.caption_scene(world.random_scene(rng, totem_share=0.2), rng)
        unknown = set(caption.split()) - words
        assert len(unknown) <= 1, caption  # the made-up name
        assert not unknown or f"a {unknown.pop()} totem" in caption


# ------------------------------------------------------------------------------- the judges


@pytest.fixture(scope="module")
def reader() -> AttributeReader:
    return AttributeReader.load()


@pytest.fixture(scope="module")
def judge() -> SubjectJudge:
    return SubjectJudge.load()


def test_the_reader_reads_fresh_renders(reader):
    drawn = sprites(250, "reader")
    prompts = [world.caption_sprite(sprite) for sprite, _ in drawn]
    images = as_images([picture for _, picture in drawn])
    for name, right in reader.follows(images, prompts).items():
        if name != "kind":
            assert right.nanmean() >= 0.97, (name, right.nanmean().item())


def test_the_reader_tells_totems_from_sprites(reader):
    totems = [p for s in world.SHIPPED_SUBJECTS for p in world.subject_pictures(s, 5)]
    images = as_images([picture for picture, _ in totems])
    assert reader.prompt_following(images, [caption for _, caption in totems]) >= 0.97
    wrong = ["a small red star"] * len(images)
    assert reader.prompt_following(images, wrong) <= 0.03


def test_following_is_nan_where_a_prompt_names_nothing(reader):
    images = as_images([picture for _, picture in sprites(2, "nan")])
    follows = reader.follows(images, ["a star", "something on a white background"])
    assert follows.keys() == ATTRIBUTES.keys()
    assert not follows["shape"][0].isnan()
    assert follows["shape"][1].isnan()
    assert follows["background"].isnan().tolist() == [True, False]


def test_the_reader_counts_a_wrong_word_as_wrong(reader):
    drawn = sprites(60, "wrong")
    images = as_images([picture for _, picture in drawn])
    colours = list(world.COLOURS)
    others = [colours[(colours.index(s.colour) + 1) % len(colours)] for s, _ in drawn]
    prompts = [f"a {colour} {s.shape}" for colour, (s, _) in zip(others, drawn, strict=True)]
    follows = reader.follows(images, prompts)
    assert follows["colour"].mean() <= 0.03
    assert follows["shape"].mean() >= 0.95


def test_the_subject_judge_knows_shipped_subjects_and_tells_them_apart(judge):
    references, images = {}, {}
    for seed in world.SHIPPED_SUBJECTS:
        references[seed] = as_images([p for p, _ in world.subject_pictures(seed, 4)])
        images[seed] = as_images([p for p, _ in world.subject_pictures(seed, 6, "held-out")])
    matrix = torch.tensor(
        [[judge.similarity(i, r).mean() for r in references.values()] for i in images.values()]
    )
    own = matrix.diagonal()
    others = matrix[~torch.eye(len(own), dtype=torch.bool)]
    assert own.min() >= 0.7
    assert others.mean() <= 0.2
    assert (own[:, None] > matrix - 2 * torch.eye(len(own))).all()


def test_the_subject_judge_sees_a_change_of_one_part(judge):
    rng = random.Random("one part")

    def drawn(identity: world.Subject) -> torch.Tensor:
        backgrounds = [rng.choice(world.BACKGROUNDS) for _ in range(6)]
        return as_images([world.render_subject(identity, b, rng) for b in backgrounds])

    margins = []
    for seed in range(200, 230):
        who = world.subject(seed)
        colour = next(
            c for c in world.COLOURS if c not in (who.body_colour, who.head_colour, who.ears_colour)
        )
        reference = drawn(who)
        same = judge.similarity(drawn(who), reference).mean()
        changed = judge.similarity(drawn(replace(who, head_colour=colour)), reference).mean()
        margins.append((same - changed).item())
    assert np.mean(np.array(margins) > 0) >= 0.9


def test_judges_refuse_what_is_not_an_image(judge, reader):
    with pytest.raises(ValueError, match=r"\(3, 64, 64\); give \(N, H, W, 3\)"):
        judge.embed(torch.zeros(3, 64, 64))
    with pytest.raises(ValueError, match="1 prompts for 2 images"):
        reader.follows(torch.zeros(2, 64, 64, 3), ["a star"])


# ------------------------------------------------------------------------------- the files


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("base.safetensors", 32 * MEGABYTE),
        ("judge_subject.safetensors", 3 * MEGABYTE),
        ("judge_attributes.safetensors", 3 * MEGABYTE),
        ("base.png", 400 * 1024),
    ],
)
def test_committed_files_are_small(name, limit):
    assert (DEMO / name).stat().st_size <= limit


def test_the_base_is_in_half_precision_and_says_what_it_is():
    with safe_open(DEMO / "base.safetensors", "pt") as file:
        dtypes = {file.get_slice(k).get_dtype() for k in file.keys() if k != "text_ids"}  # noqa: SIM118
        metadata = file.metadata()
    assert dtypes == {"F16"}
    assert json.loads(metadata["unet_config"])["cross_attention_dim"] == 96
    assert json.loads(metadata["text_config"])["hidden_size"] == 96
    assert json.loads(metadata["training"])["step"] > 0
