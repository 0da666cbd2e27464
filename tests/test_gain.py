"""Training helps: the personalised model draws the subject, the base does not."""

import pytest

from benchmarks.gain import by_subject, measure
from benchmarks.servers import workers

pytestmark = pytest.mark.slow
SUBJECTS = (1, 2, 3)


@pytest.fixture(scope="module")
def servers():
    """Two servers: these are real trainings."""
    with workers(2) as started:
        yield started


PARA = pytest.param("para", (0, 1, 2), marks=pytest.mark.stress)


@pytest.mark.parametrize(("method", "seeds"), [("lora", (0, 1, 2)), PARA])
def test_the_personalised_model_beats_the_base(servers, method, seeds, record_property):
    cells = list(measure(servers, [method], SUBJECTS, seeds, steps=100))
    for cell in cells:
        print(cell)
    record_property("prompt_following", [cell.prompt_following for cell in cells])
    gains = by_subject(cells, "subject_similarity")
    assert len(cells) == len(SUBJECTS) * len(seeds)
    assert all(cell.difference("subject_similarity") > 0 for cell in cells)
    assert all(gain > 0.1 for gain in gains)
