"""What one turn of a conversation says: its thinking, its content, its tool calls.

Thinking stands in the content, between `<think>` and `</think>`, or in a key of its own, which templates
name `reasoning_content`, `reasoning` or `thinking`.
"""

from __future__ import annotations

import re
from typing import Any

from fourbit.data.row import RowError, kind_of
from fourbit.limits import parse_json

Message = dict[str, Any]

THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")

_TAG = "(think|thinking|seed:think)"
_OPEN = re.compile(rf"<{_TAG}>\s*$")
_EMPTY = re.compile(rf"(<{_TAG}>)?\s*</{_TAG}>\s*")


def thought_at_end(text: str) -> str:
    """The thinking block with which `text` ends, opened only or opened and closed empty; "" if none."""
    match = _OPEN.search(text) or re.search(f"(?:{_EMPTY.pattern})$", text)
    return match.group() if match else ""


def open_thought(text: str) -> str:
    """The tag of the thinking block that `text` opens and does not close, or ""."""
    match = _OPEN.match(text)
    return match.group(1) if match else ""


def without_thought(answer: str) -> str:
    """An answer without the empty thinking block before it."""
    return re.sub(rf"^\s*{_EMPTY.pattern}", "", answer)


def split_thought(message: Message) -> tuple[str, str | None]:
    """(the thinking, what is said after it or None if nothing is), both without white space around them."""
    content = message.get("content") or ""
    thought = next((str(message[key]) for key in THOUGHT_KEYS if message.get(key)), "")
    if "</think>" in content:
        inside, _, content = content.rpartition("</think>")
        thought = inside.rpartition("<think>")[2]
    return thought.strip(), content.strip() or None


def written_parts(message: Message) -> list[str]:
    """What must stand in the text of this turn, whatever the template puts around it."""
    thought, said = split_thought(message)
    names = [_function(call)["name"] for call in message.get("tool_calls") or []]
    return [part for part in (thought, said, *names) if part]


def check_message(item: object, where: str) -> Message:
    """A turn with text as content and tool calls as objects; raises RowError beginning with `where`."""
    if not isinstance(item, dict):
        raise RowError("refused", f"{where} is {kind_of(item)}, must be an object with role and content")
    message = {key: _without_null(value) for key, value in item.items() if value is not None}
    if "from" in message and "role" not in message:
        role = message.pop("from")
        message["role"] = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
        if "content" not in message and "value" in message:
            message["content"] = message.pop("value")
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
    else:
        message["tool_calls"] = [_call(call, where) for call in _list(message["tool_calls"], where)]
        message.setdefault("content", "")
    for key in ("role", "content"):
        if key not in message:
            raise RowError("refused", f"{where} has no {key}; each message needs role and content")
    if isinstance(message["content"], list):
        message["content"] = _joined(message["content"], where)
    for key in ("role", "content"):
        if not isinstance(message[key], str):
            raise RowError("refused", f"{where}: {key} is {kind_of(message[key])}, must be text")
    return message


def check_tools(value: object, where: str) -> list[Any] | None:
    """The column `tools`: a list of function descriptions, objects or JSON text; None if it is empty."""
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except ValueError:
            raise RowError("refused", f"{where}: 'tools' is text, but not valid JSON; repair it") from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("refused", f"{where}: 'tools' must be a list of objects that describe functions")
    return [_without_null(tool) for tool in value]


_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}


def _joined(parts: list[Any], where: str) -> str:
    """Content in parts, as the OpenAI form allows; anything but text cannot be trained on here."""
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else kind_of(part)
            raise RowError("refused", f"{where}: content holds a part that is not text ({kind}); remove it")
    return "".join(part["text"] for part in parts)


def _call(call: object, where: str) -> dict[str, Any]:
    """A tool call whose arguments are an object, which templates write as JSON themselves."""
    function = _function(call)
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError("refused", f"{where}: a tool call names no function; give it function.name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments or "{}")
        except ValueError:
            raise RowError(
                "refused", f"{where}: the arguments of a tool call are not valid JSON; repair them"
            ) from None
    outer = dict(call) if isinstance(call, dict) and "function" in call else {}
    return {"type": "function", **outer, "function": {**function, "arguments": arguments}}


def _function(call: object) -> dict[str, Any]:
    if not isinstance(call, dict):
        return {}
    inner = call.get("function", call)
    return inner if isinstance(inner, dict) else {}


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise RowError("refused", f"{where}: tool_calls is {kind_of(value)}, must be a list")
    return value


def _without_null(value: Any) -> Any:
    """Parquet fills the keys that one object lacks and another has with null."""
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_null(item) for item in value]
    return value
