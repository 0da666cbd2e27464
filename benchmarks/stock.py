"""What ComfyUI has to be compared with: bases of random weights, and its own Train LoRA.

Weights decide neither time nor memory, so none are downloaded. Import inside `comfyui()`.
"""

import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import comfy.ldm.modules.diffusionmodules.model as autoencoder
import comfy.model_base
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from comfy.model_patcher import CoreModelPatcher, ModelPatcher
from comfy_extras.nodes_train import TrainLoraNode
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from personalize.trainers.data import Example


@dataclass(frozen=True)
class Geometry:
    """A U-Net in ComfyUI's words, and the pictures that it is trained on."""

    resolution: int  # pixels
    channels: tuple[int, ...]  # per level
    depths: tuple[int, ...]  # transformer blocks per level
    blocks: int  # per level
    context: int  # width of the text states
    middle: int = 1  # transformer blocks between the halves
    heads: int = 8
    head_channels: int = -1  # instead of heads
    pooled: int = 0  # width of the pooled text, which SDXL is told with six sizes

    def config(self) -> dict[str, Any]:
        """Return what ComfyUI's model detection would."""
        channels, depths, blocks = self.channels, self.depths, self.blocks
        told = {"adm_in_channels": self.pooled + 6 * 256, "num_classes": "sequential"}
        return {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": channels[0],
            "channel_mult": [n // channels[0] for n in channels],
            "num_res_blocks": [blocks] * len(channels),
            "transformer_depth": [d for d in depths for _ in range(blocks)],
            "transformer_depth_output": [d for d in depths for _ in range(blocks + 1)],
            "transformer_depth_middle": self.middle,
            "use_spatial_transformer": True,
            "context_dim": self.context,
            "num_heads": -1 if self.head_channels > 0 else self.heads,
            "num_head_channels": self.head_channels,
            "legacy": False,
            "use_linear_in_transformer": bool(self.pooled),
            "use_temporal_attention": False,
            "use_temporal_resblock": False,
            **(told if self.pooled else {"adm_in_channels": None}),
        }


GEOMETRIES = {
    "demo": Geometry(128, (96, 192), (1, 1), 1, 96, heads=4),
    "thin": Geometry(64, (32, 64, 128, 128), (1, 1, 1, 0), 2, 64),  # SD 1.5's layers, a tenth wide
    "small": Geometry(256, (320, 640), (1, 1), 1, 768),  # two levels of SD 1.5 at its widths
    "sd15": Geometry(512, (320, 640, 1280, 1280), (1, 1, 1, 0), 2, 768),
    "sdxl": Geometry(
        1024, (320, 640, 1280), (0, 2, 10), 2, 2048, middle=10, head_channels=64, pooled=1280
    ),
}


class OfAnySize(comfy.supported_models.SD15):
    """SD 1.x that takes the number of heads from its geometry."""

    unet_extra_config: dict[str, Any] = {}  # noqa: RUF012


def build_model(geometry: Geometry, device: torch.device, dtype: torch.dtype) -> ModelPatcher:
    """Build a MODEL of random weights from ComfyUI's own classes, on `device`."""
    xl = bool(geometry.pooled)
    known = (comfy.supported_models.SDXL if xl else OfAnySize)(geometry.config())
    known.set_inference_dtype(dtype, None)
    kind = comfy.model_base.SDXL if xl else comfy.model_base.BaseModel
    base = kind(known, comfy.model_base.ModelType.EPS, device=str(device))
    randomize(base.diffusion_model)
    model = CoreModelPatcher(base, load_device=device, offload_device=torch.device("cpu"))

    def another(disable_dynamic: bool = False) -> ModelPatcher:
        return build_model(geometry, device, dtype)

    model.cached_patcher_init = another, ()  # Train LoRA loads its base anew
    return model


def build_vae() -> comfy.sd.VAE:
    """Build Stable Diffusion's VAE of random weights."""
    shape: dict[str, Any] = {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    shape |= {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3}
    parts = {
        "encoder": autoencoder.Encoder(**shape, attn_resolutions=[]),
        "decoder": autoencoder.Decoder(**shape, attn_resolutions=[]),
        "quant_conv": nn.Conv2d(8, 8, 1),
        "post_quant_conv": nn.Conv2d(4, 4, 1),
    }
    return comfy.sd.VAE(sd=randomize(nn.ModuleDict(parts)).state_dict())


@torch.no_grad()
def randomize(module: nn.Module) -> nn.Module:
    """Fill a module so that activations keep their size; with the same numbers every time."""
    for index, (name, weight) in enumerate(module.named_parameters()):
        if weight.ndim > 1:
            generator = torch.Generator(weight.device).manual_seed(index)
            weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
    return module


class Ended(BaseException):
    """The training is not wanted any more."""


class StockTraining:
    """ComfyUI's own Train LoRA, which runs as it is and waits after every optimiser step.

    It has a thread of its own: its node returns only when all steps are done.
    """

    def __init__(self, model: ModelPatcher, examples: tuple[Example, ...], **widgets: Any):
        self.optimizer: torch.optim.Optimizer | None = None
        self._inputs = stock_inputs(model, examples) | widgets
        self._go: SimpleQueue[AbstractContextManager[Any] | None] = SimpleQueue()
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        self._inside: AbstractContextManager[Any] = nullcontext()
        self._thread = threading.Thread(target=self._run, args=(torch.get_num_threads(),))

    def step(self, inside: AbstractContextManager[Any] | None = None) -> None:
        """Make a step, inside a context of the training's thread."""
        if self._thread.ident is None:
            self._thread.start()
        self._go.put(inside or nullcontext())
        if (error := self._done.get()) is not None:
            raise error

    def close(self) -> None:
        """End it."""
        if self._thread.is_alive():
            self._go.put(None)
            self._thread.join()

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)
        hook = register_optimizer_step_post_hook(self._after)
        try:
            self._wait()
            TrainLoraNode.execute(**{name: [value] for name, value in self._inputs.items()})
        except Ended:
            pass
        except BaseException as error:
            self._done.put(error)
        finally:
            hook.remove()

    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if threading.get_ident() == self._thread.ident:  # the hook is called for all optimisers
            self.optimizer = optimizer
            self._inside.__exit__(None, None, None)
            self._done.put(None)
            self._wait()

    def _wait(self) -> None:
        inside = self._go.get()
        if inside is None:
            raise Ended
        self._inside = inside
        inside.__enter__()


def stock_inputs(model: ModelPatcher, examples: tuple[Example, ...]) -> dict[str, Any]:
    """Return the inputs of Train LoRA for some pictures; the widgets are those of a new node."""
    pairs = [
        [e.context[None], {"pooled_output": e.pooled[None]} if len(e.pooled) else {}]
        for e in examples
    ]
    return {
        "model": model,
        "latents": {"samples": torch.stack([e.latent for e in examples])},
        "positive": pairs,
        "steps": 100_000,
        "batch_size": 1,
        "grad_accumulation_steps": 1,
        "learning_rate": 0.0005,
        "rank": 8,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "seed": 0,
        "training_dtype": "bf16",
        "lora_dtype": "bf16",
        "quantized_backward": False,
        "algorithm": "LoRA",
        "gradient_checkpointing": True,
        "checkpoint_depth": 1,
        "offloading": False,
        "existing_lora": "[None]",
        "bucket_mode": False,
        "bypass_mode": False,
    }


def silent() -> None:
    """Keep ComfyUI's progress bars off the terminal."""
    comfy.utils.set_progress_bar_enabled(False)
