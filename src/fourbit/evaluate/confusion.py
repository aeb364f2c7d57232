"""What is taken for what, as a table of labels against labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: With more labels than this a table is no longer read; the most frequent confusions say more.
MOST_LABELS = 12


@dataclass(frozen=True, slots=True)
class ConfusionTable:
    """counts[i][j]: rows whose reference is labels[i] and whose answer labels[j]; the last column: none."""

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


def is_classification(references: Sequence[str], labels: Sequence[str] | None = None) -> bool:
    """Whether the answers are labels: a closed set was given, or each reference occurs twice on average."""
    return labels is not None or 2 * len({text.strip() for text in references}) <= len(references)


def confusion_table(
    answers: Sequence[str | None],
    references: Sequence[str],
    labels: Sequence[str] | None = None,
    casefold: bool = False,
) -> ConfusionTable | None:
    """The table of a classification with few labels, else None.

    answers  None where there is no whole answer
    labels   their order in the table; references that are not among them follow
    """
    if not is_classification(references, labels):
        return None
    names = {_key(label, casefold): label.strip() for label in labels or ()}
    for reference in sorted(references):
        names.setdefault(_key(reference, casefold), reference.strip())
    if len(names) > MOST_LABELS:
        return None
    places = {key: place for place, key in enumerate(names)}
    counts = [[0] * (len(names) + 1) for _ in names]
    for answer, reference in zip(answers, references, strict=True):
        column = places.get(_key(answer, casefold), len(names)) if answer is not None else len(names)
        counts[places[_key(reference, casefold)]][column] += 1
    return ConfusionTable(tuple(names.values()), tuple(tuple(row) for row in counts))


def _key(text: str, casefold: bool) -> str:
    return text.strip().casefold() if casefold else text.strip()
