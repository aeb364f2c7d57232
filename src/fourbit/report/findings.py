"""What the curves of a run say, each statement with the numbers it rests on.

The rules, in this order (losses in nats per token; "falls" means by more than 1 % of itself):

    rising        the last held-out loss is above the best one          stop there, or regularise
    train on      the best held-out loss is the last, it fell since     more epochs
                  the evaluation before, and the training loss falls
    both high     neither loss falls any more, and neither has lost     raise the rank or the learning rate
                  a tenth of where it began
    plateau early the held-out loss was within 1 % of its best before   the rank is enough, could be smaller;
                  half of the run and has not fallen since              fewer steps would do
    settled       none of these

A loss curve of one seed is noisy, so that 1 % is not proof: findings are hints about what to try next.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from fourbit.report.curves import Curves, Series

#: The share of a loss that counts as a change.
CHANGE = 0.01
#: The share of its first value that a loss must have lost not to be called high.
LEARNED = 0.1
#: Fewer evaluations than this show no trend.
EVALUATIONS = 3
#: Steps at the beginning whose mean is where the training loss began.
_FIRST = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """One statement.

    name      rising, train on, both high, plateau early, settled, too few, skipped or no held-out
    level     "good", "warn" or "note"
    text      what is seen and what to do
    evidence  label to the figure it rests on
    """

    name: str
    level: str
    text: str
    evidence: dict[str, str]


def findings(curves: Curves, full: bool = False) -> list[Finding]:
    """What to conclude from a run's curves; `full` says that there is no adapter to give a rank."""
    found = [_trend(curves, full)]
    if curves.not_finite:
        found.append(
            Finding(
                "skipped",
                "warn",
                "Steps whose loss or gradient was not finite were skipped. Lower the learning rate, or set "
                "model.compute_dtype to float32.",
                {"steps skipped": f"{curves.not_finite} of {curves.steps}"},
            )
        )
    return found


def _trend(curves: Curves, full: bool) -> Finding:
    heldout = curves.heldout
    if not heldout:
        return Finding(
            "no held-out",
            "note",
            "There is no held-out loss, so nothing can be said about unseen data. Hold rows out with "
            "data.heldout_fraction; the first evaluation comes at step train.eval_every.",
            {},
        )
    if len(heldout) < EVALUATIONS or len(curves.train) < 4 * EVALUATIONS:
        return Finding(
            "too few",
            "note",
            "Too few steps or evaluations to show a trend. Train longer, or lower train.eval_every.",
            {"evaluations": str(len(heldout)), "steps": str(len(curves.train))},
        )
    for rule in (_rising, _train_on, _both_high, _plateau_early):
        finding = rule(curves, full)
        if finding is not None:
            return finding
    return Finding(
        "settled",
        "good",
        "The held-out loss has nearly stopped falling and has not risen. The run is about as long as it "
        "should be.",
        {**_ends(heldout), "training loss at the end": _late(curves.train)},
    )


def _rising(curves: Curves, full: bool) -> Finding | None:
    best, last = _best(curves.heldout), curves.heldout[-1]
    if last[1] <= (1 + CHANGE) * best[1]:
        return None
    after = [value for step, value in curves.train if step > best[0]]
    before = [value for step, value in curves.train if step <= best[0]][-len(after) :]
    regularise = "a lower learning rate" if full else "more lora.dropout, a smaller rank"
    return Finding(
        "rising",
        "warn",
        f"The held-out loss rises: after step {best[0]:,} the run learns its rows by heart. Stop there (the "
        f"weights kept are those of that step), or regularise: {regularise}, more data.",
        {
            "best held-out loss": f"{best[1]:.4f} at step {best[0]:,}",
            "last held-out loss": f"{last[1]:.4f} at step {last[0]:,} ({last[1] / best[1] - 1:+.1%})",
            "training loss, the steps before and after": f"{fmean(before):.4f}, {fmean(after):.4f}",
        },
    )


def _train_on(curves: Curves, full: bool) -> Finding | None:
    heldout = curves.heldout
    if _best(heldout) != heldout[-1] or not _falls(heldout[-2][1], heldout[-1][1]):
        return None
    earlier, late = _last_halves(curves.train)
    if not _falls(earlier, late):
        return None
    return Finding(
        "train on",
        "note",
        "Training and held-out loss are both still falling. Train on: more epochs, in a new run where the "
        "learning rate decays to zero.",
        {
            "held-out loss, last two": f"{heldout[-2][1]:.4f}, {heldout[-1][1]:.4f} "
            f"({heldout[-1][1] / heldout[-2][1] - 1:+.1%})",
            "training loss, third and last quarter": f"{earlier:.4f}, {late:.4f} ({late / earlier - 1:+.1%})",
        },
    )


def _both_high(curves: Curves, full: bool) -> Finding | None:
    first = fmean(value for _, value in curves.train[:_FIRST])
    earlier, late = _last_halves(curves.train)
    began, best = curves.heldout[0][1], _best(curves.heldout)[1]
    moves = _falls(earlier, late) or _falls(curves.heldout[-2][1], curves.heldout[-1][1])
    if moves or late < (1 - LEARNED) * first or best < (1 - LEARNED) * max(began, first):
        return None
    what = "the learning rate" if full else "the learning rate or the rank (lora.r)"
    return Finding(
        "both high",
        "warn",
        f"Both losses have hardly fallen and no longer do. Raise {what}.",
        {
            "training loss, first steps and last quarter": f"{first:.4f}, {late:.4f} "
            f"({late / first - 1:+.1%})",
            "held-out loss, first and best": f"{began:.4f}, {best:.4f} ({best / began - 1:+.1%})",
        },
    )


def _plateau_early(curves: Curves, full: bool) -> Finding | None:
    best, end = _best(curves.heldout), curves.heldout[-1][0]
    reached = next(point for point in curves.heldout if point[1] <= (1 + CHANGE) * best[1])
    if reached[0] > end / 2:
        return None
    rank = "" if full else "The rank is enough and could be smaller. "
    return Finding(
        "plateau early",
        "good",
        f"The held-out loss had come within 1 % of its best by step {reached[0]:,} of {end:,}. {rank}Fewer "
        "steps would do.",
        {
            f"held-out loss at step {reached[0]:,}": f"{reached[1]:.4f}",
            "best held-out loss": f"{best[1]:.4f} at step {best[0]:,}",
            "last held-out loss": f"{curves.heldout[-1][1]:.4f}",
        },
    )


def _best(series: Series) -> tuple[int, float]:
    return min(series, key=lambda point: point[1])


def _falls(before: float, after: float) -> bool:
    return after < (1 - CHANGE) * before


def _last_halves(series: Series) -> tuple[float, float]:
    """Means over the third and the last quarter."""
    half = [value for _, value in series[len(series) // 2 :]]
    middle = len(half) // 2
    return fmean(half[:middle]), fmean(half[middle:])


def _ends(heldout: Series) -> dict[str, str]:
    best = _best(heldout)
    return {
        "best held-out loss": f"{best[1]:.4f} at step {best[0]:,}",
        "last held-out loss": f"{heldout[-1][1]:.4f} at step {heldout[-1][0]:,}",
    }


def _late(train: Series) -> str:
    return f"{_last_halves(train)[1]:.4f}"


def plain(found: Iterable[Finding]) -> list[dict[str, object]]:
    """Findings as plain values for JSON."""
    return [
        {"name": item.name, "level": item.level, "text": item.text, "evidence": item.evidence}
        for item in found
    ]
