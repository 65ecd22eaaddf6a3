"""`EASConfig`: what the user says about adapters, gates and the number of attentions to skip."""

from __future__ import annotations

import enum
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from . import checks


class EASType(str, enum.Enum):
    """PEFT's own enum of methods is closed to plugins; one that equals its string works in every mapping of PEFT."""

    EAS = "EAS"


RECORDED = ("r", "r_pia", "groups", "router", "propagation", "stand_in", "scaling", "use_bias")
"""The settings that a merged model remembers."""


@dataclass
class EASConfig(PeftConfig):
    """Configuration of Effective Attention Skipping (arXiv 2403.15226) for PEFT.

    A retained attention gets a low-rank adapter of rank `r` in front of its input projections, and every FFN one of
    rank `r_pia`, which is the PIA (propagation-of-information adapter) where the layer's attention is skipped. All of
    it folds into the neighbouring weights in `merge_and_unload()`.

    Args:
        r (`int`): Rank of the adapters in front of attentions; a multiple of `groups`, and no more than the width of
            the model.
        r_pia (`int`): Rank of the adapters in front of FFNs, a multiple of `groups`; of `stand_in="linear"`; and of
            `propagation="mean"`, where it has to be even.
        num_skip (`int`, `float` or `"auto"`, *optional*): How many attentions to skip: a count (`int`), a fraction in
            (0, 1) (`float`) of the model's attentions, or `"auto"`, which lets the search find the largest set within
            `max_loss_increase`. Defaults to as many as `skip_layers` names, or to a quarter.
        max_loss_increase (`float`, *optional*): With `num_skip="auto"`: by how much, in nats a token, the held-out loss
            with the set skipped may exceed that with nothing skipped when the search ends.
        target_speedup (`float`, *optional*): Instead of `num_skip`: skip as many as make a forward of the held-out
            batches this many times as fast, by its operations; above 1.
        skip_layers (`list[int | str]`, *optional*): The attentions that are skipped: indices of layers, or names such
            as `"encoder.3.self"` and `"decoder.3.cross"` where a layer has several attentions or a model several lists
            of layers. If `None`, no attention is skipped until a set is chosen by a search or by
            `model.set_skip_layers(...)`.
        groups (`int`): Number of blocks of block-diagonal up-projections (the paper uses 2).
        router (`"none"` or `"static"`): One up-projection; or two branches, weighted by learned constants.
        propagation (`"none"` or `"mean"`): Whether a skipped attention also leaves a uniform attention of rank `r_pia`:
            the mean over the tokens that it would have let each token look at.
        stand_in (`"linear"`, `"mean"` or `"zero"`): What a skipped attention leaves. `"linear"`: a linear map of what
            it read, of rank `r_pia`, and a constant, which are trained, and which an `EASCallback` or
            `initialize_eas_weights` starts as near as they get to what the attention added to the residual stream.
            `"mean"`: the constant alone, which starts at the mean; merged models then have plain weights. `"zero"`:
            nothing.
        dropout (`float`): Dropout probability of the adapters' inputs while training.
        scaling (`float`): Factor `s` of the adapters' output, from 1e-4 to 1e4, or from -1e4 to -1e-4; as LoRA's
            `lora_alpha / r`, so learning rates are about those of LoRA.
        use_bias (`bool`): Whether adapters add a bias. Merged linears then have one, too.
        init_weights (`bool`): `True` makes a fresh adapter an identity; `False` draws the up-projections at random.
        target_modules (`list[str]` or `str`, *optional*): Restricts the attention and FFN modules that get adapters, by
            suffix or regular expression. Defaults to those of every decoder layer that has an attention.
        exclude_modules (`list[str]` or `str`, *optional*): Attention and FFN modules that are left alone.
        layers_to_transform (`list[int]` or `int`, *optional*): Layers that get adapters. Defaults to all.
        modules_to_save (`list[str]`, *optional*): Further modules that are trained and saved as a whole.

    Raises:
        ValueError: for every value outside of what is allowed. Numbers may be NumPy's, or
            tensors of one number; they are kept as Python's.
    """

    r: int = field(default=16, metadata={"help": "Rank of the adapters in front of retained attentions."})
    r_pia: int = field(default=32, metadata={"help": "Rank of the adapters in front of FFNs."})
    num_skip: int | float | str | None = field(
        default=None,
        metadata={"help": "Attentions to skip: a count, a fraction in (0, 1), or 'auto'. Default: a quarter."},
    )
    max_loss_increase: float | None = field(
        default=None, metadata={"help": "With num_skip='auto': what skipping may cost in held-out loss."}
    )
    target_speedup: float | None = field(
        default=None, metadata={"help": "Instead of num_skip: skip as many as make a forward this many times as fast."}
    )
    skip_layers: list[int | str] | None = field(
        default=None, metadata={"help": "Attentions that are skipped: indices of layers, or names; then no search."}
    )
    groups: int = field(default=1, metadata={"help": "Blocks of the block-diagonal up-projections."})
    router: str = field(default="none", metadata={"help": "'none': one branch; 'static': two, with learned weights."})
    propagation: str = field(
        default="none", metadata={"help": "'none' or 'mean': what a skipped attention says of other tokens."}
    )
    stand_in: str = field(
        default="linear", metadata={"help": "'linear', 'mean' or 'zero': what a skipped attention leaves."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability of the adapters' inputs."})
    scaling: float = field(default=0.25, metadata={"help": "Factor of the adapters' output."})
    use_bias: bool = field(default=True, metadata={"help": "Whether adapters add a bias."})
    init_weights: bool = field(default=True, metadata={"help": "True: a fresh adapter changes nothing."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Attention and FFN modules that get adapters. Default: all of the decoder's."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Attention and FFN modules that get no adapters."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers that get adapters. Default: all."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules besides the adapters that are trained and saved."}
    )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """As in PEFT, which reads the configuration before the weights: if these lie beside it, they must be whole.

        Raises:
            OSError: if `adapter_model.safetensors` is truncated or corrupt.
        """
        weights = Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        if weights.is_file():
            try:
                with safe_open(weights, framework="pt"):
                    pass
            except SafetensorError as error:
                raise OSError(
                    f"{weights} can't be read ({error}): it is truncated or corrupt. Download it again, or save the "
                    "adapter again."
                ) from error
        return super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = EASType.EAS
        # Whether `skip_layers` is what an adapter was made with, and not what was chosen since; not saved.
        self.is_set_given = False
        self.groups = checks.integer("groups", self.groups, 1)
        self.r, self.r_pia = (checks.integer(name, getattr(self, name), 1) for name in ("r", "r_pia"))
        for name in ("r", "r_pia"):
            if getattr(self, name) % self.groups:
                raise ValueError(f"`{name}` must be a multiple of `groups`={self.groups}, got {getattr(self, name)}.")
        self._check_prompt()
        self.router = checks.choice("router", self.router, ("none", "static"))
        self.propagation = checks.choice("propagation", self.propagation, ("none", "mean"))
        if self.propagation == "mean" and self.r_pia % 2:
            raise ValueError(f"`r_pia` must be even with `propagation='mean'`, got {self.r_pia}.")
        self.stand_in = checks.choice("stand_in", self.stand_in, ("linear", "mean", "zero"))
        self.dropout = checks.number("dropout", self.dropout, lambda v: 0 <= v < 1, "a probability in [0, 1)")
        # beyond, a factor only overflows, or leaves nothing to learn
        self.scaling = checks.number(
            "scaling", self.scaling, lambda v: 1e-4 <= abs(v) <= 1e4, "a number with an absolute value from 1e-4 to 1e4"
        )
        self.use_bias = checks.flag("use_bias", self.use_bias)
        self.init_weights = checks.flag("init_weights", self.init_weights)
        if self.skip_layers is not None:
            self.skip_layers = checks.attentions("skip_layers", self.skip_layers)
        self._check_num_skip()
        self._check_modules()

    def _check_modules(self) -> None:
        layers = checks.plain(self.layers_to_transform)
        if isinstance(layers, int):
            self.layers_to_transform = checks.integer("layers_to_transform", layers, 0)
        elif layers is not None:
            self.layers_to_transform = cast(list[int], checks.attentions("layers_to_transform", layers, or_names=False))
        for name in ("target_modules", "exclude_modules"):
            if getattr(self, name) is not None:
                setattr(self, name, checks.modules_or_pattern(name, getattr(self, name)))
        if self.modules_to_save is not None:
            self.modules_to_save = checks.modules("modules_to_save", self.modules_to_save)

    def _check_prompt(self) -> None:
        if isinstance(self.propagation, str) and self.propagation == "prompt":
            raise ValueError(
                "`propagation='prompt'` was a mean over the prompt's tokens, for which layers had to know what the "
                "prompt is. Its successor is `propagation='mean'`: over the tokens that the skipped attention would "
                "have let each token look at."
            )
        if isinstance(self.router, str) and self.router == "prompt":
            raise ValueError(
                "`router='prompt'` weighted the branches by the prompt, which does not fold into the weights. Its "
                "successor is `router='static'`, with `propagation='mean'` for what other tokens say."
            )

    def _check_num_skip(self) -> None:
        value = self.num_skip = checks.plain(self.num_skip)
        is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= checks.LARGEST
        is_share = isinstance(value, float) and 0 < value < 1
        if not (value is None or is_count or is_share or (isinstance(value, str) and value == "auto")):
            allowed = f"a count from 0 to {checks.LARGEST} (int), a fraction in (0, 1) (float), or 'auto'"
            raise checks.refused("num_skip", value, allowed)
        if self.max_loss_increase is not None:
            self.max_loss_increase = checks.number(
                "max_loss_increase", self.max_loss_increase, lambda v: v >= 0, "a number of at least 0"
            )
        if self.target_speedup is not None:
            self.target_speedup = checks.number(
                "target_speedup", self.target_speedup, lambda v: v > 1, "a number above 1"
            )
        by_budget = [n for n in ("max_loss_increase", "target_speedup") if getattr(self, n) is not None]
        if value == "auto" and by_budget != ["max_loss_increase"]:
            raise ValueError("`num_skip='auto'` needs `max_loss_increase`, and no `target_speedup`.")
        if value != "auto" and "max_loss_increase" in by_budget:
            raise ValueError(f"`max_loss_increase` needs `num_skip='auto'`, got {value!r}.")
        if value is not None and "target_speedup" in by_budget:
            raise ValueError(f"`target_speedup` says how many to skip, and so does `num_skip`={value!r}: give one.")
        if by_budget and self.skip_layers is not None:
            raise ValueError(f"`{by_budget[0]}` is for a search, but `skip_layers` names the set: give one of the two.")
        if isinstance(value, int) and self.skip_layers is not None and value != len(self.skip_layers):
            raise ValueError(
                f"`num_skip`={value} contradicts `skip_layers`, which names {len(self.skip_layers)} layers: "
                "give one of the two."
            )

    def count_to_skip(self, num_attentions: int) -> int:
        """Number of attentions to skip in a model that has `num_attentions` of them; with a budget, while searching."""
        if self.skip_layers is not None:
            return len(self.skip_layers)
        wanted = 0.25 if self.num_skip is None or isinstance(self.num_skip, str) else self.num_skip
        return wanted if isinstance(wanted, int) else round(wanted * num_attentions)

    def record(self) -> dict[str, Any]:
        """What a merged model remembers of its adapter, in `config.eas["config"]`: plain values, and no folder."""
        base = self.base_model_name_or_path
        try:
            validate_repo_id(base)
        except ValueError:  # a folder, or nothing
            base = None
        return {"base_model": None if base and os.path.isdir(base) else base} | {k: getattr(self, k) for k in RECORDED}

    def settle(self, skip_layers: Iterable[int | str]) -> None:
        """Record that the set is chosen, in place of whatever said how to choose it."""
        self.skip_layers = list(skip_layers)
        self.is_set_given = False
        if self.num_skip is not None:
            self.num_skip = len(self.skip_layers)
        self.max_loss_increase = self.target_speedup = None
