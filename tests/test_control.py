"""What the page is told of trainings: whatever a prompt says of its workflow, it stays small."""

import pytest

from personalize.nodes import control
from personalize.nodes.session import LONGEST_ID, workflow_of

STRANGE = (
    *(None, [], "x", 3, {}, {"workflow": None}, {"workflow": "x"}, {"workflow": [1]}),
    *({"workflow": {"id": strange}} for strange in (None, 3, ["x"], {"a": 1}, "x" * 10**6)),
)


@pytest.mark.parametrize("told", STRANGE, ids=lambda told: repr(told)[:40])
def test_a_workflow_that_is_none_is_none(told):
    assert workflow_of(told) is None


def test_a_workflow_is_known_by_its_id():
    for id in ("0fd5c6a4-8e62-4f9b-9e4e-1f2e3d4c5b6a", "x" * LONGEST_ID):
        assert workflow_of({"workflow": {"id": id, "nodes": []}}) == id


def test_a_run_that_could_not_be_noted_does_not_go_on():
    nameless: str = []  # type: ignore[assignment]
    with pytest.raises(TypeError), control.running("a run", "1", nameless):
        raise AssertionError("was noted")
    assert control.of_run("a run") is None


def test_a_thousand_nodes_are_remembered_the_newest_last(monkeypatch):
    monkeypatch.setattr(control, "_latest", {})
    for number in (*range(1500), 700):
        with control.running(f"run {number}", str(number), "a flow") as training:
            assert control.of_run(f"run {number}") is training
    nodes = [shown.node for shown in control.latest()]
    assert len(nodes) == control.MOST_SHOWN and nodes[-1] == "700" and nodes[0] == "500"
