"""A frozen Gemma with LoRA adapters as a NeMo model.

`GemmaLoRA` is a `ModelPT`: NeMo's exp_manager, optimizers, schedulers and `.nemo` archives work with it as with
NeMo's own models. Its state is the adapter alone, under peft's names, in checkpoints and in the archive.
"""

import math
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from lightning.pytorch import Trainer
from nemo.core.classes import ModelPT
from nemo.core.classes import common as nemo_classes
from omegaconf import DictConfig
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.prompt import Prompt
from nemo_configs.command_line import UserError, plain
from training.base_model import describe
from training.batches import MicroBatch, Step, learned_loss
from training.distribute import AdapterParallel
from training.fast_layers import speed_up

# NeMo restores only classes of known packages; this one is ours.
nemo_classes.ALLOWED_TARGET_PREFIXES.append("training.gemma_lora.")


def weights_dtype() -> torch.dtype:
    """bfloat16 where the processor computes in it, else float32 (bfloat16 would be emulated, and slower)."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


class GemmaLoRA(ModelPT):
    """
    Args:
        cfg: `base_folder` (a Hugging Face folder), `base` (`base_model.describe` of it), `dtype` of its weights, `peft`
            (LoraConfig keys), `prompt` (Prompt keys), `optim` (NeMo's optimizer config), `clip` (of the gradient
            norm), `seed`.
        trainer: a Lightning trainer, or None to answer prompts only.

    Raises:
        UserError: the base model is another one than the adapter was trained on, or has no such target modules.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None) -> None:
        super().__init__(cfg, trainer)
        self.automatic_optimization = False  # a step's micro-batches share one mean over learned tokens
        folder = Path(cfg.base_folder)
        found = describe(folder)
        if found["sha256"] != cfg.base.sha256:
            raise UserError(
                f"this adapter was trained on {cfg.base.name} with weights {cfg.base.sha256[:12]}; {folder} holds "
                f"{found['name']} with weights {found['sha256'][:12]}. Give the right base: model.path=/its/folder"
            )
        torch.manual_seed(cfg.seed)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.prompt = Prompt(**plain(cfg.prompt))
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, cfg.dtype))
        base.config.use_cache = False
        base.learned_loss = MethodType(learned_loss, base)  # a method: a sharded base is gathered around its own
        lora = plain(cfg.peft)
        lora.pop("name")
        try:
            # Adapters of a bfloat16 model are kept in float32: an update is often smaller than bfloat16 can hold.
            self.model: PeftModel = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **lora))
        except ValueError as error:
            raise UserError(f"peft.target_modules={lora['target_modules']}: {error}") from None
        speed_up(self.model)

    def _loss(self, batch: MicroBatch) -> Tensor:
        return self.model.get_base_model().learned_loss(batch)

    def training_step(self, step: Step, batch_idx: int) -> None:
        # Chance (dropout) depends on the seed and the step only, so a resumed run draws what it would have drawn.
        torch.manual_seed(self.cfg.seed * 1_000_003 + self.global_step)
        optimizer = self.optimizers()
        total = torch.zeros((), device=self.device)
        for batch in step.micro_batches:
            loss = self._loss(batch) * (1 / step.learned)
            self.manual_backward(loss)
            total += loss.detach()
        tokens = torch.tensor(float(sum(batch.tokens for batch in step.micro_batches)), device=self.device)
        if isinstance(self.trainer.strategy, AdapterParallel):
            total, tokens = self.trainer.strategy.sum_step(self._trainable(), torch.stack([total, tokens]))
        if not math.isfinite(total):
            raise UserError(
                f"the loss became {total.item()} at step {self.global_step + 1}. The last checkpoint is good; lower "
                f"task.train.learning_rate (now {self.cfg.optim.lr}) and train again"
            )
        norm = torch.nn.utils.clip_grad_norm_(self._trainable(), self.cfg.clip)
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        optimizer.zero_grad()
        self.lr_schedulers().step()
        values = {"train_loss": total, "grad_norm": norm, "learning_rate": rate, "tokens": tokens}
        self.log_dict(values, on_step=True, on_epoch=False, batch_size=1)

    def on_validation_epoch_start(self) -> None:
        self._validation_sum = torch.zeros(2, device=self.device, dtype=torch.float64)

    def validation_step(self, step: Step, batch_idx: int) -> None:
        for batch in step.micro_batches:
            self._validation_sum += torch.stack(
                [self._loss(batch).double(), torch.tensor(len(batch.targets), device=self.device).double()]
            )

    def on_validation_epoch_end(self) -> None:
        loss, tokens = self.trainer.strategy.reduce(self._validation_sum, reduce_op="sum")
        self.log("val_loss", (loss / tokens).float())

    def transfer_batch_to_device(self, step: Step, device: torch.device, dataloader_idx: int) -> Step:
        return Step([batch.to(device) for batch in step.micro_batches], step.learned)

    def configure_optimizers(self) -> Any:
        self.setup_optimization(self.cfg.optim)
        return [self._optimizer], [self._scheduler]

    def _trainable(self) -> list[Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Checkpoints are written between a step's end and Lightning's counting of it, which would make a resumed epoch
        # one step too long for the rows that are left.
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        batches["completed"] = batches["ready"]

    # The state of this model is its adapter: the base is named by hash, not copied.
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return get_peft_model_state_dict(self.model)

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        wanted = self.state_dict().keys()
        if strict and wanted != state_dict.keys():
            raise UserError(f"adapter weights do not fit: {sorted(wanted ^ state_dict.keys())[:3]} … differ")
        return set_peft_model_state_dict(self.model, state_dict)

    # Data comes as `Batches`, given to the trainer; ModelPT asks for these.
    def setup_training_data(self, train_data_config: Any) -> None:
        raise NotImplementedError("pass Batches to trainer.fit")

    def setup_validation_data(self, val_data_config: Any) -> None:
        raise NotImplementedError("pass Batches to trainer.fit")

    @classmethod
    def list_available_models(cls) -> list[Any]:
        return []
