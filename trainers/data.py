"""What is trained on: pictures, their latents and their text states, all on the CPU."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

NO_POOLED = torch.zeros(0)  # of text encoders that give no pooled text
PIXELS = 8  # of a picture's side, for one of its latent's


@dataclass(frozen=True)
class Origin:
    """The photograph that a picture was cut from."""

    size: tuple[int, int]  # height and width in pixels, before scaling
    corner: tuple[float, float]  # top and left of the picture, in its own heights and widths


@dataclass(frozen=True)
class Wording:
    """A caption, as it is and as the text encoder gives it."""

    caption: str
    context: Tensor  # (L, D) text states
    pooled: Tensor = NO_POOLED  # (P,)
    words: Tensor | None = None  # (L,) bool: the states that are no padding; None: all may be words


@dataclass(frozen=True)
class Example:
    """One picture, ready to be drawn."""

    pixels: Tensor  # (3, H, W) in [-1, 1]
    latent: Tensor  # (C, h, w), as the VAE gives it
    caption: str
    context: Tensor  # (L, D) text states
    pooled: Tensor = NO_POOLED  # (P,) the whole text as one vector; SDXL is told it as well
    words: Tensor | None = None  # see Wording
    origin: Origin | None = None  # None: SDXL is told what a sampler tells it of such a picture
    mask: Tensor | None = None  # (h, w) in [0, 1]: what each place counts; None: all alike
    mirrored: "Example | None" = None  # the same picture, for half of the times that it is shown
    wordings: tuple[Wording, ...] = ()  # to train with, one at a time; none: the caption
    subject: int = 0  # which of several; of a prior picture: whose class it shows

    @property
    def sizes(self) -> Tensor:
        """Return what SDXL is told of a picture (Podell et al. 2023, section 2.2): (6,) fp32.

        Height and width of the photograph, top and left of the cut, height and width of the
        picture, in pixels.
        """
        own = [PIXELS * side for side in self.latent.shape[1:]]
        if self.origin is None:
            return torch.tensor([*own, 0, 0, *own], dtype=torch.float32)
        cut = [round(share * side) for share, side in zip(self.origin.corner, own, strict=True)]
        return torch.tensor([*self.origin.size, *cut, *own], dtype=torch.float32)

    @property
    def views(self) -> tuple["Example", ...]:
        """The picture, and the mirrored one if there is one."""
        return (self,) if self.mirrored is None else (self, self.mirrored)

    def said(self, wording: Wording) -> "Example":
        """Return the same picture with other words."""
        return replace(self, **vars(wording))

    def changed(self, change: "Callable[[Example], Example]") -> "Example":
        """Change the picture, and the mirrored one alike."""
        mirrored = change(self.mirrored) if self.mirrored is not None else None
        return replace(change(self), mirrored=mirrored)


@dataclass(frozen=True)
class PersonalData:
    """The pictures of a subject, those held out, and pictures of its class.

    `empty` is the empty caption. `encode` is the VAE, for what is drawn while training (augmented,
    or of another size): pixels (N, 3, H, W) in [-1, 1] to latents (N, C, h, w) on the CPU, in the
    scale of the examples' own. `subjects` are the instance prompts of several subjects; that of
    one need not be told. They may `take_turns`: then a batch shows one of them, and each has as
    many batches as the others. `encoder_bytes` are those that `encode` takes on a GPU for a picture
    of a height and width, its VAE among them.
    """

    training: tuple[Example, ...]
    held_out: tuple[Example, ...]
    prior: tuple[Example, ...]
    empty: Wording
    instance_prompt: str
    class_prompt: str
    encode: Callable[[Tensor], Tensor]
    subjects: tuple[str, ...] = ()
    take_turns: bool = False
    encoder_bytes: Callable[[int, int], int] = lambda height, width: 0

    def unsaid(self, example: Example) -> Example:
        """Return an example with the empty caption."""
        return example.said(self.empty)

    def changed(self, change: Callable[[Example], Example]) -> "PersonalData":
        """Change all pictures."""

        def each(examples: tuple[Example, ...]) -> tuple[Example, ...]:
            return tuple(example.changed(change) for example in examples)

        groups = self.training, self.held_out, self.prior
        training, held_out, prior = map(each, groups)
        return replace(self, training=training, held_out=held_out, prior=prior)

    def drawn(self) -> Iterator[Example]:
        """Yield all that training can show, mirrored pictures after their own."""
        for example in (*self.training, *self.prior):
            yield from example.views

    @property
    def usual_shape(self) -> tuple[int, ...]:
        """The shape (C, h, w) that most training pictures' latents have; the first of several."""
        shapes = Counter(tuple(example.latent.shape) for example in self.training)
        return shapes.most_common(1)[0][0]

    def traits(self) -> dict[str, Any]:
        """Say what the training pictures are like, in JSON, besides what they show."""
        sizes = {f"{e.pixels.shape[-1]}x{e.pixels.shape[-2]}" for e in self.training}
        return {
            "sizes": sorted(sizes),
            "masks": sum(example.mask is not None for example in self.training),
            "mirrored pictures": sum(example.mirrored is not None for example in self.training),
            "wordings": sum(len(example.wordings) for example in self.training),
            "subjects": list(self.subjects),
            "turns": self.take_turns,
        }

    def fingerprint(self) -> str:
        """Return a hash of all pictures and captions, 16 hex digits."""
        digest = hashlib.sha256()
        for group in (self.training, self.held_out, self.prior):
            digest.update(f"|{len(group)}|".encode())
            for example in group:
                digest.update(example.pixels.contiguous().numpy().tobytes())
                digest.update(example.caption.encode())
                digest.update(str(example.origin or "").encode())
                digest.update(particulars(example))
        if self.subjects:
            digest.update(repr((self.subjects, self.take_turns)).encode())
        return digest.hexdigest()[:16]


def particulars(example: Example) -> bytes:
    """Return what tells an example from a plain one, for a hash; nothing of a plain one."""
    told = b"" if example.mask is None else b"|mask" + example.mask.contiguous().numpy().tobytes()
    told += b"|mirrored" if example.mirrored is not None else b""
    told += b"".join(b"|word" + wording.caption.encode() for wording in example.wordings)
    return told + (f"|subject{example.subject}".encode() if example.subject else b"")


@dataclass(frozen=True)
class Batch:
    """What one forward pass is asked about."""

    latents: Tensor  # (B, C, h, w) clean, in the network's scale
    noise: Tensor  # (B, C, h, w)
    timesteps: Tensor  # (B,) int in [0, T)
    context: Tensor  # (B, L, D)
    pooled: Tensor  # (B, P)
    words: Tensor  # (B, L, W), see `words_of`
    sizes: Tensor  # (B, 6), see Example
    weight: Tensor  # (B,) share of each example in the loss
    of_subject: Tensor  # (B,) bool: not a prior picture
    seed: int  # of what else is random while this batch is looked at, such as weights
    masks: Tensor | None  # (B, 1, h, w) what each place counts, 1 on average; None: all alike

    @property
    def conditions(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the network is told besides the time: context, pooled text, sizes."""
        return self.context, self.pooled, self.sizes

    def to(self, device: torch.device) -> "Batch":
        """Move every tensor."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if torch.is_tensor(value)
        }
        return replace(self, **moved)


def conditions(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Return what the network is told of examples besides the time, as fields of a Batch."""
    return {
        "context": stack_contexts([example.context for example in examples]),
        "pooled": torch.stack([example.pooled for example in examples]),
        "words": words_of(examples),
        "sizes": torch.stack([example.sizes for example in examples]),
    }


def stack_masks(examples: Sequence[Example]) -> Tensor | None:
    """Return what each place counts in the loss, (B, 1, h, w); None where no example has a mask."""
    if all(example.mask is None for example in examples):
        return None
    whole = torch.ones(examples[0].latent.shape[1:])
    masks = [whole if e.mask is None else evened(e.mask) for e in examples]
    return torch.stack(masks)[:, None]


def evened(mask: Tensor) -> Tensor:
    """Scale a mask (h, w) to a mean of 1, so that a small one does not slow learning down.

    One that is black all over stays so.
    """
    return mask / mask.mean().clamp(min=torch.finfo(mask.dtype).tiny)


def words_of(examples: Sequence[Example]) -> Tensor:
    """Say which text states are which word of each text: (B, L, W) of 0 and 1.

    Column n is the text's n-th word, wherever the text is repeated to the batch's length, and 0
    beyond its last; padding is in no column.
    """
    lengths = [len(example.context) for example in examples]
    chosen = [
        torch.arange(length) if e.words is None else e.words.nonzero()[:, 0]
        for e, length in zip(examples, lengths, strict=True)
    ]
    found = torch.zeros(len(examples), math.lcm(*lengths), max(map(len, chosen)))
    for of_text, places, length in zip(found, chosen, lengths, strict=True):
        of_text.unflatten(0, (-1, length))[:, places, torch.arange(len(places))] = 1
    return found


def stack_contexts(contexts: list[Tensor]) -> Tensor:
    """Stack text states (L_i, D) to (B, L, D), repeated to one length as ComfyUI does."""
    length = math.lcm(*(context.shape[0] for context in contexts))
    return torch.stack([c.repeat(length // c.shape[0], 1) for c in contexts])
