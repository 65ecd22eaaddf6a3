"""Other ways to find the attentions to skip, which the search is compared with in `benchmarks/evidence.py`."""

from __future__ import annotations

import math
import random

import bandit
import torch
from transformers import PreTrainedModel

from peft_eas import EASCallback
from peft_eas.families import find_layers
from peft_eas.search.run import Search


class StartAlone(Search):
    """Chooses its start, and stays with it."""

    def round(self, step: int) -> None:
        pass


class Bandit(Search):
    """The paper's search (section 3.2): each step skips a drawn set, each round scores drawn sets, and the set with the
    highest preferences is chosen. The first preferences are the scores that the search starts from."""

    LEARNING_RATE, CANDIDATES = 2.0, 3

    def begin(self, step: int) -> None:
        super().begin(step)
        scores = [math.inf if score is None else score for score in self.state.scores]
        self.preferences = bandit.preferences_from_scores(scores, self.state.count)

    def before_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        super().before_step(step, optimizer)
        if self.state.start and self.state.settled is None:
            arms = bandit.draw(self.preferences, self.state.count, random.Random(f"{self.args.seed} step {step}"))
            self.gates.set(self.state.to_layers(arms))

    def after_step(self, step: int) -> None:
        if self.state.start and self.state.settled is None:
            self.gates.set(self.state.best())
        super().after_step(step)

    def round(self, step: int) -> None:
        state, rng = self.state, random.Random(f"{self.args.seed} round {step}")
        subsets = bandit.draw_distinct(self.preferences, state.count, self.CANDIDATES, rng)
        with self.scorer.aside(step):
            batches, losses = self.held_out.batches(len(state.rounds)), []
            for arms in subsets:
                with self.gates.skipping(state.to_layers(arms)):
                    losses.append(self.scorer.mean(batches))
        self.preferences = bandit.update(self.preferences, subsets, losses, self.LEARNING_RATE)
        chosen = bandit.choose(self.preferences, state.count)
        state.order = [*chosen, *(arm for arm in range(len(state.layers)) if arm not in chosen)]
        self.gates.set(state.best())
        nothing: dict = {"tried": [], "costs": [], "exchanged": []}
        state.rounds.append({"step": step, "losses": losses, "skip_layers": state.best(), **nothing})


class StartAloneCallback(EASCallback):
    """`EASCallback` without tries."""

    search_class = StartAlone


class BanditCallback(EASCallback):
    """`EASCallback`, by the paper's bandit."""

    search_class = Bandit


@torch.no_grad()
def gate_norm(model: PreTrainedModel) -> dict[int | str, float]:
    """How strongly queries and keys are coupled, by an attention's weights alone, as in Gate-Norm (arXiv 2512.20636).

    The root of the sum over heads of `|W_q^T W_k|^2` (Frobenius), with `W_q` and `W_k` `(head, d)`. The least coupled
    ones are said to matter least.
    """
    scores = {}
    for key, place in find_layers(model).items():
        attention = model.get_submodule(place.attention)
        queries, keys = (
            next(module.weight.float() for name, module in attention.named_modules() if name.split(".")[-1] in names)
            for names in (("q_proj", "query"), ("k_proj", "key"))
        )
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        queries = queries.unflatten(0, (heads, -1))
        keys = keys.unflatten(0, (getattr(config, "num_key_value_heads", None) or heads, -1))
        keys = keys.repeat_interleave(heads // len(keys), dim=0)
        # |Q^T K|^2 = <Q Q^T, K K^T>, which is small
        scores[key] = ((queries @ queries.mT) * (keys @ keys.mT)).sum().sqrt().item()
    return scores
