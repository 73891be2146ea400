"""LoRA with experts, as ICEdit trains it (arXiv:2504.20690): several low-rank updates per layer, chosen token by token.

A layer has ``E`` updates of rank ``r`` and a router, one linear map from a token to ``E`` logits. The factors of all experts lie
in one pair of matrices, so that a layer costs two products however many experts it has:
``h = x A^T`` is cut into ``E`` parts, part ``e`` is multiplied by the gate of expert ``e``, and ``B`` adds them up. Published
files hold each expert by itself; ``published`` translates.

Shapes: ``E`` experts, ``r`` rank of each, ``k`` experts per token (top_k); ``...`` stands for batch and tokens.
"""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

from .errors import UserError
from .specs import ExpertLoRA, Gate


@dataclass(kw_only=True)
class Routing:
    """What a router did in one forward pass, each ``(E,)``."""

    share: Tensor
    """Share of the choices that fell on each expert; sums to 1."""
    weight: Tensor
    """Mean gate of each expert, 0 where it was not chosen."""
    probability: Tensor
    """Mean of the softmax over all logits; with its graph until the backward pass has come through."""

    def balance(self) -> Tensor:
        """Load-balancing loss of the Switch Transformer (arXiv:2101.03961): 1 where all experts get the same."""
        return len(self.share) * (self.share * self.probability).sum()


class Experts(LoraVariant):
    """Makes experts of one adapter's LoRA on one layer.

    This is peft's seam for adapters that compute something else (DoRA is another). So a layer can have plain adapters and such
    with experts beside each other, and peft switches, scales and freezes them all alike.
    """

    def __init__(self, *, experts: int, top_k: int, gate: Gate):
        self.experts, self.top_k, self.gate = experts, top_k, gate
        self.routing: Routing | None = None
        """Of the last forward pass."""

    def forward(  # type: ignore[override]  # peft declares it static and calls it on the instance
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """The layer's ``result (..., out)`` plus the update of ``x (..., in)``."""
        if torch.is_autocast_enabled(x.device.type):
            # Once: else router and experts would each keep a copy of their own for the backward pass.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        gates = self.route(module.lora_route[active_adapter](x))
        h = module.lora_A[active_adapter](x).unflatten(-1, (self.experts, -1))
        h = (h * gates.to(h.dtype).unsqueeze(-1)).flatten(-2)
        return result + module.lora_B[active_adapter](h) * module.scaling[active_adapter]

    def route(self, logits: Tensor) -> Tensor:
        """Gates ``(..., E)`` in float32, zero but for the chosen experts."""
        logits = logits.float()
        probability = logits.softmax(-1)
        if self.gate == "topk-softmax":
            # Of a single logit the softmax is 1 whatever it is: with top_k 1 nothing tells the router where to go.
            best, chosen = logits.topk(self.top_k)
            weights = best.softmax(-1)
        else:
            weights, chosen = probability.topk(self.top_k)
        gates = torch.zeros_like(logits).scatter(-1, chosen, weights)
        self._note(logits, probability, chosen, gates)
        return gates

    def _note(self, logits: Tensor, probability: Tensor, chosen: Tensor, gates: Tensor) -> None:
        # Gradient checkpointing runs the layer again inside the backward pass; noted then, that graph would live on.
        if torch._C._current_graph_task_id() != -1:
            return
        tokens = tuple(range(logits.dim() - 1))
        count = torch.zeros_like(logits).scatter_(-1, chosen, 1 / self.top_k)
        self.routing = Routing(
            share=count.detach().mean(tokens),
            weight=gates.detach().mean(tokens),
            probability=probability.mean(tokens),
        )
        if logits.requires_grad:
            # Weakly: the graph owns the hook, and what the hook owned could never be freed with it.
            logits.register_hook(partial(_let_go, weakref.ref(self.routing)))

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        """Refuse: which expert acts depends on the token, so no single weight does the same."""
        raise UserError(
            f"adapter {active_adapter!r} has experts, which cannot be merged into a layer's weight; make it a plain LoRA"
            " first: pentimento export RUN --to lora"
        )

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:  # type: ignore[override]
        """Refuse, as ``merge_safe``."""
        self.merge_safe(module, active_adapter, orig_weight)

    def supports_lora_conversion(self) -> bool:
        """Not by peft, which knows nothing of routers; ``export.py`` does it."""
        return False


def _let_go(noted: "weakref.ref[Routing]", grad: Tensor) -> None:
    """Nothing of a step's graph is kept once its backward pass has come through."""
    if (routing := noted()) is not None:
        routing.probability = routing.probability.detach()


def install(layer: Any, name: str, spec: ExpertLoRA) -> None:
    """Turn an adapter's LoRA on a layer of peft's into experts with a router; initial values are the caller's business."""
    if not hasattr(layer, "lora_route"):
        layer.lora_route = nn.ModuleDict()
        layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_route")
    place = layer.lora_A[name].weight.device
    width = spec.experts * spec.expert_rank
    layer.lora_A[name] = nn.Linear(layer.in_features, width, bias=False, device=place)
    layer.lora_B[name] = nn.Linear(width, layer.out_features, bias=False, device=place)
    layer.lora_route[name] = nn.Linear(layer.in_features, spec.experts, bias=False, device=place)
    layer.r[name], layer.lora_alpha[name] = spec.expert_rank, spec.expert_scaled
    layer.set_scale(name, 1)
    layer.lora_variant[name] = Experts(experts=spec.experts, top_k=spec.top_k, gate=spec.gate)


def routing(layer: Any, name: str) -> Routing | None:
    """What an adapter's router on this layer did in the last forward pass; ``None`` before the first."""
    variant: Experts = layer.lora_variant[name]
    return variant.routing


def published(tensors: Mapping[str, Tensor], experts: int) -> dict[str, Tensor]:
    """An adapter's tensors under the names of published files, where each expert has its own.

    ``X.lora_A.weight (E r, in)`` of a layer with a router becomes ``X.lora_A.expert_0.weight (r, in)`` and so on, likewise the
    columns of ``X.lora_B.weight (out, E r)``. They are views: what is copied into them arrives in the layer.
    """
    views: dict[str, Tensor] = {}
    for key, value in tensors.items():
        module, _, factor = key.removesuffix(".weight").rpartition(".")
        if f"{module}.lora_route.weight" not in tensors or factor == "lora_route":
            views[key] = value
            continue
        parts = value.chunk(experts, dim=0 if factor == "lora_A" else 1)
        views |= {f"{module}.{factor}.expert_{number}.weight": part for number, part in enumerate(parts)}
    return views
