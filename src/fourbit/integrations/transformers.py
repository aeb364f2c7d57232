"""What `fourbit.FourBitConfig` brings along when it is first asked for.

transformers then knows quant_method "fourbit", and stock PEFT (`get_peft_model`, `PeftModel.from_pretrained`)
builds fourbit's layers on packed weights, whose merges go to 16 bits and never into packed bytes.
"""

from __future__ import annotations

from fourbit.model.adapters import register_layers
from fourbit.model.quantizer import FourBitConfig

__all__ = ["FourBitConfig"]

register_layers()
