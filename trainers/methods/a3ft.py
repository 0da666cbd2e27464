"""A3FT: adapter-augmented attention fine-tuning (Moon et al., NeurIPS 2022 workshop, "Fine-tuning
Diffusion Models with Limited Data").

    z_out = LN(softmax(z_q^T z / sqrt(hw)) z),   z_q = LN(W4 (W3 z + W2 SiLU(W1 t)))    (eq. 1, 2)
    h = proj_out((1 - a) z + a z_out),           a = sigmoid(M2 SiLU(M1 t))             (eq. 3)

Of the base, the attention blocks learn (norm, query, key, value, output projection) and the rest
is frozen. Between every self-attention and its output projection sits an adapter that knows the
time t: it mixes channels, and a gate says how much of the mix each channel takes. The mixing is
shared by all blocks of one width. The paper's table 1 is the three modes naive, attention and a3ft.

There on unconditional bases that predict variances too (L_simple + .001 L_vlb), with Adam at 2e-4,
batches of 128 and 500 epochs of about 1000 pictures. Ours: text-to-image bases (the adapter is in
self-attention, and cross-attention learns with it), the lower learning rate for a few pictures,
SiLU between W1 and W2, LN over channels, the start of the gate, and the strength s at loading: s
times every weight's change, and s a.

Not with BNN, APT, PaRa or BP/ZO in one training, for the adapter is no change of a weight; BNN and
APT train the same weights without it (over = attention).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..data import Batch
from ..denoiser import Denoiser
from ..edits import Edit
from ..errors import InputError
from ..free import differences, set_free
from ..method import Method, error_of
from ..pixel_denoiser import LAMBDA, PixelDenoiser, variational_bound
from ..settings import Settings, knob
from ..sites import layers_of
from ..time_aware import SHUT, SITE, TimeAware, set_time_aware
from .dreambooth import FREE_LAYERS

TRAINED = {
    "self- and cross-attention": "attention",
    "self-attention": "self-attention",
}
GATES = {"near-identity": SHUT, "half": 0.0}  # the bias of M2


@dataclass(frozen=True)
class A3FTSettings(Settings):
    """Settings of A3FT and of what its paper compares it with."""

    learning_rate: float = knob(
        2e-5,
        "How far each step moves. The paper: 2e-4, with batches of 128 and pixels for a base.",
        min=0.0,
        max=1.0,
        step=1e-7,
    )
    mode: str = knob(
        "a3ft",
        "a3ft: attention and the time-aware adapter; attention: attention alone; naive: every "
        "weight. The rows of the paper's table 1.",
        choices=("a3ft", "attention", "naive"),
    )
    weight_decay: float = knob(
        0.0,
        "Pull of the weights towards zero, not towards the base. 0 is the paper's Adam.",
        min=0.0,
        max=1.0,
        step=1e-3,
        advanced=True,
    )
    trained: str = knob(
        "self- and cross-attention",
        "Which attention learns; not for naive. Unconditional bases have self-attention only.",
        choices=tuple(TRAINED),
        advanced=True,
    )
    gate: str = knob(
        "near-identity",
        "How the adapter starts. near-identity: .7 % of it is used, so almost from the base; "
        "half: 50 %.",
        choices=tuple(GATES),
        advanced=True,
    )


class A3FT(Method):
    name = "a3ft"
    title = "A3FT"
    Settings = A3FTSettings
    settings: A3FTSettings
    starts_at_identity = False  # the gate is never quite shut

    def adapt(self, unet: nn.Module) -> None:
        s = self.settings
        free = layers_of(
            unet, FREE_LAYERS["everything" if s.mode == "naive" else TRAINED[s.trained]]
        )
        if not free:
            raise InputError("mode", f"is '{s.mode}', but this base has no attention.")
        set_free(unet, free)
        if s.mode == "a3ft":
            set_time_aware(unet, GATES[s.gate])

    def errors(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        if not (isinstance(denoiser, PixelDenoiser) and denoiser.predicts_variance):
            return super().errors(denoiser, batch)
        noisy = denoiser.noised(batch.latents, batch.noise, batch.timesteps)
        answer = denoiser.answer(noisy, batch.timesteps)
        simple = error_of(answer[:, : noisy.shape[1]], denoiser, batch)
        return simple + LAMBDA * variational_bound(denoiser, batch, noisy, answer)

    def learned(self, unet: nn.Module) -> Mapping[str, Edit | TimeAware]:
        edits = differences(unet)
        adapter = dict(unet.named_children()).get(SITE)
        return edits | {SITE: adapter.snapshot()} if isinstance(adapter, TimeAware) else edits
