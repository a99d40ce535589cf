"""How many blocks are sampled, and how likely that finds something."""

from random import Random

import pytest

from cbtfs.sample import Sample, chance


@pytest.mark.parametrize(
    ("unchanged", "expected"),
    [
        (0, 0),
        (5, 5),  # there are no more
        (16_384, 64),  # 1 GiB
        (131_072, 132),  # 8 GiB: 0.1 %
        (262_144, 256),  # 16 GiB
        (1 << 28, 256),  # 16 TiB costs no more
    ],
)
def test_the_usual_sample_has_bounds(unchanged: int, expected: int) -> None:
    assert Sample().count(unchanged) == expected


def test_a_share_that_somebody_chose_is_kept() -> None:
    assert Sample(share=0.01, at_least=1, at_most=None).count(1 << 28) == 2684355


def test_a_share_of_nothing_turns_it_off() -> None:
    assert Sample(share=0.0).count(1000) == 0


def test_the_chance_is_that_of_drawing_without_putting_back() -> None:
    assert chance(unchanged=10, wrong=0, sampled=5) == 0
    assert chance(unchanged=10, wrong=1, sampled=5) == pytest.approx(0.5)
    assert chance(unchanged=10, wrong=6, sampled=5) == 1


def test_the_chance_is_what_happens() -> None:
    rng = Random(3)
    hits = sum(bool({0, 1, 2} & set(rng.sample(range(40), 9))) for _ in range(20_000))

    assert hits / 20_000 == pytest.approx(chance(unchanged=40, wrong=3, sampled=9), abs=0.02)
