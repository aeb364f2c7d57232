"""The labels of a closed set as a tree of tokens.

Labels share beginnings ("card arrival", "card linking"), so a tree holds each common beginning once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fourbit.errors import DataError


class LabelTrie:
    """Node 0 is the root; nodes are numbered level by level, the children of a node in one run.

    tokens       int64 [N]          the token that leads to the node (root: 0)
    depth        int64 [N]          tokens from the root
    first_child  int64 [N]
    children     int64 [N]          how many; 0 at a label's end
    ends         int64 [labels]     the node at which each label ends
    ancestors    bool  [N+1, N+1]   ancestors[n, m]: m lies on the path to n, n itself included; row and
                                    column N, for a slot that holds no node, are False
    """

    def __init__(self, sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> None:
        """sequences: token ids of the labels, the end of the turn included.

        Raises DataError if there are none, or if one is empty or begins another.
        """
        if not sequences or not all(sequences):
            raise DataError("labels: give at least one, none of them empty")
        tokens, depth, first_child, children, parents = [0], [0], [0], [0], [0]
        ends = [0] * len(sequences)
        level = [(0, list(range(len(sequences))))]  # a node and the labels that pass through it
        while level:
            below: list[tuple[int, list[int]]] = []
            for node, members in level:
                groups: dict[int, list[int]] = {}
                for label in members:
                    if len(sequences[label]) == depth[node]:
                        if len(members) > 1:
                            other = next(member for member in members if member != label)
                            raise DataError(
                                f"labels: number {label + 1} and number {other + 1} have the same tokens, "
                                "or one begins the other; remove one"
                            )
                        ends[label] = node
                    else:
                        groups.setdefault(sequences[label][depth[node]], []).append(label)
                first_child[node], children[node] = len(tokens), len(groups)
                for token, group in groups.items():
                    below.append((len(tokens), group))
                    tokens.append(token)
                    depth.append(depth[node] + 1)
                    parents.append(node)
                    first_child.append(0)
                    children.append(0)
            level = below
        self.size = len(tokens)
        self.tokens, self.depth, self.first_child, self.children, self.ends = (
            torch.tensor(values, device=device) for values in (tokens, depth, first_child, children, ends)
        )
        self.ancestors = _ancestors(parents).to(device)

    def edges(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """The edges out of nodes [n]: for each, which of the n it leaves, and the child it leads to."""
        counts = self.children[nodes]
        source = torch.repeat_interleave(torch.arange(nodes.numel(), device=nodes.device), counts)
        before = counts.cumsum(0) - counts
        ordinal = torch.arange(source.numel(), device=nodes.device) - before[source]
        return source, self.first_child[nodes][source] + ordinal


def _ancestors(parents: list[int]) -> Tensor:
    size = len(parents)
    table = torch.zeros(size + 1, size + 1, dtype=torch.bool)
    for node, parent in enumerate(parents):  # parents come first
        table[node] = table[parent]
        table[node, node] = True
    return table
