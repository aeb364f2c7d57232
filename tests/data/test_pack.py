"""Rows end to end: how full, and that they neither see each other nor change loss, gradients or dropout."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fourbit.config import TrainSettings
from fourbit.data.batch import NO_LOSS, collate, effective_batches
from fourbit.data.encode import encode
from fourbit.data.pack import best_fit, collate_packed
from fourbit.data.read import read_rows
from fourbit.data.render import Example
from fourbit.data.steps import batch_of, epoch_fill, groups
from fourbit.model.adapters import add_lora, key_source
from fourbit.nn.attention import use_tiled_attention
from fourbit.nn.loss import causal_lm_loss
from fourbit.nn.packing import keeps_rows_apart
from tests.tiny import byte_tokenizer, llama


@given(st.lists(st.integers(1, 60), max_size=80), st.integers(8, 64))
def test_every_row_once_and_no_pack_too_full(lengths, capacity):
    packs = best_fit(lengths, capacity)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in pack) for pack in packs]
    assert all(total <= capacity or len(pack) == 1 for total, pack in zip(sums, packs, strict=True))
    # Two packs that would fit in one were not both opened.
    small = sorted(total for total in sums if total <= capacity)
    assert len(small) < 2 or small[0] + small[1] > capacity


def test_the_fullest_pack_that_has_room_is_taken():
    assert best_fit([6, 5, 3, 4, 2], 10) == [[0, 3], [1, 2, 4]]
    assert best_fit([30, 4, 4], 10) == [[0], [1, 2]]
    assert best_fit([], 10) == []


@pytest.mark.parametrize(("part", "every"), [("train", 3), ("test", 1)])
def test_the_shipped_data_is_packed_to_97_percent(smollm2, settings, part, every):
    """Of what an epoch computes, whatever shares a step; and, rows enough, of packs of one fixed size."""
    folder = Path(__file__).parents[2] / "demo" / "banking77"
    wanted = settings(prompt="{text}", completion="{category}")
    rows = read_rows([folder / f"{part}.csv"], wanted)
    examples = encode(rows[::every], smollm2, wanted).examples
    for capacity in (256, 512, 1024, 2048):
        for batch, grouped in product((8, 16, 64), (True, False)):
            train = TrainSettings(packing=capacity, effective_batch=batch, group_by_length=grouped)
            assert epoch_fill(examples, train).share >= 0.98
    assert epoch_fill(examples, TrainSettings()).share < 0.95  # padded
    lengths = [len(example.input_ids) for example in examples]
    for capacity in (512, 1024, 2048):
        assert sum(lengths) / (capacity * len(best_fit(lengths, capacity))) >= 0.97


@pytest.mark.parametrize("layout", [{}, {"padding_free": True}, {"packing": 48}], ids=str)
def test_the_fill_is_that_of_the_batches(layout):
    rows = examples() * 3
    train = TrainSettings(effective_batch=4, micro_batch=3, **layout)
    batches = [
        batch_of([rows[i] for i in group], 0, train)
        for step in effective_batches(rows, 4, train.seed, 0, train.group_by_length)
        for group in groups(step, rows, train)
    ]
    found = epoch_fill(rows, train)
    assert found.batches == len(batches)
    assert found.computed == sum(batch.input_ids.numel() for batch in batches)
    assert found.tokens == sum(len(row.input_ids) for row in rows)


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for row, length in enumerate([5, 23, 9, 16, 40, 2]):
        ids = torch.randint(0, 259, (length,), generator=generator).tolist()
        made.append(Example(ids, [False] * (length // 2) + [True] * (length - length // 2), row, "f:1", 0))
    return made


def test_the_batch():
    batch = collate_packed([Example([7, 8, 9], [True, True, False], 4, "f:1", 0),
                            Example([5, 6], [False, True], 2, "f:2", 0)], pad_id=1)  # fmt: skip
    assert batch.input_ids.tolist() == [[7, 8, 9, 5, 6, 1, 1, 1]]
    assert batch.labels.tolist() == [[NO_LOSS, 8, NO_LOSS, NO_LOSS, 6, NO_LOSS, NO_LOSS, NO_LOSS]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 0, 0]]
    assert batch.rows.tolist() == [[4, 4, 4, 2, 2, 2, 2, 2]]
    assert batch.attention_mask is None


@pytest.mark.parametrize("short", [False, True], ids=["sdpa", "short attention"])
def test_packed_rows_have_the_loss_and_gradients_of_single_ones(short):
    """Adapter with dropout on: the masks are those of each row by itself."""
    model = add_lora(llama(), r=4, dropout=0.3, seed=0)
    if short:
        assert use_tiled_attention(model.get_base_model())
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
    model.train()
    keys = key_source(model)
    weights = [p for p in model.parameters() if p.requires_grad]
    rows = examples()

    def run(batches):
        total, count = 0.0, 0
        model.zero_grad()
        for batch in batches:
            keys.set(0, 3, batch.rows, batch.position_ids)
            loss, tokens = causal_lm_loss(model, batch)
            loss.backward()
            total, count = total + loss.item(), count + tokens
        return total, count, torch.cat([w.grad.flatten() for w in weights])

    alone = run(collate([row], 0) for row in rows)
    padded = run([collate(rows, 0)])
    packed = run([collate_packed(rows, 0)])
    two = run(
        collate_packed([rows[i] for i in pack], 0) for pack in best_fit([len(r.input_ids) for r in rows], 48)
    )
    for other in (padded, packed, two):
        assert other[1] == alone[1]
        assert other[0] == pytest.approx(alone[0], rel=1e-6)
        torch.testing.assert_close(other[2], alone[2], rtol=1e-3, atol=1e-4 * float(alone[2].abs().max()))


def test_order_inside_a_pack_does_not_matter():
    model = llama().eval()
    rows = examples()
    with torch.no_grad():
        one, _ = causal_lm_loss(model, collate_packed(rows, 0))
        other, _ = causal_lm_loss(model, collate_packed(rows[::-1], 0))
    assert one.item() == pytest.approx(other.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_mixes_rows_is_found(dtype):
    model = llama().to(dtype)
    assert keeps_rows_apart(model, 0, torch.device("cpu"))
    assert keeps_rows_apart(model, 258, torch.device("cpu"))  # the last word
    layer = model.model.layers[0].mlp

    def leak(module, inputs, output):
        return output + 1e-3 * output.cumsum(dim=1)

    layer.register_forward_hook(leak)
    assert not keeps_rows_apart(model, 0, torch.device("cpu"))


def test_a_model_that_counts_places_is_found():
    """Rows are apart, but the second one's positions go on from the first's."""
    model = llama()
    model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: output + torch.linspace(0, 1, output.shape[1])[:, None]
    )
    assert not keeps_rows_apart(model, 0, torch.device("cpu"))


def test_a_real_tokenizers_rows(settings, row):
    rows = [row(line, prompt="a" * line, completion="b" * (12 - line)) for line in range(1, 12)]
    encoded = encode(rows, byte_tokenizer(), settings())
    model = llama().eval()
    with torch.no_grad():
        alone = sum(causal_lm_loss(model, collate([e], 0))[0].item() for e in encoded.examples)
        packed, tokens = causal_lm_loss(model, collate_packed(encoded.examples, 0))
    assert tokens == encoded.trained_tokens
    assert packed.item() == pytest.approx(alone, rel=1e-6)
