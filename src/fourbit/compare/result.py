"""What a comparison came to: each arm's figures, and each pair of arms tested."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

from fourbit.compare.arm import Outcome
from fourbit.compare.runner import Job
from fourbit.compare.statistics import LEVEL, Mean, holm, mcnemar, mean_interval, paired_t
from fourbit.evaluate.scores import Accuracy

LOSS_TEST = "paired t over seeds"
SCORE_TEST = "McNemar, exact, over rows"


@dataclass(frozen=True, slots=True)
class Score:
    """The share of right answers, over all seeds; the interval is Wilson's for the number of rows.

    Rows of several seeds are the same rows, so seeds do not narrow the interval.
    """

    value: float
    low: float
    high: float
    rows: int
    each: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm over its seeds; figures are of those that finished, None where there is none.

    status      finished, no memory, failed, or partly where some seeds finished
    reason      why not all finished
    losses      held-out loss by seed
    peak_bytes  the highest; seconds and tokens_per_second are means
    """

    name: str
    overrides: tuple[str, ...]
    learning_rate: float | str
    status: str
    reason: str
    losses: dict[int, float]
    loss: Mean | None
    score: Score | None
    peak_bytes: int | None
    seconds: float | None
    score_seconds: float | None
    tokens_per_second: float | None
    trainable_parameters: int | None
    parameters: int | None


@dataclass(frozen=True, slots=True)
class Difference:
    """Two arms in one figure, first - second, over the seeds that both finished.

    low, high   95 % interval of the difference, where the test gives one
    relative    of the loss: difference / the second's
    p, adjusted None where one seed allows no test; adjusted by Holm over all pairs in this figure
    detail      what the test saw
    """

    figure: str
    first: str
    second: str
    difference: float
    low: float | None
    high: float | None
    relative: float | None
    test: str
    p: float | None
    adjusted: float | None
    detail: str

    @property
    def verdict(self) -> str:
        """beyond noise; doubtful, where only this test by itself says so; within noise; or not tested."""
        if self.p is None or self.adjusted is None:
            return "not tested"
        if self.adjusted < LEVEL:
            return "beyond noise"
        return "doubtful" if self.p < LEVEL else "within noise"


@dataclass(frozen=True, slots=True)
class Comparison:
    """All of it. rows: how many there are to train on, held out and scored; notes: what to keep in mind."""

    arms: list[ArmResult]
    differences: list[Difference]
    seeds: tuple[int, ...]
    rows: dict[str, int]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "seeds": list(self.seeds),
            "rows": self.rows,
            "arms": [asdict(arm) for arm in self.arms],
            "differences": [{**asdict(item), "verdict": item.verdict} for item in self.differences],
            "notes": self.notes,
        }


def compare(jobs: Sequence[Job], outcomes: Sequence[Outcome], rows: dict[str, int]) -> Comparison:
    """Arm by arm and pair by pair, in the order of the jobs."""
    by_arm: dict[str, list[tuple[Job, Outcome]]] = {}
    for job, outcome in zip(jobs, outcomes, strict=True):
        by_arm.setdefault(job.arm.name, []).append((job, outcome))
    finished = {
        name: {job.seed: outcome for job, outcome in pairs if outcome.status == "finished"}
        for name, pairs in by_arm.items()
    }
    pairs = [(a, b) for a, b in combinations(finished, 2) if finished[a].keys() & finished[b].keys()]
    differences = [
        *_adjusted([_loss_difference(a, b, finished[a], finished[b]) for a, b in pairs]),
        *_adjusted(
            [
                found
                for a, b in pairs
                if (found := _score_difference(a, b, finished[a], finished[b])) is not None
            ]
        ),
    ]
    seeds = tuple(dict.fromkeys(job.seed for job in jobs))
    arms = [_arm(found) for found in by_arm.values()]
    return Comparison(arms, differences, seeds, rows, _notes(jobs, arms, seeds))


def _arm(pairs: Sequence[tuple[Job, Outcome]]) -> ArmResult:
    first = pairs[0][0]
    done = {job.seed: outcome for job, outcome in pairs if outcome.status == "finished"}
    others = [outcome for _, outcome in pairs if outcome.status != "finished"]
    status = "finished" if not others else "partly" if done else others[0].status
    losses = {seed: _loss(item) for seed, item in done.items()}
    values = list(done.values())
    return ArmResult(
        name=first.arm.name,
        overrides=first.arm.overrides,
        learning_rate=first.config.train.learning_rate,
        status=status,
        reason=others[0].reason if others else "",
        losses=losses,
        loss=mean_interval(list(losses.values())) if losses else None,
        score=_score([item.right for item in values if item.right is not None]),
        peak_bytes=max((item.peak_bytes for item in values), default=None),
        seconds=fmean(item.seconds for item in values) if values else None,
        score_seconds=fmean(item.score_seconds for item in values) if values else None,
        tokens_per_second=fmean(item.tokens / item.seconds for item in values) if values else None,
        trainable_parameters=values[0].trainable_parameters if values else None,
        parameters=values[0].parameters if values else None,
    )


def _loss(outcome: Outcome) -> float:
    assert outcome.heldout_loss is not None, "an arm that finished has been evaluated"
    return outcome.heldout_loss


def _score(marks: Sequence[Sequence[bool]]) -> Score | None:
    if not marks:
        return None
    rows = len(marks[0])
    each = tuple(sum(right) / rows for right in marks)
    value = fmean(each)
    interval = Accuracy(round(value * rows), rows)
    return Score(value, interval.low, interval.high, rows, each)


def _loss_difference(
    first: str, second: str, of_first: dict[int, Outcome], of_second: dict[int, Outcome]
) -> Difference:
    seeds = sorted(of_first.keys() & of_second.keys())
    ours, theirs = ([_loss(side[seed]) for seed in seeds] for side in (of_first, of_second))
    mean, p = paired_t(ours, theirs)
    return Difference(
        figure="held-out loss",
        first=first,
        second=second,
        difference=mean.value,
        low=mean.low,
        high=mean.high,
        relative=mean.value / fmean(theirs),
        test=LOSS_TEST,
        p=p,
        adjusted=None,
        detail=f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed: no test",
    )


def _score_difference(
    first: str, second: str, of_first: dict[int, Outcome], of_second: dict[int, Outcome]
) -> Difference | None:
    """A row of several seeds counts once, for the arm that has it right in more of them."""
    seeds = sorted(of_first.keys() & of_second.keys())
    marks = [(of_first[seed].right, of_second[seed].right) for seed in seeds]
    known = [(ours, theirs) for ours, theirs in marks if ours is not None and theirs is not None]
    if not known:
        return None
    rows = len(known[0][0])
    leads = [sum(ours[row] - theirs[row] for ours, theirs in known) for row in range(rows)]
    only_first, only_second = sum(lead > 0 for lead in leads), sum(lead < 0 for lead in leads)
    return Difference(
        figure="score",
        first=first,
        second=second,
        difference=sum(leads) / (rows * len(known)),
        low=None,
        high=None,
        relative=None,
        test=SCORE_TEST,
        p=mcnemar(only_first, only_second),
        adjusted=None,
        detail=f"{only_first} rows against {only_second}, of {rows}",
    )


def _adjusted(differences: Sequence[Difference]) -> list[Difference]:
    tested = [(item, item.p) for item in differences if item.p is not None]
    found = dict(zip((id(item) for item, _ in tested), holm([p for _, p in tested]), strict=True))
    return [
        Difference(**{**asdict(item), "adjusted": found[id(item)]}) if id(item) in found else item
        for item in differences
    ]


def _notes(jobs: Sequence[Job], arms: Sequence[ArmResult], seeds: Sequence[int]) -> list[str]:
    notes = []
    configs = {job.arm.name: job.config for job in jobs}
    full = [name for name, config in configs.items() if config.lora is None]
    with_adapter = {config.train.learning_rate for config in configs.values() if config.lora is not None}
    for name in full:
        if configs[name].train.learning_rate in with_adapter:
            notes.append(
                f"{name} trains all weights with the adapters' learning rate. Full fine-tuning usually wants "
                f'a tenth of it or less: --set "{name}: train.learning_rate=..."'
            )
    if len({config.model.path for config in configs.values()}) > 1:
        notes.append(
            "The arms start from different models. Losses per token compare only where the tokenizers agree."
        )
    if len(seeds) == 1:
        notes.append("One seed: the differences in loss are not tested. Give several with --seeds.")
    return notes
