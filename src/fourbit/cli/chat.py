"""`fourbit chat`: talk to a model and its adapters, side by side or one at a time."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from fourbit.cli import slash
from fourbit.cli.subject import read_subject_settings
from fourbit.config import RunConfig
from fourbit.errors import ConfigError, FourBitError, ModelError

if TYPE_CHECKING:
    from fourbit.evaluate.conversation import Answers, Conversation


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "chat",
        help="talk to a model or a finished run",
        description="Talk to a model, with any number of adapters on it. In a terminal, /help lists the "
        "commands, Ctrl-C stops an answer, Ctrl-D leaves. With piped input, each line is a conversation of "
        "its own and its answer one line: nothing else is printed, and no line is a command.",
        epilog="example: fourbit chat runs/demo --adapter other=runs/other --compare; "
        "echo 'My card has not arrived.' | fourbit chat runs/demo --json",
    )
    parser.add_argument(
        "run_folder", nargs="?", metavar="RUN", help="run folder of `fourbit train`, or its config file"
    )
    parser.add_argument("--model", help="instead of RUN: a folder, a hub name or a .gguf file")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]FOLDER",
        help="one more adapter, or run, on the same base; may be repeated",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override one setting, such as model.quant_type=none",
    )
    parser.add_argument(
        "--use", metavar="NAME", help="who answers: an adapter's name (default: the first) or base"
    )
    parser.add_argument("--compare", action="store_true", help="base and adapters all answer")
    parser.add_argument("--system", help="system message (default: the run's)")
    _add_sampling(parser)
    parser.add_argument("--one-prompt", action="store_true", help="all of the piped input is one prompt")
    parser.add_argument("--json", action="store_true", help="a JSON object for each line of piped input")
    parser.set_defaults(run=run)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=0.0, help="0 (default): the likeliest token")
    group.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest of this probability")
    group.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens; 0: from all")
    group.add_argument(
        "--min-p", type=float, default=0.0, help="draw from those this share as likely as the likeliest"
    )
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1: what was said becomes less likely"
    )
    group.add_argument("--seed", type=int, default=0, help="of the draws")
    group.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (default 512)")


def run(args: argparse.Namespace) -> int:
    """Talk until the end of input."""
    from fourbit.evaluate.sampling import Sampling

    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {args.max_new_tokens}: give at least 1")
    sampling = Sampling(
        args.temperature, args.top_p, args.top_k, args.seed, args.min_p, args.repetition_penalty
    )
    config = read_subject_settings(args)
    conversation = _open(args, config, sampling)
    if args.use is not None:
        conversation.use(args.use)
    if args.compare:
        slash.run(conversation, "/compare on")
    if sys.stdin.isatty() and not (args.json or args.one_prompt):
        talk(conversation, sys.stdout)
    else:
        pipe(conversation, [sys.stdin.read()] if args.one_prompt else sys.stdin, sys.stdout, args.json)
    return 0


def _open(args: argparse.Namespace, config: RunConfig, sampling: Any) -> Conversation:
    from fourbit.model.adapter_folder import adapter_at

    folders, base = [_named(word) for word in args.adapter], config.model.path
    if args.run_folder is not None:
        kept = Path(args.run_folder) / "adapter"
        if not kept.is_dir():
            raise ModelError(
                f"{args.run_folder}: the run has no adapter yet; finish it with "
                f"`fourbit train {args.run_folder}/config.yaml --resume`"
            )
        if config.lora is None:  # full fine-tuning keeps a whole model there
            base = str(kept)
        else:
            folders.insert(0, _named(args.run_folder))
    folders = [(name, str(adapter_at(place))) for name, place in folders]

    from fourbit.evaluate.conversation import Conversation
    from fourbit.model.adapter_set import AdapterSet
    from fourbit.model.load import load

    model, tokenizer = load(base, **config.model.model_dump(exclude={"path"}))
    adapters = AdapterSet(model)
    for name, folder in folders:
        adapters.add(name, folder)
    system = args.system if args.system is not None else config.data.system
    return Conversation(adapters, tokenizer, system, sampling, args.max_new_tokens)


def _named(word: str) -> tuple[str, str]:
    """NAME=FOLDER, or a folder, named after itself or the run it lies in."""
    name, found, place = word.partition("=")
    if found and "/" not in name and not Path(word).exists():
        return name, place
    path = Path(word).resolve()
    return path.parent.name if path.name == "adapter" else path.name, word


def talk(conversation: Conversation, out: TextIO) -> None:
    """Prompt, answer, and again. Ctrl-C stops the answer, or drops the line being typed."""
    with suppress(ImportError):  # not on Windows, whose consoles edit lines themselves
        import readline  # noqa: F401  line editing and history for input()

    print("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves", file=out)
    while True:
        try:
            line = input("all> " if conversation.compare else f"{conversation.speaker}> ")
        except KeyboardInterrupt:
            print(file=out)
            continue
        except EOFError:
            print(file=out)
            return
        if not line.strip():
            continue
        try:
            if not line.startswith("/"):
                _print_answers(conversation, conversation.answer(line), out)
                continue
            outcome = slash.run(conversation, line)
            if outcome.leave:
                return
            if outcome.text:
                print(outcome.text, file=out)
            if outcome.answer is not None:
                _print_answers(conversation, outcome.answer, out)
        except FourBitError as error:
            print(error, file=out)


def _print_answers(conversation: Conversation, answers: Answers, out: TextIO) -> None:
    speaker = None
    # Closed here and not when it is collected: an interruption must put the adapters back at once.
    with closing(answers):
        try:
            for name, piece in answers:
                if name != speaker:
                    _end_answer(conversation, speaker, out)
                    if conversation.compare:
                        print(f"[{name}{'*' if name == conversation.speaker else ''}]", file=out)
                speaker = name
                print(piece, end="", flush=True, file=out)
        except KeyboardInterrupt:
            print(" [stopped]", file=out)
        except FourBitError:
            print(file=out)
            raise
        else:
            _end_answer(conversation, speaker, out)


def _end_answer(conversation: Conversation, speaker: str | None, out: TextIO) -> None:
    if speaker is not None:
        cut = not conversation.replies[speaker].stopped
        print(" [cut: /set max_new_tokens]" if cut else "", file=out)


def pipe(conversation: Conversation, prompts: Any, out: TextIO, as_json: bool) -> None:
    """A line of answer for each prompt, every one a conversation of its own.

    Line breaks inside an answer become spaces; in JSON they stay. Where several answer, each has a line
    that begins with its name.
    """
    for prompt in prompts:
        text = prompt.rstrip("\r\n")
        if text.strip():
            for _ in conversation.answer(text):
                pass
        replies = conversation.replies if text.strip() else {}
        conversation.reset()
        if as_json:
            answers = {
                name: {"text": reply.text, "tokens": reply.tokens, "stopped": reply.stopped}
                for name, reply in replies.items()
            }
            print(json.dumps({"prompt": text, "answers": answers}, ensure_ascii=False), file=out, flush=True)
            continue
        for name, reply in replies.items():
            line = " ".join(reply.text.split("\n")).strip()
            print(f"{name}: {line}" if conversation.compare else line, file=out, flush=True)
        if not replies:
            print(file=out, flush=True)
