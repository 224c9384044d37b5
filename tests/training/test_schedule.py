from __future__ import annotations

import pytest

from cpq_hf.training.schedule import DROPBITS_END, drop_rate, learning_steps, noise_scale


def test_noise_falls_geometrically_from_start_to_end():
    values = [noise_scale(progress / 10, 1 / 3, 0.1) for progress in range(11)]
    assert values[0] == 1 / 3
    assert values[-1] == pytest.approx(0.1)
    ratios = [after / before for before, after in zip(values, values[1:], strict=False)]
    assert ratios == pytest.approx([ratios[0]] * 10)
    assert ratios[0] < 1


def test_drop_rate_is_zero_at_the_end_of_training():
    assert drop_rate(0, 0.2) == 0.2
    assert drop_rate(DROPBITS_END / 2, 0.2) == pytest.approx(0.1)
    assert [drop_rate(progress, 0.2) for progress in (DROPBITS_END, 0.9, 1)] == [0, 0, 0]


@pytest.mark.parametrize("progress", [-0.5, 1.5])
def test_progress_outside_training_is_its_nearest_end(progress):
    inside = min(max(progress, 0), 1)
    assert noise_scale(progress, 0.4, 0.1) == noise_scale(inside, 0.4, 0.1)
    assert drop_rate(progress, 0.1) == drop_rate(inside, 0.1)


def test_a_quarter_of_the_steps_learns_and_one_at_least():
    assert [learning_steps(total) for total in (1, 4, 400, 1001)] == [1, 1, 100, 250]
