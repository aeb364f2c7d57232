"""Is what was merged or exported still the model that was trained?

An independent reader (`readers.py`) reads each artifact back, and the same held-out rows go through it
and through the reference: the adapter on its training base. Compared are the loss of the answers'
tokens, the likeliest token at each of them, and the token ids of the rows' texts. Every artifact gets
its figures as `verification.json`; one that lost more than the bounds allow is an error.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fourbit.config import RunConfig
from fourbit.data.examples import lengths_of
from fourbit.data.read import read_rows
from fourbit.data.render import Example, Renderer
from fourbit.errors import ConfigError
from fourbit.exporting import provenance
from fourbit.exporting.readers import (
    FourbitReader,
    Reader,
    format_of,
    open_reader,
    open_reference,
    release,
    require,
)
from fourbit.exporting.rows import heldout_examples
from fourbit.exporting.scoring import RowScore, answer_ids
from fourbit.exporting.verification import LOSS_FLOOR, Bounds, Checked, Measured, Verification, save_record

#: Held-out rows by default: some thousand answer tokens, in which a change of 1 % of the loss shows.
ROWS = 200

#: Called with what is being done, how much of it is done, and how much there is.
StageProgress = Callable[[str, int, int], None]


def verify(
    config: RunConfig,
    adapter: str | Path | None,
    artifacts: Sequence[str | Path],
    *,
    files: Sequence[str] = (),
    rows: int = ROWS,
    bounds: Bounds | None = None,
    gguf_base: str | Path | None = None,
    progress: StageProgress | None = None,
) -> Verification:
    """Compare artifacts with the adapter on its training base, and save each one's figures beside it.

    config     names base, data and seed, as the run was trained
    adapter    PEFT adapter folder, or None to compare with the base itself
    files      rows to compare on; default the held-out rows of the run
    rows       so many of them, drawn by seed
    gguf_base  the .gguf file that a LoRA .gguf is put on

    The models are in memory one after the other. Artifacts that are missing, or whose reader is, are
    errors before anything is measured. Nothing is raised for what an artifact lost: see `check`.
    """
    if rows < 1:
        raise ConfigError(f"rows = {rows}: give at least 1")
    places = [Path(artifact) for artifact in artifacts]
    if not places:
        raise ConfigError("give at least one artifact to verify")
    for place in places:
        require(format_of(place), place)
    original = _reference(config, adapter, files, rows, progress)
    release()
    result = Verification(
        rows=len(original.examples),
        tokens=sum(len(score.top1) for score in original.scores),
        base=original.base,
        adapter=original.adapter,
        reference=original.measured,
        bounds=bounds or Bounds(),
        checked=(),
    )
    for place in places:
        one = _check(place, config, original, result.bounds, gguf_base, progress)
        release()
        result = replace(result, checked=(*result.checked, one))
        save_record(place, one, result)
    return result


@dataclass(frozen=True, slots=True)
class _Reference:
    base: provenance.Source
    adapter: provenance.Source | None
    examples: Sequence[Example]
    texts: list[str]
    ids: list[list[int]]
    template: str | None
    scores: list[RowScore]
    measured: Measured


def _reference(
    config: RunConfig,
    adapter: str | Path | None,
    files: Sequence[str],
    rows: int,
    progress: StageProgress | None,
) -> _Reference:
    began = time.monotonic()
    adapter_source = _hashed("adapter", adapter, progress) if adapter is not None else None
    reader = open_reference(config.model, adapter)
    examples = heldout_examples(config, reader.tokenizer, files, rows)
    texts = _texts(config, reader, examples, files)
    scores = reader.score(examples, _stage(progress, "adapter" if adapter is not None else "base"))
    place = reader.model.name_or_path if adapter is None else reader.model.get_base_model().name_or_path
    return _Reference(
        base=_hashed("base", place, progress),
        adapter=adapter_source,
        examples=examples,
        texts=texts,
        ids=reader.tokenize(texts),
        template=reader.chat_template,
        scores=scores,
        measured=_measured(reader, examples, scores, began),
    )


def _check(
    place: Path,
    config: RunConfig,
    original: _Reference,
    bounds: Bounds,
    gguf_base: str | Path | None,
    progress: StageProgress | None,
) -> Checked:
    began = time.monotonic()
    source = _hashed("artifact", place, progress)
    base = Path(gguf_base) if gguf_base is not None else None
    # One more than the longest row: llama.cpp keeps a place for the token that it predicts.
    context = 1 + max(lengths_of(original.examples))
    reader = open_reader(place, config.model, base, context)
    try:
        scores = reader.score(original.examples, _stage(progress, place.name))
        ids = reader.tokenize(original.texts)
    finally:
        reader.close()
    measured = _measured(reader, original.examples, scores, began)
    same_tokens = sum(map(list.__eq__, ids, original.ids)) if ids is not None else None
    same_template = reader.chat_template == original.template if ids is not None else None
    agreement = _agreement(scores, original.scores)
    return Checked(
        artifact=str(place),
        format=format_of(place),
        sha256=source.sha256,
        bytes=sum(
            file.stat().st_size for file in ([place] if place.is_file() else place.glob("*.safetensors"))
        ),
        measured=measured,
        loss_change=_relative(measured.loss - original.measured.loss, original.measured.loss),
        loss_error=_loss_error(scores, original),
        agreement=agreement,
        same_tokens=same_tokens,
        same_template=same_template,
        losses=tuple(_losses(measured, agreement, original, bounds)),
        defects=tuple(_defects(measured, same_tokens, same_template, original)),
    )


def _losses(measured: Measured, agreement: float, original: _Reference, bounds: Bounds) -> list[str]:
    found = []
    before = original.measured.loss
    if measured.loss - before > bounds.loss_increase * max(before, LOSS_FLOOR):
        change = _relative(measured.loss - before, before)
        found.append(
            f"its held-out loss is {measured.loss:.4f} and the adapter's {before:.4f} "
            f"({change:+.1%}, at most {bounds.loss_increase:+.1%} allowed)"
        )
    if agreement < bounds.agreement:
        found.append(
            f"its likeliest token is the adapter's at {agreement:.1%} of the answers' tokens "
            f"(at least {bounds.agreement:.0%} required)"
        )
    return found


def _defects(
    measured: Measured, same_tokens: int | None, same_template: bool | None, original: _Reference
) -> list[str]:
    found = []
    if not math.isfinite(measured.loss):
        found.append("its held-out loss is not a number")
    if same_tokens is not None and same_tokens < len(original.texts):
        different = len(original.texts) - same_tokens
        found.append(
            f"its tokenizer splits {different:,} of {len(original.texts):,} rows otherwise than in training"
        )
    if same_template is False:
        found.append("its chat template is not the one of training")
    return found


def _measured(
    reader: Reader, examples: Sequence[Example], scores: Sequence[RowScore], began: float
) -> Measured:
    tokens = sum(len(score.top1) for score in scores)
    pairs = zip(scores, examples, strict=True)
    return Measured(
        reader=reader.name,
        loss=math.fsum(score.loss for score in scores) / tokens,
        answers=sum(list(score.top1) == answer_ids(example) for score, example in pairs) / len(scores),
        seconds=time.monotonic() - began,
    )


def _agreement(scores: Sequence[RowScore], reference: Sequence[RowScore]) -> float:
    same = count = 0
    for ours, theirs in zip(scores, reference, strict=True):
        same += sum(map(int.__eq__, ours.top1, theirs.top1))
        count += len(theirs.top1)
    return same / count


def _loss_error(scores: Sequence[RowScore], original: _Reference) -> float:
    """Of the relative change, from the spread of the rows' differences; 0 where there is one row."""
    differences = [ours.loss - theirs.loss for ours, theirs in zip(scores, original.scores, strict=True)]
    count, tokens = len(differences), sum(len(score.top1) for score in scores)
    mean = math.fsum(differences) / count
    squares = math.fsum((difference - mean) ** 2 for difference in differences)
    # The sum of n rows has the variance n s², s² = squares / (n - 1).
    return _relative(math.sqrt(count * squares / max(1, count - 1)) / tokens, original.measured.loss)


def _relative(change: float, before: float) -> float:
    return change / before if before else math.copysign(math.inf, change) if change else 0.0


def _texts(
    config: RunConfig, reader: FourbitReader, examples: Sequence[Example], files: Sequence[str]
) -> list[str]:
    """The rendered text of each row that an example comes from, once."""
    renderer = Renderer(reader.tokenizer, config.data)
    wanted = {example.source for example in examples}
    rows = read_rows(files or config.data.heldout or config.data.train, config.data)
    return [renderer.text(row).text for row in rows if row.source in wanted]


def _stage(progress: StageProgress | None, name: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(name, done, total)


def _hashed(role: str, place: str | Path, progress: StageProgress | None) -> provenance.Source:
    megabytes = _stage(progress, "hashes (MB)")
    report = (lambda done, total: megabytes(done >> 20, total >> 20)) if megabytes is not None else None
    return provenance.describe(role, place, report)
