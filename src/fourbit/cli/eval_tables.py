"""What `fourbit eval` prints for people: tables of figures, confusions and samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fourbit.evaluate.choice import ChoiceResult
    from fourbit.evaluate.confusion import ConfusionTable
    from fourbit.evaluate.intervals import Difference, Estimate
    from fourbit.evaluate.lm_eval import TaskScore
    from fourbit.evaluate.result import EvalResult
    from fourbit.evaluate.scores import Accuracy, Confusion

#: Characters of a text that a sample shows; the middle of a longer one is left out.
_SHOWN = 400
_MOST_CONFUSIONS = 10
_METHODS = {
    "wilson": "Wilson",
    "bootstrap": "bootstrap over rows",
    "normal": "normal, by subject",
    "newcombe": "Newcombe, p by McNemar's exact test",
}


def print_results(
    results: Mapping[str, EvalResult], differences: Mapping[str, Difference], out: Console
) -> None:
    """Figures side by side, what was cut or left out, confusions, samples."""
    first = next(iter(results.values()))
    found = list(results.values())
    lines = [
        (name.replace("_", " "), name, [estimate(result.metrics[name]) for result in found])
        for name in first.metrics
    ]
    if first.choice_accuracy is not None:
        lines.append(
            ("likeliest label", "likeliest_label", [proportion(result.choice_accuracy) for result in found])
        )
    if first.loss is not None:
        lines.append(
            ("loss per token", "loss", [f"{result.loss.loss:.4f}" if result.loss else "" for result in found])
        )
        lines.append(
            ("perplexity", "", [f"{result.loss.perplexity:.2f}" if result.loss else "" for result in found])
        )
    lines.append(("seconds", "", [f"{result.seconds:.0f}" for result in found]))
    _print_figures(f"{first.rows:,} rows", list(results), lines, differences, out)
    methods = [value.method for value in first.metrics.values()]
    _print_methods([*methods, *(["wilson"] if first.choice_accuracy else [])], differences, out)
    for name, result in results.items():
        for warning in _warnings(result):
            out.print(f"{name}: {warning}", style="yellow", highlight=False)
    for name, result in results.items():
        _print_confusions(name, result, out)
    _print_samples(results, out)


def print_choice(
    results: Mapping[str, ChoiceResult], differences: Mapping[str, Difference], out: Console
) -> None:
    """Accuracies of multiple choice, and how often each letter was chosen."""
    found = list(results.values())
    lines = [("all questions", "accuracy", [proportion(result.accuracy) for result in found])]
    if found[0].subject_mean is not None:
        lines.append(
            (
                f"mean of {len(found[0].subjects)} subjects",
                "subject_mean",
                [estimate(r.subject_mean) for r in found],
            )
        )
    for letter in sorted({letter for result in found for letter in result.answers}):
        lines.append((f"answered {letter}", "", [f"{result.answers.count(letter):,}" for result in found]))
    lines.append(("seconds", "", [f"{result.seconds:.0f}" for result in found]))
    _print_figures(f"{found[0].rows:,} questions", list(results), lines, differences, out)
    _print_methods(["wilson", *(["normal"] if found[0].subject_mean else [])], differences, out)


def print_tasks(results: Mapping[str, Sequence[TaskScore]], out: Console) -> None:
    """What lm-eval-harness reports, each figure with 1.96 of its standard errors."""
    table = _table("lm-eval-harness, value +- 1.96 standard errors", out)
    for column in ("task", "metric"):
        table.add_column(column, overflow="fold")
    for column in ("rows", *results):
        table.add_column(column, justify="right", no_wrap=True)
    for scores in zip(*results.values(), strict=True):
        one = scores[0]
        table.add_row(one.task, one.metric, f"{one.rows:,}", *map(_task_figure, scores))
    out.print(table)


def proportion(accuracy: Accuracy | None) -> str:
    """value [low, high] in percent."""
    return _percent(accuracy.value, accuracy.low, accuracy.high) if accuracy else ""


def estimate(value: Estimate | None) -> str:
    """value [low, high] in percent."""
    return _percent(value.value, value.low, value.high) if value else ""


def _percent(value: float, low: float, high: float) -> str:
    return f"{value:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def _task_figure(score: TaskScore) -> str:
    return f"{score.value:.4f}" + (f" +- {1.96 * score.stderr:.4f}" if score.stderr is not None else "")


def _table(title: str, out: Console) -> Table:
    """A table under its title, which rich would break at the width of a narrow table."""
    out.print(f"\n[bold]{title}[/bold]", highlight=False)
    return Table(box=box.SIMPLE_HEAD, pad_edge=False)


def _print_figures(
    title: str,
    names: Sequence[str],
    lines: Sequence[tuple[str, str, list[str]]],
    differences: Mapping[str, Difference],
    out: Console,
) -> None:
    """lines: label, name among the differences, and one figure for each model."""
    table = _table(f"{title}, with 95 % intervals", out)
    table.add_column("", no_wrap=True)
    # Where the terminal is narrow, a figure goes before its interval on two lines, and nothing is cut.
    for name in names:
        table.add_column(name, justify="right")
    if differences:
        table.add_column("difference", justify="right")
        table.add_column("p", justify="right", no_wrap=True)
    for label, key, values in lines:
        extra = _difference(differences.get(key), key) if differences else ()
        table.add_row(label, *values, *extra)
    out.print(table)


def _difference(found: Difference | None, name: str) -> tuple[Text, Text]:
    if found is None:
        return Text(""), Text("")
    figures = (found.value, found.low, found.high)
    # Proportions and scores in points of a hundred, losses as they are.
    value, low, high = (f"{x:+.4f}" if name == "loss" else f"{100 * x:+.1f}" for x in figures)
    p = "" if found.p is None else "<0.001" if found.p < 0.001 else f"{found.p:.3f}"
    better = (found.value < 0) == (name == "loss")
    style = "dim" if not found.clear else "green" if better else "red"
    return Text(f"{value} [{low}, {high}]", style), Text(p, style)


def _print_methods(methods: Sequence[str], differences: Mapping[str, Difference], out: Console) -> None:
    used = list(dict.fromkeys([*methods, *(found.method for found in differences.values())]))
    if used:
        out.print(f"intervals: {'; '.join(_METHODS[name] for name in used)}", style="dim", highlight=False)


def _warnings(result: EvalResult) -> Iterator[str]:
    if result.cut:
        yield (
            f"{result.cut:,} answers reached eval.max_new_tokens; an unfinished answer is wrong except for "
            "contains, regex, rouge_l and token_f1"
        )
    if result.dropped:
        yield f"{result.dropped:,} rows are longer than data.max_length and not part of the loss"


def _print_confusions(name: str, result: EvalResult, out: Console) -> None:
    from fourbit.evaluate.confusion import is_classification

    chosen = result.choices is not None
    what = "likeliest label" if chosen else "answer"
    if result.table is not None:
        _print_table(f"{name}: {what} (columns) for each reference (rows)", result.table, out)
        return
    references = [row.reference for row in result.row_scores if row.reference is not None]
    if result.confusions and (chosen or is_classification(references)):
        _print_frequent(f"{name}: most frequent confusions, by {what}", result.confusions, out)


def _print_table(title: str, found: ConfusionTable, out: Console) -> None:
    """Columns are numbered, so that twelve labels of any length fit."""
    table = _table(title, out)
    table.add_column("", overflow="fold")
    for number in range(1, len(found.labels) + 1):
        table.add_column(str(number), justify="right")
    table.add_column("other", justify="right")
    for number, (label, counts) in enumerate(zip(found.labels, found.counts, strict=True)):
        cells = [
            Text(f"{count:,}" if count else "\u00b7", "bold" if place == number else "" if count else "dim")
            for place, count in enumerate(counts)
        ]
        table.add_row(Text(f"{number + 1} {label}"), *cells)
    out.print(table)


def _print_frequent(title: str, found: Sequence[Confusion], out: Console) -> None:
    table = _table(title, out)
    table.add_column("reference", overflow="fold")
    table.add_column("answered", overflow="fold")
    table.add_column("rows", justify="right")
    for confusion in found[:_MOST_CONFUSIONS]:
        table.add_row(
            Text(_shortened(confusion.reference, 60)),
            Text(_shortened(confusion.answer, 60)),
            f"{confusion.count:,}",
        )
    out.print(table)


def _print_samples(results: Mapping[str, EvalResult], out: Console) -> None:
    first = next(iter(results.values()))
    if not first.samples:
        return
    table = _table("samples", out)
    table.show_lines = True
    for column in ("prompt", "reference", *results):
        table.add_column(column, overflow="fold")
    for number, sample in enumerate(first.samples):
        answers = [result.samples[number] for result in results.values()]
        # Text, not str: an answer may hold what rich would read as markup.
        table.add_row(
            Text(_shortened(sample.prompt)),
            Text(_shortened(sample.reference)),
            *(Text(_shortened(answer.answer), _colour(answer.right)) for answer in answers),
        )
    out.print(table)


def _colour(right: bool | None) -> str:
    return "" if right is None else "green" if right else "red"


def _shortened(text: str, most: int = _SHOWN) -> str:
    text = text.strip()
    return text if len(text) <= most else f"{text[: most // 2].rstrip()} ... {text[-most // 2 :].lstrip()}"
