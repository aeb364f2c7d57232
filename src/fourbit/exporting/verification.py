"""What a verification found: figures, the bounds they are held against, the record beside the artifact."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fourbit.errors import ConfigError, VerificationError
from fourbit.exporting import provenance

FILE = "verification.json"
#: Nats per token. Below, rounding alone can be one percent of the loss, so the bound stops shrinking with it.
LOSS_FLOOR = 0.1


@dataclass(frozen=True, slots=True)
class Bounds:
    """What an artifact may lose.

    loss_increase  of the reference's loss per token (of LOSS_FLOOR where that is larger)
    agreement      least share of answer tokens with the same likeliest token as the reference's
    """

    loss_increase: float = 0.01
    agreement: float = 0.97

    def __post_init__(self) -> None:
        if not self.loss_increase >= 0:
            raise ConfigError(f"threshold {self.loss_increase}: give a share of the loss, such as 0.01")
        if not 0 <= self.agreement <= 1:
            raise ConfigError(f"agreement {self.agreement}: give a share from 0 to 1, such as 0.97")


@dataclass(frozen=True, slots=True)
class Measured:
    """One model on the held-out rows.

    loss     nats per answer token, every token counted once
    answers  share of rows whose whole answer greedy decoding would write
    """

    reader: str
    loss: float
    answers: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Checked:
    """An artifact beside the reference.

    format         of the artifact, a key of `readers.PACKAGES`
    loss_change    relative to the reference; positive is worse
    loss_error     standard error of loss_change over the rows: more rows make it smaller
    agreement      share of answer tokens with the reference's likeliest token
    same_tokens    rows whose text has the reference's token ids, or None without a tokenizer
    same_template  whether the chat template is the reference's, or None without a tokenizer
    losses         one sentence for each loss beyond the bounds, which a user may accept
    defects        one sentence for each thing that no user should accept
    """

    artifact: str
    format: str
    sha256: str
    bytes: int
    measured: Measured
    loss_change: float
    loss_error: float
    agreement: float
    same_tokens: int | None
    same_template: bool | None
    losses: tuple[str, ...]
    defects: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found. base and adapter name the reference with its hashes; tokens: of the answers."""

    rows: int
    tokens: int
    base: provenance.Source
    adapter: provenance.Source | None
    reference: Measured
    bounds: Bounds
    checked: tuple[Checked, ...]

    @property
    def best(self) -> Checked:
        """The artifact with the lowest loss, such as the better of two merge targets."""
        return min(self.checked, key=lambda one: one.measured.loss)

    def check(self, accept_loss: bool = False) -> None:
        """Raise VerificationError for the first artifact beyond the bounds, unless its loss is accepted.

        Wrong token ids, another chat template and a loss that is no number are never accepted.
        """
        for one in self.checked:
            problems = [*one.defects, *(() if accept_loss else one.losses)]
            if not problems:
                continue
            way = "" if one.defects else "; try another merge target or a larger format, or --accept-loss"
            raise VerificationError(f"{one.artifact}: {' and '.join(problems)}{way}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; None for a number that is none."""
        return dict(_plain(asdict(self)))


def record_path(artifact: Path) -> Path:
    """Where an artifact's figures lie: in its folder, or beside a file under the file's name."""
    return artifact.with_name(f"{artifact.name}.{FILE}") if artifact.is_file() else artifact / FILE


def save_record(place: Path, one: Checked, whole: Verification) -> None:
    """Write an artifact's figures where `record_path` says. Raises VerificationError if the disk refuses."""
    record = {
        **{key: value for key, value in whole.to_dict().items() if key != "checked"},
        **_plain(asdict(one)),
        "versions": provenance.versions(),
        "command": provenance.this_command(),
    }
    path = record_path(place)
    try:
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise VerificationError(f"{path}: cannot be written ({error.strerror or error})") from error


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
