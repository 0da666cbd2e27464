"""Two small judges of sprite-world pictures: who is in them, and whether they follow their prompts.

Pictures are float (N, H, W, 3) in [0, 1], ComfyUI's IMAGE, of any size; they are resized inside.
"""

from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from . import world

FOLDER = Path(__file__).parent
JUDGED_SIZE = 64  # pixels
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "kind": ("sprite", world.KIND),
    "shape": world.SHAPES,
    "colour": tuple(world.COLOURS),
    "pattern": world.PATTERNS,
    "size": world.SIZES,
    "position": tuple(world.POSITIONS),
    "background": world.BACKGROUNDS,
}
SPRITE_ATTRIBUTES = ("shape", "colour", "pattern", "size", "position")
EMBEDDING = 64


def _stage(n_in: int, n_out: int, stride: int, kernel: int = 3) -> nn.Sequential:
    convolution = nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(n_out), nn.ReLU())


def trunk() -> nn.Sequential:
    """Return the convolutions of both judges: (N, 3, 64, 64) -> (N, 128, 4, 4)."""
    layers = [_stage(3, 32, 2, kernel=5)]
    for n_in, n_out in ((32, 64), (64, 96), (96, 128)):
        layers += [_stage(n_in, n_out, 2), _stage(n_out, n_out, 1)]
    return nn.Sequential(*layers)


J = TypeVar("J", bound="_Judge")


class _Judge(nn.Module):
    """A network that lives in one half-precision safetensors file."""

    file: Path

    @classmethod
    def load(cls: type[J], path: Path | None = None) -> J:
        """Load the judge that comes with the pack, or the one at `path`."""
        judge = cls()
        judge.load_state_dict({k: v.float() for k, v in load_file(path or cls.file).items()})
        return judge.eval().requires_grad_(False)

    def save(self, path: Path | None = None) -> None:
        """Write the weights in half precision."""
        state = {k: v.half().contiguous() for k, v in self.state_dict().items()}
        save_file(state, path or self.file)


def resized(images: torch.Tensor) -> torch.Tensor:
    """Turn (N, H, W, 3) in [0, 1] into (N, 3, 64, 64) in [-1, 1]."""
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"judge: images are {tuple(images.shape)}; give (N, H, W, 3) in [0, 1].")
    pixels = images.float().movedim(-1, 1) * 2 - 1
    return F.interpolate(pixels, (JUDGED_SIZE, JUDGED_SIZE), mode="bilinear", antialias=True)


class AttributeReader(_Judge):
    """Reads kind, shape, colour, pattern, size, position and background off a picture."""

    file = FOLDER / "judge_attributes.safetensors"

    def __init__(self) -> None:
        super().__init__()
        self.trunk = trunk()
        self.hidden = nn.Linear(128 * 4 * 4, 192)
        self.heads = nn.ModuleDict({k: nn.Linear(192, len(v)) for k, v in ATTRIBUTES.items()})

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the logits (N, choices) of each attribute; pixels (N, 3, 64, 64) in [-1, 1]."""
        features = self.hidden(self.trunk(pixels).flatten(1)).relu()
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, images: torch.Tensor) -> dict[str, list[str]]:
        """Name every attribute of every picture (on a totem only kind and background count)."""
        device = next(self.parameters()).device
        logits = self(resized(images.to(device)))
        chosen = {name: values.argmax(1).tolist() for name, values in logits.items()}
        return {name: [ATTRIBUTES[name][i] for i in ids] for name, ids in chosen.items()}

    def follows(self, images: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Compare pictures with what their prompts name: 1 right, 0 wrong, NaN unnamed; each (N,).

        A totem where a sprite was asked for has every sprite attribute wrong.
        """
        if len(prompts) != len(images):
            raise ValueError(f"follows: {len(prompts)} prompts for {len(images)} images.")
        seen = self.read(images)
        result = {name: torch.full((len(prompts),), torch.nan) for name in ATTRIBUTES}
        for row, prompt in enumerate(prompts):
            for name, word in world.named_attributes(prompt).items():
                lost = name in SPRITE_ATTRIBUTES and seen["kind"][row] == world.KIND
                result[name][row] = float(seen[name][row] == word and not lost)
        return result

    def prompt_following(self, images: torch.Tensor, prompts: list[str]) -> float:
        """Return the share of all named attributes that the pictures show, in [0, 1]."""
        return torch.cat(list(self.follows(images, prompts).values())).nanmean().item()


class SubjectJudge(_Judge):
    """Embeds pictures so that those of one subject lie close, in any pose and background."""

    file = FOLDER / "judge_subject.safetensors"

    def __init__(self) -> None:
        super().__init__()
        self.trunk = trunk()
        self.hidden = nn.Linear(128 * 4 * 4, 192)
        self.head = nn.Linear(192, EMBEDDING)
        self.centre: torch.Tensor
        self.register_buffer("centre", torch.zeros(EMBEDDING))

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return hidden features (N, 192) of pixels (N, 3, 64, 64) in [-1, 1]."""
        return self.hidden(self.trunk(pixels).flatten(1)).relu()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return unit embeddings (N, 64) around the centre of all subjects."""
        return F.normalize(self.head(self.features(pixels)) - self.centre, dim=1)

    @torch.no_grad()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embed pictures: (N, 64), unit norm."""
        return self(resized(images.to(self.centre.device)))

    def similarity(self, images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        """Return each picture's mean cosine with the reference pictures: (N,) in [-1, 1]."""
        return (self.embed(images) @ self.embed(references).T).mean(1)
