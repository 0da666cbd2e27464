"""Every odd thing that people feed a trainer: it works as they see it, or it is named at once."""

import os
import resource
from pathlib import Path

import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image

from personalize.nodes.folder import Folder
from tests.test_dataset import prepared, refusal, states, vae  # noqa: F401
from tests.test_writing import told_by_child
from tests.tiny import make
from tests.waiting import awaited

NAME = "some"
RED, WHITE = (200, 30, 60), (255, 255, 255)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder of ComfyUI's input folder."""
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    (tmp_path / NAME).mkdir()
    return tmp_path / NAME


def plain(size=(80, 72), colour=RED) -> Image.Image:
    return Image.new("RGB", size, colour)


def loaded(**how) -> list[torch.Tensor]:
    """Run the node; return its pictures, (H, W, 3) each."""
    with torch.inference_mode():
        return [image[0] for image in Folder.execute(NAME, **how).args[0]]


def problem(count: int = 1) -> str:
    """Return why the only file is refused: the same before the prompt is queued, and after."""
    with pytest.raises(ValueError) as error:
        Folder.execute(NAME)
    assert queued() == str(error.value)
    start = f"Load Personal Images: 'folder' has 1 of {count} pictures that can not be used: "
    assert str(error.value).startswith(start) and str(error.value).isprintable()
    return str(error.value).removeprefix(start).removesuffix(". Replace or remove them.")


def queued() -> str | bool:
    """Return what ComfyUI is told before it runs anything."""
    return awaited(Folder.validate_inputs(NAME))


def is_colour(picture: torch.Tensor, colour, tolerance: int = 3) -> bool:
    return bool(((picture * 255 - torch.tensor(colour)).abs() <= tolerance).all())


# What is read as people see it


def grey16(file: Path) -> None:
    Image.fromarray(np.full((72, 80), 40_000, np.uint16)).save(file)


def animated(file: Path) -> None:
    frames = [plain(colour=colour) for colour in (RED, (0, 255, 0), (0, 0, 255))]
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=100)


def clear_palette(file: Path) -> None:
    picture = plain().quantize(8)
    picture.save(file, transparency=picture.getpixel((0, 0)))


def half_clear(file: Path) -> None:
    Image.new("RGBA", (80, 72), (0, 0, 0, 128)).save(file)


def one_clear_colour(file: Path) -> None:
    plain().save(file, transparency=RED)


def another_suffix(file: Path) -> None:
    plain().save(file.with_suffix(".bmp"))
    file.with_suffix(".bmp").rename(file)


SEEN = {
    "grey.png": (lambda f: Image.new("L", (80, 72), 90).save(f), (90, 90, 90)),
    "bits.png": (lambda f: Image.new("1", (80, 72), 1).save(f), WHITE),
    "palette.png": (lambda f: plain().quantize(8).save(f), RED),
    "palette with a clear colour.png": (clear_palette, WHITE),
    "rgb with a clear colour.png": (one_clear_colour, WHITE),
    "half clear.png": (half_clear, (127, 127, 127)),
    "grey and half clear.png": (lambda f: Image.new("LA", (80, 72), (0, 128)).save(f), (127,) * 3),
    "16 bits.png": (grey16, (40_000 / 257,) * 3),
    "16 bits.tif": (grey16, (40_000 / 257,) * 3),
    "cmyk.jpg": (lambda f: plain().convert("CMYK").save(f, quality=95), RED),
    "cmyk.tif": (lambda f: plain().convert("CMYK").save(f), RED),
    "ycbcr.tif": (lambda f: plain().convert("YCbCr").save(f), RED),
    "animated.gif": (animated, RED),
    "animated.webp": (animated, RED),
    "animated.png": (animated, RED),
    "really a bitmap.png": (another_suffix, RED),
    "CAPITALS.JPG": (lambda f: plain().save(f, format="JPEG"), RED),
}


@pytest.mark.parametrize("name", SEEN)
def test_a_picture_comes_out_as_it_is_seen(folder, name):
    write, colour = SEEN[name]
    write(folder / name)
    assert queued() is True
    for shorter_side in (0, 64):
        (picture,) = loaded(shorter_side=shorter_side)
        assert picture.shape == ((64, 71, 3) if shorter_side else (72, 80, 3))
        assert is_colour(picture, colour), picture[0, 0] * 255


def test_transparency_of_any_kind_may_be_mixed(folder):
    half_clear(folder / "a.png")
    plain().save(folder / "b.png")
    clear_palette(folder / "c.png")
    assert [round(float(picture[0, 0, 1]) * 255) for picture in loaded()] == [127, 30, 255]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_turn_of_the_camera_is_undone(folder, suffix, orientation):
    upright = Image.new("RGB", (96, 80), (255, 255, 255))
    upright.paste(RED, (0, 0, 48, 20))  # above, on the left
    ways = Image.Transpose
    undone = {  # what EXIF's number asks viewers to do, undone
        2: ways.FLIP_LEFT_RIGHT,
        3: ways.ROTATE_180,
        4: ways.FLIP_TOP_BOTTOM,
        5: ways.TRANSPOSE,
        6: ways.ROTATE_90,
        7: ways.TRANSVERSE,
        8: ways.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(undone[orientation]) if orientation > 1 else upright
    stored.save(folder / f"turned.{suffix}", exif=exif, quality=95)
    (picture,) = loaded()
    assert picture.shape == (80, 96, 3)
    assert is_colour(picture[2:16, 2:44], RED, 12) and is_colour(picture[30:, 2:], WHITE, 12)


# What is named


def truncated(file: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    os.truncate(file, file.stat().st_size // 2)


def link_out(file: Path) -> None:
    outside = file.parent.parent.parent / f"outside of {file.parent.parent.name}.png"
    plain().save(outside)
    file.symlink_to(outside)


def floats(file: Path) -> None:
    Image.fromarray(np.full((72, 80), 0.5, np.float32)).save(file)


def huge(file: Path) -> None:
    Image.new("1", (16384, 16384)).save(file)


REFUSED = {
    "pixel.png": (lambda f: plain((1, 1)).save(f), "only 1x1 pixels, at least 64"),
    "12k.png": (lambda f: Image.new("1", (12_000, 12_000)).save(f), "12000x12000: more than 134"),
    "line.png": (lambda f: plain((9000, 3)).save(f), "only 9000x3 pixels, at least 64"),
    "16k.png": (huge, "more than 134 million pixels"),
    "empty.png": (lambda f: f.touch(), "the file is empty"),
    "half.png": (truncated, "trunca"),
    "half.jpg": (truncated, "trunca"),
    "half.webp": (truncated, ""),
    "half.tif": (truncated, ""),
    "text.jpg": (lambda f: f.write_text("hello"), "not a picture of a kind that can be read here"),
    "page.webp": (lambda f: f.write_text("<html>"), "not a picture of a kind that"),
    "floats.tif": (floats, "numbers without a range; save it with 8 or 16 bits"),
    "link.png": (link_out, "a link out of ComfyUI's input folder"),
    "\x1b[2Jcursor\n.png": (lambda f: f.touch(), "the file is empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_of_no_use_is_named_before_anything_runs(folder, name):
    write, reason = REFUSED[name]
    write(folder / name)
    plain().save(folder / "zz good.png")
    told = problem(2)
    assert reason in told and "good.png" not in told and str(folder.parent) not in told
    assert name in told or not name.isprintable()


CAPTIONS = {
    "utf16": ("grün".encode("utf-16"), "its caption a.txt is not UTF-8 text"),
    "latin1": ("grün".encode("latin-1"), "its caption a.txt is not UTF-8 text"),
    "huge": (b"word " * 100_000, "its caption a.txt has 500 kB, at most 20"),
}


@pytest.mark.parametrize("kind", CAPTIONS)
def test_a_caption_of_no_use_is_named(folder, kind):
    text, reason = CAPTIONS[kind]
    plain().save(folder / "a.png")
    (folder / "a.txt").write_bytes(text)
    assert problem() == f"a.png ({reason})"


def test_a_caption_that_is_a_link_out_is_not_read(folder):
    plain().save(folder / "a.png")
    (folder.parent / "secret").write_text("secret")
    (folder / "a.txt").symlink_to(folder.parent / "secret")
    assert problem() == "a.png (its caption a.txt is a link out of the folder)"


@pytest.mark.parametrize("text", ["", " \n ", "\ufeff"])
def test_an_empty_caption_is_none(folder, text):
    plain().save(folder / "a.png")
    (folder / "a.txt").write_text(text, encoding="utf-8")
    assert Folder.execute(NAME).args[1] == [""]


def test_every_problem_is_named_at_once(folder):
    files = {name: what for name, what in REFUSED.items() if name.isprintable()}
    for name, (write, _) in files.items():
        write(folder / name)
    plain().save(folder / "good.png")
    told = queued()
    count = len(files)
    assert f"has {count} of {count + 1} pictures that can not be used: " in str(told)
    assert all(f"{name} (" in str(told) for name in files) and "good.png" not in str(told)


@pytest.mark.parametrize("there", [[], ["notes.md"], [".hidden.png"], ["inner/a.png"]])
def test_a_folder_without_pictures(folder, there):
    for name in there:
        (folder / name).parent.mkdir(exist_ok=True)
        plain().save(folder / name, format="PNG")
    assert "has no picture directly in it" in str(queued())


def test_files_that_were_good_once_are_read_again_when_they_change(folder):
    plain().save(folder / "a.png")
    assert queued() is True
    truncated(folder / "a.png")
    assert "a.png" in str(queued())


# How many, and the same twice


def test_the_same_picture_twice_is_told(folder):
    for name in ("a.png", "b.png", "c.png"):
        plain(colour=RED if name != "b.png" else WHITE).save(folder / name)
    plain().save(folder / "d.bmp")
    text = Folder.execute(NAME).ui.as_dict()["text"][0]
    assert text.endswith(". The same picture twice: c.png is a.png; d.bmp is a.png")


def test_measuring_on_a_picture_that_is_trained_on_is_refused(vae):  # noqa: F811
    images = torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    twice = images[[0, 1, 2, 1]]
    assert refusal(vae, [twice], hold_out=1) == (
        "'hold_out' keeps image 4 out of training, which is the same as image 2: what is measured "
        "on it would say nothing. Remove one of them."
    )
    assert len(prepared(vae, [twice]).training) == 4  # to train on one twice is a choice
    assert len(prepared(vae, [images[[0, 1, 1]]], hold_out=2).held_out) == 2


def test_one_picture_is_enough(folder, vae):  # noqa: F811
    plain((300, 64)).save(folder / "one.png")
    data = prepared(vae, [picture[None] for picture in loaded()])
    assert len(data.training) == 1 and data.training[0].pixels.shape == (3, 64, 64)


def write_many(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Write photographs of noise: links to a dozen files."""
    rng = np.random.default_rng(0)
    for number in range(min(12, count)):
        small = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        small.resize(size).save(folder / f"{number:05}.jpg", quality=80)
    for number in range(12, count):
        os.link(folder / f"{number % 12:05}.jpg", folder / f"{number:05}.jpg")


def grown_in_child(work) -> float:
    """Return the megabytes that a process of its own needs at most for some work."""

    def measure() -> float:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024

    return float(told_by_child(measure))


@pytest.mark.parametrize(
    "count", [pytest.param(200, id="200"), pytest.param(5000, marks=pytest.mark.stress, id="5000")]
)
def test_many_pictures_are_never_held_in_their_full_size(folder, vae, count):  # noqa: F811
    width, height = 1600, 1200
    write_many(folder, count, (width, height))

    def work() -> None:
        assert queued() is True
        images = [picture[None] for picture in loaded(shorter_side=64)]
        data = prepared(vae, images)
        assert len(data.training) == count

    grown, whole = grown_in_child(work), count * width * height * 12 / 2**20
    kept = count * (64 * 85 + 64 * 64) * 12 / 2**20
    print(f"\n{count} pictures of {width}x{height}: {grown:.0f} MB, whole {whole:.0f} MB")
    assert grown < 300 + 2 * kept < whole


def test_pictures_that_do_not_fit_into_memory_are_refused_before_one_is_read(folder):
    """As many names of one large picture as would fill this machine."""
    Image.new("1", (11_000, 11_000)).save(folder / "00000.png")
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for number in range(1, free // (11_000**2 * 12) + 2):
        os.link(folder / "00000.png", folder / f"{number:05}.png")
    with pytest.raises(ValueError, match=r"'shorter_side' is 0, at which \d+ pictures take .* GB"):
        loaded()


def test_a_huge_picture_is_read_in_little_memory_where_it_is_scaled_down(folder):
    Image.new("L", (11_000, 11_000), 90).save(folder / "huge.png")

    def work() -> None:
        (picture,) = loaded(shorter_side=512)
        assert picture.shape == (512, 512, 3) and is_colour(picture, (90, 90, 90))

    assert grown_in_child(work) < 11_000**2 * 6 / 2**20  # bytes; the floats alone would take 12


# Captions for CLIP


def test_prompts_beyond_the_token_limit_are_what_stock_clip_makes_of_them(vae):  # noqa: F811
    """Nothing is cut: stock CLIP Text Encode reads 75 tokens at a time, and so do we."""
    long = " ".join(f"word{n}" for n in range(200))
    data = prepared(vae, captions=[long, "short", long + " more"])
    expected = states(long)
    assert len(expected) > 77 and len(expected) % 77 == 0
    assert torch.allclose(data.training[0].context, expected.float(), atol=1e-5)
    assert not torch.equal(data.training[2].context, data.training[0].context)


def test_captions_that_no_batch_could_hold_are_refused(vae):  # noqa: F811
    """Text states in a batch are repeated to one length: their least common multiple."""
    captions = ["word " * 60 * n for n in (1, 6, 8, 9)]
    assert refusal(vae, [torch.rand(4, 64, 64, 3)], captions=captions).startswith(
        "'captions' are of 1, 5, 7 and 8 times 77 tokens"
    )


# Settings


ABSURD = [
    ({"learning_rate": 0.0}, "'learning_rate' is 0.0, at which nothing is learned; give 0.0001."),
    ({"learning_rate": -1.0}, "'learning_rate' is -1.0; give a number from 0.0 to 1.0."),
    ({"learning_rate": float("nan")}, "'learning_rate' is nan; give a number from 0.0 to 1.0."),
    ({"learning_rate": float("inf")}, "'learning_rate' is inf; give a number from 0.0 to 1.0."),
    ({"steps": 0}, "'steps' is 0; give a number from 1 to 1000000."),
    ({"batch_size": 10**9}, "'batch_size' is 1000000000; give a number from 1 to 1024."),
    ({"rank": 0}, "'rank' is 0; give a number from 1 to 1024."),
    ({"ema_decay": 1.0}, "'ema_decay' is 1.0; give a number from 0.0 to 0.99999."),
    ({"steps": "10"}, "'steps' is '10'; give a whole number from 1 to 1000000."),
    ({"steps": True}, "'steps' is True; give a number from 1 to 1000000."),
    ({"steps": 2.5}, "'steps' is 2.5; give a whole number from 1 to 1000000."),
    ({"steps": None}, "'steps' is None; give a whole number from 1 to 1000000."),
    ({"learning_rate": [1e-4]}, "'learning_rate' is [0.0001]; give a number from 0.0 to 1.0."),
    ({"optimizer": ["adamw"]}, "'optimizer' is ['adamw']; give one of adamw"),
    (
        {"steps": 1, "warmup_steps": 1},
        "'warmup_steps' is 1 of 1 steps, in which the learning rate never comes up; give less",
    ),
    ({"optimizer": "sgd; rm -rf"}, "'optimizer' is 'sgd; rm -rf'; give one of adamw"),
]


@pytest.mark.parametrize("settings, told", ABSURD, ids=lambda value: str(value)[:30])
def test_an_absurd_setting_is_told_in_one_sentence(settings, told):
    from personalize.trainers.errors import InputError
    from personalize.trainers.methods.lora import LoRA

    with pytest.raises(InputError) as error:
        make(LoRA, **settings)
    assert str(error.value).startswith(told) and str(error.value).isprintable()


@pytest.mark.parametrize("name", ["lora", "para", "apt", "bnn"])
def test_a_rank_above_the_width_names_the_most_that_goes(name):
    from personalize.trainers.errors import InputError
    from personalize.trainers.methods import METHODS
    from tests.tiny import run, tiny_denoiser

    with pytest.raises(InputError, match=r"^'rank' is 1000, but the narrowest layer is 32 wide"):
        run(make(METHODS[name], rank=1000), tiny_denoiser())


def test_a_batch_above_the_set_shows_every_picture_as_often():
    from personalize.trainers.method import Draws

    drawn = Draws(seed=0, step=0, part=0, parts=1).examples(tuple("abc"), 9)
    assert sorted(drawn) == sorted("aaabbbccc")


def refused(node: type, **inputs) -> str:
    """Return why a node refuses, without its name."""
    with pytest.raises(ValueError) as error:
        node.execute(**inputs)
    return str(error.value).partition(": ")[2]


STRENGTHS = (float("nan"), float("inf"), 5.0, None, "1")


@pytest.mark.parametrize("strength", STRENGTHS, ids=str)
def test_a_strength_that_a_link_brings_is_checked(strength):
    from personalize.nodes import combine, load, unconditional

    told = f"'strength' is {strength!r}; give a number from -4.0 to 4.0."
    assert refused(load.Apply, model=None, personalized=None, strength=strength) == told
    inputs = {"model": None, "run": "a", "checkpoint": "last", "strength": strength}
    assert refused(load.Load, **inputs) == told
    inputs = {"model": None, "personalized": {}, "how": "concat", "strength": strength}
    assert refused(combine.Combine, **inputs) == told
    apply = unconditional.ApplyUnconditional
    assert refused(apply, base=None, personalized=None, strength=strength) == told


NO_TEXT = "has half a character ('\\ud83d') at place 3; write it anew."
WATCHED = {
    "'every' is -1; give a number from 0 to 100000.": {"every": -1},
    "'cfg' is nan; give a number from 0.0 to 100.0.": {"cfg": float("nan")},
    "'best' is 'first'; give one of held-out, train, last.": {"best": "first"},
    "'prior_prompts' is 3; give a text.": {"prior_prompts": 3},
    f"'prompts' {NO_TEXT}": {"prompts": "a \ud83d"},
    f"'held_out_caption' {NO_TEXT}": {"held_out_caption": "a \ud83d"},
}


@pytest.mark.parametrize("told", WATCHED)
def test_what_a_link_brings_to_the_monitor_is_checked(told):
    from personalize.nodes.monitor import Monitor

    texts = {"prompts": "", "prior_prompts": "", "held_out_caption": ""}
    assert refused(Monitor, **texts | WATCHED[told]) == told


def test_pictures_that_would_not_fit_into_memory_are_not_drawn():
    from personalize.nodes.unconditional import SampleUnconditional
    from tests.test_unconditional import tiny_base

    base, how = tiny_base(sample_size=1024), {"steps": 2, "seed": 0}
    told = refused(SampleUnconditional, base=base, count=100_000, eta=0.0, **how)
    assert told.startswith("'count' is 100000, which takes 2516.6 GB of memory, and ")
    told = refused(SampleUnconditional, base=base, count=1, eta=float("nan"), **how)
    assert told == "'eta' is nan; give a number from 0.0 to 1.0."


@pytest.mark.parametrize("name", [None, 3, "zib\ud83d", ["zib"]], ids=ascii)
def test_a_name_that_is_no_text_is_refused(name):
    from personalize.trainers.errors import InputError
    from personalize.trainers.run import check_name

    with pytest.raises(InputError, match=r"^'name' "):
        check_name(name)


def test_a_link_to_nothing_is_no_picture(folder):
    plain().save(folder / "a.png")
    alone = Folder.fingerprint_inputs(NAME)
    (folder / "b.png").symlink_to(folder / "nothing")
    assert Folder.fingerprint_inputs(NAME) == alone and len(loaded()) == 1


def test_an_input_folder_may_be_the_top_of_a_disk(monkeypatch, tmp_path):
    from personalize.nodes.folder import inside_input

    monkeypatch.setattr(folder_paths, "input_directory", "/")
    assert inside_input(str(tmp_path).lstrip("/")) == tmp_path.resolve()
