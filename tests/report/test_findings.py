"""What the curves say, on curves whose meaning is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from fourbit.report.curves import Curves, Series
from fourbit.report.findings import findings, plain

STEPS, EVERY = 200, 20


def curves(
    train: Callable[[float], float], heldout: Callable[[float], float] | None, not_finite: int = 0
) -> Curves:
    """Losses as functions of the share of the run that is done."""

    def series(loss: Callable[[float], float], every: int) -> Series:
        return [(step, loss(step / STEPS)) for step in range(every, STEPS + 1, every)]

    return Curves(
        train=series(train, 1),
        heldout=series(heldout, EVERY) if heldout is not None else [],
        learning_rate=[],
        grad_norm=[],
        tokens_per_second=[],
        peak_bytes=[],
        seconds=1.0,
        not_finite=not_finite,
    )


def falling(done: float) -> float:
    return 2.0 - done


def flat_soon(done: float) -> float:
    return 1.0 + math.exp(-30 * done)


def rising(done: float) -> float:
    return 1.0 + (done - 0.5) ** 2


def high(done: float) -> float:
    return 3.0 - 0.05 * min(done, 0.1)


def settling(done: float) -> float:
    return 1.0 + 0.1 * (1 - min(done, 0.8)) ** 2


CASES = {
    "rising": (falling, rising),
    "train on": (falling, falling),
    "both high": (high, high),
    "plateau early": (flat_soon, flat_soon),
    "settled": (falling, settling),
}


@pytest.mark.parametrize("name", CASES)
def test_each_shape_has_its_finding(name: str) -> None:
    (found,) = findings(curves(*CASES[name]))
    assert found.name == name


def test_a_finding_carries_the_numbers_it_rests_on() -> None:
    (found,) = findings(curves(falling, rising))
    assert found.evidence == {
        "best held-out loss": "1.0000 at step 100",
        "last held-out loss": "1.2500 at step 200 (+25.0%)",
        "training loss, the steps before and after": "1.7475, 1.2475",
    }
    assert "after step 100" in found.text


def test_one_percent_is_the_threshold() -> None:
    def ends_at(last: float) -> Callable[[float], float]:
        return lambda done: last if done == 1 else 2.0 - done

    assert findings(curves(falling, ends_at(1.1 * 1.0101)))[0].name == "rising"
    assert findings(curves(falling, ends_at(1.1 * 1.0099)))[0].name != "rising"


def test_training_loss_that_no_longer_falls_is_not_trained_on() -> None:
    assert findings(curves(flat_soon, falling))[0].name == "settled"


def test_a_high_loss_that_fell_before_is_not_high() -> None:
    """Most of the fall may come before the first evaluation."""
    first_steps = curves(lambda done: 8.0 if done < 0.1 else 3.0, lambda done: 3.0)
    assert findings(first_steps)[0].name == "plateau early"


def test_without_adapter_there_is_no_rank_to_change() -> None:
    for shape in CASES.values():
        text = findings(curves(*shape), full=True)[0].text
        assert "rank" not in text
        assert "lora" not in text


def test_too_little_to_say() -> None:
    assert findings(curves(falling, None))[0].name == "no held-out"
    short = curves(falling, falling)
    (found,) = findings(Curves(short.train, short.heldout[:2], [], [], [], [], seconds=1.0, not_finite=0))
    assert (found.name, found.evidence) == ("too few", {"evaluations": "2", "steps": "200"})


def test_skipped_steps_are_told() -> None:
    found = findings(curves(falling, falling, not_finite=3))
    assert [item.name for item in found] == ["train on", "skipped"]
    assert plain(found)[1]["evidence"] == {"steps skipped": "3 of 200"}
