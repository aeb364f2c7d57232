"""The reader: what llama.cpp says about a file, row by row and in batches."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fourbit.errors import ModelError
from fourbit.exporting.gguf import kquants, llama_cpp
from fourbit.exporting.gguf.llama_cpp import LlamaCppReader
from fourbit.exporting.gguf.write import write_gguf
from tests.exporting.gguf import models

TOKENIZER = models.byte_level()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Its answers are of printable tokens: no others are text that two programs spell the same."""
    built = models.model("llama-untied", len(TOKENIZER))
    printable = [TOKENIZER.decode([index]).isprintable() for index in range(len(TOKENIZER))]
    ascii_only = [TOKENIZER.decode([index]).isascii() for index in range(len(TOKENIZER))]
    kept = torch.tensor([p and a for p, a in zip(printable, ascii_only, strict=True)])
    with torch.no_grad():
        built.get_parameter("lm_head.weight")[~kept] = 0
    return built


@pytest.fixture(scope="module")
def file(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    return write_gguf(models.lazy(model), model.config, TOKENIZER, folder / "tiny.gguf", "F32")


@pytest.fixture(scope="module")
def reader(file: Path) -> Iterator[LlamaCppReader]:
    with LlamaCppReader(file, context=128, threads=1, slots=3) as opened:
        yield opened


def greedy(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    found = list(ids)
    for _ in range(count):
        with torch.no_grad():
            found.append(int(model(torch.tensor([found])).logits[0, -1].argmax()))
        if found[-1] in (0, 2):  # what llama.cpp takes for the end of a turn
            break
    return found[len(ids) :]


def test_scores_are_the_models_at_the_marked_places_only(
    reader: LlamaCppReader, model: PreTrainedModel
) -> None:
    ids = TOKENIZER.encode("<|im_start|>user\nhi 日本 é<|im_end|>\nyes<|im_end|>")
    trained = [index % 3 != 1 for index in range(len(ids))]
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    places = [index for index in range(1, len(ids)) if trained[index]]
    scores = reader.score(ids, trained)
    wanted = [expected[place - 1, ids[place]].item() for place in places]
    assert [score.log_probability for score in scores] == pytest.approx(wanted, abs=2e-5)
    assert reader.top1(ids, trained) == [int(expected[place - 1].argmax()) for place in places]
    total, count = reader.loss(ids, trained)
    assert (total, count) == (pytest.approx(-sum(wanted), abs=1e-4), len(places))


def test_tokens_that_end_inside_a_character_are_scored_too(
    reader: LlamaCppReader, model: PreTrainedModel
) -> None:
    # The server keeps such tokens back, and their probabilities with them.
    ids = TOKENIZER.encode("a🦜𝔘")
    assert len(ids) > 6
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    scores = reader.score(ids, [True] * len(ids))
    wanted = [expected[index - 1, ids[index]].item() for index in range(1, len(ids))]
    assert [score.log_probability for score in scores] == pytest.approx(wanted, abs=2e-5)
    assert [score.top1 for score in scores] == expected[:-1].argmax(-1).tolist()


def test_answers_are_the_models_greedy_ones(reader: LlamaCppReader, model: PreTrainedModel) -> None:
    prompts = [TOKENIZER.encode(f"<|im_start|>user\nfox {n} jumps<|im_end|>\n") for n in range(7)]
    seen: list[tuple[int, int]] = []
    answers = reader.answer_all(prompts, 6, progress=lambda done, total: seen.append((done, total)))
    expected = [
        TOKENIZER.decode(greedy(model, ids, 6), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in prompts
    ]
    assert len(set(expected)) > 3
    assert answers == expected
    assert seen == [(n + 1, 7) for n in range(7)]


def test_a_batch_gives_what_its_rows_give(reader: LlamaCppReader) -> None:
    rows = []
    for number in range(6):
        ids = TOKENIZER.encode(f"<|im_start|>user\nfox number {number * 111} jumps<|im_end|>\n")
        rows.append((ids, [index > len(ids) - 5 for index in range(len(ids))]))
    together = reader.score_all(rows)
    for row, scores in zip(rows, together, strict=True):
        alone = reader.score(*row)
        assert [s.top1 for s in scores] == [s.top1 for s in alone]
        assert [s.log_probability for s in scores] == pytest.approx(
            [s.log_probability for s in alone], abs=1e-5
        )


def test_stop_strings_end_an_answer(reader: LlamaCppReader) -> None:
    ids = TOKENIZER.encode("the quick brown fox")
    whole = reader.answer(ids, 12)
    assert len(whole) > 3
    assert reader.answer(ids, 12, stop=[whole[2]]) == whole[: whole.index(whole[2])]


def test_special_names_are_text_where_asked(reader: LlamaCppReader) -> None:
    assert reader.tokenize("<|im_end|>") == [2]
    assert len(reader.tokenize("<|im_end|>", special=False)) > 1


def test_a_row_beyond_the_context_is_one_line(reader: LlamaCppReader) -> None:
    with pytest.raises(ModelError, match=r"a row of 130 tokens and 1 new ones is longer than the 128 tokens"):
        reader.loss([50] * 131, [False] * 130 + [True])


def test_files_that_llama_cpp_cannot_load_are_one_line(tmp_path: Path, file: Path) -> None:
    with pytest.raises(ModelError, match=r"gone\.gguf: no such file"):
        LlamaCppReader(tmp_path / "gone.gguf")
    short = tmp_path / "short.gguf"
    short.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ModelError, match=r"short\.gguf: llama\.cpp cannot load it"):
        LlamaCppReader(short)


@pytest.mark.parametrize(
    ("cores", "busy", "threads"), [(4, 0.0, 4), (4, 49.0, 2), (2, 100.0, 1), (1, 0.0, 1)]
)
def test_busy_cores_get_no_thread(
    cores: int, busy: float, threads: int, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp.psutil, "cpu_percent", lambda seconds: busy)
    monkeypatch.setattr(llama_cpp.torch, "get_num_threads", lambda: cores)
    taken = []
    start = llama_cpp._start
    monkeypatch.setattr(llama_cpp, "_start", lambda *a: taken.append(a[3]) or start(*a[:3], 1, *a[4:]))
    with LlamaCppReader(file, context=64):
        assert taken == [threads]


@pytest.mark.parametrize(("package", "extra"), [("xllamacpp", "llama-cpp"), ("cyllama", "gguf-k")])
def test_a_missing_binding_names_what_to_install(
    package: str, extra: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def missing(name: str, *rest: Any, **options: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(f"No module named '{package}'")
        return original(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    use = kquants.require if package == "cyllama" else partial(LlamaCppReader, file)
    with pytest.raises(ModelError, match=rf"{package}.*pip install 'fourbit\[{extra}\]'"):
        use()
