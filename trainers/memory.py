"""How much memory a run needs, known before: its steps are made on tensors without numbers.

Ours. Loop, method and optimiser are the very ones; only the numbers are missing, so that a step at
the size of SD 1.5 takes a second and no memory. Tensors are counted; what a GPU's libraries take
for themselves (some 0.5 GiB) comes on top.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .data import Batch, PersonalData
from .denoiser import Denoiser
from .eight_bits import (
    InsteadOfEightBits,
    eight_bit_layers,
    installed,
    takes_eight_bits,
    wide_layers,
)
from .errors import InputError
from .loop import Learner, draw_objectives
from .method import Method, Objective
from .methods.apt import APT
from .methods.dreambooth import DreamBooth
from .methods.lora import LoRA, LoRASettings
from .settings import MOST_BATCHES, Settings

LOOKED_AT = 64  # first steps that are drawn to find every kind of batch
LATE = 8  # last ones, which may be of another kind
REHEARSED = 2  # batches of a step that are gone through; each leaves behind what the first two do
aten = torch.ops.aten


def needed(
    method: Method,
    denoiser: Denoiser,
    data: PersonalData,
    halved: bool = False,
    heed: Callable[[], None] = lambda: None,
) -> int:
    """Return the bytes that training holds at its peak, the network's own among them.

    denoiser: as it will be trained: its precision, and whether it checkpoints; left as it is.
    halved: with pictures of half the side. heed: called all the while, may raise.
    Raises InputError as training would.
    """
    settings = method.settings
    parts = settings.gradient_accumulation
    settings = replace(settings, gradient_accumulation=min(parts, REHEARSED))
    in_bytes = settings.optimizer == "adamw-8bit"  # which has no step without numbers
    if in_bytes:
        settings = replace(settings, optimizer="adamw")
    method = type(method)(settings)
    with Rehearsal(heed) as rehearsal:
        twin = without_numbers(denoiser)
        rehearsal.follow([*twin.parameters(), *twin.buffers()])
        learner = Learner(method, twin)
        steps = kinds_of_step(method, twin, replace(data, encode=Blank(data)))
        if halved:
            steps = [[replace(o, batch=half_size(o.batch)) for o in step] for step in steps]
        for number in (1, 2):  # the optimiser has its state from the second on
            for objectives in steps:
                learner.advance(number, objectives, settings.learning_rate)
        between = rehearsal.live + (encoder_bytes(data, halved) if encodes(method) else 0)
    largest = max(size_of(objective.batch) for step in steps for objective in step)
    waiting = (parts - 1) * largest  # all batches of a step are drawn before it
    smaller = spared_by(learner.optimizer) if in_bytes else 0
    return max(rehearsal.peak, between) + waiting - spared(denoiser) - smaller


def remedies(
    method: Method,
    denoiser: Denoiser,
    data: PersonalData,
    heed: Callable[[], None] = lambda: None,
) -> dict[str, int]:
    """Return what can be changed for less memory, and the peak with it in bytes; best first."""
    settings, found = method.settings, {}

    def peak(method: Method, denoiser: Denoiser, halved: bool = False) -> int:
        return needed(method, denoiser, data, halved, heed)

    if not denoiser.unet.is_gradient_checkpointing:
        lean = without_numbers(denoiser)
        lean.unet.enable_gradient_checkpointing()
        found["'gradient_checkpointing' on"] = peak(method, lean)
    if denoiser.dtype is torch.float32:
        small = without_numbers(denoiser, torch.bfloat16)
        found["'precision' bf16"] = peak(method, small)
    if takes_eight_bits(settings) and installed() and not eight_bit_layers(denoiser.unet):
        with suppress(InputError):  # where the base's own weights learn
            found["'precision' int8"] = peak(method, in_eight_bits(denoiser))
    if settings.optimizer == "adamw" and installed():
        light = type(method)(replace(settings, optimizer="adamw-8bit"))
        found["'optimizer' adamw-8bit"] = peak(light, denoiser)
    parts = settings.gradient_accumulation * settings.batch_size
    if settings.batch_size > 1 and parts <= MOST_BATCHES:
        single = type(method)(replace(settings, batch_size=1, gradient_accumulation=parts))
        found[f"'batch_size' 1 and 'gradient_accumulation' {parts}"] = peak(single, denoiser)
    if all(side % (2 * denoiser.size_multiple) == 0 for side in data.training[0].latent.shape[1:]):
        found["pictures of half the side ('resolution')"] = peak(method, denoiser, True)
    if isinstance(method, DreamBooth):
        common = {field.name: getattr(settings, field.name) for field in fields(Settings)}
        found["Train LoRA instead"] = peak(LoRA(LoRASettings(**common)), denoiser)
    return dict(sorted(found.items(), key=lambda item: item[1]))


@dataclass(frozen=True)
class Kind:
    """What the memory that a batch needs depends on."""

    ways: tuple[bool, ...]  # how it is learned from
    pictures: int  # numbers
    texts: int

    @classmethod
    def of(cls, batch: Batch) -> "Kind":
        """Return the kind of a batch."""
        ways = tuple(value for value in vars(batch).values() if isinstance(value, bool))
        return cls(ways, batch.latents.numel(), batch.context.numel())

    def exceeds(self, other: "Kind") -> bool:
        """Tell whether a batch of this kind needs more than one of the other."""
        larger = self.pictures >= other.pictures and self.texts >= other.texts
        return self != other and self.ways == other.ways and larger


def kinds_of_step(method: Method, denoiser: Denoiser, data: PersonalData) -> list[list[Objective]]:
    """Draw steps of a run; return one of each kind of batch that no other exceeds."""
    found: dict[Kind, Objective] = {}
    steps = range(method.settings.steps)
    for index in sorted({*steps[:LOOKED_AT], *steps[-LATE:]}):
        for objective in draw_objectives(method, denoiser, data, index):
            found.setdefault(Kind.of(objective.batch), objective)
    largest = [o for kind, o in found.items() if not any(other.exceeds(kind) for other in found)]
    return [[objective] * method.settings.gradient_accumulation for objective in largest]


def size_of(batch: Batch) -> int:
    """Return the bytes of a batch's tensors."""
    return sum(tensor.nbytes for tensor in vars(batch).values() if torch.is_tensor(tensor))


def half_size(batch: Batch) -> Batch:
    """Return a batch with pictures of half the side."""
    pictures = {name: x for name, x in vars(batch).items() if torch.is_tensor(x) and x.ndim == 4}
    return replace(batch, **{name: x[..., ::2, ::2] for name, x in pictures.items()})


def encodes(method: Method) -> bool:
    """Tell whether a method encodes pictures in any of its steps."""
    return isinstance(method, APT) and method.draws_views


def encoder_bytes(data: PersonalData, halved: bool) -> int:
    """Return what encoding one picture takes at most."""
    sizes = [example.pixels.shape[1:] for example in data.training]
    return max(data.encoder_bytes(*(side // (1 + halved) for side in size)) for size in sizes)


def without_numbers(denoiser: Denoiser, dtype: torch.dtype | None = None) -> Denoiser:
    """Copy a denoiser onto the meta device, in another precision if wanted.

    What is needed for the copy is what is needed for the denoiser.
    """

    def empty(tensor: Tensor) -> Tensor:
        bare = torch.empty_like(tensor, device="meta", dtype=dtype or tensor.dtype)
        return nn.Parameter(bare, False) if isinstance(tensor, nn.Parameter) else bare

    tensors = [*denoiser.parameters(), *denoiser.buffers()]
    twin = deepcopy(denoiser, {id(tensor): empty(tensor) for tensor in tensors})
    in_one_precision(twin)
    for module in twin.modules():
        if isinstance(module, Attention):
            module.set_processor(Rehearsed())  # pyright: ignore[reportArgumentType]
    return twin


def forget(denoiser: Denoiser) -> None:
    """Let go of all weights, in place; their shapes stay."""
    in_one_precision(denoiser)
    denoiser.to("meta")


def in_one_precision(denoiser: Denoiser) -> None:
    """Put layers without numbers in the place of those in 8 bits."""
    for name, layer in eight_bit_layers(denoiser.unet).items():
        denoiser.unet.set_submodule(name, InsteadOfEightBits(layer, denoiser.dtype))


def in_eight_bits(denoiser: Denoiser) -> Denoiser:
    """Return a denoiser without numbers for one in bf16 with wide layers in 8 bits."""
    twin = without_numbers(denoiser, torch.bfloat16)
    for name, layer in wide_layers(twin.unet):
        twin.unet.set_submodule(name, InsteadOfEightBits(layer, twin.dtype))
    return twin


def spared(denoiser: Denoiser) -> int:
    """Return the bytes by which weights in 8 bits are smaller than in the network's precision."""
    weights = [layer.weight for layer in eight_bit_layers(denoiser.unet).values()]
    return sum((denoiser.dtype.itemsize - 1) * w.numel() - 4 * len(w) for w in weights)


def spared_by(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes by which AdamW's moments are smaller in 8 bits.

    bitsandbytes keeps so those of tensors of 4096 numbers or more, with a scale for every 256.
    """
    moments = [m for s in optimizer.state.values() for m in s.values() if m.numel() >= 4096]
    return sum(3 * m.numel() - 4 * math.ceil(m.numel() / 256) for m in moments)


class Blank:
    """A VAE's encode() that only knows the size of its answer."""

    def __init__(self, data: PersonalData):
        self.latent = data.training[0].latent
        self.scale = data.training[0].pixels.shape[-1] // self.latent.shape[-1]

    def __call__(self, pixels: Tensor) -> Tensor:
        height, width = (side // self.scale for side in pixels.shape[2:])
        return self.latent.new_zeros(len(pixels), len(self.latent), height, width)


class LiveBytes(TorchDispatchMode):
    """Follow the bytes of all tensors that come to life inside on a device, and their peak."""

    def __init__(self, device: str = "cpu"):
        super().__init__()
        self.device = device
        self.known: set[int] = set()
        self.live = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {
            tensor.untyped_storage()._cdata
            for tensor in tree_leaves((args, kwargs))
            if torch.is_tensor(tensor)
        }
        self.follow(tree_leaves(out), before)
        return out

    def follow(self, tensors: Sequence[Any], before: set[int] | None = None) -> None:
        """Count what tensors hold, but for storages that were there before, until it is freed."""
        for tensor in tensors:
            if not torch.is_tensor(tensor) or tensor.device.type != self.device:
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self.known or key in (before or ()):  # a view
                continue
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._end, key, size)

    def _end(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


class Rehearsal(LiveBytes):
    """Count bytes on the meta device, and answer what is asked of numbers that are not there.

    A number is 1, a mask selects everything, and a copy on the CPU is zeros. heed: called before
    every operation.
    """

    def __init__(self, heed: Callable[[], None] = lambda: None) -> None:
        super().__init__("meta")
        self.heed = heed

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        self.heed()
        asked = args[0] if args and torch.is_tensor(args[0]) and args[0].is_meta else None
        if asked is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        if func is aten._local_scalar_dense.default:
            return torch.ones((), dtype=asked.dtype).item()
        if func is aten._to_copy.default and str((kwargs or {}).get("device")) == "cpu":
            return torch.zeros(asked.shape, dtype=kwargs.get("dtype") or asked.dtype)
        if func is aten.index.Tensor and any(
            i.dtype is torch.bool for i in args[1] if i is not None
        ):
            func, args = aten.clone.default, args[:1]
        return super().__torch_dispatch__(func, types, args, kwargs)


class Rehearsed(AttnProcessor2_0):
    """Attention as ever, in the memory that it needs on a CPU or GPU.

    Without numbers torch takes the plain way, which holds a map of every query and key.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        with WithoutMaps():
            return super().__call__(*args, **kwargs)


class WithoutMaps(TorchFunctionMode):
    """Compute attention as fused kernels do, which keep one number per query for the way back."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return aten._scaled_dot_product_flash_attention_for_cpu(*args[:3])[0]
        return func(*args, **(kwargs or {}))
