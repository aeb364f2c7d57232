from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fourbit.config import EvalSettings
from fourbit.errors import DataError
from fourbit.evaluate.choice import choice_prompts, evaluate_choice
from fourbit.evaluate.questions import Question
from tests.evaluate.conftest import build
from tests.tiny import byte_tokenizer

PLAIN = EvalSettings(batch_size=3)
SUBJECTS = ("anatomy", "law", None)


def questions(count: int, letters: str = "ABCD") -> list[Question]:
    """Short questions whose texts and lengths differ."""
    return [
        Question(
            f"q.jsonl:{n}",
            SUBJECTS[n % 3],
            f"{'why ' * (n % 4)}{n * 7919}?\n" + "".join(f"{a}. {n}{a}\n" for a in letters) + "Answer:",
            tuple(letters),
            n % len(letters),
            finished=False,
        )
        for n in range(count)
    ]


def by_hand(model: LlamaForCausalLM, text: str, letters: str) -> list[float]:
    """Logits of the letters after a text, one forward pass of transformers."""
    tokenizer = byte_tokenizer()
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])).logits[0, -1]
    return [float(logits[tokenizer(letter, add_special_tokens=False)["input_ids"][0]]) for letter in letters]


@pytest.mark.parametrize("shots", [0, 2])
def test_the_letter_with_the_highest_logit(shots: int) -> None:
    model, asked = build("llama"), questions(14)
    examples = [
        Question("s:1", subject, f"{subject} {n}?\nA. a\nB. b\nAnswer:", ("A", "B"), n % 2, finished=False)
        for subject in ("anatomy", "law")
        for n in range(3)
    ]
    settings = PLAIN.model_copy(update={"shots": shots, "shots_file": "s"})
    seen: list[tuple[int, int]] = []
    result = evaluate_choice(
        model, byte_tokenizer(), asked, settings, examples=examples, progress=lambda *at: seen.append(at)
    )
    for question, answer, right, confidence in zip(
        asked, result.answers, result.right, result.confidence, strict=True
    ):
        about = f" about {question.subject}" if question.subject else ""
        of_subject = [e for e in examples if question.subject in (None, e.subject)][:shots]
        worked = "".join(f"{e.text} {'AB'[e.answer]}\n\n" for e in of_subject)
        text = (
            f"The following are multiple choice questions (with answers){about}.\n\n{worked}{question.text} "
        )
        logits = torch.tensor(by_hand(model, text, "ABCD"))
        assert answer == "ABCD"[int(logits.argmax())]
        assert right is (answer == "ABCD"[question.answer])
        assert confidence == pytest.approx(float(logits.softmax(0).max()), abs=1e-4)
    assert len({round(confidence, 3) for confidence in result.confidence}) > 7  # each prompt is its own
    assert seen[-1] == (14, 14)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_means() -> None:
    result = evaluate_choice(build("llama"), byte_tokenizer(), questions(11), PLAIN)
    assert result.rows == result.accuracy.count == 11
    assert result.accuracy.right == sum(result.right)
    assert {name: found.count for name, found in result.subjects.items()} == {"anatomy": 4, "law": 4}
    assert result.subject_mean is not None
    parts = [found.value for found in result.subjects.values()]
    assert result.subject_mean.value == pytest.approx(sum(parts) / 2)
    without = [Question(q.source, None, q.text, q.letters, q.answer, q.finished) for q in questions(2)]
    assert evaluate_choice(build("llama"), byte_tokenizer(), without, PLAIN).subject_mean is None


def test_as_a_turn_of_a_chat() -> None:
    tokenizer = byte_tokenizer()
    (prompt, *_) = choice_prompts(questions(1), tokenizer, EvalSettings(choice_prompt="chat"))
    assert tokenizer.decode(prompt.ids) == (
        "<|im_start|>user\nThe following are multiple choice questions (with answers) about anatomy.\n\n"
        "0?\nA. 0A\nB. 0B\nC. 0C\nD. 0D\nAnswer:<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(prompt.letters) == "ABCD"
    with pytest.raises(DataError, match="this model has no chat template"):
        choice_prompts(questions(1), byte_tokenizer(chat=False), EvalSettings(choice_prompt="chat"))


def test_a_letter_that_merges_with_what_stands_before_it() -> None:
    """`Answer: A` ends in the token ` A`, so the prompt ends before the space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("\u0120", letter) for letter in "ABCD"]
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, *("".join(m) for m in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    for end in ("Answer:", "Answer:  "):
        question = Question("q:1", None, f"A. x\nB. y\n{end}", ("A", "B"), 0, finished=True)
        (prompt,) = choice_prompts([question], tokenizer, PLAIN)
        assert tokenizer.decode(prompt.ids) == "A. x\nB. y\nAnswer:"
        assert [tokenizer.decode([token]) for token in prompt.letters] == [" A", " B"]
    line = Question("q:1", None, "A. x\nB. y\n", ("A", "B"), 0, finished=True)
    (prompt,) = choice_prompts([line], tokenizer, PLAIN)
    assert [tokenizer.decode([token]) for token in prompt.letters] == ["A", "B"]


def test_what_cannot_be_asked() -> None:
    long = Question("q.jsonl:9", None, "why " * 200 + "\nA. x\nB. y\nAnswer:", ("A", "B"), 0, finished=True)
    with pytest.raises(DataError, match=r"q.jsonl:9: the prompt has 8\d\d tokens, the model reads 512"):
        evaluate_choice(build("llama"), byte_tokenizer(), [long], PLAIN)
    with pytest.raises(DataError, match="there are no questions"):
        evaluate_choice(build("llama"), byte_tokenizer(), [], PLAIN)
