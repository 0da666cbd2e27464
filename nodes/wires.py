"""The pack's own wire types, and errors that name the node."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from comfy_api.latest import io

from ..trainers.errors import DiskError, InputError
from .widgets import check_widgets

CATEGORY = "personalize"
PersonalDataWire = io.Custom("PERSONALIZE_DATA")  # trainers.data.PersonalData
PixelDataWire = io.Custom("PERSONALIZE_PIXEL_DATA")  # the same, of pixels without text
UnconditionalWire = io.Custom("PERSONALIZE_UNCONDITIONAL")  # trainers.unconditional.Unconditional
MonitorWire = io.Custom("PERSONALIZE_MONITOR")  # nodes.monitor.Monitoring
PersonalizedWire = io.Custom("PERSONALIZED")  # trainers.artifact.Personalization


@contextmanager
def at(node: type[io.ComfyNode], **widgets: Any) -> Iterator[None]:
    """Put the node's name in front of what went wrong with its inputs, numbers, memory or disk.

    widgets: values to check before, which a link may have brought.
    """
    try:
        if widgets:
            check_widgets(node, widgets)
        yield
    except (InputError, FloatingPointError, MemoryError) as error:
        kind = ValueError if isinstance(error, InputError) else type(error)
        raise kind(f"{node.define_schema().display_name}: {error}") from error
    except OSError as error:
        told = error if isinstance(error, DiskError) else DiskError.of(error)
        raise OSError(f"{node.define_schema().display_name}: {told}") from error
