"""Pipeline schedules as their papers give them, and what stages pass on in them: plain Python, no shardlab.

An item is (kind, microbatch, link): forward F, backward B (of the input), gradient of the weights W, of link
chunk * p + stage of the chain of chunks. A stage does its items in order, each as soon as what it needs is
there; all take one tick.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Item = tuple[str, int, int]
Row = dict[int, Item]  # stage -> what it does
Edges = frozenset[tuple[int, int]]  # (from stage, to stage)


class Sent(NamedTuple):
    """What passes between stages at the end of a tick: activations to the next link, cotangents back."""

    forward: Edges
    backward: Edges


def interleaved(p: int, m: int, v: int) -> list[Row]:
    """1F1B over v chunks a stage (arXiv:2104.04473, section 2.2.2, figure 4): p microbatches go through a
    chunk before the stage takes its next one; (p - s - 1) 2 + (v - 1) p forwards precede the first pair."""
    turns = [(first + i, chunk) for first in range(0, m, p) for chunk in range(v) for i in range(p)]
    orders = []
    for s in range(p):
        forward = [("F", i, chunk * p + s) for i, chunk in turns]
        backward = [("B", i, (v - 1 - chunk) * p + s) for i, chunk in turns]
        orders.append(_after(forward, backward, min((p - s - 1) * 2 + (v - 1) * p, m * v), first="F"))
    return _rows(orders, p * v)


def zb_h1(p: int, m: int) -> list[Row]:
    """ZB-H1 (arXiv:2401.10241, section 2.1, figure 3): after p - s forwards, B and F in turn, and W so late
    that stage s has done s of them fewer than of B: no more waits for its W anywhere than on the first stage
    of 1F1B."""
    orders = []
    for s in range(p):
        pairs = _after([("F", i, s) for i in range(m)], [("B", i, s) for i in range(m)], p - s, first="B")
        order: list[Item] = []
        for item in pairs:
            order.append(item)
            if item[0] == "B" and item[1] >= s:
                order.append(("W", item[1] - s, s))
        orders.append(order + [("W", i, s) for i in range(max(m - s, 0), m)])
    return _rows(orders, p)


def _after(forward: Sequence[Item], backward: Sequence[Item], ahead: int, *, first: str) -> list[Item]:
    """So many forwards, then one of each in turn, `first` first; then what is left."""
    order, rest = list(forward[:ahead]), forward[ahead:]
    for i, item in enumerate(backward):
        pair = [*rest[i : i + 1], item]
        order += pair if first == "F" else reversed(pair)
    return order


def _rows(orders: list[list[Item]], links: int) -> list[Row]:
    done: set[Item] = set()
    rows: list[Row] = []
    while any(orders):
        row = {s: order[0] for s, order in enumerate(orders) if order and _needs(order[0], links) <= done}
        for s in row:
            orders[s].pop(0)
        done |= set(row.values())
        rows.append(row)
    return rows


def _needs(item: Item, links: int) -> set[Item]:
    kind, i, link = item
    if kind == "F":
        return {("F", i, link - 1)} if link else set()
    if kind == "W":
        return {("B", i, link)}
    return {("F", i, link)} | ({("B", i, link + 1)} if link < links - 1 else set())


def sent(rows: list[Row], p: int, links: int) -> list[Sent]:
    """Of each tick."""
    found = []
    for row in rows:
        edges: dict[str, set[tuple[int, int]]] = {"F": set(), "B": set()}
        for s, (kind, _, link) in row.items():
            to = link + {"F": 1, "B": -1, "W": 0}[kind]
            if kind != "W" and 0 <= to < links:
                edges[kind].add((s, to % p))
        found.append(Sent(frozenset(edges["F"]), frozenset(edges["B"])))
    return found


def permutes(ticks: list[Sent]) -> list[Edges]:
    """The collective-permutes of a step in a program that all stages share.

    A permute names its pairs when it is compiled, so that few sets of pairs are chosen: those that no other
    tick's set holds. A tick takes the smallest of these that holds its own, of equal ones that of the first
    tick. Where a stage would then send or get twice, activations and cotangents go apart.
    """
    widest = [a for a in dict.fromkeys(ticks) if not any(a != b and _within(a, b) for b in ticks)]
    found = []
    for tick in ticks:
        forward, backward = min((w for w in widest if _within(tick, w)), key=lambda w: len(w[0]) + len(w[1]))
        pairs = [*forward, *backward]
        alone = all(len({pair[end] for pair in pairs}) == len(pairs) for end in (0, 1))
        found += [forward | backward] if alone else [edges for edges in (forward, backward) if edges]
    return found


def _within(a: Sent, b: Sent) -> bool:
    return a.forward <= b.forward and a.backward <= b.backward
