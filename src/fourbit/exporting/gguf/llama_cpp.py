"""A GGUF file read back by llama.cpp itself: its tokens, its log-probabilities, its answers.

llama.cpp's server runs within this process (xllamacpp); what it is asked and answers is its documented
JSON interface, on a loopback port of its own that wants a key. So a file is measured in the program that
will serve it, with an adapter applied as it will apply it.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

import psutil
import torch

from fourbit.errors import ModelError

#: Called with rows done so far and rows there are.
ReadProgress = Callable[[int, int], None]

_Row = TypeVar("_Row")
_Result = TypeVar("_Result")

# Added to one token's logit it makes that token the next one; the reported probabilities stay the model's.
_FORCE = 1e6
# How many of the likeliest tokens are asked for where the forced one is not reported, before all are.
_LIKELIEST = 256
# Seconds in which idle cores are counted.
_LOOK = 0.2


@dataclass(frozen=True, slots=True)
class TokenScore:
    """The model's view of one token: its natural-log probability, and the token it finds likeliest."""

    log_probability: float
    top1: int


class LlamaCppReader:
    """A loaded GGUF file, optionally with a LoRA GGUF applied at full strength. Use it in `with`.

    context  tokens that one row may have, prompt and answer together
    threads  of llama.cpp's own; default as many as there are idle cores
    slots    rows computed in one batch; each keeps the prefix that it has in common with its next row

    Raises ModelError when the binding is missing or llama.cpp cannot load the file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        lora: str | os.PathLike[str] | None = None,
        context: int = 1024,
        threads: int | None = None,
        slots: int = 8,
    ) -> None:
        self._path = os.fspath(path)
        self._context = context
        self._slots = slots
        self._worker = threading.local()  # a thread's slot
        self._key = secrets.token_hex(16)
        self._server: Any = _start(self._path, lora, context, threads or _idle_cores(), slots, self._key)
        address = urlsplit(self._server.listening_address)
        self._address = (address.hostname or "127.0.0.1", address.port)
        self._vocabulary = self._count_tokens()
        self._filler = self.tokenize("a", special=False)[-1]

    def __enter__(self) -> LlamaCppReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the server and free the model."""
        self._server = None

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """A text's tokens, nothing added before or after. special: special tokens' names are tokens."""
        request = {"content": text, "add_special": False, "parse_special": special}
        tokens: list[int] = self._ask("/tokenize", request)["tokens"]
        return tokens

    def score(self, ids: Sequence[int], trained: Sequence[bool]) -> list[TokenScore]:
        """The marked tokens' scores, each given all tokens before it. The first token has none."""
        return [self._score_next(ids[:index], ids[index]) for index in range(1, len(ids)) if trained[index]]

    def loss(self, ids: Sequence[int], trained: Sequence[bool]) -> tuple[float, int]:
        """Sum of the marked tokens' negative log-probabilities, and how many they are."""
        scores = self.score(ids, trained)
        return -sum(score.log_probability for score in scores), len(scores)

    def top1(self, ids: Sequence[int], trained: Sequence[bool]) -> list[int]:
        """The likeliest token at each marked place."""
        return [score.top1 for score in self.score(ids, trained)]

    def answer(self, ids: Sequence[int], max_new_tokens: int, stop: Sequence[str] = ()) -> str:
        """The greedy continuation as text, up to an end-of-turn token or one of the stop strings."""
        request = self._request(ids, max_new_tokens) | {"stop": list(stop)}
        text: str = self._ask("/completion", request)["content"]
        return text

    def score_all(
        self,
        rows: Sequence[tuple[Sequence[int], Sequence[bool]]],
        progress: ReadProgress | None = None,
    ) -> list[list[TokenScore]]:
        """`score` of many rows, batched."""
        return self._each(lambda row: self.score(*row), rows, progress)

    def answer_all(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        progress: ReadProgress | None = None,
    ) -> list[str]:
        """`answer` to many prompts, batched."""
        return self._each(lambda ids: self.answer(ids, max_new_tokens, stop), prompts, progress)

    def _each(
        self, work: Callable[[_Row], _Result], rows: Sequence[_Row], progress: ReadProgress | None
    ) -> list[_Result]:
        results = []
        slots = itertools.count()

        def take_slot() -> None:
            self._worker.slot = next(slots)

        # The threads only wait: the server batches. Each keeps to a slot, whose cache then holds the row's
        # own beginning, and the prefix in common with the row before.
        with ThreadPoolExecutor(self._slots, initializer=take_slot) as pool:
            for done, result in enumerate(pool.map(work, rows), start=1):
                results.append(result)
                if progress is not None:
                    progress(done, len(rows))
        return results

    def _score_next(self, before: Sequence[int], token: int) -> TokenScore:
        found = self._likeliest(before, token, 1)
        if found is None:
            # The server keeps back a token that ends inside a character, with its probability; the same
            # distribution is then read off another token, first near its top and then whole.
            for count in (_LIKELIEST, self._vocabulary):
                found = self._likeliest(before, self._filler, count)
                if found is not None and token in found:
                    break
        if found is None or token not in found:
            raise ModelError(f"{self._path}: llama.cpp gave no probability for token {token}")
        return TokenScore(found[token], max(found, key=lambda index: found[index]))

    def _likeliest(self, before: Sequence[int], forced: int, count: int) -> dict[int, float] | None:
        """Log-probabilities of the likeliest next tokens and of the forced one; None if it is kept back."""
        bias = {"n_probs": count, "logit_bias": [[forced, _FORCE]]}
        answer = self._ask("/completion", self._request(before, 1) | bias)
        reported = answer.get("completion_probabilities")
        if not reported:
            return None
        first = reported[0]
        if first["id"] != forced:
            raise ModelError(f"{self._path}: llama.cpp took token {first['id']} where {forced} was forced")
        found = {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}
        return found | {forced: first["logprob"]}

    def _request(self, ids: Sequence[int], new: int) -> dict[str, Any]:
        if len(ids) + new > self._context:
            raise ModelError(
                f"{self._path}: a row of {len(ids)} tokens and {new} new ones is longer than the "
                f"{self._context} tokens that the reader was opened for"
            )
        slot = getattr(self._worker, "slot", 0)
        return {"prompt": list(ids), "n_predict": new, "temperature": 0.0, "id_slot": slot}

    def _count_tokens(self) -> int:
        models = self._ask("/v1/models", None)["data"]
        return int(models[0]["meta"]["n_vocab"])

    def _ask(self, route: str, request: dict[str, Any] | None) -> Any:
        # A connection each: the server closes idle ones.
        connection = http.client.HTTPConnection(*self._address)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        try:
            body = None if request is None else json.dumps(request)
            connection.request("GET" if request is None else "POST", route, body, headers)
            response = connection.getresponse()
            answer = json.loads(response.read())
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            raise ModelError(f"{self._path}: llama.cpp stopped answering ({error})") from error
        finally:
            connection.close()
        if response.status != http.client.OK:
            reason = answer.get("error", {}).get("message", answer)
            raise ModelError(f"{self._path}: llama.cpp refused a row ({reason})")
        return answer


def _start(
    path: str, lora: str | os.PathLike[str] | None, context: int, threads: int, slots: int, key: str
) -> Any:
    xllamacpp = _binding()
    for file in [path, *([] if lora is None else [os.fspath(lora)])]:
        if not os.path.isfile(file):
            raise ModelError(f"{file}: no such file")
    settings = xllamacpp.CommonParams()
    settings.model.path = path
    if lora is not None:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(os.fspath(lora), 1.0)]
    settings.n_ctx, settings.n_parallel = context * slots, slots
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.n_gpu_layers = 0
    settings.fit_params = False  # it would shorten the context to what it thinks fits
    # Attention in fp32, not the server's default of fp16: what differs is then the file's doing.
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.swa_full = True  # a window's cache cannot go back to a common prefix
    settings.cache_ram_mib = 0  # rows come once: keeping old ones would only cost memory
    settings.warmup = False
    settings.verbosity = 1  # errors only, which say why a file does not load
    settings.api_keys = [key]
    settings.ui = False
    try:
        return xllamacpp.Server(settings)
    except (RuntimeError, ValueError) as error:
        what = path if lora is None else f"{path} with {os.fspath(lora)}"
        raise ModelError(f"{what}: llama.cpp cannot load it, for the reason it gives above") from error


def _idle_cores() -> int:
    """Cores that no other process keeps busy just now, at least one.

    llama.cpp's threads wait for one another some thousand times a token, so one that has to wait for a core
    holds up all: on two busy cores two threads took eight times as long as one (docs/log.md).
    """
    return max(1, round(torch.get_num_threads() * (1 - psutil.cpu_percent(_LOOK) / 100)))


def _binding() -> Any:
    try:
        import xllamacpp
    except ImportError as error:
        raise ModelError(
            f"reading a GGUF file back needs xllamacpp, which cannot be imported ({error}); "
            "pip install 'fourbit[llama-cpp]'"
        ) from error
    return xllamacpp
