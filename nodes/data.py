"""Personal Dataset: pictures and captions in, latents and text states out; all problems at once."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import comfy.model_management
import comfy.utils
import torch
import torch.nn.functional as F
from comfy_api.latest import io
from torch import Tensor

from ..trainers.data import NO_POOLED, Example, Origin, PersonalData, Wording
from ..trainers.errors import InputError, brief
from .wires import CATEGORY, PersonalDataWire, at

MOST_CHUNKS = 60  # of tokens, that text states are repeated to in a batch: 1 to 6 go together
FITS = ("crop", "pad", "as is")  # to a square
BUCKETS = "buckets"
MOST_RATIO = 2  # of a bucket's sides
STEP = 64  # pixels that the sides of buckets are multiples of: SD halves latents three times
PLACE = "{}"  # of the caption in a template
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
            search_aliases=[
                "training images",
                "dreambooth dataset",
                "lora dataset",
                "few-shot",
                "aspect ratio buckets",
                "masked training",
            ],
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
                    options=[*FITS, BUCKETS],
                    default="crop",
                    tooltip="crop: scale the shorter side, cut the longer at its centre. pad: "
                    "scale the longer side, fill with the edge. as is: refuse other sizes. "
                    "buckets: keep upright and wide pictures so, up to 2:1, with as many pixels; "
                    "a batch has pictures of one size.",
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
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="White where the subject is, one per picture in their order, as a "
                    "batch or a list: from the MaskEditor (Load Image), or from any node that "
                    "finds things. The loss is measured there only.",
                ),
                io.Float.Input(
                    "unmasked_weight",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=False,
                    optional=True,
                    advanced=True,
                    tooltip="What a place outside the mask counts in the loss, next to 1 inside. "
                    "0: anything may appear there; 0.1 keeps it about as it is.",
                ),
                io.Boolean.Input(
                    "flip",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Show every training picture mirrored half of the times. Not for a "
                    "subject with a left and a right (writing, a parting, a scar), nor with "
                    "captions that say left or right.",
                ),
                io.String.Input(
                    "caption_templates",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Optional: one a line, with {} where the caption goes, such as 'a "
                    "drawing of {}'. One is drawn each time a picture is shown. Empty: the caption "
                    "as it is.",
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
    def execute(cls, images, clip, vae, prior_images=None, masks=None, **widgets) -> io.NodeOutput:
        with at(cls):
            request = Request(**widgets)
            pictures = unpack("images", images)
            prior = unpack("prior_images", prior_images) if prior_images else []
            request.check(pictures, prior)
            weights = request.weights_for(pictures, masks or [])
            return io.NodeOutput(prepare(request, pictures, prior, clip[0], vae[0], weights))


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
    unmasked_weight: list[float] = field(default_factory=lambda: [0.0])
    flip: list[bool] = field(default_factory=lambda: [False])
    caption_templates: list[str] = field(default_factory=lambda: [""])

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
        self.captions_for(len(pictures))
        self.templates()

    def size_for(self, picture: Tensor) -> tuple[int, int]:
        """Return the height and width that a picture (H, W, 3) is brought to."""
        side = self.resolution[0]
        if self.fit[0] != BUCKETS:
            return side, side
        return bucket_of(picture.shape[0], picture.shape[1], side)

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

    def templates(self) -> list[str]:
        """Return the lines of the templates. Raises InputError naming all that are not."""
        lines = [line.strip() for text in self.caption_templates for line in text.splitlines()]
        lines = [line for line in lines if line]
        wrong = [f"'{brief(line, 60)}'" for line in lines if line.count(PLACE) != 1]
        if wrong:
            raise InputError(
                "caption_templates",
                f"has {', '.join(wrong)}; write {PLACE} once in every line, where the caption of "
                "the picture goes.",
            )
        return lines

    def wordings_of(self, caption: str) -> list[str]:
        """Return what a picture is trained with instead of its caption."""
        return [template.replace(PLACE, caption) for template in self.templates()]

    def weights_for(self, pictures: list[Tensor], batches: list[Tensor]) -> list[Tensor | None]:
        """Return what every place of each picture, brought to its size, counts: (H, W) or None.

        batches: of masks. Raises InputError naming all that can not be used.
        """
        masks = [mask for batch in batches for mask in batch.reshape(-1, *batch.shape[-2:])]
        if not batches:
            return [None] * len(pictures)
        if len(masks) != len(pictures):
            raise InputError(
                "masks",
                f"has {len(masks)} masks for {len(pictures)} images; give one per image, in their "
                "order (white all over for a picture that counts as a whole), or none.",
            )
        pairs = list(zip(masks, pictures, strict=True))
        fitted_masks = [
            fitted_mask(mask, picture, self.size_for(picture), self.fit[0])
            for mask, picture in pairs
        ]
        outside = self.unmasked_weight[0]
        weights = [mask + (1 - mask) * outside for mask in fitted_masks]
        problems = [f"mask {n} {p}" for n, w in enumerate(weights, 1) if (p := _mask_problem(w))]
        if problems:
            raise InputError(
                "masks",
                f"can not be used: {'; '.join(problems)}. White is where to learn: paint there, or "
                "set 'unmasked_weight' above 0.",
            )
        return list(weights)


def digest(picture: Tensor) -> bytes:
    """Return a hash of a picture's pixels."""
    return hashlib.sha256(picture.cpu().contiguous().numpy().tobytes()).digest()


def check_lengths(texts: Iterable[Tensor], input_name: str = "captions") -> None:
    """Raise InputError for text states, (L, D) each, that one batch could not hold."""
    lengths = sorted({len(context) for context in texts})
    chunk = math.gcd(*lengths)
    if math.lcm(*lengths) > MOST_CHUNKS * chunk:
        *some, last = [str(length // chunk) for length in lengths]
        raise InputError(
            input_name,
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


def _mask_problem(weights: Tensor) -> str | None:
    if not weights.isfinite().all():
        return "has places that are NaN or infinite"
    if not weights.any():
        return "is black wherever its picture is shown"
    return None


def opaque(picture: Tensor) -> Tensor:
    """Return a picture (H, W, 3) in [0, 1], a copy; transparency is laid on white."""
    colour, alpha = picture[..., :3].float(), picture[..., 3:].float()
    if picture.shape[-1] == 4:
        colour = colour * alpha + (1 - alpha)
    return colour.clamp(0, 1)


def prepare(
    request: Request,
    pictures: list[Tensor],
    prior: list[Tensor],
    clip: Any,
    vae: Any,
    weights: list[Tensor | None] | None = None,
) -> PersonalData:
    """Encode everything once; the progress bar counts pictures.

    weights: what the places of each picture count, from `Request.weights_for`.
    """
    captions, class_prompt = request.captions_for(len(pictures)), request.class_prompt[0]
    kept = len(pictures) - request.hold_out[0]
    sizes = [request.size_for(picture) for picture in pictures]
    prior_sizes = list(dict.fromkeys(sizes[:kept]))  # a batch has pictures of one size
    encoded = len(pictures) + request.flip[0] * kept + len(prior) * len(prior_sizes)
    progress = comfy.utils.ProgressBar(encoded)
    wordings = {text for caption in captions[:kept] for text in request.wordings_of(caption)}
    texts = {
        text: Wording(text, *encode_text(clip, text))
        for text in {*captions, *wordings, class_prompt, ""}
    }
    check_lengths(wording.context for wording in texts.values())

    def example(
        picture: Tensor, size: tuple[int, int], caption: str, weights: Tensor | None = None
    ) -> Example:
        pixels = fitted_to(opaque(picture), size, request.fit[0]).movedim(-1, 0) * 2 - 1
        latent = encode_pixels(vae, pixels[None])[0]
        progress.update(1)
        as_sampled = request.size_conditioning[0] == SIZES[0]
        origin = None if as_sampled else origin_of(picture, size, request.fit[0])
        mask = None if weights is None else at_latent_places(weights, latent)
        return Example(pixels, latent, **vars(texts[caption]), origin=origin, mask=mask)

    def trained(one: Example) -> Example:
        """Add what is chosen each time that the picture is shown."""
        one = replace(one, wordings=tuple(texts[t] for t in request.wordings_of(one.caption)))
        if not request.flip[0]:
            return one
        pixels = one.pixels.flip(-1)
        latent = encode_pixels(vae, pixels[None])[0]
        progress.update(1)
        mask = one.mask.flip(-1) if one.mask is not None else None
        return replace(one, mirrored=replace(one, pixels=pixels, latent=latent, mask=mask))

    each = zip(pictures, sizes, captions, weights or [None] * len(pictures), strict=True)
    examples = [example(*of_picture) for of_picture in each]
    return PersonalData(
        training=tuple(map(trained, examples[:kept])),
        held_out=tuple(examples[kept:]),
        prior=tuple(example(p, size, class_prompt) for size in prior_sizes for p in prior),
        empty_context=texts[""].context,
        empty_pooled=texts[""].pooled,
        instance_prompt=request.instance_prompt[0],
        class_prompt=request.class_prompt[0],
        encode=partial(encode_pixels, vae),
    )


def fitted(picture: Tensor, side: int, fit: str) -> Tensor:
    """Bring a picture (H, W, 3) to (side, side, 3)."""
    return fitted_to(picture, (side, side), fit)


def fitted_to(picture: Tensor, size: tuple[int, int], fit: str) -> Tensor:
    """Bring a picture (H, W, 3) to a size, height first; "pad" only to squares."""
    height, width = picture.shape[:2]
    if (height, width) == size:
        return picture
    channels_first = picture.movedim(-1, 0)[None]
    if fit == "pad":
        channels_first = F.pad(channels_first, margins(height, width), mode="replicate")
    scaled = comfy.utils.common_upscale(channels_first, size[1], size[0], "lanczos", "center")
    return scaled[0].movedim(0, -1).clamp(0, 1)


def fitted_mask(mask: Tensor, picture: Tensor, size: tuple[int, int], fit: str) -> Tensor:
    """Bring the mask (h, w) of a picture (H, W, 3) to a size, as the picture; fillings are black.

    It may have another size than the picture, and is a whole picture's all the same.
    """
    whole = mask.cpu().float().clamp(0, 1)[None, None]
    height, width = picture.shape[:2]
    if whole.shape[2:] != (height, width):
        whole = F.interpolate(whole, (height, width), mode="bilinear", antialias=True).clamp(0, 1)
    if fit == "pad":
        whole = F.pad(whole, margins(height, width))
    return comfy.utils.common_upscale(whole, size[1], size[0], "area", "center")[0, 0]


def margins(height: int, width: int) -> tuple[int, int, int, int]:
    """Return what makes a square of a picture: left, right, top, bottom."""
    longest = max(height, width)
    top, left = (longest - height) // 2, (longest - width) // 2
    return left, longest - width - left, top, longest - height - top


def at_latent_places(weights: Tensor, latent: Tensor) -> Tensor:
    """Average what the pixels (H, W) count over the places of a latent (C, h, w): (h, w)."""
    return F.interpolate(weights[None, None], latent.shape[1:], mode="area")[0, 0]


def buckets(side: int) -> list[tuple[int, int]]:
    """Return the sizes (height, width) of about side^2 pixels, up to 2:1, the square first.

    Sides are multiples of 64 pixels; of less for small pictures, which would have no choice.
    """
    step = min(STEP, 1 << (side // 4).bit_length() - 1)
    square = max(step, side // step * step)
    found = [(square, square)]
    for longer in range(square + step, MOST_RATIO * side, step):
        shorter = round(side * side / longer / step) * step
        if longer <= MOST_RATIO * shorter:
            found += [(shorter, longer), (longer, shorter)]
    return found


def bucket_of(height: int, width: int, side: int) -> tuple[int, int]:
    """Return the bucket whose shape is nearest to that of a picture."""
    return min(buckets(side), key=lambda size: abs(math.log(size[0] * width / (size[1] * height))))


def origin_of(picture: Tensor, size: tuple[int, int], fit: str) -> Origin:
    """Tell where in a picture (H, W, 3) `fitted_to` cuts for a size; padding cuts nothing."""
    whole = height, width = picture.shape[0], picture.shape[1]
    if fit == "pad":
        return Origin(whole, (0.0, 0.0))
    cut = min(height, width * size[0] / size[1]), min(width, height * size[1] / size[0])
    return Origin(whole, ((height - cut[0]) / 2 / cut[0], (width - cut[1]) / 2 / cut[1]))


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
