"""Say what ComfyUI said when it refused or failed a prompt."""

from typing import Any


class PromptFailed(RuntimeError):
    """A prompt was refused, failed or was interrupted; the message is the server's own."""

    def __init__(
        self,
        message: str,
        *,
        node_id: str | None = None,
        node_type: str | None = None,
        exception_type: str | None = None,
        traceback: str = "",
        node_errors: dict[str, Any] | None = None,
        interrupted: bool = False,
    ):
        super().__init__(message)
        self.node_id = node_id
        self.node_type = node_type
        self.exception_type = exception_type
        self.traceback = traceback
        self.node_errors = node_errors or {}
        self.interrupted = interrupted

    @classmethod
    def from_messages(cls, messages: list[list[Any]]) -> "PromptFailed":
        """Make the error from the status messages in a prompt's history."""
        for kind, data in messages:
            where = f"node {data.get('node_id')} ({data.get('node_type')})"
            place = {"node_id": data.get("node_id"), "node_type": data.get("node_type")}
            if kind == "execution_interrupted":
                return cls(f"Interrupted in {where}", **place, interrupted=True)
            if kind == "execution_error":
                what = f"{data['exception_type']}: {data['exception_message'].strip()}"
                trace = "".join(data.get("traceback", []))
                kind = data["exception_type"]
                return cls(f"{where}: {what}", **place, exception_type=kind, traceback=trace)
        return cls("The prompt failed, and the server did not say why")


def refusal(reply: Any, prompt: dict[str, dict[str, Any]]) -> PromptFailed:
    """Make the error from the answer to a prompt that did not validate."""
    if not isinstance(reply, dict):
        return PromptFailed(f"The server refused the prompt: {reply}")
    node_errors = reply.get("node_errors") or {}
    error = reply.get("error") or {"message": "Some outputs did not validate"}
    lines = [_line(error) if isinstance(error, dict) else str(error)]
    for id, found in node_errors.items():
        title = found.get("class_type") or prompt.get(id, {}).get("class_type")
        lines += [f"node {id} ({title}): {_line(one)}" for one in found["errors"]]
    first = next(iter(node_errors), None)
    kind = node_errors[first].get("class_type") if first else None
    return PromptFailed("\n".join(lines), node_id=first, node_type=kind, node_errors=node_errors)


def _line(error: dict[str, Any]) -> str:
    """Join message and details, without saying anything twice."""
    message, details = error.get("message", ""), error.get("details", "")
    return f"{message}: {details}" if details and details not in message else message
