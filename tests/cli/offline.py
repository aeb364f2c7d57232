"""Every command, one after another in one process without a network. Started by test_private.py.

    unshare -rn python offline.py FOLDER [--slow]

Prints, as JSON, what each command returned and which addresses beyond this machine anything asked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
import socket
import struct
import sys
from pathlib import Path
from typing import Any

#: In every row's prompt and answer, and nowhere else.
MARKER = "Geheimnis"
SETTINGS = (
    "model.compute_dtype=float32",
    "data.heldout_fraction=0.25",
    "train.max_steps=2",
    "train.effective_batch=4",
    "train.eval_every=1",
    "train.tensorboard=true",
    "eval.max_new_tokens=2",
)
SET = ["--output", "run", *(word for setting in SETTINGS for word in ("--set", setting))]
FAST = [
    ["doctor"],
    ["init", "run.yaml", "--model", "model", "--data", "rows.jsonl"],
    ["data", "run.yaml", "--html", "rows.html"],
    ["plan", "run.yaml", *SET],
    ["train", "run.yaml", *SET],
    ["eval", "run", "--labels-from-column", "completion"],
    ["chat", "run", "--max-new-tokens", "2"],
    ["quantize", "model", "packed"],
    ["adapters", "list", "run"],
    ["adapters", "combine", "run=0.5", "other=0.5", "--output", "combined"],
    ["merge", "run", "merged", "--no-verify"],
    ["export", "run", "run.gguf", "--to", "gguf", "--no-verify"],
    ["export", "run", "lora.gguf", "--to", "lora-gguf", "--no-verify"],
    ["export", "run", "nf4", "--to", "bnb", "--no-verify"],
    ["verify", "run", "merged", "--accept-loss"],
    ["report", "run"],
]
#: Those that start processes of their own or read back with other programs.
SLOW = [
    ["eval", "run", "--lm-eval", "task.yaml"],
    ["verify", "run", "merged", "run.gguf", "nf4", "--accept-loss"],
    [
        "compare",
        "run.yaml",
        *SET,
        "--output",
        "both",
        "--vary",
        "lora.r=4",
        "--vary",
        "lora.r=8",
        "--eval-rows",
        "2",
    ],
]


def main() -> int:
    folder, slow = Path(sys.argv[1]), "--slow" in sys.argv
    os.chdir(folder)
    os.umask(0o022)
    _raise_loopback()
    asked: list[str] = []
    sys.addaudithook(lambda event, details: asked.extend(_address(event, details)))
    from fourbit.cli.main import main as fourbit

    if not slow:  # it takes a process and ten seconds
        import fourbit.training.planner as planner

        planner.runtime_bytes = lambda *_: 500_000_000
    returned = []
    for words in [*FAST, *SLOW] if slow else FAST:
        printed = io.StringIO()
        sys.stdin = io.StringIO("hello?\n")
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = fourbit(words)
        if words[0] == "train" and not code:
            shutil.copytree("run/adapter", "other")
        returned.append((" ".join(words[:2]), code, printed.getvalue()[-600:] if code else ""))
    print(json.dumps({"returned": returned, "asked": asked}))
    return 0


def _address(event: str, details: tuple[Any, ...]) -> list[str]:
    """What an event of Python's asks of a network: nothing where it stays on this machine."""
    if event == "socket.getaddrinfo" and details[0] not in ("localhost", "127.0.0.1", "::1", None, ""):
        return [str(details[0])]
    if event == "socket.connect" and details[0].family in (socket.AF_INET, socket.AF_INET6):
        host = details[1][0]
        return [] if host in ("localhost", "127.0.0.1", "::1") else [str(host)]
    return []


def _raise_loopback() -> None:
    """A new network has its loopback down; llama.cpp's server listens there."""
    request = struct.pack("16sh", b"lo", 1)  # SIOCSIFFLAGS with IFF_UP
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket, contextlib.suppress(PermissionError):
        fcntl.ioctl(any_socket, 0x8914, request + bytes(22))


if __name__ == "__main__":
    sys.exit(main())
