# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Fewer products for the LoRA layers of a compiled block.

Q, K, V and the feed-forward of a single block read one input. Layer by layer, each LoRA reads it again, reads it once
more for the gradient of its first matrix, and writes a gradient of its own for it. These products are bound by memory,
so each family of them becomes one product of concatenated factors, as a pass over the compiler's graph: the layers, their
names and their weights stay as PEFT has them.
"""

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.fx import Graph, Node

from training_speed import NARROW


aten = torch.ops.aten
# What a summand may pass through on its way into a sum.
RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
CONVERSIONS = (torch.ops.prims.convert_element_type.default,)


class JoinLoraProducts(CustomGraphPass):
    """Joins `mm`s with a common factor or a common sum; for `torch.compile`'s option `post_grad_custom_pre_pass`."""

    def __call__(self, graph: Graph) -> None:
        # What goes down to the rank, for all layers that read x: `x @ a, x @ b -> x @ [a b]`, cut in two.
        join_common_factor(graph, common=0)
        # The gradients of the matrices that go down: `a @ x, b @ x -> [a; b] @ x`, cut in two.
        join_common_factor(graph, common=1)
        join_summands(graph)
        stable_topological_sort(graph)
        graph.eliminate_dead_code()

    def uuid(self) -> bytes:
        """Compiled blocks that are cached on disk are found again as long as this file and NARROW stay the same."""
        return get_hash_for_files((__file__,), str(NARROW))


def join_common_factor(graph: Graph, common: int) -> None:
    """Joins the products whose first (0) or second (1) factor is the same, along the other one's free side."""
    # The place of the other factor, and the result's dimension that is its free side.
    other = 1 - common
    for group in groups(graph, lambda mm: mm.args[common], lambda mm: shape(mm)[other] <= NARROW):
        last = group[-1]
        factors = {common: last.args[common], other: cat(graph, last, [mm.args[other] for mm in group], other)}
        parts = call(
            graph,
            last,
            aten.split_with_sizes.default,
            call(graph, last, aten.mm.default, factors[0], factors[1]),
            [shape(mm)[other] for mm in group],
            other,
        )
        # Users may stand before the joined product: the graph's order is put right afterwards.
        for i, mm in enumerate(group):
            mm.replace_all_uses_with(call(graph, last, operator.getitem, parts, i))
        for mm in group:
            graph.erase_node(mm)


def join_summands(graph: Graph) -> None:
    """`... + a @ b + ... + c @ d -> ... + [a c] @ [b; d]`: the gradient of what several layers read."""
    for group in groups(graph, root_of_sum, lambda mm: shape(mm.args[1])[0] <= NARROW):
        *others, last = group
        others = [mm for mm in others if leave_sum(mm)]
        if others:
            first, second = zip(*(mm.args for mm in (*others, last)))
            factors = cat(graph, last, list(first), 1), cat(graph, last, list(second), 0)
            last.replace_all_uses_with(call(graph, last, aten.mm.default, *factors))


def groups(graph: Graph, key: Callable[[Node], Node | None], fits: Callable[[Node], bool]) -> Iterable[list[Node]]:
    """Products of one dtype with the same key, two or more, in the graph's order, none of which needs another."""
    found = defaultdict(list)
    for mm in graph.find_nodes(op="call_function", target=aten.mm.default):
        if fits(mm) and (common := key(mm)) is not None:
            found[common, mm.meta["val"].dtype].append(mm)
    for group in found.values():
        needed = ancestors([factor for mm in group for factor in mm.args])
        group = [mm for mm in group if mm not in needed]
        if len(group) > 1:
            yield group


def ancestors(nodes: Iterable[Node]) -> set[Node]:
    seen, waiting = set(), list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting.extend(node.all_input_nodes)
    return seen


def is_sum(node: Node) -> bool:
    """Of two tensors of one shape and dtype, so that either may take its place."""
    if node.target is not aten.add.Tensor or node.kwargs or not all(isinstance(arg, Node) for arg in node.args):
        return False
    kinds = {(value.shape, value.dtype) for value in (arg.meta["val"] for arg in (node, *node.args))}
    return len(kinds) == 1


def steps_into_sum(mm: Node) -> list[Node]:
    """From a product on, each node's only user, up to the last of the sums that it is part of."""
    path, last_sum, node = [mm], 0, mm
    while len(node.users) == 1:
        (node,) = node.users
        if not (is_sum(node) or node.target in RESHAPES or node.target in CONVERSIONS):
            break
        path.append(node)
        if is_sum(node):
            last_sum = len(path)
    return path[:last_sum]


def root_of_sum(mm: Node) -> Node | None:
    path = steps_into_sum(mm)
    return path[-1] if path else None


def leave_sum(mm: Node) -> bool:
    """Takes a product out of the first sum that it goes into, if its shape and dtype are those of that sum's term."""
    path = steps_into_sum(mm)
    place = next(i for i, node in enumerate(path) if is_sum(node))
    first, term = path[place], path[place - 1]
    rest = [arg for arg in first.args if arg is not term]
    if len(rest) != 1:
        return False
    first.replace_all_uses_with(rest[0])
    first.graph.erase_node(first)
    return True


def shape(node: Node) -> torch.Size:
    return node.meta["val"].shape


def call(graph: Graph, before: Node, target: Callable, *args) -> Node:
    """A new node with the value that the passes after this one expect of each."""
    with graph.inserting_before(before):
        node = graph.call_function(target, args)
    node.meta["val"] = target(*torch.fx.map_arg(args, lambda arg: arg.meta["val"]))
    return node


def cat(graph: Graph, before: Node, tensors: list[Node], dim: int) -> Node:
    return call(graph, before, aten.cat.default, tensors, dim)
