"""A pack for one test: compare what was trained with what was loaded, inside ComfyUI's process."""

import importlib
import json
import sys
from dataclasses import fields
from pathlib import Path

import comfy.model_management
import torch
from comfy_api.latest import ComfyExtension, io, ui

PACK = Path(__file__).resolve().parent.parent.parent / "__init__.py"


def part(name: str):
    """Import a module of the pack under the name that ComfyUI gave it."""
    loaded = [m for m in list(sys.modules.values()) if getattr(m, "__file__", None)]
    pack = next(m for m in loaded if Path(m.__file__).resolve() == PACK)
    return importlib.import_module(f".{name}", pack.__name__)


class Probe(io.ComfyNode):
    """Train, load, and tell how far the two networks are apart."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeProbe",
            is_output_node=True,
            inputs=[
                io.Model.Input("model"),
                io.Custom("PERSONALIZE_DATA").Input("data"),
                io.String.Input("method"),
            ],
            outputs=[],
        )

    @classmethod
    @torch.inference_mode(False)
    def execute(cls, model, data, method) -> io.NodeOutput:
        base, bridge, load = part("nodes.base"), part("nodes.bridge"), part("nodes.load")
        artifact, loop = part("trainers.artifact"), part("trainers.loop")
        method = part("trainers.methods").METHODS[method]
        wanted = {"steps": 3, "learning_rate": 1e-2, "layers": "all"}
        known = {field.name for field in fields(method.Settings)}
        settings = method.Settings(**{n: v for n, v in wanted.items() if n in known})
        denoiser = bridge.denoiser_of(model)
        scaled = base.in_network_scale(data, model, denoiser)
        step = list(loop.train(method(settings), denoiser, scaled))[-1]
        header = artifact.Header(
            method=method.name,
            step=0,
            settings=settings.as_dict(),
            base=bridge.fingerprint(model),
            instance_prompt=data.instance_prompt,
            class_prompt=data.class_prompt,
            data=data.fingerprint(),
        )
        learned = artifact.Personalization.of(header, step.learned(), step.index)
        asked = question(data.training[0])
        with torch.no_grad():
            trained = denoiser(*asked)
        plain = output(model, asked)
        loaded = output(load.personalize(model, learned, 1.0)[0], asked)
        zero = output(load.personalize(model, learned, 0.0)[0], asked)
        found = {
            "scale": trained.abs().max(),
            "trained - loaded": (trained - loaded).abs().max(),
            "trained - base": (trained - plain).abs().max(),
            "strength 0 - base": (zero - plain).abs().max(),
        }
        text = json.dumps({name: float(value) for name, value in found.items()})
        return io.NodeOutput(ui=ui.PreviewText(text))


def question(example) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ask about noise at a late and an early time, with the example's caption."""
    noise = torch.randn(2, *example.latent.shape, generator=torch.Generator().manual_seed(0))
    return noise, torch.tensor([3, 990]), example.context.expand(2, -1, -1).clone()


def output(model, asked) -> torch.Tensor:
    """Return what ComfyUI's own network computes once ComfyUI has loaded it."""
    comfy.model_management.load_models_gpu([model])
    noise, timesteps, context = (tensor.to(model.load_device) for tensor in asked)
    with torch.no_grad():
        return model.model.diffusion_model(noise, timesteps, context=context).float().cpu()


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [Probe]


async def comfy_entrypoint():
    return Extension()
