"""The commands inside `fourbit chat`: lines that begin with a slash, carried out on a conversation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fourbit.errors import ConfigError, nearest

if TYPE_CHECKING:
    from fourbit.evaluate.conversation import Answers, Conversation


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command leads to: something to say, an answer to print, or the end."""

    text: str = ""
    answer: Answers | None = None
    leave: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """argument: as `/help` shows it."""

    argument: str
    help: str
    run: Callable[[Conversation, str], Outcome]


def run(conversation: Conversation, line: str) -> Outcome:
    """Carry out a line that begins with a slash. Raises ConfigError or DataError in one line."""
    name, _, argument = line.strip().partition(" ")
    if name not in COMMANDS:
        raise ConfigError(f"no command '{name}'{nearest(name, COMMANDS)}; /help lists them")
    command, argument = COMMANDS[name], argument.strip()
    if argument and not command.argument:
        raise ConfigError(f"{name} takes nothing behind it")
    return command.run(conversation, argument)


def _help(conversation: Conversation, argument: str) -> Outcome:
    rows = [(f"{name} {command.argument}".strip(), command.help) for name, command in COMMANDS.items()]
    width = max(len(head) for head, _ in rows)
    lines = [f"{head:<{width}}  {text}" for head, text in rows]
    lines += ["", "Ctrl-C stops an answer, Ctrl-D leaves. Any other line is a question."]
    return Outcome("\n".join(lines))


def _system(conversation: Conversation, argument: str) -> Outcome:
    conversation.reset()
    conversation.system = argument or None
    what = "system message set" if argument else "no system message"
    return Outcome(f"{what}, conversation forgotten")


def _set(conversation: Conversation, argument: str) -> Outcome:
    if not argument:
        return Outcome("\n".join(f"{name} {value:g}" for name, value in conversation.settings.items()))
    name, found, value = argument.replace("=", " ", 1).partition(" ")
    if not found or not value.strip():
        raise ConfigError(f"/set {argument}: write it as /set NAME VALUE, such as /set temperature 0.7")
    conversation.set(name, value.strip())
    return Outcome(f"{name} {conversation.settings[name]:g}")


def _reset(conversation: Conversation, argument: str) -> Outcome:
    conversation.reset()
    return Outcome("conversation forgotten")


def _undo(conversation: Conversation, argument: str) -> Outcome:
    conversation.undo()
    return Outcome(f"last question and answer forgotten; {_asked(conversation)} left")


def _retry(conversation: Conversation, argument: str) -> Outcome:
    same = conversation.sampling.temperature == 0
    note = "temperature is 0: the same model gives the same answer (/set temperature 0.7)" if same else ""
    return Outcome(note, answer=conversation.retry())


def _save(conversation: Conversation, argument: str) -> Outcome:
    if not argument:
        raise ConfigError("/save FILE: say where, such as /save chat.jsonl")
    conversation.save(argument)
    return Outcome(f"{_asked(conversation)} written to {argument}")


def _load(conversation: Conversation, argument: str) -> Outcome:
    if not argument:
        raise ConfigError("/load FILE: say which, such as /load chat.jsonl")
    conversation.load(argument)
    return Outcome(f"{_asked(conversation)} read from {argument}")


def _adapters(conversation: Conversation, argument: str) -> Outcome:
    def mark(name: str) -> str:
        return "*" if name == conversation.speaker else " "

    return Outcome("\n".join(f"{mark(name)} {name}" for name in conversation.speakers))


def _use(conversation: Conversation, argument: str) -> Outcome:
    conversation.use(argument)
    return Outcome(f"{argument} answers from now on")


def _compare(conversation: Conversation, argument: str) -> Outcome:
    if argument not in ("on", "off", ""):
        raise ConfigError(f"/compare {argument}: give on or off")
    if len(conversation.speakers) == 1 and argument != "off":
        raise ConfigError("there is no adapter to compare with: start with --adapter NAME=FOLDER")
    conversation.compare = argument == "on" if argument else not conversation.compare
    if not conversation.compare:
        return Outcome(f"only {conversation.speaker} answers")
    names = ", ".join(conversation.speakers)
    return Outcome(f"{names} all answer; the conversation goes on from {conversation.speaker}'s answer")


def _asked(conversation: Conversation) -> str:
    count = len(conversation.turns) // 2
    return "1 question and its answer" if count == 1 else f"{count} questions and their answers"


def _quit(conversation: Conversation, argument: str) -> Outcome:
    return Outcome(leave=True)


COMMANDS = {
    "/help": Command("", "this list", _help),
    "/system": Command("[TEXT]", "set the system message, or remove it, and start over", _system),
    "/set": Command("[NAME VALUE]", "change a setting of the answers, or list them", _set),
    "/reset": Command("", "forget the conversation", _reset),
    "/undo": Command("", "forget the last question and its answer", _undo),
    "/retry": Command("", "answer the last question again", _retry),
    "/save": Command("FILE", "write the conversation, as a row that can be trained on", _save),
    "/load": Command("FILE", "go on from a conversation that was saved", _load),
    "/adapters": Command("", "list base and adapters; * answers", _adapters),
    "/use": Command("NAME", "let this adapter, or base, answer", _use),
    "/compare": Command("[on|off]", "base and adapters answer, one below the other", _compare),
    "/quit": Command("", "leave", _quit),
}
