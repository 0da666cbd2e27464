"""Personal Dataset: pictures and captions in, latents and text states out; all problems at once."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor

from ..trainers.data import NO_POOLED, Example, Origin, PersonalData
from ..trainers.errors import InputError
from .wires import CATEGORY, PersonalDataWire, at

MOST_CHUNKS = 60  # of tokens, that text states are repeated to in a batch: 1 to 6 go together
FITS = ("crop", "pad", "as is")
SIZES = ("as sampled", "as photographed")


class Dataset(io.ComfyNode):
    """Prepare pictures for training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeDataset",
            display_name="Personal Dataset",
            category=CATEGORY,
            description="Prepares the pictures of your subject: checks them, fits them to the "
            "training resolution, encodes pictures and captions once, and sets some aside to "
            "measure over-fitting.",
            search_aliases=["training images", "dreambooth dataset", "lora dataset", "few-shot"],
            is_input_list=True,
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip="3 to 30 pictures of the subject, as one batch or as a list (of any "
                    "sizes), from Load Image, Load Image (from Folder), Batch Images, …",
                ),
                io.Clip.Input("clip", tooltip="Text encoder of the base that will be trained."),
                io.Vae.Input("vae", tooltip="VAE of the base that will be trained."),
                io.String.Input(
                    "instance_prompt",
                    default="a photo of sks person",
                    tooltip="Caption of every picture that has none of its own: a rare word for "
                    "the subject and its class. Use these words in your prompts afterwards.",
                ),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    tooltip="Optional: one line per picture, in their order, or a list from Load "
                    "Image-Text (from Folder). One line alone is used for all.",
                ),
                io.String.Input(
                    "class_prompt",
                    default="",
                    tooltip="What the prior images show, without the rare word: 'a photo of a "
                    "person'. Needed with prior images.",
                ),
                io.Int.Input(
                    "resolution",
                    default=512,
                    min=64,
                    max=4096,
                    step=8,
                    tooltip="Side of the training pictures in pixels, for SD a multiple of 64: 512 "
                    "for SD 1.x, 768 for SD 2.x-v, 1024 for SDXL; 128 for the demo base.",
                ),
                io.Combo.Input(
                    "fit",
                    options=list(FITS),
                    default="crop",
                    tooltip="crop: scale the shorter side, cut the longer at its centre. pad: "
                    "scale the longer side, fill with the edge. as is: refuse other sizes.",
                ),
                io.Int.Input(
                    "hold_out",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="How many pictures, counted from the end, are kept out of training to "
                    "measure on: the trainer reports the loss on them beside that of the base.",
                ),
                io.Image.Input(
                    "prior_images",
                    optional=True,
                    tooltip="Pictures of the class, best made by the base itself with the class "
                    "prompt; they keep the class from turning into the subject.",
                ),
                io.Combo.Input(
                    "size_conditioning",
                    options=list(SIZES),
                    default=SIZES[0],
                    optional=True,
                    advanced=True,
                    tooltip="SDXL only: the sizes that it is told of a training picture. as "
                    "sampled: what CLIP Text Encode tells it when you sample, a whole picture of "
                    "this size. as photographed: the photograph's own size and where it was cut, "
                    "so that blur and cut-off heads are not taken for the subject's.",
                ),
            ],
            outputs=[
                PersonalDataWire.Output(
                    "data", display_name="data", tooltip="For any of the training nodes."
                )
            ],
        )

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def execute(cls, images, clip, vae, prior_images=None, **widgets) -> io.NodeOutput:
        with at(cls):
            request = Request(**widgets)
            pictures = unpack("images", images)
            prior = unpack("prior_images", prior_images) if prior_images else []
            request.check(pictures, prior)
            return io.NodeOutput(prepare(request, pictures, prior, clip[0], vae[0]))


@dataclass(frozen=True)
class Request:
    """The node's widgets; every value comes as a list."""

    instance_prompt: list[str]
    captions: list[str]
    class_prompt: list[str]
    resolution: list[int]
    fit: list[str]
    hold_out: list[int]
    size_conditioning: list[str] = field(default_factory=lambda: [SIZES[0]])

    def check(self, pictures: list[Tensor], prior: list[Tensor]) -> None:
        """Raise InputError for what does not go together."""
        side, kept = self.resolution[0], self.hold_out[0]
        if side % 8 or side < 8:
            raise InputError(
                "resolution", f"is {side}; give a multiple of 8, such as {max(8, side // 8 * 8)}."
            )
        if kept >= len(pictures):
            raise InputError(
                "hold_out",
                f"is {kept} of {len(pictures)} images, which leaves none to train on; "
                f"give at most {len(pictures) - 1}, or more images.",
            )
        self._check_held_out(pictures)
        if prior and not self.class_prompt[0].strip():
            raise InputError(
                "class_prompt", "is empty, but prior images are connected; say what they show."
            )
        if self.fit[0] == "as is":
            self._check_sizes("images", pictures)
            self._check_sizes("prior_images", prior)

    def _check_held_out(self, pictures: list[Tensor]) -> None:
        """Refuse to measure on a picture that is trained on."""
        if not self.hold_out[0]:
            return
        kept = len(pictures) - self.hold_out[0]
        trained = {digest(picture): n for n, picture in enumerate(pictures[:kept], 1)}
        for n, picture in enumerate(pictures[kept:], kept + 1):
            if (twin := trained.get(digest(picture))) is not None:
                raise InputError(
                    "hold_out",
                    f"keeps image {n} out of training, which is the same as image {twin}: what is "
                    "measured on it would say nothing. Remove one of them.",
                )

    def _check_sizes(self, name: str, pictures: list[Tensor]) -> None:
        side = self.resolution[0]
        odd = {f"{p.shape[1]}x{p.shape[0]}" for p in pictures if p.shape[:2] != (side, side)}
        if odd:
            raise InputError(
                name,
                f"has pictures of {', '.join(sorted(odd))} where 'resolution' asks for "
                f"{side}x{side} and 'fit' is 'as is'; choose 'crop' or 'pad', or resize them.",
            )

    def captions_for(self, count: int) -> list[str]:
        """Return one caption per picture. Raises InputError when the numbers differ."""
        lines = self.captions
        if len(lines) == 1:
            lines = lines[0].rstrip().splitlines() or [""]
        if len(lines) == 1:
            lines = lines * count
        if len(lines) != count:
            raise InputError(
                "captions",
                f"has {len(lines)} lines for {count} images; give none, one, or one per image.",
            )
        captions = [line.strip() or self.instance_prompt[0].strip() for line in lines]
        if not all(captions):
            raise InputError(
                "instance_prompt", "is empty and some images have no caption; say what they show."
            )
        return captions


def digest(picture: Tensor) -> bytes:
    """Return a hash of a picture's pixels."""
    return hashlib.sha256(picture.cpu().contiguous().numpy().tobytes()).digest()


def check_lengths(texts: Iterable[Tensor]) -> None:
    """Raise InputError for text states, (L, D) each, that one batch could not hold."""
    lengths = sorted({len(context) for context in texts})
    chunk = math.gcd(*lengths)
    if math.lcm(*lengths) > MOST_CHUNKS * chunk:
        *some, last = [str(length // chunk) for length in lengths]
        raise InputError(
            "captions",
            f"are of {', '.join(some)} and {last} times {chunk} tokens, which together no batch "
            f"can hold; make the long ones shorter: below {chunk} tokens, about 50 words, is best.",
        )


def unpack(name: str, batches: list[Tensor]) -> list[Tensor]:
    """Flatten IMAGE batches to pictures, (H, W, 3 or 4) each.

    Raises InputError naming every picture that can not be used.
    """
    pictures = [picture for batch in batches for picture in batch]
    if not pictures:
        raise InputError(name, "has no image; connect at least one.")
    problems = [f"image {i + 1} {p}" for i, x in enumerate(pictures) if (p := _problem(x))]
    if problems:
        raise InputError(name, f"can not be used: {'; '.join(problems)}. Replace or remove them.")
    return pictures


def _problem(picture: Tensor) -> str | None:
    if picture.ndim != 3 or picture.shape[-1] not in (3, 4):
        return f"has shape {tuple(picture.shape)} instead of (height, width, 3)"
    if min(picture.shape[:2]) < 8:
        return f"is only {picture.shape[1]}x{picture.shape[0]} pixels"
    if not picture.isfinite().all():
        return "has pixels that are NaN or infinite"
    return None


def opaque(picture: Tensor) -> Tensor:
    """Return a picture (H, W, 3) in [0, 1], a copy; transparency is laid on white."""
    colour, alpha = picture[..., :3].float(), picture[..., 3:].float()
    if picture.shape[-1] == 4:
        colour = colour * alpha + (1 - alpha)
    return colour.clamp(0, 1)


def prepare(
    request: Request, pictures: list[Tensor], prior: list[Tensor], clip: Any, vae: Any
) -> PersonalData:
    """Encode everything once; the progress bar counts pictures."""
    side, fit = request.resolution[0], request.fit[0]
    as_sampled = request.size_conditioning[0] == SIZES[0]
    captions = request.captions_for(len(pictures))
    progress = comfy.utils.ProgressBar(len(pictures) + len(prior))
    texts = {text: encode_text(clip, text) for text in {*captions, request.class_prompt[0], ""}}
    check_lengths(states for states, _ in texts.values())

    def example(picture: Tensor, caption: str) -> Example:
        pixels = fitted(opaque(picture), side, fit)
        channels_first = pixels.movedim(-1, 0) * 2 - 1
        latent = encode_pixels(vae, channels_first[None])[0]
        progress.update(1)
        origin = None if as_sampled else origin_of(picture, fit)
        return Example(channels_first, latent, caption, *texts[caption], origin)

    examples = [example(p, c) for p, c in zip(pictures, captions, strict=True)]
    kept = len(examples) - request.hold_out[0]
    return PersonalData(
        training=tuple(examples[:kept]),
        held_out=tuple(examples[kept:]),
        prior=tuple(example(p, request.class_prompt[0]) for p in prior),
        empty_context=texts[""][0],
        empty_pooled=texts[""][1],
        instance_prompt=request.instance_prompt[0],
        class_prompt=request.class_prompt[0],
        encode=partial(encode_pixels, vae),
    )


def fitted(picture: Tensor, side: int, fit: str) -> Tensor:
    """Bring a picture (H, W, 3) to (side, side, 3)."""
    height, width = picture.shape[:2]
    if (height, width) == (side, side):
        return picture
    channels_first = picture.movedim(-1, 0)[None]
    if fit == "pad":
        longest = max(height, width)
        top, left = (longest - height) // 2, (longest - width) // 2
        margins = (left, longest - width - left, top, longest - height - top)
        channels_first = torch.nn.functional.pad(channels_first, margins, mode="replicate")
    scaled = comfy.utils.common_upscale(channels_first, side, side, "lanczos", "center")
    return scaled[0].movedim(0, -1).clamp(0, 1)


def origin_of(picture: Tensor, fit: str) -> Origin:
    """Tell where in a picture (H, W, 3) `fitted` cuts; padding cuts nothing."""
    size = height, width = picture.shape[0], picture.shape[1]
    if fit == "pad":
        return Origin(size, (0.0, 0.0))
    square = min(size)
    return Origin(size, ((height - square) / 2 / square, (width - square) / 2 / square))


@torch.no_grad()
def encode_pixels(vae: Any, pixels: Tensor) -> Tensor:
    """Return the latents of pixels (N, 3, H, W) in [-1, 1]: (N, C, h, w), fp32 on the CPU.

    Ends instead when the stop button was pressed.
    """
    comfy.model_management.throw_exception_if_processing_interrupted()
    return vae.encode((pixels.movedim(1, -1) + 1) / 2).clone().float().cpu()


def encode_text(clip: Any, text: str) -> tuple[Tensor, Tensor]:
    """Return a caption's text states (L, D) and pooled text (P,), fp32 on the CPU.

    Brackets are only brackets. P is 0 for a text encoder that has no pooled text.
    """
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text, disable_weights=True))
    states, told = conditioning[0]
    pooled = told.get("pooled_output")
    pooled = NO_POOLED if pooled is None else pooled[0]
    return states[0].clone().float().cpu(), pooled.clone().float().cpu()
