"""Optimizers whose states may live elsewhere than the weights.

pages.py  equal pieces of states, in memory or beyond it
adamw.py  AdamW on them, with 32-bit or 8-bit states
"""

from fourbit.optim.adamw import PagedAdamW

__all__ = ["PagedAdamW"]
