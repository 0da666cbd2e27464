"""Personalize Monitor: what a training node measures, shows, keeps and decides while it trains."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..trainers.data import Example, PersonalData, Wording
from ..trainers.errors import InputError
from ..trainers.method import generator
from ..trainers.settings import knob
from ..trainers.verdict import Rules
from .data import encode_text
from .fit import fitted_to, opaque, origin_of
from .request import unpack
from .widgets import widget
from .wires import CATEGORY, MonitorWire, at

PRIOR_PICTURES = 4  # that are sampled of the class, all prompts together


@dataclass(frozen=True)
class MonitorSettings(Rules):
    """The widgets that are not texts."""

    every: int = knob(
        0,
        "Steps between two evaluations. 0: about 20 in a run, fewer (8 at least) where they would "
        "take more than a tenth of the time.",
        min=0,
        max=100_000,
    )
    restore_best: bool = knob(True, "The training node hands on the best checkpoint, not the last.")
    leave_one_out: bool = knob(
        False,
        "When nothing is held out: keep one picture of each subject, chosen by the trainer's seed, "
        "out of training to measure on. The model never sees it: of four pictures that is a "
        "quarter.",
    )
    keep: int = knob(
        1,
        "How many of the best checkpoints stay on disk, besides the last, pinned ones, and those "
        "of the trainer's 'save_every'.",
        min=1,
        max=1000,
        advanced=True,
    )
    sample_every: int = knob(
        4,
        "Evaluations between two samplings; the last one is always sampled.",
        min=1,
        max=10_000,
        advanced=True,
    )
    sample_count: int = knob(
        2,
        "Pictures of each prompt; from two on, how they differ is measured.",
        min=1,
        max=16,
        advanced=True,
    )
    sample_steps: int = knob(20, "Of every sample, as in KSampler.", min=1, max=1000, advanced=True)
    cfg: float = knob(
        7.0, "As in KSampler; 4 for the demo base.", min=0.0, max=100.0, step=0.1, advanced=True
    )
    sampler_name: str = knob(
        "euler", "As in KSampler.", choices=tuple(comfy.samplers.KSampler.SAMPLERS), advanced=True
    )
    scheduler: str = knob(
        "normal",
        "As in KSampler.",
        choices=tuple(comfy.samplers.KSampler.SCHEDULERS),
        advanced=True,
    )
    sample_seed: int = knob(
        0,
        "Noise of the samples, the same at every evaluation.",
        min=0,
        max=2**63 - 1,
        advanced=True,
    )


class Monitor(io.ComfyNode):
    """Say what a training node shall measure and decide."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        fields = dataclasses.fields(MonitorSettings)
        plain = [widget(field) for field in fields if not field.metadata["advanced"]]
        return io.Schema(
            node_id="PersonalizeMonitor",
            display_name="Personalize Monitor",
            category=CATEGORY,
            description="Watches over a training: measures, at fixed timesteps and noise, how well "
            "pictures of the subject are known that are not trained on, shows when the model "
            "over-fits or forgets its class, stops in time and keeps the best checkpoint. "
            "Measuring never changes what is learned.",
            search_aliases=["validation", "over-fitting", "early stopping", "best checkpoint"],
            inputs=[
                *plain,
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip="Optional: what to sample while training, one prompt a line (needs "
                    "'clip' and 'vae'). Sampling takes time: see 'sample_every'.",
                ),
                io.String.Input(
                    "prior_prompts",
                    default="",
                    multiline=True,
                    tooltip="Optional: what the model shall still know, one prompt a line, such as "
                    "'a photo of a person' (needs 'clip'). The base draws it once, before "
                    "training. Empty: the prior images of Personal Dataset, if it has any.",
                ),
                io.Clip.Input(
                    "clip", optional=True, tooltip="Text encoder of the base, for all prompts."
                ),
                io.Vae.Input("vae", optional=True, tooltip="VAE of the base, for the samples."),
                io.Image.Input(
                    "held_out",
                    optional=True,
                    tooltip="Pictures of the subject to measure on, besides those that Personal "
                    "Dataset holds out. Don't train on them.",
                ),
                io.String.Input(
                    "held_out_caption",
                    default="",
                    advanced=True,
                    tooltip="What 'held_out' shows (needs 'clip'). Empty: the instance prompt.",
                ),
                *(widget(field) for field in fields if field.metadata["advanced"]),
            ],
            outputs=[
                MonitorWire.Output(
                    "monitor", display_name="monitor", tooltip="For any of the training nodes."
                )
            ],
        )

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def execute(
        cls,
        prompts,
        prior_prompts,
        held_out_caption="",
        clip=None,
        vae=None,
        held_out=None,
        **widgets,
    ) -> io.NodeOutput:
        said = {"prompts": prompts, "prior_prompts": prior_prompts}
        with at(cls, **widgets, **said, held_out_caption=held_out_caption):
            texts, prior = lines(prompts), lines(prior_prompts)
            caption = held_out_caption.strip()
            if clip is None and (texts or prior or caption):
                raise InputError("clip", "is not connected, but prompts are given; connect both.")
            if vae is None and texts:
                raise InputError("vae", "is not connected, but 'prompts' are given; connect both.")
            pictures = unpack("held_out", [held_out]) if held_out is not None else []
            monitoring = Monitoring(
                settings=MonitorSettings(**widgets),
                shown=tuple(Prompt.of(clip, text) for text in texts),
                prior=tuple(Prompt.of(clip, text) for text in prior),
                nothing=Prompt.of(clip, "") if texts or prior else None,
                vae=vae,
                held_out=tuple(opaque(picture) for picture in pictures),
                held_out_text=encode_text(clip, caption) if caption else None,
                clip=clip if pictures else None,
            )
            return io.NodeOutput(monitoring)


def lines(text: str) -> list[str]:
    """Return the lines that are not empty."""
    return [line.strip() for line in text.splitlines() if line.strip()]


@dataclass(frozen=True)
class Prompt:
    """A text as the stock sampler wants it, and as training does."""

    wording: Wording
    conditioning: list[Any]

    @property
    def text(self) -> str:
        return self.wording.caption

    @classmethod
    def of(cls, clip: Any, text: str) -> "Prompt":
        """Encode a text."""
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        return cls(encode_text(clip, text), conditioning)


@dataclass(frozen=True)
class Monitoring:
    """What goes over the wire: how to watch a run, and with what."""

    settings: MonitorSettings
    shown: tuple[Prompt, ...] = ()  # to sample while training
    prior: tuple[Prompt, ...] = ()  # to measure forgetting on
    nothing: Prompt | None = None  # the negative prompt of both
    vae: Any = None
    held_out: tuple[Tensor, ...] = ()  # (H, W, 3) in [0, 1]
    held_out_text: Wording | None = None  # None: the instance prompt
    clip: Any = None  # to encode that where no training picture has it

    def prepare(self, data: PersonalData, model: ModelPatcher | None, seed: int) -> "Material":
        """Say what is trained on and what is measured on; the base draws what it has to.

        model: the base; None when it knows no text. seed: of the run. Raises InputError when what
        the monitor asks for does not go with the base or the data.
        """
        if model is None and (self.shown or self.prior or self.held_out):
            raise InputError(
                "monitor",
                "has prompts or held-out pictures, which go with a MODEL only; use the dataset's "
                "'hold_out', and a monitor without them. Samples are drawn anyway.",
            )
        data = replace(data, held_out=data.held_out + self._held_out(data))
        if self.settings.leave_one_out and not self.held_out:
            data = leave_one_out(data, seed)
        prior = self._drawn_prior(data, model) if model is not None else ()
        return Material(data, replace(data, prior=prior or data.prior))

    def _held_out(self, data: PersonalData) -> tuple[Example, ...]:
        """Encode the connected pictures as the dataset's own are, each in the size of those."""
        sizes = {(e.pixels.shape[1], e.pixels.shape[2]) for e in data.training}
        as_photographed = data.training[0].origin is not None

        def example(picture: Tensor) -> Example:
            size = nearest_shape(picture.shape[0] / picture.shape[1], sizes)
            pixels = fitted_to(picture, size, "crop").movedim(-1, 0) * 2 - 1
            latent = data.encode(pixels[None])[0]
            if not latent.isfinite().all():
                raise InputError(
                    "held_out",
                    "has a picture that this VAE turns into numbers that are not finite; run the "
                    "VAE in fp32 or bf16, or leave the picture out.",
                )
            origin = origin_of(picture, size, "crop") if as_photographed else None
            said = self._text(data)
            text = data.instance_prompt, said.context, said.pooled, said.words
            return Example(pixels, latent, *text, origin)

        return tuple(example(picture) for picture in self.held_out)

    def _text(self, data: PersonalData) -> Wording | Example:
        if self.held_out_text is not None:
            return self.held_out_text
        known = {e.caption: e for e in (*data.training, *data.held_out)}
        if data.instance_prompt in known:
            return known[data.instance_prompt]
        if self.clip is None or data.subjects or not data.instance_prompt:
            raise InputError(
                "held_out_caption",
                "is empty, and no training picture has the instance prompt as its caption; say "
                "what 'held_out' shows, and connect 'clip'.",
            )
        return encode_text(self.clip, data.instance_prompt)

    def _drawn_prior(self, data: PersonalData, base: ModelPatcher) -> tuple[Example, ...]:
        """Let the base draw what it must not forget, latents as the VAE would give them."""
        shape, drawn = data.usual_shape, []
        for index, prompt in enumerate(self.prior):
            count = PRIOR_PICTURES // len(self.prior) + (index < PRIOR_PICTURES % len(self.prior))
            latents = self.sample(base, prompt, shape, max(1, count))
            drawn += [Example(torch.empty(0), x, **vars(prompt.wording)) for x in latents]
        return tuple(drawn)

    @torch.no_grad()
    def sample(
        self, model: ModelPatcher, prompt: Prompt, shape: Sequence[int], count: int
    ) -> Tensor:
        """Return the latents that a stock KSampler with these settings gives, (count, C, h, w).

        Leaves the global random numbers as they are, which some samplers seed.
        """
        s, latent = self.settings, torch.zeros(count, *shape)
        source = torch.Generator().manual_seed(s.sample_seed)
        noise = comfy.sample.prepare_noise_inner(latent, source)
        assert self.nothing is not None
        with untouched_generators():
            samples = comfy.sample.sample(
                model,
                noise,
                s.sample_steps,
                s.cfg,
                s.sampler_name,
                s.scheduler,
                prompt.conditioning,
                self.nothing.conditioning,
                latent,
                callback=stop_when_interrupted,
                disable_pbar=True,
                seed=s.sample_seed,
            )
        return samples.clone().float().cpu()

    def samples(self, model: ModelPatcher, shape: Sequence[int]) -> list[Tensor]:
        """Return the pictures of every prompt, (count, H, W, 3) in [0, 1] each.

        shape: of a latent. ComfyUI holds none of its models on the device afterwards.
        """
        try:
            latents = [self.sample(model, p, shape, self.settings.sample_count) for p in self.shown]
            with torch.no_grad():
                return [self._decoded(x) for x in latents]
        finally:
            comfy.model_management.unload_all_models()
            comfy.model_management.soft_empty_cache()

    def _decoded(self, latents: Tensor) -> Tensor:
        """Return the pictures of latents (N, C, h, w), unless the stop button was pressed."""
        stop_when_interrupted()
        return self.vae.decode(latents).clone().float().cpu()[..., :3]


class Material(NamedTuple):
    """The pictures of a run."""

    trained: PersonalData  # held-out pictures included
    measured: PersonalData  # with prior pictures that are only looked at


def nearest_shape(ratio: float, sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Return the size (height, width) whose ratio of height to width is nearest to one."""
    return min(sorted(sizes), key=lambda size: abs(math.log(size[0] / size[1] / ratio)))


def leave_one_out(data: PersonalData, seed: int) -> PersonalData:
    """Move one picture from those trained on to those held out, chosen by the run's seed.

    Of several subjects, one picture of each that has none held out.
    """
    rng, left = generator(seed, 3, -1), []
    measured = {example.subject for example in data.held_out}
    for subject in sorted({example.subject for example in data.training} - measured):
        own = [i for i, example in enumerate(data.training) if example.subject == subject]
        if len(own) < 2:
            whose = f" of '{data.subjects[subject]}'" if data.subjects else ""
            raise InputError(
                "leave_one_out",
                f"is on, but there is only one picture{whose}; give more, or switch it off.",
            )
        left.append(own[int(torch.randint(len(own), (), generator=rng))])
    kept = tuple(example for i, example in enumerate(data.training) if i not in left)
    held_out = (*data.held_out, *(data.training[i] for i in left))
    return replace(data, training=kept, held_out=held_out)


@contextmanager
def untouched_generators() -> Iterator[None]:
    """Give the global random number generators back as they were."""
    device = comfy.model_management.get_torch_device()
    with torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []):
        yield


def stop_when_interrupted(*_: Any) -> None:
    """Let the stop button end a sampling, as a sampler's callback."""
    comfy.model_management.throw_exception_if_processing_interrupted()
