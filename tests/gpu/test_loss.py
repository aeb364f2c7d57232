"""Triton's cross-entropy of a chunk of logits."""

from __future__ import annotations

import pytest
import torch

from fourbit.kernels.gpu import loss
from tests.losses import CASES, Case, check_against_fp64


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_fp64(case: Case, device: torch.device) -> None:
    check_against_fp64(loss.cross_entropy, case, device)
