"""The most likely of a closed set of labels, exactly, without scoring all of them.

    label = argmax over l of  log p(tokens of l, end of turn | prompt)

Log-probabilities only fall along a path, so a prefix of a label that is already less likely than a
complete label cannot become the best: best-first search over the tree of labels finds the exact argmax
and leaves the rest of the tree unread (branch and bound; nothing is approximated). Any exact search must
read every prefix that is likelier than the best label; this one reads few others.

Whether one wanted label is the argmax, which is all that an accuracy asks, takes far less where it is not:
its own tokens, and those of the first label found to be likelier. So its path is read first, beside those of
the labels that most often won before (an untrained model prefers the same few whatever is asked), and the
search then follows the prefixes that are furthest ahead of its pace.

Many requests are searched at once. In each round every request adds the T most likely of its open
prefixes to its KV cache, side by side: each sees the prompt and its own ancestors. A fine-tuned model
reads little more than the label's own tokens, an untrained one a third of the tree (measured on
banking77), and the prompt is read once either way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fourbit.evaluate.context import PADDING, Context, Progress, inference, prefill
from fourbit.evaluate.trie import LabelTrie

#: Open prefixes this much (nats) less likely than a request's likeliest are read in the same round. Wider
#: means fewer rounds and more prefixes that turn out not to be needed.
_MARGIN = 2.0
#: Tokens per round: below the first a forward pass is bound by reading weights, so more are read ahead;
#: above the second nothing is gained but memory used.
_FEW_TOKENS, _MANY_TOKENS = 64, 512
#: Requests leave a batch when so large a part of it has its answer; leaving copies the cache.
_LEAVING = 4
#: So many of the labels that beat wanted ones before are tried first.
_RIVALS = 3
_CHUNK_BYTES = 2 * 2**20
_NEVER = -torch.inf


@dataclass(frozen=True, slots=True)
class Choice:
    """The most likely label, or that the wanted one is not it.

    label     its index; None where another label was found to be likelier than the wanted one
    log_prob  in nats, end of turn included; of that other label where label is None
    """

    label: int | None
    log_prob: float


def most_likely(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    wanted: Sequence[int | None] | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[Choice]:
    """The most likely label for each prompt, all given as token ids, labels with their end of turn.

    wanted  for each prompt the label of which alone is asked whether it is the most likely, or None

    Raises DataError if labels are missing, empty or the same.
    """
    search = LabelSearch(LabelTrie(labels, next(model.parameters()).device), wanted)
    choices: dict[int, Choice] = {}
    with inference(model):
        for indices, context in prefill(model, prompts, batch_size):
            for index, choice in search.choose(indices, context):
                choices[index] = choice
                if progress is not None:
                    progress(len(choices), len(prompts))
    return [choices[index] for index in range(len(prompts))]


class LabelSearch:
    """The search over one set of labels, for one batch of prompts after another.

    wanted: see `most_likely`.
    """

    def __init__(self, trie: LabelTrie, wanted: Sequence[int | None] | None = None) -> None:
        self._trie, self._wanted = trie, wanted
        self._winners: Counter[int] = Counter()

    def choose(self, indices: Sequence[int], context: Context) -> Iterator[tuple[int, Choice]]:
        """The index and most likely label of each request of a prefilled batch, as they are found.

        indices: of the context's rows among all prompts. Consumes the context (fork it to keep it). To be
        iterated under `inference(model)`.
        """
        wanted = None if self._wanted is None else [self._wanted[index] for index in indices]
        rivals = [label for label, _ in self._winners.most_common(_RIVALS)]
        search = _Search(context, self._trie, wanted, rivals)
        while True:
            open_scores = search.open_scores()
            going_on = open_scores.amax(dim=1) > _NEVER
            count = int(going_on.sum())
            if count == 0 or (len(going_on) - count) * _LEAVING >= len(going_on):
                for row, best, choice in search.results(~going_on):
                    if choice.label is None:
                        self._winners[best] += 1
                    yield indices[row], choice
                if count == 0:
                    return
                search.keep(going_on.nonzero().squeeze(1))
                open_scores = open_scores[going_on]
            search.read_likeliest(open_scores)


class _Search:
    """The state of B requests in a tree of N nodes.

    wanted   int64 [B]    the end of the label that is asked for; the root, which nothing beats, for none
    scores   fp64 [B, N]  log-probability of the prefix that ends at a node, or -inf while unknown
    closed   bool [B, N]  nodes whose children are scored, and ends of labels
    slots    int64 [B, S - S0]  the node in each cache slot after the prompt's S0 (N: none)
    """

    def __init__(
        self,
        context: Context,
        trie: LabelTrie,
        wanted: Sequence[int | None] | None,
        rivals: Sequence[int],
    ) -> None:
        self.context, self.trie = context, trie
        batch, device = context.positions.shape[0], context.positions.device
        self.rows = torch.arange(batch, device=device)
        self.scores = torch.full((batch, trie.size), _NEVER, dtype=torch.float64, device=device)
        self.scores[:, 0] = 0.0
        self.closed = torch.zeros(batch, trie.size, dtype=torch.bool, device=device)
        self.closed[:, trie.ends] = True
        self.slots = torch.empty(batch, 0, dtype=torch.int64, device=device)
        self.prompt_length, self.prompt_seen = context.lengths, context.positions >= 0
        self._score_children(context.logits, self.rows, self.rows, torch.zeros_like(self.rows))
        ends = [0 if label is None else int(trie.ends[label]) for label in wanted or [None] * batch]
        self.wanted = torch.tensor(ends, device=device)
        self._read_first(trie.ends[list(rivals)])

    def open_scores(self) -> Tensor:
        """[B, N]: the scores of nodes that must still be read, -inf elsewhere."""
        best = self.scores[:, self.trie.ends].amax(dim=1, keepdim=True)
        done = self.closed | (self.scores <= best) | self._beaten()[:, None]
        return self.scores.masked_fill(done, _NEVER)

    def _beaten(self) -> Tensor:
        """bool [B]: whether a label is likelier than the wanted one."""
        return self.scores[:, self.trie.ends].amax(dim=1) > self._wanted_scores()[:, 0]

    def _wanted_scores(self) -> Tensor:
        return self.scores.gather(1, self.wanted[:, None])  # [B, 1]

    def _read_first(self, rivals: Tensor) -> None:
        """Score, where a label is wanted, that label and the ones that end at rivals [n], side by side."""
        trie = self.trie
        ends = torch.cat([self.wanted[:, None], rivals.expand(len(self.wanted), -1)], dim=1)
        on_path = trie.ancestors[ends, :-1].any(dim=1) & (self.wanted > 0)[:, None]
        on_path &= (trie.depth > 0) & (trie.children > 0)  # the root is read, and an end has no children
        width = int(on_path.sum(dim=1).max())
        if width == 0:
            return
        # Numbers grow with depth, so a node's parent comes before it; then what is on no path.
        numbers = torch.where(on_path, torch.arange(trie.size, device=on_path.device), trie.size)
        self._read(numbers.sort(dim=1).values[:, :width], by_column=True)

    def read_likeliest(self, open_scores: Tensor) -> None:
        """Read the likeliest open nodes of every row, or those furthest ahead of the wanted label's pace."""
        pace = self._wanted_scores() / self.trie.depth[self.wanted][:, None].clamp(min=1)  # nats a token
        ahead = open_scores - pace * self.trie.depth
        _, nodes = ahead.topk(_round_width(ahead))
        self._read(torch.where(open_scores.gather(1, nodes) > _NEVER, nodes, self.trie.size))

    def _read(self, nodes: Tensor, by_column: bool = False) -> None:
        """Append nodes [B, T] (N: none) to the cache and score their children.

        by_column: whether a node's parent may be among those in the columns before it.
        """
        trie = self.trie
        real = nodes < trie.size
        known = nodes.clamp(max=trie.size - 1)
        self.slots = torch.cat([self.slots, nodes], dim=1)
        prompt = self.prompt_seen[:, None].expand(-1, nodes.shape[1], -1)
        visible = torch.cat([prompt, trie.ancestors[nodes[:, :, None], self.slots[:, None]]], dim=2)
        positions = torch.where(real, self.prompt_length[:, None] + trie.depth[known] - 1, PADDING)
        logits = self.context.extend(trie.tokens[known], positions, visible)
        columns = 1 if by_column else nodes.shape[1]
        for part, some, there in zip(*(x.split(columns, dim=1) for x in (logits, nodes, real)), strict=True):
            places = there.flatten().nonzero().squeeze(1)
            self._score_children(part.flatten(0, 1), places, there.nonzero()[:, 0], some[there])

    def _score_children(self, logits: Tensor, places: Tensor, rows: Tensor, nodes: Tensor) -> None:
        """logits [m, V], of which those at places [n] follow nodes [n] of requests rows [n]."""
        source, child = self.trie.edges(nodes)
        places = places[source]
        step = logits[places, self.trie.tokens[child]].float() - _log_normalizer(logits)[places]
        # Rounding must not make a longer prefix likelier than its beginning: the search rests on that.
        scores = self.scores[rows, nodes][source] + step.double().clamp(max=0.0)
        self.scores[rows[source], child] = scores
        self.closed[rows, nodes] = True

    def results(self, which: Tensor) -> Iterator[tuple[int, int, Choice]]:
        """The rows marked in which [B], the most likely label found for each, and its choice."""
        best, labels = self.scores[which][:, self.trie.ends].max(dim=1)
        beaten = self._beaten()[which]
        found = zip(*(values.tolist() for values in (self.rows[which], labels, best, beaten)), strict=True)
        for row, label, score, other in found:
            yield row, label, Choice(None if other else label, score)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (int64 [n]) only."""
        self.context.select(rows)
        for name in ("rows", "wanted", "scores", "closed", "slots", "prompt_length", "prompt_seen"):
            setattr(self, name, getattr(self, name)[rows])


def _round_width(open_scores: Tensor) -> int:
    """How many nodes each row reads in this round."""
    batch = open_scores.shape[0]
    top = open_scores.amax(dim=1, keepdim=True)
    is_open = open_scores > _NEVER
    near = int((is_open & (open_scores >= top - _MARGIN)).sum())
    active = max(1, int((top > _NEVER).sum()))
    width = max(-(-near // active), _FEW_TOKENS // batch)
    most = int(is_open.sum(dim=1).max())
    return max(1, min(width, most, max(1, _MANY_TOKENS // batch)))


def _log_normalizer(logits: Tensor) -> Tensor:
    """fp32 [m]: log of the sum of exp over logits [m, V], in chunks that stay in the cache.

    Taken from `log_softmax`, which torch runs in one fused kernel: half the time of `logsumexp` on a CPU.
    """
    rows = max(1, _CHUNK_BYTES // (4 * logits.shape[-1]))
    return torch.cat(
        [
            chunk[:, 0].float() - torch.log_softmax(chunk, dim=-1, dtype=torch.float32)[:, 0]
            for chunk in logits.split(rows)
        ]
    )
