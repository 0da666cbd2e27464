"""The list of nodes."""

from comfy_api.latest import ComfyExtension, io

from ..trainers.methods import METHODS
from .combine import Combine
from .data import Dataset
from .demo import DemoBase, DemoSubject
from .export import ExportLoRA
from .folder import Folder
from .join import JoinSubjects
from .load import Apply, Load
from .monitor import Monitor
from .report import Report
from .routes import register
from .train import train_node
from .unconditional import NODES as UNCONDITIONAL


class PersonalizeExtension(ComfyExtension):
    """Everything this pack adds to ComfyUI."""

    async def on_load(self) -> None:
        register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        training = [train_node(method) for method in METHODS.values()]
        using = [Report, Apply, Load, Combine, ExportLoRA, *UNCONDITIONAL]
        return [Folder, Dataset, JoinSubjects, Monitor, *training, *using, DemoBase, DemoSubject]
