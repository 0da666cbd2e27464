"""Join Subjects: several Personal Datasets for one training."""

from collections.abc import Mapping

import torch
from comfy_api.latest import io

from ..trainers.data import PersonalData
from ..trainers.errors import InputError
from ..trainers.subjects import join, summary
from .request import check_lengths
from .wires import CATEGORY, PersonalDataWire, at

MOST = 16  # inputs


class JoinSubjects(io.ComfyNode):
    """Put several subjects into one run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        one = PersonalDataWire.Input("data", tooltip="From Personal Dataset: one subject.")
        return io.Schema(
            node_id="PersonalizeJoinSubjects",
            display_name="Join Subjects",
            category=CATEGORY,
            description="Puts the Personal Datasets of several subjects together, so that one "
            "training learns all of them, each by words of its own. Held-out and prior pictures "
            "stay with their subject.",
            search_aliases=["several subjects", "multiple concepts", "merge datasets"],
            inputs=[
                io.Autogrow.Input(
                    "data",
                    template=io.Autogrow.TemplatePrefix(one, "data", min=2, max=MOST),
                    tooltip="A Personal Dataset for each subject; there is always one more socket.",
                ),
                io.Boolean.Input(
                    "balance",
                    default=True,
                    tooltip="On: a batch shows one subject, and they take turns, however many "
                    "pictures each has. Off: all pictures are mixed, and each is shown equally "
                    "often.",
                ),
            ],
            outputs=[
                PersonalDataWire.Output(
                    "joined", display_name="data", tooltip="For any of the training nodes."
                ),
                io.String.Output(display_name="report", tooltip="Which subjects are in it."),
            ],
        )

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def execute(cls, data, balance) -> io.NodeOutput:
        with at(cls, balance=balance):
            together = joined(data, balance)
            text = summary(together)
            return io.NodeOutput(together, text, ui={"text": [text]})


def joined(data: Mapping[str, PersonalData], balance: bool) -> PersonalData:
    """Put the inputs together. Raises InputError naming what does not go with the others."""
    if len(data) < 2:
        raise InputError("data", f"has {len(data)} subjects; connect two or more.")
    together = join(data, balance)
    examples = *together.training, *together.held_out, *together.prior
    contexts = [text.context for e in examples for text in (e, *e.wordings)]
    check_lengths([*contexts, together.empty.context], "data")
    return together
