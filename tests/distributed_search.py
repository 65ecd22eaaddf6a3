"""One process of distributed trainings with searches, one after another; started by `test_distributed.py`.

torchrun --nproc-per-node 2 distributed_search.py OUT '{"NAME": {"gradient_checkpointing": true}}'
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from searches import charge
from torch import distributed
from transformers import Trainer, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from zoo import tiny
from zoo.training import collate, dataset, trainer

from peft_eas import EASCallback, EASConfig
from peft_eas.shards import is_shared_out

STEPS, SAVE = 14, 8  # at the end of an epoch: not every version of the Trainer resumes exactly within one


class Fail(TrainerCallback):
    """The second process fails in the middle of the search."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 4:
            raise RuntimeError("this process has had enough")


def allow_fsdp_on_cpus() -> None:
    """torch shards on CPUs, too; accelerate only lets accelerators do it."""
    init = AcceleratorState.__init__

    def patched(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState().distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = patched


def allow_deepspeed_on_cpus() -> None:
    """DeepSpeed trains on CPUs, too; accelerate only lets accelerators do it in several processes."""
    prepare = PartialState._prepare_backend
    PartialState._prepare_backend = lambda self, cpu=False, *args: prepare(self, True, *args)


def train(out: Path, batch_size: int, options: dict) -> tuple:
    unset_hf_deepspeed_config()  # that of the training before
    torch.manual_seed(0)
    model = get_peft_model(tiny.model("llama"), EASConfig(num_skip=2, **options.pop("config", {})))
    tiny.shake(model, scale=0.05)
    if options.get("gradient_checkpointing"):
        model.enable_input_require_grads()
    if options.get("fsdp"):
        allow_fsdp_on_cpus()
    if options.get("deepspeed"):
        allow_deepspeed_on_cpus()
    callbacks = [Fail()] if options.pop("fail", False) else []
    resume = options.pop("resume", None)
    if charged := options.pop("charge", None):
        charge(model, 1.0, charged)
    settings = dict(warmup_steps=2, search_steps=8, interval=2) | options.pop("search", {})
    search = EASCallback(dataset(20), **settings)
    momentum = options.pop("momentum", None)
    made = trainer(
        out, model, callbacks=[search, *callbacks], per_device_train_batch_size=batch_size, max_steps=STEPS,
        **dict(save_strategy="steps", save_steps=SAVE, logging_strategy="steps", logging_steps=1) | options,
    )  # fmt: skip
    if momentum is not None:
        made.optimizer_cls_and_kwargs = torch.optim.SGD, dict(lr=0.5, momentum=momentum, weight_decay=0.05)
    made.train(resume_from_checkpoint=resume)
    made.save_model(str(out / "final"))
    return made, search


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """What a model says to a batch, the same one in all processes."""
    return model.eval()(**collate(list(dataset(8)))).logits


def losses(made: Trainer) -> list[float]:
    """Those of the optimizer steps."""
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def main() -> None:
    for name, options in json.loads(sys.argv[2]).items():
        out = Path(sys.argv[1]) / name
        made, search = train(out, 3, options)
        evaluated = made.evaluate()["eval_loss"]
        (out / f"rank{made.args.process_index}.json").write_text(
            json.dumps(
                {
                    "report": search.report,
                    "skip_layers": made.model.skip_layers,
                    "eval_loss": evaluated,
                    "losses": losses(made),
                    "logits": logits(made.model).tolist(),
                    "sharded": any(is_shared_out(p) for p in made.model.parameters()),
                }
            )
        )
        distributed.barrier()
    os._exit(0)  # taking gloo's threads down in order hangs now and then


if __name__ == "__main__":
    main()
