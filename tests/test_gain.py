"""Training helps: the personalised model draws the subject, the base does not."""

import pytest

from benchmarks.gain import interval, measure


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "para"])
def test_personalized_beats_base_on_three_subjects_and_three_seeds(comfy, method, record_property):
    cells = list(measure(comfy, [method], subjects=(1, 2, 3), seeds=(0, 1, 2)))
    by_subject = {cell.subject: [] for cell in cells}
    for cell in cells:
        by_subject[cell.subject].append(cell.difference("subject_similarity"))
        print(cell)
    assert len(cells) == 9
    assert all(sum(differences) / 3 > 0.1 for differences in by_subject.values())
    mean, low, high = interval([cell.difference("subject_similarity") for cell in cells])
    record_property("subject_similarity_gain", [mean, low, high])
    record_property("prompt_following", [cell.prompt_following for cell in cells])
    assert low > 0
