# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The LoRA: which layers it adapts, how its products are computed, and how compiled blocks join them.

PEFT's layers compute in the float32 of their weights and add each product in a step of its own. `MasterWeightLora` keeps
the weights in float32 and computes in the base's dtype. In a compiled block, layers that read the same input (Q, K, V and
the feed-forward of a single block) each read it again for their LoRA. Those products are bound by memory, so a pass over
the compiler's graph joins each family of them into one product of concatenated factors. Layers, names and weights stay as
PEFT has them. No library joins them.
"""

import logging
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import peft.tuners.lora
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch.fx import Graph, Node


logger = logging.getLogger(__name__)

# Attention and feed-forward of both kinds of blocks, as in the diffusers FLUX LoRA examples. The transformer's last
# layer is called `proj_out` too.
LORA_TARGETS = [
    "attn.to_k",
    "attn.to_q",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    "proj_mlp",
    "proj_out",
]


# -- Layers -----------------------------------------------------------------------------------------------------------


class MasterWeightLora(peft.tuners.lora.Linear):
    """PEFT's layer with float32 weights whose two products are computed in the dtype of the base."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.disable_adapters or self.merged or self.lora_variant or args or kwargs:
            return super().forward(x, *args, **kwargs)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        result = self.base_layer(x)
        shape, result = result.shape, result.flatten(0, -2)
        for name in self.active_adapters:
            if name in self.lora_A:
                layers: list[Any] = [self.lora_A[name], self.lora_B[name]]
                down, up = (layer.weight.to(x.dtype) for layer in layers)
                low = F.linear(self.lora_dropout[name](x), down).flatten(0, -2)
                if torch.compiler.is_compiling():
                    # `addmm` would copy the result first. The compiler fuses a sum into what follows.
                    result = result + low @ (self.scaling[name] * up).t()
                else:
                    result = torch.addmm(result, low, up.t(), alpha=self.scaling[name])
        return result.view(shape)


def add_lora(
    transformer: FluxTransformer2DModel,
    rank: int,
    alpha: int,
    dropout: float = 0.0,
    layers: list[str] | None = None,
    fused: bool = True,
) -> None:
    """
    Adds an untrained LoRA to a transformer, in place. `fused` computes its products as `MasterWeightLora` does.

    Raises:
        `ValueError`: if one of `layers` is the name of no linear layer.
    """
    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    unknown = [layer for layer in layers or () if not any(f".{name}".endswith(f".{layer}") for name in names)]
    if unknown:
        raise ValueError(
            f"--lora_layers names {', '.join(map(repr, unknown))}, which match no linear layer of the transformer. Names of"
            f" layers are {', '.join(LORA_TARGETS)}, and others of its `named_modules`."
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        init_lora_weights="gaussian",
        target_modules=layers or LORA_TARGETS,
    )
    if fused:
        # PEFT has no public way to use a layer class of one's own. Without the private one, a run is slower.
        if hasattr(config, "_register_custom_module"):
            config._register_custom_module({nn.Linear: MasterWeightLora})
        else:
            logger.warning(
                "LoRA products are computed by PEFT's own layers, since this version of it takes no others."
            )
    transformer.add_adapter(config)


# -- Joined products of compiled blocks -------------------------------------------------------------------------------

aten = torch.ops.aten
# A product with one side this short, a LoRA's rank, takes no longer than reading and writing the other sides.
NARROW = 128
# What a summand may pass through on its way into a sum.
RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
CONVERSIONS = (torch.ops.prims.convert_element_type.default,)


def compiler_options(fused_lora: bool) -> dict:
    """
    The `options` of `torch.compile` for the transformer's blocks.

    A pass over the compiler's graph takes private parts of torch. Where they have changed, nothing is joined: the run is
    slower and otherwise the same.
    """
    # Smaller blocks for reductions that need many registers are compiled one by one, in this process. Steps are as fast
    # without.
    options: dict[str, Any] = {"dynamic_scale_rblock": False}
    if not fused_lora:
        return options
    try:
        # These imports take seconds, so they wait until something is compiled.
        from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
        from torch._inductor.pattern_matcher import stable_topological_sort
    except ImportError as error:
        logger.warning(f"LoRA products are not joined, since this version of torch does not fit: {error}")
        return options

    class JoinLoraProducts(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            join_lora_products(graph)
            stable_topological_sort(graph)
            graph.eliminate_dead_code()

        def uuid(self) -> bytes:
            """The compiler's cache on disk finds a block again while this file and NARROW stay the same."""
            return get_hash_for_files((__file__,), str(NARROW))

    return options | {"post_grad_custom_pre_pass": JoinLoraProducts()}


def join_lora_products(graph: Graph) -> None:
    """Joins `mm`s that have a factor or a sum in common. The graph's order has to be restored afterwards."""
    # Projections down to the rank, for all layers that read x: `x @ a, x @ b -> x @ [a b]`, split in two.
    join_common_factor(graph, common=0)
    # The gradients of the projections' matrices: `a @ x, b @ x -> [a; b] @ x`, split in two.
    join_common_factor(graph, common=1)
    join_summands(graph)


def join_common_factor(graph: Graph, common: int) -> None:
    """Joins the products that share their first (0) or second (1) factor, along the free side of the other one."""
    # Index of the other factor, and of the result's dimension along its free side.
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
        # Users may stand before the joined product until the graph is sorted.
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


def groups(graph: Graph, key: Callable[[Node], Any], fits: Callable[[Node], bool]) -> Iterable[list[Node]]:
    """Two or more products of one dtype with the same key, in the graph's order, none of which depends on another."""
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
    """Whether a node adds two tensors of its own shape and dtype, so that either of them can replace it."""
    terms = [arg for arg in node.args if isinstance(arg, Node)]
    if node.target is not aten.add.Tensor or node.kwargs or len(terms) < len(node.args):
        return False
    kinds = {(value.shape, value.dtype) for value in (arg.meta["val"] for arg in (node, *terms))}
    return len(kinds) == 1


def steps_into_sum(mm: Node) -> list[Node]:
    """The chain of only users that starts at a product and ends at the last sum that it is part of."""
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
    """Removes a product from the first sum that it enters. Returns whether that was possible."""
    path = steps_into_sum(mm)
    place = next(i for i, node in enumerate(path) if is_sum(node))
    first, term = path[place], path[place - 1]
    rest = [arg for arg in first.args if isinstance(arg, Node) and arg is not term]
    if len(rest) != 1:
        return False
    first.replace_all_uses_with(rest[0])
    first.graph.erase_node(first)
    return True


def shape(node: Any) -> torch.Size:
    return node.meta["val"].shape


def call(graph: Graph, before: Node, target: Callable, *args) -> Node:
    """Adds a node with the example value that later passes expect."""
    with graph.inserting_before(before):
        node = graph.call_function(target, args)
    node.meta["val"] = target(*torch.fx.map_arg(args, lambda arg: arg.meta["val"]))
    return node


def cat(graph: Graph, before: Node, tensors: list[Any], dim: int) -> Node:
    return call(graph, before, aten.cat.default, tensors, dim)
