"""What a model with EAS adapters computes, written from the formulas alone: stock model, float64, plain loops.

Nothing of `peft_eas` is used. Skipping and adapting is done by hooks on a stock copy of the base model.
"""

from __future__ import annotations

import copy

import torch


def branches(h: torch.Tensor, p: dict, alpha: torch.Tensor, scaling: float) -> torch.Tensor:
    """s * sum_j alpha_j (h B_j^T + b_j) with block-diagonal B_j; h (B, T, r), alpha (branches,)."""
    blocks = p["up"]
    count, groups, out_size, in_size = blocks.shape
    total = 0
    for j in range(count):
        parts = []
        for g in range(groups):
            part = h[..., g * in_size : (g + 1) * in_size]
            parts.append(torch.einsum("bti,oi->bto", part, blocks[j, g]))
        branch = torch.cat(parts, dim=-1)
        assert branch.shape[-1] == groups * out_size
        if "bias" in p:
            branch = branch + p["bias"][j]
        total = total + alpha[j] * branch
    return scaling * total


def adapt(z: torch.Tensor, p: dict, config) -> torch.Tensor:
    h = torch.einsum("btd,rd->btr", z, p["down"])
    alpha = torch.softmax(p["router"], dim=0) if "router" in p else torch.ones(1, dtype=z.dtype)
    return z + branches(h, p, alpha, config.scaling)


def left(z: torch.Tensor, p: dict, allowed: torch.Tensor, others: torch.Tensor | None = None) -> torch.Tensor:
    """What is added where an attention is skipped: z (B, T, d) is its input, allowed (B, T, S) what it may look at.

    The attention is torch's own, of one head, with queries and keys of zero.
    """
    total = torch.zeros(*z.shape[:-1], 1, dtype=z.dtype)
    if "constant" in p:
        total = total + p["constant"]
    if "down" in p:
        total = total + torch.einsum("btr,dr->btd", torch.einsum("bte,re->btr", z, p["down"]), p["up"])
    if "mean_down" in p:
        values = torch.einsum("bsd,rd->bsr", z if others is None else others, p["mean_down"])
        nothing = torch.zeros(*allowed.shape[:2], values.shape[-1], dtype=z.dtype)
        keys = torch.zeros_like(values)
        looked = torch.nn.functional.scaled_dot_product_attention(nothing, keys, values, attn_mask=allowed)
        looked = torch.where(allowed.any(-1, keepdim=True), looked, 0.0)  # padding looks at nothing
        total = total + torch.einsum("btr,dr->btd", looked, p["mean_up"])
    return total


def causal(mask: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """What each token may look at, (B, T, T), in a decoder: itself and those before it that are no padding."""
    length = mask.shape[1]
    looks = torch.ones(length, length, dtype=torch.bool).tril()
    if window is not None:
        looks = looks & ~torch.ones(length, length, dtype=torch.bool).tril(-window)
    return looks & mask.bool()[:, None]


def adapters(peft_model) -> dict[str, dict[str, torch.Tensor]]:
    """`{module of the base model and part of the adapter: {short name: float64 tensor}}` of the adapter "default"."""
    found: dict[str, dict] = {}
    for key, value in peft_model.state_dict().items():
        if ".eas_" in key and "eas_skip" not in key:
            module, _, name = key.removeprefix("base_model.model.").rpartition(".default.")
            found.setdefault(module, {})[name] = value.detach().double()
    return found


def by_module(peft_model) -> dict[str, dict[str, torch.Tensor]]:
    """The same by module alone, for a set that is given: an attention then has one part."""
    return {key.rpartition(".eas_")[0]: named for key, named in adapters(peft_model).items()}


def logits(base, parameters: dict, config, inputs: dict) -> torch.Tensor:
    """Logits of the adapted model. `base` is a stock model."""
    model = copy.deepcopy(base).double().eval()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    decoder = model.model.language_model if hasattr(model.model, "language_model") else model.model
    prefix = "model.language_model.layers." if hasattr(model.model, "language_model") else "model.layers."

    def before(linear, function):
        linear.register_forward_pre_hook(lambda module, args: (function(args[0]), *args[1:]))

    for index, layer in enumerate(decoder.layers):
        p = parameters.get(f"{prefix}{index}.self_attn.eas_adapter")
        if index in config.skip_layers:
            p = parameters.get(f"{prefix}{index}.self_attn.eas_stand_in", {})
            of_all = getattr(decoder.config, "sliding_window", None)  # Mistral's
            allowed = causal(inputs["attention_mask"], getattr(layer.self_attn, "sliding_window", of_all))

            def forward(hidden_states, p=p, allowed=allowed, **kw):
                return torch.zeros_like(hidden_states) + left(hidden_states, p, allowed), None

            layer.self_attn.forward = forward
            if hasattr(layer, "pre_feedforward_layernorm"):  # then the other one is behind the attention
                layer.post_attention_layernorm = torch.nn.Identity()
        else:
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                before(linear, lambda z, p=p: adapt(z, p, config))
        p = parameters.get(f"{prefix}{index}.mlp.eas_adapter")
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj) if p else ():
            before(linear, lambda z, p=p: adapt(z, p, config))
    return model(**inputs, use_cache=False).logits
