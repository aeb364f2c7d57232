"""`fourbit chat`: talk to a model, its adapter switched on and off without loading again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from typing import Any, TextIO

from fourbit.cli.subject import Subject, add_subject_arguments, open_subject, read_subject_settings
from fourbit.errors import ConfigError, nearest

_COMMANDS = {
    "/help": "this list",
    "/reset": "forget the conversation",
    "/system": "TEXT: set the system message and start over; without TEXT, remove it",
    "/base": "answer with the base alone",
    "/adapter": "answer with the adapter",
    "/exit": "leave (so does the end of input)",
}


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "chat",
        help="talk to a model or a finished run",
        description="Talk to a model. Ctrl-C stops an answer; /help lists the commands. With piped input, "
        "each line is a conversation of its own and its answer one line: nothing else is printed.",
        epilog="example: echo 'My card has not arrived.' | fourbit chat runs/demo",
    )
    add_subject_arguments(parser)
    parser.add_argument("--system", help="system message (default: the run's)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): the likeliest token")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the likeliest of this probability"
    )
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens; 0: from all")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (default 512)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Talk until the end of input."""
    from fourbit.evaluate.generate import Sampling

    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {args.max_new_tokens}: give at least 1")
    sampling = Sampling(args.temperature, args.top_p, args.top_k, args.seed)
    config = read_subject_settings(args)
    subject = open_subject(args, config.model)
    system = args.system if args.system is not None else config.data.system
    chat = Chat(subject, system, sampling, args.max_new_tokens)
    if sys.stdin.isatty():
        _talk(chat, sys.stdout)
    else:
        _pipe(chat, sys.stdin, sys.stdout)
    return 0


class Chat:
    """A conversation with a model whose adapter is on, where it has one, until it is switched off."""

    def __init__(self, subject: Subject, system: str | None, sampling: Any, max_new_tokens: int) -> None:
        from fourbit.evaluate.generate import stop_ids

        self.subject, self.system = subject, system
        self.sampling, self.max_new_tokens = sampling, max_new_tokens
        self.stop = stop_ids(subject.model, subject.tokenizer)
        self.adapter_on = subject.has_adapter
        self.turns: list[dict[str, str]] = []

    def answer(self, text: str) -> Iterator[str]:
        """The answer in pieces. What was given out before an interruption stays in the conversation."""
        from fourbit.evaluate.generate import stream

        self.turns.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            with nullcontext() if self.adapter_on else self.subject.base():
                for piece in stream(
                    self.subject.model,
                    self.subject.tokenizer,
                    self._prompt(),
                    self.stop,
                    self.max_new_tokens,
                    sampling=self.sampling,
                ):
                    pieces.append(piece)
                    yield piece
        finally:
            self.turns.append({"role": "assistant", "content": "".join(pieces)})

    def command(self, line: str) -> str | None:
        """Carry out a line that begins with a command and say what was done; None for any other line."""
        name, _, rest = line.strip().partition(" ")
        if name not in _COMMANDS:
            return None
        if name in ("/base", "/adapter"):
            return self._switch(name)
        if name in ("/reset", "/system"):
            self.turns.clear()
        if name == "/system":
            self.system = rest.strip() or None
            return f"{'system message set' if self.system else 'no system message'}, conversation forgotten"
        if name == "/help":
            return "\n".join(f"{command:<9} {text}" for command, text in _COMMANDS.items())
        return "conversation forgotten"

    def _switch(self, name: str) -> str:
        if not self.subject.has_adapter:
            return "there is no adapter: the base answers"
        self.adapter_on = name == "/adapter"
        return f"the {name[1:]} answers from now on"

    def _prompt(self) -> list[int]:
        tokenizer = self.subject.tokenizer
        if not tokenizer.chat_template:
            # A model that was not made for conversations goes on with the last line alone.
            return list(tokenizer(self.turns[-1]["content"])["input_ids"])
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        messages = [*system, *self.turns]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _talk(chat: Chat, out: TextIO) -> None:
    """Prompt, answer, and again. Ctrl-C stops the answer, or drops the line being typed."""
    with suppress(ImportError):  # not on Windows, whose consoles edit lines themselves
        import readline  # noqa: F401  line editing and history for input()

    print("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves", file=out)
    while True:
        try:
            line = input("> ")
        except KeyboardInterrupt:
            print(file=out)
            continue
        except EOFError:
            print(file=out)
            return
        if line.strip() == "/exit":
            return
        if not line.strip():
            continue
        if line.startswith("/"):
            name = line.split()[0]
            unknown = f"no command '{name}'{nearest(name, _COMMANDS)}; /help lists them"
            print(chat.command(line) or unknown, file=out)
            continue
        try:
            for piece in chat.answer(line):
                print(piece, end="", flush=True, file=out)
        except KeyboardInterrupt:
            print(" [stopped]", end="", file=out)
        print(file=out)


def _pipe(chat: Chat, lines: TextIO, out: TextIO) -> None:
    """One line of answer for each line of input; line breaks inside an answer become spaces."""
    for line in lines:
        text = line.rstrip("\r\n")
        if text.strip() == "/exit":
            return
        if not text.strip():
            print(file=out, flush=True)
        elif chat.command(text) is None:
            print(" ".join("".join(chat.answer(text)).split("\n")).strip(), file=out, flush=True)
            chat.turns.clear()
