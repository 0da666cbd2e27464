"""Personal Dataset: what becomes of pictures and captions, and what it says when they are wrong."""

import functools
import math

import comfy.sd
import pytest
import torch
from comfy.sd1_clip import SD1Tokenizer
from comfy.sdxl_clip import SDXLTokenizer
from comfy.text_encoders.sd2_clip import SD2Tokenizer

from personalize.demo.base_model import TEXT_CONFIG, TinyVAE
from personalize.nodes.data import Dataset, encode_pixels, encode_text, encoder_bytes, words_in
from personalize.nodes.demo import build_clip
from personalize.nodes.fit import fitted, opaque
from personalize.nodes.request import unpack
from personalize.trainers.data import words_of
from personalize.trainers.errors import InputError
from tests.tiny import noise

SIDE = 64


@functools.cache
def clip():
    """Build a real ComfyUI CLIP with random weights, as small as the demo's."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = TEXT_CONFIG | {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = CLIPTextModel(CLIPTextConfig(**config)).state_dict()
    skipped = ("token_embedding.weight", "position_ids")
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith(skipped)}
    return build_clip(config, weights, noise(TEXT_CONFIG["vocab_size"], 32))


def states(text: str) -> torch.Tensor:
    """Return the text states that a stock CLIP Text Encode gives, (77, 32)."""
    return clip().encode_from_tokens_scheduled(clip().tokenize(text))[0][0][0]


@pytest.fixture(scope="module")
def vae():
    """A real ComfyUI VAE: TAESD with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return comfy.sd.VAE(sd=TinyVAE().state_dict())


def test_comfyui_runs_its_own_models_as_ever_and_what_they_say_can_train(vae):
    seen: list[bool] = []
    modules = (*vae.first_stage_model.modules(), *clip().cond_stage_model.modules())
    hooks = [
        module.register_forward_pre_hook(lambda *_: seen.append(torch.is_inference_mode_enabled()))
        for module in modules
    ]
    latents, said = encode_pixels(vae, torch.zeros(1, 3, SIDE, SIDE)), encode_text(clip(), "a zib")
    for hook in hooks:
        hook.remove()
    assert seen and all(seen)
    assert not any(told.is_inference() for told in (latents, said.context, said.pooled))


def test_a_vae_on_a_gpu_takes_room_and_for_large_pictures_that_of_a_tile(vae, monkeypatch):
    assert encoder_bytes(vae, 64, 64) == 0  # the CPU's is not ComfyUI's to count
    monkeypatch.setattr(vae, "device", torch.device("cuda"))
    small, whole, large = (encoder_bytes(vae, side, side) for side in (256, 512, 1024))
    assert vae.patcher.model_size() < small < whole == large
    assert encoder_bytes(object(), 64, 64) == 0


def pictures(count: int = 3, height: int = SIDE, width: int = SIDE, seed: int = 0):
    """Make a batch of noise pictures (N, H, W, 3) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, height, width, 3, generator=generator)


def prepared(vae, images=None, **widgets):
    """Run the node as ComfyUI does: in inference mode, every input as a list."""
    given = {
        "instance_prompt": "a zib totem",
        "captions": "",
        "class_prompt": "",
        "resolution": SIDE,
        "fit": "crop",
        "hold_out": 0,
    } | widgets
    images = [pictures()] if images is None else images
    prior = given.pop("prior_images", None)
    lists = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
    with torch.inference_mode():
        return Dataset.execute(images, [clip()], [vae], prior_images=prior, **lists).args[0]


def refusal(vae, *args, **widgets) -> str:
    """Return the node's error, without its name."""
    with pytest.raises(ValueError) as error:
        prepared(vae, *args, **widgets)
    name, _, text = str(error.value).partition(": ")
    assert name == "Personal Dataset"
    return text


# Pixels


def test_a_picture_of_the_right_size_is_not_resampled():
    (picture,) = pictures(1)
    for fit in ("crop", "pad", "as is"):
        assert torch.equal(fitted(picture, SIDE, fit), picture)


def marked(height: int, width: int) -> torch.Tensor:
    """Make a black picture with a white square of a quarter of its shorter side at the centre."""
    picture = torch.zeros(height, width, 3)
    half = min(height, width) // 8
    top, left = height // 2, width // 2
    picture[top - half : top + half, left - half : left + half] = 1
    return picture


@pytest.mark.parametrize("height, width", [(128, 256), (256, 128), (64, 200), (512, 512)])
def test_crop_keeps_the_centre_and_the_scale_of_the_shorter_side(height, width):
    picture = fitted(marked(height, width), SIDE, "crop")
    assert picture.shape == (SIDE, SIDE, 3) and picture.min() >= 0 and picture.max() <= 1
    white = picture[..., 0] > 0.5
    assert int(white.sum()) == pytest.approx((SIDE // 4) ** 2, abs=2 * SIDE // 4)
    rows, columns = white.nonzero(as_tuple=True)
    assert float(rows.float().mean()) == pytest.approx(SIDE / 2 - 0.5, abs=0.6)
    assert float(columns.float().mean()) == pytest.approx(SIDE / 2 - 0.5, abs=0.6)


def test_crop_cuts_the_same_from_both_ends():
    picture = torch.zeros(SIDE, 3 * SIDE, 3)
    picture[:, :SIDE], picture[:, SIDE : 2 * SIDE], picture[:, 2 * SIDE :] = 0.2, 0.5, 0.8
    assert (fitted(picture, SIDE, "crop") - 0.5).abs().max() < 1 / 255


def test_pad_keeps_everything_and_repeats_the_edge():
    picture = torch.zeros(SIDE, 2 * SIDE, 3)
    picture[: SIDE // 2], picture[SIDE // 2 :] = 0.2, 0.8  # above dark, below light
    found = fitted(picture, SIDE, "pad")
    assert found.shape == (SIDE, SIDE, 3)
    assert (found[: SIDE // 2 - 3] - 0.2).abs().max() < 0.01
    assert (found[SIDE // 2 + 3 :] - 0.8).abs().max() < 0.01
    white = (fitted(marked(128, 256), SIDE, "pad")[..., 0] > 0.5).sum()
    assert int(white) == pytest.approx((SIDE // 8) ** 2, abs=2 * SIDE // 8)


def test_colours_are_not_swapped_by_resizing():
    picture = torch.zeros(128, 128, 3)
    picture[..., 0], picture[..., 1], picture[..., 2] = 0.1, 0.5, 0.9
    found = fitted(picture, SIDE, "crop").mean((0, 1))
    assert torch.allclose(found, torch.tensor([0.1, 0.5, 0.9]), atol=1 / 255)


def test_transparency_is_laid_on_white():
    rgba = torch.zeros(1, SIDE, SIDE, 4)
    rgba[..., 0] = 1.0  # red
    rgba[0, : SIDE // 2, :, 3] = 1.0  # opaque above, clear below
    rgba[0, 0, :, 3] = 0.5
    picture = opaque(*unpack("images", [rgba]))
    assert picture.shape == (SIDE, SIDE, 3)
    assert picture[1, 0].tolist() == [1, 0, 0]
    assert picture[-1, 0].tolist() == [1, 1, 1]
    assert picture[0, 0].tolist() == [1, 0.5, 0.5]


def test_pixels_are_kept_in_minus_one_to_one_with_channels_first(vae):
    images = pictures()
    data = prepared(vae, [images])
    for example, picture in zip(data.training, images, strict=True):
        assert torch.allclose(example.pixels, picture.movedim(-1, 0) * 2 - 1)
        assert example.pixels.shape == (3, SIDE, SIDE)


def test_values_outside_the_range_are_clamped(vae):
    data = prepared(vae, [pictures(1) * 3 - 1])
    assert data.training[0].pixels.min() == -1 and data.training[0].pixels.max() == 1


# Latents and text states


def test_latents_are_what_the_vae_makes_of_the_pixels(vae):
    images = pictures()
    data = prepared(vae, [images])
    with torch.no_grad():
        expected = vae.encode(images)
    for example, latent in zip(data.training, expected, strict=True):
        assert example.latent.shape == (4, SIDE // 8, SIDE // 8)
        assert torch.allclose(example.latent, latent.float().cpu(), atol=1e-5)


def test_everything_can_be_trained_on(vae):
    """Free of graphs, and not born in inference mode, though the node was called in it."""
    data = prepared(vae, prior_images=[pictures(1)], class_prompt="a totem")
    tensors = [data.empty.context]
    for example in data.training + data.prior:
        tensors += [example.pixels, example.latent, example.context]
    for tensor in tensors:
        assert not tensor.requires_grad and not tensor.is_inference()
        assert tensor.device.type == "cpu" and tensor.dtype == torch.float32
        (tensor * torch.ones(1, requires_grad=True)).sum().backward()  # may be saved for backward


def test_the_tensors_that_came_in_are_not_shared(vae):
    images = pictures()
    data = prepared(vae, [images])
    kept = data.training[0].pixels.clone()
    images.zero_()
    assert torch.equal(data.training[0].pixels, kept)


def test_the_text_states_are_those_of_the_captions(vae):
    data = prepared(vae, captions="one\ntwo\nthree", prior_images=[pictures(1)], class_prompt="k")
    for example in data.training + data.prior:
        assert torch.allclose(example.context, states(example.caption).float(), atol=1e-5)
    assert torch.allclose(data.empty.context, states("").float(), atol=1e-5)
    contexts = [example.context for example in data.training + data.prior] + [data.empty.context]
    assert len({context.numpy().tobytes() for context in contexts}) == 5


LONG = "a zib totem with " + "a very long beard and " * 20 + "a hat"


def spelled(text: str) -> int:
    """Count a text's tokens, start and end among them."""
    return len(clip().tokenizer.clip_l.tokenizer(text)["input_ids"])


def test_words_are_told_from_padding(vae):
    data = prepared(vae, captions="one\na zib totem\na (zib:1.5) totem")
    for example in data.training:
        count = spelled(example.caption)
        assert example.words.tolist() == [True] * count + [False] * (77 - count)
    assert data.empty.words.sum() == 2  # start and end
    assert spelled("a zib totem") > 4
    stated = words_of(data.training)
    assert stated.shape == (3, 77, spelled("a (zib:1.5) totem"))
    assert [int(words.sum()) for words in stated] == [int(e.words.sum()) for e in data.training]


def test_every_chunk_of_a_long_text_has_words_and_padding():
    said = encode_text(clip(), LONG)
    first, second = said.words.chunk(2)
    assert said.context.shape[0] == len(said.words) == 154
    assert first[:70].all() and second[:2].all() and not second[70:].any()
    # each chunk has a start and an end
    assert said.words.sum() == spelled(LONG) + 2
    assert said.words.sum() < 154


@pytest.mark.parametrize("kind", [SD1Tokenizer, SD2Tokenizer, SDXLTokenizer])
@pytest.mark.parametrize("text", ["", "a zib totem", LONG])
def test_every_clip_pads_in_its_own_way_and_has_the_same_words(kind, text):
    tokens = kind().tokenize_with_weights(text)
    length = sum(map(len, next(iter(tokens.values()))))
    for encoder, chunks in tokens.items():
        words = words_in({encoder: chunks}, length)
        assert torch.equal(words, words_in(clip().tokenize(text), length)), encoder


def test_embeddings_are_words_and_tokens_of_other_encoders_are_not_looked_at():
    chunk = [(49406, 1.0), (noise(768), 1.0), (49407, 1.0), (49407, 1.0)]
    assert words_in({"l": [chunk]}, 4).tolist() == [True, True, True, False]
    assert words_in({"l": [chunk]}, 8) is None
    assert words_in({"t5xxl": [[(3, 1.0), (1, 1.0), (0, 1.0)]]}, 3) is None


# Captions


def captions(data) -> list[str]:
    return [example.caption for example in data.training]


@pytest.mark.parametrize(
    "given, expected",
    [
        ("", ["a zib totem"] * 3),
        ("  \n ", ["a zib totem"] * 3),
        ("one", ["one"] * 3),
        ("one\ntwo\nthree", ["one", "two", "three"]),
        ("one\ntwo\nthree\n", ["one", "two", "three"]),
        ("  one  \r\ntwo\r\nthree", ["one", "two", "three"]),
        ("one\n\nthree", ["one", "a zib totem", "three"]),
        (["one", "two", "three"], ["one", "two", "three"]),
        (["one", "", "three"], ["one", "a zib totem", "three"]),
        (["one\ntwo\nthree"], ["one", "two", "three"]),
    ],
    ids=[
        "none",
        "blank",
        "one",
        "each",
        "newline at the end",
        "windows",
        "gap",
        "list",
        "list with a gap",
        "text",
    ],
)
def test_captions_find_their_pictures(vae, given, expected):
    assert captions(prepared(vae, captions=given)) == expected


def test_images_come_as_batches_and_lists_in_their_order(vae):
    mixed = [pictures(2), pictures(1, 80, 120, seed=1), pictures(1, 200, 64, seed=2)]
    data = prepared(vae, mixed, captions="a\nb\nc\nd")
    assert captions(data) == list("abcd")
    assert all(example.pixels.shape == (3, SIDE, SIDE) for example in data.training)
    assert torch.allclose(data.training[1].pixels, mixed[0][1].movedim(-1, 0) * 2 - 1)


def test_the_last_pictures_are_held_out_with_their_captions(vae):
    data = prepared(vae, captions="one\ntwo\nthree", hold_out=1)
    assert captions(data) == ["one", "two"]
    assert [example.caption for example in data.held_out] == ["three"]


def test_prior_images_have_the_class_prompt(vae):
    data = prepared(vae, prior_images=[pictures(2), pictures(1)], class_prompt="a totem")
    assert [example.caption for example in data.prior] == ["a totem"] * 3
    assert data.class_prompt == "a totem" and data.instance_prompt == "a zib totem"
    assert prepared(vae).prior == ()


# The fingerprint


def test_the_fingerprint_knows_pixels_captions_and_groups(vae):
    images = pictures()
    same_again = prepared(vae, [images.clone()]).fingerprint()
    touched = images.clone()
    touched[0, 0, 0, 0] = 1 - touched[0, 0, 0, 0]
    others = [
        prepared(vae, [touched]),
        prepared(vae, [images], captions="one"),
        prepared(vae, [images.flip(0)]),
        prepared(vae, [images], hold_out=1),
        prepared(vae, [images[:2]]),
        prepared(vae, [images], prior_images=[pictures(1)], class_prompt="a totem"),
    ]
    first = prepared(vae, [images]).fingerprint()
    assert first == same_again and len(first) == 16 and int(first, 16) >= 0
    assert len({first, *(data.fingerprint() for data in others)}) == 7


# Refused, with what to do


def nan_in(index: int):
    images = pictures()
    images[index, 5, 5, 1] = float("nan")
    return images


def test_no_image(vae):
    assert refusal(vae, [pictures(0)]) == "'images' has no image; connect at least one."


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_pixels_that_are_no_numbers_name_their_picture(vae, value):
    images = pictures()
    images[1, 5, 5, 1] = value
    assert refusal(vae, [images]) == (
        "'images' can not be used: image 2 has pixels that are NaN or infinite. "
        "Replace or remove them."
    )


def test_all_bad_pictures_are_named_at_once_counted_over_batches(vae):
    grey = torch.zeros(1, SIDE, SIDE, 1)
    assert refusal(vae, [pictures(1), nan_in(1), grey, pictures(1, 4, 90)]) == (
        "'images' can not be used: image 3 has pixels that are NaN or infinite; image 5 has shape "
        "(64, 64, 1) instead of (height, width, 3); image 6 is only 90x4 pixels. "
        "Replace or remove them."
    )


def test_prior_images_are_checked_too(vae):
    text = refusal(vae, prior_images=[nan_in(0)], class_prompt="a totem")
    assert text.startswith("'prior_images' can not be used: image 1 has pixels that are NaN")


@pytest.mark.parametrize("given", ["one\ntwo", "1\n2\n3\n4\n5", ["one", "two"]])
def test_a_wrong_number_of_captions(vae, given):
    lines = given if isinstance(given, list) else given.splitlines()
    assert refusal(vae, captions=given) == (
        f"'captions' has {len(lines)} lines for 3 images; give none, one, or one per image."
    )


def test_mixed_sizes_as_they_are(vae):
    mixed = [pictures(1), pictures(1, 96, 64), pictures(1, 64, 128)]
    assert refusal(vae, mixed, fit="as is") == (
        "'images' has pictures of 128x64, 64x96 where 'resolution' asks for 64x64 and 'fit' is "
        "'as is'; choose 'crop' or 'pad', or resize them."
    )
    prior = {"prior_images": [pictures(1, 32, 32)], "class_prompt": "a totem"}
    assert refusal(vae, fit="as is", **prior).startswith("'prior_images' has pictures of 32x32")


@pytest.mark.parametrize("side, nearest", [(100, 96), (513, 512), (65, 64)])
def test_a_resolution_that_is_no_multiple_of_eight(vae, side, nearest):
    expected = f"'resolution' is {side}; give a multiple of 8, such as {nearest}."
    assert refusal(vae, resolution=side) == expected


NO_TEXT = "'instance_prompt' has half a character ('\\ud83d') at place 3; write it anew."
LINKED = {  # what a link may bring, though no widget would take it
    "'resolution' is 51200; give a number from 64 to 4096.": {"resolution": 51200},
    "'resolution' is 4; give a number from 64 to 4096.": {"resolution": 4},
    "'resolution' is 64.0; give a whole number from 64 to 4096.": {"resolution": 64.0},
    "'resolution' is None; give a whole number from 64 to 4096.": {"resolution": None},
    "'resolution' is an empty list; connect what gives one value, or more.": {"resolution": []},
    "'hold_out' is -1; give a number from 0 to 1000.": {"hold_out": -1},
    "'hold_out' is True; give a number from 0 to 1000.": {"hold_out": True},
    "'unmasked_weight' is -0.5; give a number from 0.0 to 1.0.": {"unmasked_weight": -0.5},
    "'unmasked_weight' is nan; give a number from 0.0 to 1.0.": {"unmasked_weight": math.nan},
    "'flip' is 'no'; give true or false.": {"flip": "no"},
    "'fit' is 'stretch'; give one of crop, pad, as is, buckets.": {"fit": "stretch"},
    "'captions' is 3; give a text.": {"captions": [3]},
    NO_TEXT: {"instance_prompt": "a \ud83d"},
    NO_TEXT.replace("instance_prompt", "class_prompt"): {"class_prompt": "a \ud83d"},
    NO_TEXT.replace("instance_prompt", "captions"): {"captions": ["a", "b", "a \ud83d"]},
}


@pytest.mark.parametrize("told", LINKED)
def test_what_a_widget_would_not_take_is_refused_of_a_link(vae, told):
    assert refusal(vae, **LINKED[told]) == told


@pytest.mark.parametrize("kept", [3, 4, 1000])
def test_holding_out_everything(vae, kept):
    assert refusal(vae, hold_out=kept) == (
        f"'hold_out' is {kept} of 3 images, which leaves none to train on; "
        "give at most 2, or more images."
    )


@pytest.mark.parametrize("prompt", ["", "   "])
def test_prior_images_without_a_class_prompt(vae, prompt):
    assert refusal(vae, prior_images=[pictures(1)], class_prompt=prompt) == (
        "'class_prompt' is empty, but prior images are connected; say what they show."
    )


@pytest.mark.parametrize("given", ["", "one\n\nthree"])
def test_an_empty_prompt_without_captions(vae, given):
    assert refusal(vae, instance_prompt="  ", captions=given) == (
        "'instance_prompt' is empty and some images have no caption; say what they show."
    )
    full = prepared(vae, instance_prompt="", captions="one\ntwo\nthree")
    assert captions(full) == ["one", "two", "three"]


def test_nothing_is_encoded_before_everything_was_checked():
    """The VAE is slow: a wrong caption is told first. (There is no VAE here to call.)"""
    assert refusal(None, captions="one\ntwo").startswith("'captions' has 2 lines")


def test_errors_name_the_input():
    with pytest.raises(InputError) as error:
        unpack("images", [])
    assert error.value.input_name == "images"
