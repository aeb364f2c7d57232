"""Defaults that code below the settings has too; `config` takes them from here."""

from __future__ import annotations

#: MiB of fp32 logits that are formed at once in the loss.
LOSS_CHUNK = 24
