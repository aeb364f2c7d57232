"""What code at several levels agrees on: values that `config` takes from here, and names of PEFT's."""

from __future__ import annotations

#: Values per scale that the codec accepts: bitsandbytes' set.
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
#: Of an adapter: its rank, the factor alpha / r of its output, dropout on its input.
LORA_R, LORA_ALPHA, LORA_DROPOUT = 16, 32, 0.05
#: MiB of fp32 logits that are formed at once in the loss.
LOSS_CHUNK = 48
#: How PEFT's `init_lora_weights` begin that take from the base what they put into the adapter, which then
#: fits the changed base only.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
