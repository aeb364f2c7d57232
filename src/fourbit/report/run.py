"""The page of a run folder: curves and what they say, evaluation, provenance, settings.

Row text is private, so samples and masked rows are shown only when asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup

from fourbit.config import RunConfig
from fourbit.config_file import dump_config, load_config
from fourbit.errors import ConfigError, DataError
from fourbit.evaluate import kept
from fourbit.exporting import provenance
from fourbit.limits import parse_json
from fourbit.report import page
from fourbit.report.chart import Line, line_chart
from fourbit.report.curves import Curves, Series, read_curves, smooth, thin
from fourbit.report.evaluation import evaluation_table
from fourbit.report.findings import Finding, findings

FILE = "report.html"
_MASKED_ROWS = 4
_POINTS = 600  # of one line: more than a screen has columns for


@dataclass(frozen=True, slots=True)
class Report:
    """path: of the page; findings: what the curves say."""

    path: Path
    findings: list[Finding]


def write_report(folder: Path, with_text: bool = False) -> Report:
    """Write `report.html` into a run folder; `with_text` adds sample answers and masked rows.

    Raises ConfigError when it is not a run folder, TrainingError when it holds no metrics, ModelError or
    DataError when text is asked for and the run's data or tokenizer are gone.
    """
    if not (folder / "config.yaml").exists():
        raise ConfigError(f"{folder}: not a run folder (it has no config.yaml)")
    config = load_config(folder / "config.yaml")
    curves = read_curves(folder)
    found = findings(curves, full=config.lora is None)
    evaluation = _read_json(folder / kept.FILE)
    html = page.render(
        "run.html",
        title=f"Run {folder.resolve().name}",
        folder=str(folder),
        state=_state(folder, curves),
        subtitle=_subtitle(config),
        tiles=_tiles(folder, curves),
        findings=found,
        charts=_charts(curves, config),
        evaluation=evaluation_table(evaluation),
        with_text=with_text,
        samples=_samples(evaluation) if with_text else [],
        masks=_masks(config) if with_text else [],
        steps=provenance.read(folder),
        settings=dump_config(config),
    )
    return Report(page.write(folder / FILE, html), found)


def _state(folder: Path, curves: Curves) -> str:
    stopped = _read_json(folder / "summary.json").get("stopped")
    after = f"after {curves.steps:,} steps"
    return {
        "done": f"finished {after}",
        "early": f"stopped early {after}, as the held-out loss no longer fell",
        "interrupted": f"was interrupted {after}",
    }.get(str(stopped), f"has not finished; it is at step {curves.steps:,}")


def _subtitle(config: RunConfig) -> str:
    base = Path(config.model.path).name
    if config.lora is None:
        return f"{base}, full fine-tuning"
    held = "16-bit base" if config.model.quant_type == "none" else f"base in {config.model.quant_type}"
    targets = config.lora.target_modules
    named = targets if isinstance(targets, str) else ", ".join(targets)
    return f"{base}, {held}, LoRA r = {config.lora.r}, alpha = {config.lora.alpha:g}, on {named}"


def _tiles(folder: Path, curves: Curves) -> list[tuple[str, str]]:
    summary = _read_json(folder / "summary.json")
    tiles = []
    if curves.heldout:
        step, best = min(curves.heldout, key=lambda point: point[1])
        tiles.append((f"{best:.4f}", f"best held-out loss, step {step:,}"))
    if curves.train:
        late = fmean(value for _, value in curves.train[-max(1, len(curves.train) // 10) :])
        tiles.append((f"{late:.4f}", "training loss, last tenth"))
    tiles.append((page.duration(curves.seconds), f"for {curves.steps:,} steps"))
    if curves.tokens_per_second:
        rate = len(curves.tokens_per_second) / sum(
            1 / value for _, value in curves.tokens_per_second if value
        )
        tiles.append((f"{rate:,.0f}", "tokens per second"))
    if curves.peak_bytes:
        tiles.append((page.gigabytes(max(value for _, value in curves.peak_bytes)), "peak memory"))
    if "trainable_parameters" in summary:
        trainable, total = summary["trainable_parameters"], summary["parameters"]
        tiles.append((f"{trainable:,}", f"trainable parameters, {trainable / total:.2%}"))
    return tiles


def _charts(curves: Curves, config: RunConfig) -> list[tuple[Markup, bool]]:
    """(chart, whether it takes the whole width)."""
    clip = config.train.max_grad_norm
    clipped = sum(value > clip for _, value in curves.grad_norm)
    share = f"{clipped / len(curves.grad_norm):.0%} of steps" if curves.grad_norm else "no step"
    loss = line_chart(
        [
            *_noisy("training", curves.train),
            Line("held-out", curves.heldout, 2, dots=True),
        ],
        "Loss, nats per token",
        log_beyond=8,
    )
    rate = line_chart(
        [Line("learning rate", thin(curves.learning_rate, _POINTS))], "Learning rate", from_zero=True
    )
    norm = line_chart(
        _noisy("gradient norm", curves.grad_norm),
        f"Gradient norm before clipping ({share} were clipped)",
        from_zero=True,
        mark=(clip, f"clipped at {clip:g}"),
    )
    speed = line_chart(
        _noisy("tokens per second", curves.tokens_per_second),
        "Throughput, tokens per second",
        from_zero=True,
    )
    memory = line_chart(
        [Line("peak so far", [(step, value / 1e9) for step, value in thin(curves.peak_bytes, _POINTS)])],
        "Peak memory so far, GB",
        from_zero=True,
    )
    return [(chart, chart is loss) for chart in (loss, rate, norm, speed, memory) if chart]


def _noisy(name: str, series: Series) -> list[Line]:
    """The values of single steps, and over them their running mean."""
    width = max(5, len(series) // 20)
    return [
        Line(f"{name}, each step", thin(series, _POINTS), 1, faint=True),
        Line(f"{name}, mean over {width} steps", thin(smooth(series, width), _POINTS), 1),
    ]


def _samples(found: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    return [
        (model, result["samples"])
        for model, result in found.items()
        if isinstance(result, dict) and result.get("samples")
    ]


def _masks(config: RunConfig) -> list[Any]:
    from fourbit.report.masks import masked_rows  # needs torch and transformers

    return masked_rows(config, _MASKED_ROWS)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); remove it or write it again") from None
    return found if isinstance(found, dict) else {}
