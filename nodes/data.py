"""Personal Dataset: pictures and captions in, latents and text states out; all problems at once."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor

from ..trainers.data import NO_POOLED, Example, PersonalData, Wording
from .fit import BUCKETS, FITS, at_latent_places, fitted_to, opaque, origin_of
from .request import SIZES, Request, check_lengths, unpack
from .wires import CATEGORY, PersonalDataWire, at

TILE = 512  # pixels of a side, as ComfyUI cuts pictures
END = 49407  # in CLIP's vocabulary; what follows it in a chunk is padding


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
        with at(cls, **widgets):
            request = Request(**widgets)
            pictures = unpack("images", images)
            prior = unpack("prior_images", prior_images) if prior_images else []
            request.check(pictures, prior)
            weights = request.weights_for(pictures, masks or [])
            return io.NodeOutput(prepare(request, pictures, prior, clip[0], vae[0], weights))


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
    texts = {text: encode_text(clip, text) for text in {*captions, *wordings, class_prompt, ""}}
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
        empty=texts[""],
        instance_prompt=request.instance_prompt[0],
        class_prompt=request.class_prompt[0],
        encode=partial(encode_pixels, vae),
        encoder_bytes=partial(encoder_bytes, vae),
    )


@torch.no_grad()
def encode_pixels(vae: Any, pixels: Tensor) -> Tensor:
    """Return the latents of pixels (N, 3, H, W) in [-1, 1]: (N, C, h, w), fp32 on the CPU.

    Ends instead when the stop button was pressed.
    """
    comfy.model_management.throw_exception_if_processing_interrupted()
    with torch.inference_mode():  # as ComfyUI runs its own models
        latents = vae.encode((pixels.movedim(1, -1) + 1) / 2)
    return latents.clone().float().cpu()


def encoder_bytes(vae: Any, height: int, width: int) -> int:
    """Return the bytes of a GPU that a VAE takes to encode a picture, itself included.

    Where there is no room for a large one, ComfyUI does it in tiles; so much is needed.
    """
    if not isinstance(vae, comfy.sd.VAE) or vae.device.type == "cpu":
        return 0
    tile = 1, 3, min(height, TILE), min(width, TILE)
    return vae.patcher.model_size() + int(vae.memory_used_encode(tile, vae.vae_dtype))


def encode_text(clip: Any, text: str) -> Wording:
    """Encode a caption, fp32 on the CPU.

    Brackets are only brackets. P is 0 for a text encoder that has no pooled text.
    """
    tokens = clip.tokenize(text, disable_weights=True)
    with torch.inference_mode():  # as ComfyUI runs its own models
        states, told = clip.encode_from_tokens_scheduled(tokens)[0]
    pooled = told.get("pooled_output")
    pooled = NO_POOLED if pooled is None else pooled[0]
    context = states[0].clone().float().cpu()
    return Wording(text, context, pooled.clone().float().cpu(), words_in(tokens, len(context)))


def words_in(tokens: Mapping[str, list[Any]], length: int) -> Tensor | None:
    """Tell words, start and end from padding: (L,) bool; None where tokens are not CLIP's.

    tokens: chunks of (token, weight) by encoder; SDXL's two cut and pad a text alike. length: L.
    """
    words: list[bool] = []
    for chunk in next(iter(tokens.values())):
        numbers = [token for token, _ in chunk]
        numbers = [n if isinstance(n, int) else None for n in numbers]  # None: an embedding
        if END not in numbers:
            return None
        words += [place <= numbers.index(END) for place in range(len(numbers))]
    return torch.tensor(words) if len(words) == length else None
