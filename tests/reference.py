"""What a model with EAS adapters computes, written from the formulas alone: stock model, float64, plain loops.

Nothing of `peft_eas` is used. Skipping and adapting is done by hooks on a stock copy of the base model.
"""

from __future__ import annotations

import copy

import torch


def branches(h: torch.Tensor, p: dict, alpha: torch.Tensor, scaling: float) -> torch.Tensor:
    """s * sum_j alpha_j (h B_j^T + b_j) with block-diagonal B_j; h (B, T, r), alpha (B, 2)."""
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
        if "up_bias" in p:
            branch = branch + p["up_bias"][j]
        total = total + alpha[:, j, None, None] * branch
    return scaling * total


def down(z: torch.Tensor, p: dict, name: str = "down", bias: str = "down_bias") -> torch.Tensor:
    h = torch.einsum("btd,rd->btr", z, p[name])
    return h + p[bias] if bias in p else h


def prompt_average(values: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """Mean over the prompt's tokens, row by row: (B, T, n) -> (B, 1, n)."""
    return torch.stack([row[where].mean(dim=0, keepdim=True) for row, where in zip(values, prompt, strict=True)])


def weights_of_branches(z: torch.Tensor, p: dict, prompt: torch.Tensor, temperature: float) -> torch.Tensor:
    if "router" not in p:
        return torch.ones(z.shape[0], 1, dtype=z.dtype)
    if "router_bias" not in p:
        return torch.softmax(p["router"], dim=0).expand(z.shape[0], 2)
    mean = prompt_average(z, prompt)[:, 0]
    return torch.softmax((mean @ p["router"].T + p["router_bias"]) / temperature, dim=-1)


def adapt(z: torch.Tensor, p: dict, prompt: torch.Tensor, config) -> torch.Tensor:
    alpha = weights_of_branches(z, p, prompt, config.temperature)
    return z + branches(down(z, p), p, alpha, config.scaling)


def pia(z: torch.Tensor, p: dict, prompt: torch.Tensor, config) -> torch.Tensor:
    alpha = weights_of_branches(z, p, prompt, config.temperature)
    h = down(z, p)
    if config.propagation == "prompt":
        h = h + prompt_average(down(z, p, "self_C", "self_c"), prompt)
    return z + branches(h, p, alpha, config.scaling)


def adapters(peft_model) -> dict[str, dict[str, torch.Tensor]]:
    """`{module of the base model: {short name: float64 tensor}}` of the adapter "default"."""
    found: dict[str, dict] = {}
    for key, value in peft_model.state_dict().items():
        if ".eas_" in key and "dropout" not in key and "eas_skip" not in key:
            module, _, rest = key.removeprefix("base_model.model.").rpartition(".eas_")
            found.setdefault(module, {})[rest.removesuffix(".default")] = value.detach().double()
    return found


def logits(base, parameters: dict, config, inputs: dict, prompt: torch.Tensor) -> torch.Tensor:
    """Logits of the adapted model. `base` is a stock model, `prompt (B, T)` says which tokens are the prompt."""
    model = copy.deepcopy(base).double().eval()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    decoder = model.model.language_model if hasattr(model.model, "language_model") else model.model
    prefix = "model.language_model.layers." if hasattr(model.model, "language_model") else "model.layers."

    def before(linear, function):
        linear.register_forward_pre_hook(lambda module, args: (function(args[0]), *args[1:]))

    for index, layer in enumerate(decoder.layers):
        if index in config.skip_layers:
            c = parameters.get(f"{prefix}{index}.self_attn", {}).get("stand_in", torch.zeros(1))
            layer.self_attn.forward = lambda hidden_states, c=c, **kw: (torch.zeros_like(hidden_states) + c, None)
            if hasattr(layer, "pre_feedforward_layernorm"):  # then the other one is behind the attention
                layer.post_attention_layernorm = torch.nn.Identity()
            in_front = pia
        else:
            p = parameters[f"{prefix}{index}.self_attn"]
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                before(linear, lambda z, p=p: adapt(z, p, prompt, config))
            in_front = adapt
        p = parameters.get(f"{prefix}{index}.mlp")
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj) if p else ():
            before(linear, lambda z, p=p, in_front=in_front: in_front(z, p, prompt, config))
    return model(**inputs, use_cache=False).logits
