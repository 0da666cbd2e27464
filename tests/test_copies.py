"""Do samples copy the training pictures, or each other?"""

import pytest
import torch

from personalize.trainers.copies import diversity, nearest, thumbnails
from tests.tiny import noise


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    """Blobs: something that is left at 32x32 pixels."""
    return torch.nn.functional.interpolate(noise(count, 3, 4, 4, seed=seed), (64, 64))


def test_a_copy_is_nearest_and_its_brightness_and_contrast_do_not_matter():
    known = pictures(4)
    copies = known[[2, 0]] * 0.5 + 0.3
    assert nearest(copies, known) == pytest.approx(1.0, abs=1e-5)
    assert nearest(pictures(4, seed=9), known) < 0.6


def test_nearest_is_its_naive_reference():
    samples, known = pictures(2, seed=1), pictures(3, seed=2)
    a, b = thumbnails(samples), thumbnails(known)
    expected = sum(max(float((x * y).sum()) for y in b) for x in a) / 2
    assert nearest(samples, known) == pytest.approx(expected)
    assert float(a[0].norm()) == pytest.approx(1.0)
    assert a[0].unflatten(0, (3, -1)).mean(1).abs().max() < 1e-6


def test_samples_that_are_all_alike_have_no_diversity():
    one = pictures(1)
    assert diversity([one.expand(3, -1, -1, -1)]) == pytest.approx(0.0, abs=1e-5)
    assert diversity([pictures(3, seed=1), pictures(3, seed=2)]) > 0.5


def test_prompts_with_one_sample_each_tell_nothing_of_diversity():
    assert diversity([pictures(1), pictures(1, seed=1)]) is None
    assert diversity([]) is None
