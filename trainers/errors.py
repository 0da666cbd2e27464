"""The errors of the border: which input or file, what was got, what was expected, what to do."""

import re
import unicodedata
from pathlib import Path

OF_SYSTEM = re.compile(r".*?([^:\s][^:]*) \(os error \d+\).*", re.DOTALL)  # as safetensors tells it


class InputError(ValueError):
    """Report a problem with what the user gave.

    `input_name` is the node's input (or the setting); the node layer puts the node's name in front.
    """

    def __init__(self, input_name: str, problem: str):
        super().__init__(printable(f"'{input_name}' {problem}"))
        self.input_name = input_name


class DiskError(OSError):
    """Report a file that could not be written or read; the message leaves out where it lies."""

    def __init__(self, file: str, reason: str):
        super().__init__(
            printable(
                f"could not write or read {file} ({reason}); make room on the disk, or let ComfyUI "
                "write to its output folder. What was saved before is whole."
            )
        )

    @classmethod
    def of(cls, error: OSError) -> "DiskError":
        """Tell the system's error without the folder."""
        return cls(Path(str(error.filename or "a file")).name, reason_of(error))


def printable(text: str) -> str:
    """Return a text without what moves a terminal's cursor, breaks lines or hides characters."""
    return "".join(map(_escaped, text))


def brief(text: object, most: int = 200) -> str:
    """Return what came from outside, short enough for a message."""
    whole = str(text)
    return whole if len(whole) <= most else f"{whole[: most - 1]}…"


def reason_of(error: Exception) -> str:
    """Return what an error says, without the folder that the system's own text may show."""
    if isinstance(error, OSError):
        return error.strerror or "it can not be opened"
    return brief(OF_SYSTEM.sub(r"\1", str(error)))


def _escaped(character: str) -> str:
    unseen = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return ascii(character)[1:-1] if unseen else character
