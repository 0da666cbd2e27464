"""Several personalisations in one MODEL: rank reductions as one, then rotations, then the rest."""

from collections.abc import Mapping

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..trainers.artifact import Personalization
from ..trainers.edits import (
    WAYS,
    CombinedReduction,
    Edit,
    RankReduction,
    Rotation,
    combine,
    of_weights,
)
from ..trainers.errors import InputError, brief, printable
from .bridge import PREFIX, own_weights
from .load import STRENGTH, add_edits, fitting_edits, site_names, title
from .wires import CATEGORY, PersonalizedWire, at

MOST = 16  # inputs

Reductions = dict[str, list[RankReduction]]  # site -> one of each subject that changed it


class Combine(io.ComfyNode):
    """Combine several subjects."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        one = PersonalizedWire.Input(
            "personalized", tooltip="From a training node or Load Personalization."
        )
        return io.Schema(
            node_id="PersonalizeCombine",
            display_name="Combine Personalizations",
            category=CATEGORY,
            description="Puts several subjects into one model: PaRa's reductions are merged (Chen "
            "et al. 2025: one after the other; ours: concat), and LoRAs are added after them, "
            "whatever the order of the inputs, because a reduction takes away what a LoRA added "
            "before. OFT turns what is left before anything is added to it.",
            search_aliases=["merge personalizations", "merge lora", "merge para", "two subjects"],
            inputs=[
                io.Model.Input("model", tooltip="The base they were trained on, or one like it."),
                io.Autogrow.Input(
                    "personalized",
                    template=io.Autogrow.TemplatePrefix(one, "personalized", min=1, max=MOST),
                    tooltip="What to combine; there is always one more socket.",
                ),
                io.Combo.Input(
                    "how",
                    options=list(WAYS),
                    default="concat",
                    tooltip="concat: take away all that any subject gives up, in any order. "
                    "sequential: one after the other (the paper's). sum: add up the changes "
                    "(peft's).",
                ),
                STRENGTH,
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For any sampler."),
                io.String.Output(display_name="report", tooltip="What was combined, and how."),
            ],
        )

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def execute(cls, model, personalized, how, strength) -> io.NodeOutput:
        with at(cls, how=how, strength=strength):
            patched, text = combined(model, personalized, how, strength)
            return io.NodeOutput(patched, text, ui={"text": [text]})


def combined(
    model: ModelPatcher, learned: Mapping[str, Personalization], how: str, strength: float
) -> tuple[ModelPatcher, str]:
    """Return a clone of MODEL with all that was learned, and a text of what was done.

    learned: by the name of the input that it came from. Raises InputError when one does not fit
    this base, when one changes more than weights, or when concat leaves nothing of a layer.
    """
    edits = {name: weight_edits(model, name, one) for name, one in learned.items()}
    reductions, added = split(edits)
    if how == "concat":
        check_ranks(reductions, model)
    merged = {site: combine(of_site, how) for site, of_site in reductions.items()}
    patched = model.clone()
    for change in (merged, *added.values()):
        add_edits(patched, change, strength)
    return patched, report(model, learned, merged, list(added), how, strength)


def weight_edits(model: ModelPatcher, name: str, learned: Personalization) -> dict[str, Edit]:
    """Return one input's edits. Raises InputError when they do not fit, or are not all."""
    edits = fitting_edits(model, learned, name)
    weights = of_weights(edits)
    if len(weights) < len(edits):
        raise InputError(
            name,
            f"is {title(learned)}, which adds modules to the network and can not be merged; put "
            "it on the combined model with Apply Personalization.",
        )
    return weights


def split(edits: Mapping[str, dict[str, Edit]]) -> tuple[Reductions, dict[str, dict[str, Edit]]]:
    """Return the reductions of all inputs by site, and the other edits of every input.

    The others are in the order in which they act: what turns a weight, then what is added to it.
    """
    reductions: Reductions = {}
    added: dict[str, dict[str, Edit]] = {}
    for name, of_input in edits.items():
        for site, edit in of_input.items():
            if isinstance(edit, RankReduction):
                reductions.setdefault(site, []).append(edit)
            else:
                added.setdefault(name, {})[site] = edit
    return reductions, dict(sorted(added.items(), key=lambda item: not turns(item[1])))


def turns(edits: Mapping[str, Edit]) -> bool:
    """Tell whether edits turn weights, as OFT does, and add nothing."""
    return all(isinstance(edit, Rotation) for edit in edits.values())


def check_ranks(reductions: Reductions, model: ModelPatcher) -> None:
    """Raise InputError when several subjects, all of whose directions go, ask for a whole layer."""
    names, own = site_names(model), own_weights(model)
    for site, of_site in reductions.items():
        ranks, width = [r.basis.shape[1] for r in of_site], len(own[names[site]])
        if len(ranks) > 1 and sum(ranks) >= width:
            raise InputError(
                "personalized",
                f"gives up {' + '.join(map(str, ranks))} output directions of {site}, which has "
                f"{width}; combine fewer subjects, set 'how' to sequential, or train them with a "
                "lower rank.",
            )


def prompt(learned: Personalization) -> str:
    """Return its instance prompt, short enough for a line."""
    return brief(printable(learned.header.instance_prompt))


def report(
    model: ModelPatcher,
    learned: Mapping[str, Personalization],
    merged: Mapping[str, CombinedReduction],
    added: list[str],
    how: str,
    strength: float,
) -> str:
    """Say in plain words what was combined, in the order in which it acts."""
    inputs = [
        f"{name}: {title(one)} after {one.header.step} steps, '{prompt(one)}'"
        for name, one in learned.items()
    ]
    lines = [f"{len(inputs)} personalisations, strength {strength:g}:", *inputs]
    if merged:
        reduced = [name for name in learned if name not in added]
        lines += [f"Reductions of {len(merged)} layers first, by {how}: {', '.join(reduced)}."]
    if added:
        then = "Then added, so that no reduction takes them away" if merged else "Added"
        lines += [f"{then}: {', '.join(added)}."]
    names = site_names(model)
    if any(PREFIX + names[site] in model.patches for site in merged):
        lines += [
            "The model carried patches already (a LoRA, say): reductions take from those too. "
            "Put LoRAs after this node, or connect them to it."
        ]
    return "\n".join(lines)
