"""What Personal Dataset was asked for, and everything that can be wrong with it."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from ..trainers.errors import InputError, brief
from .fit import BUCKETS, bucket_of, fitted_mask

MOST_CHUNKS = 60  # of tokens, that text states are repeated to in a batch: 1 to 6 go together
PLACE = "{}"  # of the caption in a template
SIZES = ("as sampled", "as photographed")


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
