"""Show a prompt's progress: one line that moves on a terminal, plain lines elsewhere."""

import shutil
import sys
import time
from typing import TextIO

from .client import Progress


class ProgressBar:
    """Call it with each Progress; a context manager, so that the line is closed on errors too."""

    def __init__(self, stream: TextIO = sys.stderr):
        self._stream = stream
        self._moves = stream.isatty()
        self._start = time.monotonic()
        self._shown = ""
        self._printed = -1  # twentieths of the whole
        self._next = 0.0

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._moves and self._shown:
            self._stream.write("\n")
            self._stream.flush()

    def __call__(self, progress: Progress) -> None:
        if self._moves:
            return self._draw(progress)
        now, twentieth = time.monotonic(), int(20 * progress.fraction)
        if twentieth != self._printed or now > self._next:  # each 5 %, and at least every 10 s
            self._printed, self._next = twentieth, now + 10
            print(self._text(progress), file=self._stream, flush=True)

    def _draw(self, progress: Progress) -> None:
        columns = shutil.get_terminal_size().columns
        text = self._text(progress)
        room = columns - len(text) - 4
        line = f"{bar(progress.fraction, min(room, 40))} {text}" if room >= 10 else text
        line = line[: columns - 1]
        self._stream.write("\r" + line.ljust(len(self._shown)))
        self._stream.flush()
        self._shown = line

    def _text(self, progress: Progress) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._start), 60)
        steps = f" {progress.value:g}/{progress.maximum:g}" if progress.maximum > 1 else ""
        return f"{progress.fraction:4.0%} {minutes}:{seconds:02} {progress.title}{steps}"


def bar(fraction: float, width: int) -> str:
    """Return a bar of `width` characters."""
    full = round(fraction * width)
    return "█" * full + "░" * (width - full)
