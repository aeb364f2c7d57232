"""A conversation with a base and its adapters: turns, who answers, settings; no terminal.

All speak about the same turns. Each keeps what it has read of them, so that a turn costs its own tokens;
after a change of speaker the new one reads what it has missed.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Generator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourbit.data.template import ChatTemplate
from fourbit.errors import ConfigError, DataError, nearest
from fourbit.evaluate.context import transformers_model
from fourbit.evaluate.generate import Answer, decode, stop_ids, stream
from fourbit.evaluate.prompt_cache import PromptCache
from fourbit.evaluate.sampling import GREEDY, Sampling
from fourbit.limits import parse_json
from fourbit.model.adapter_set import BASE, AdapterSet
from fourbit.private import open_private

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = dict[str, str]
#: Who speaks and a piece of text. To be closed where it is not read to its end.
Answers = Generator[tuple[str, str], None, None]


@dataclass(frozen=True, slots=True)
class Reply:
    """A finished answer; stopped: by itself, rather than by the length limit. read: prompt tokens it cost."""

    text: str
    tokens: int
    stopped: bool
    read: int


class Conversation:
    """Turns between a user and whoever `speaker` names: `BASE` or an adapter.

    turns     user and assistant in turn, as chat templates take them
    compare   all answer, the base first; the speaker's answer enters the conversation
    replies   the newest answers, by speaker
    """

    def __init__(
        self,
        adapters: AdapterSet,
        tokenizer: PreTrainedTokenizerBase,
        system: str | None = None,
        sampling: Sampling = GREEDY,
        max_new_tokens: int = 512,
    ) -> None:
        self.adapters, self.tokenizer, self.system = adapters, tokenizer, system
        self.sampling, self.compare = sampling, False
        self.max_new_tokens = _positive(max_new_tokens)
        self.speaker = adapters.names[0] if adapters.names else BASE
        self.turns: list[Turn] = []
        self.replies: dict[str, Reply] = {}
        with adapters.using(BASE) as model:
            self._stop = stop_ids(model, tokenizer)
            config = transformers_model(model).config.get_text_config()
        self._longest: int | None = getattr(config, "max_position_embeddings", None)
        self._caches: dict[str, PromptCache] = {}
        self._files: set[Path] = set()
        self._attempt = 0

    @property
    def speakers(self) -> tuple[str, ...]:
        return (BASE, *self.adapters.names)

    def answer(self, text: str) -> Answers:
        """Ask, and give who answers and the answer in pieces, an empty one first.

        What was given out before an interruption stays in the conversation; a question to which nothing
        was said is dropped. Raises DataError, the question dropped, where the conversation is too long.
        """
        self._attempt = 0
        self.turns.append({"role": "user", "content": text})
        yield from self._answers()

    def retry(self) -> Answers:
        """Answer the last question again, with other draws. Raises ConfigError if there is none."""
        if not self.turns:
            raise ConfigError("there is no question to answer again")
        self._attempt += 1
        self.turns.pop()
        yield from self._answers()

    def undo(self) -> None:
        """Forget the last question and its answer. Raises ConfigError if there is none."""
        if not self.turns:
            raise ConfigError("there is nothing to undo")
        del self.turns[-2:]

    def reset(self) -> None:
        """Forget all turns."""
        self.turns.clear()

    def use(self, name: str) -> None:
        """Let the base or an adapter answer from now on. Raises ConfigError for an unknown name."""
        if name not in self.speakers:
            raise ConfigError(f"no adapter '{name}'{nearest(name, self.speakers)}; {self._choice()}")
        self.speaker = name

    def _choice(self) -> str:
        return f"there are {', '.join(self.speakers)}"

    @property
    def settings(self) -> dict[str, float | int]:
        """Names and values of what `set` sets."""
        drawn = {field.name: getattr(self.sampling, field.name) for field in fields(Sampling)}
        return {**drawn, "max_new_tokens": self.max_new_tokens}

    def set(self, name: str, value: str) -> None:
        """Change one setting. Raises ConfigError for an unknown name or a value out of range."""
        if name not in self.settings:
            raise ConfigError(
                f"no setting '{name}'{nearest(name, self.settings)}; {', '.join(self.settings)}"
            )
        whole = isinstance(getattr(GREEDY, name, 0), int)
        try:
            number: Any = int(value) if whole else float(value)
        except ValueError:
            raise ConfigError(f"{name} = {value}: give a {'whole ' if whole else ''}number") from None
        if name == "max_new_tokens":
            self.max_new_tokens = _positive(number)
        else:
            self.sampling = replace(self.sampling, **{name: number})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write system message and turns as one line, `{"messages": [...]}`: as .jsonl, a row to train on.

        Raises ConfigError where that cannot be written, and for a file that this conversation has not
        written or read itself.
        """
        file = Path(path)
        if file.exists() and file.resolve() not in self._files:
            raise ConfigError(f"{path}: exists already; give another name")
        try:
            text = json.dumps({"messages": self._messages()}, ensure_ascii=False)
            with open_private(file) as stream:
                stream.write(text + "\n")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror or error})") from None
        self._files.add(file.resolve())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from a saved conversation instead of this one. Raises DataError, and this one stays."""
        try:
            messages = parse_json(Path(path).read_bytes())["messages"]
            turns: list[Turn] = [{"role": m["role"], "content": m["content"]} for m in messages]
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
        except (ValueError, KeyError, TypeError):
            raise DataError(f'{path}: no conversation; /save writes one, as {{"messages": [...]}}') from None
        system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else None
        expected = ["user", "assistant"] * (len(turns) // 2)
        texts = [turn["content"] for turn in turns] + ([system] if system is not None else [])
        if [turn["role"] for turn in turns] != expected or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{path}: user and assistant must speak in turn, the assistant last")
        self.turns, self.system = turns, system
        self._files.add(Path(path).resolve())

    def _answers(self) -> Answers:
        speakers = self.speakers if self.compare else (self.speaker,)
        self.replies = {}
        pieces: dict[str, list[str]] = {}
        try:
            for speaker in speakers:
                pieces[speaker] = []
                yield speaker, ""
                for piece in self._stream(speaker):
                    pieces[speaker].append(piece)
                    yield speaker, piece
        finally:
            kept = "".join(pieces.get(self.speaker, ()))
            if kept or self.speaker in self.replies:
                self.turns.append({"role": "assistant", "content": kept})
            else:
                self.turns.pop()

    def _stream(self, speaker: str) -> Generator[str, None, None]:
        prompt = self._prompt()
        room = self.max_new_tokens
        if self._longest is not None:
            room = min(room, self._longest - len(prompt))
            if room < 1:
                raise DataError(
                    f"the conversation has {len(prompt):,} tokens and the model reads {self._longest:,}: "
                    "ask something shorter, /undo or /reset"
                )
        cache = self._caches.setdefault(speaker, PromptCache())
        before = cache.tokens_read
        # Of one draw for all speakers, so that they differ by what they know only.
        draw = random.Random(f"{self.sampling.seed}/{len(self.turns)}/{self._attempt}")
        with self.adapters.using(speaker) as model:
            answer: Answer = yield from stream(
                model,
                self.tokenizer,
                prompt,
                self._stop,
                room,
                sampling=self.sampling,
                cache=cache,
                draw=draw,
            )
        self.replies[speaker] = Reply(
            text=decode(self.tokenizer, answer.ids),
            tokens=len(answer.ids),
            stopped=answer.stopped,
            read=cache.tokens_read - before - max(0, len(answer.ids) - (not answer.stopped)),
        )

    def _prompt(self) -> list[int]:
        if not self.tokenizer.chat_template:
            # A model that was not made for conversations goes on with the last line alone.
            return list(self.tokenizer(self.turns[-1]["content"])["input_ids"])
        messages: Any = self._messages()
        text = ChatTemplate(self.tokenizer).text(messages, "this conversation", answer_next=True)
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _messages(self) -> list[Turn]:
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system, *self.turns]


def _positive(count: int) -> int:
    if count < 1:
        raise ConfigError(f"max_new_tokens is {count}, must be at least 1")
    return count
