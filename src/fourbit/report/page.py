"""HTML pages that stand alone: one file, no script, nothing fetched, light and dark.

Templates lie in `templates/`; the engine escapes every value that is not itself made of escaped parts.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourbit.errors import ConfigError
from fourbit.private import replace_private

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **values: Any) -> str:
    """The page that a template of `templates/` makes of the values."""
    return _environment().get_template(template).render(**values)


def write(path: Path, html: str) -> Path:
    """Write a page, whole or not at all. Raises ConfigError where that cannot be."""
    try:
        replace_private(path, html)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
    return path


def gigabytes(value: float) -> str:
    """Bytes in 10^9, as memory is given everywhere here."""
    return f"{value / 1e9:.2f} GB"


def duration(seconds: float) -> str:
    """45 s, 12:05 min, 2:03 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"gigabytes": gigabytes, "duration": duration}
    return environment
