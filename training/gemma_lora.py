"""A frozen Gemma with LoRA adapters as a NeMo model.

`GemmaLoRA` is a `ModelPT`: NeMo's exp_manager, optimizers, schedulers and `.nemo` archives work with it as with NeMo's
own models. Its state, in checkpoints and in the archive, is the adapter alone under peft's names.
"""

from pathlib import Path
from types import MethodType
from typing import Any

import torch
from bitsandbytes.optim import PagedAdamW32bit
from lightning.pytorch import Trainer
from nemo.core.classes import ModelPT
from nemo.core.classes import common as nemo_classes
from nemo.core.config.optimizers import AdamWParams
from nemo.core.optim.optimizers import register_optimizer
from omegaconf import DictConfig, OmegaConf
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from core.base_model import describe
from core.configuration import escaped, unescaped
from core.errors import UserError
from core.load_model import add_lora, keep_in_main_memory, load_base, lora_settings
from core.machine import processor_vendor
from core.prompt import Prompt
from training.batches import MicroBatch, Step, loss_sum
from training.distribute import AdapterParallel
from training.experts import round_experts
from training.fused_layers import fuse_layers
from training.packed_attention import use_packed_attention
from training.qlora import fuse_qlora_layers
from training.stored_weights import can_store, load_stored

# NeMo restores only classes of allowed packages.
nemo_classes.ALLOWED_TARGET_PREFIXES.append("training.gemma_lora.")
register_optimizer("paged_adamw_32bit", PagedAdamW32bit, AdamWParams)


def weights_dtype() -> torch.dtype:
    """Of the frozen base: bfloat16 where the machine multiplies it faster than float32.

    What a CPU is tells it, not a measurement: a run that goes on, and every process of a distributed one, must choose
    alike. AVX-512's own bfloat16 instructions do twice as much as float32's on AMD's processors; on Intel's (family 6,
    model 207 without AMX, torch 2.13) half as much: 171 against 327 GFLOP/s, a training 290 against 430 tokens/s.
    """
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    # torch may be confined to fewer instructions than the processor has: see core.machine.confine_to_avx2.
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return torch.float32
    faster = torch.cpu._is_amx_tile_supported() or processor_vendor() == "AuthenticAMD"
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() and faster else torch.float32


def nemo_config(settings: dict[str, Any]) -> DictConfig:
    """`settings` as NeMo wants them, who keeps a model's in OmegaConf: a `${` in one of their texts stays text."""
    return OmegaConf.create(escaped(settings))


def available_optimizer(name: str, accelerator: str) -> str:
    """NeMo's name of the optimizer `name`, or of its substitute on `accelerator`."""
    if name.startswith("paged") and accelerator == "cpu":
        print("Optimizer: adamw with 32-bit state, as paged_adamw_32bit pages between a GPU and main memory")
        return "adamw"
    return name


def model_settings(base_folder: Path, peft: dict[str, Any], prompt: dict[str, Any], seed: int) -> dict[str, Any]:
    """What the configuration of every `GemmaLoRA` has; `peft` and `prompt` are sections of the run's configuration."""
    return {
        "base_folder": str(base_folder),
        "base": describe(base_folder),
        "dtype": str(weights_dtype()).removeprefix("torch."),
        "peft": {"name": peft["name"], **lora_settings(peft)},
        "prompt": prompt,
        "seed": seed,
    }


class GemmaLoRA(ModelPT):
    """A frozen base with trainable adapters in float32.

    Args:
        cfg: `base_folder` (a Hugging Face folder), `base` (`base_model.describe` of it), `dtype` of its weights, `peft`
            (`name` and LoraConfig keys), `quantization` (BitsAndBytesConfig keys or None), `gradient_checkpointing`,
            `prompt` (Prompt keys), `optim` (NeMo's optimizer config), `clip` (maximum gradient norm), `seed`, and where
            it is wanted `table_in_main_memory`.
        trainer: a Lightning trainer, or None for inference.

    Raises:
        UserError: the base is not the one that the adapter was trained on, or lacks a target module.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None) -> None:
        # NeMo resolves its configuration before it restores a model, and again here; there is nothing to resolve.
        settings = unescaped(OmegaConf.to_container(cfg, resolve=False))
        super().__init__(nemo_config(escaped(settings)), trainer)
        self.automatic_optimization = False  # the micro-batches of a step share one mean over target tokens
        folder = Path(cfg.base_folder)
        found = describe(folder)
        if found["sha256"] != cfg.base.sha256:
            raise UserError(
                f"this adapter was trained on {cfg.base.name} with weights {cfg.base.sha256[:12]}; {folder} holds "
                f"{found['name']} with weights {found['sha256'][:12]}. Pass the right base: model.path=FOLDER"
            )
        torch.manual_seed(cfg.seed)
        self.prompt = Prompt(**settings["prompt"])
        device = (
            trainer.strategy.root_device if trainer else torch.device("cuda" if torch.cuda.is_available() else "cpu")
        )
        dtype, quantization = getattr(torch, cfg.dtype), settings.get("quantization")
        divided = trainer and isinstance(trainer.strategy, AdapterParallel) and trainer.strategy.kind != "ddp"
        stored = not quantization and not divided and can_store(folder, dtype, device)
        base = load_stored(folder) if stored else load_base(folder, dtype, quantization, device)
        if cfg.get("table_in_main_memory") and device.type != "cpu":
            keep_in_main_memory(base)
        base.config.use_cache = False
        base.loss_sum = MethodType(loss_sum, base)  # a method: FSDP gathers a sharded base around its methods
        self.model = add_lora(base, {key: value for key, value in settings["peft"].items() if key != "name"})
        if cfg.get("gradient_checkpointing"):
            base.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()  # `from_pretrained` sets eval mode, which Lightning keeps
        fuse_layers(self.model)
        if trainer:
            use_packed_attention(base)
            round_experts(base, device)
        fuse_qlora_layers(self.model)

    def _loss(self, batch: MicroBatch) -> Tensor:
        return self.model.get_base_model().loss_sum(batch)

    def training_step(self, step: Step, batch_idx: int) -> None:
        # Randomness (dropout) depends on seed and step only, so that a resumed run draws the same numbers.
        torch.manual_seed(self.cfg.seed * 1_000_003 + self.global_step)
        optimizer = self.optimizers()
        total = torch.zeros((), device=self.device)
        for batch in step.micro_batches:
            loss = self._loss(batch) * (1 / step.target_tokens)
            self.manual_backward(loss)
            total += loss.detach()
        if isinstance(self.trainer.strategy, AdapterParallel):
            total = self.trainer.strategy.sum_step(self._trainable(), total)
        norm = torch.nn.utils.clip_grad_norm_(self._trainable(), self.cfg.clip)
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        optimizer.zero_grad()
        self.lr_schedulers().step()
        values = {"train_loss": total, "grad_norm": norm, "learning_rate": rate}
        self.log_dict(
            values, on_step=True, on_epoch=False, batch_size=1, logger=False
        )  # RunProgress writes to the loggers

    def on_validation_epoch_start(self) -> None:
        self._validation_sum = torch.zeros(2, device=self.device, dtype=torch.float64)

    def validation_step(self, step: Step, batch_idx: int) -> None:
        for batch in step.micro_batches:
            self._validation_sum += torch.stack(
                [self._loss(batch).double(), torch.tensor(len(batch.targets), device=self.device).double()]
            )

    def on_validation_epoch_end(self) -> None:
        loss, tokens = self.trainer.strategy.reduce(self._validation_sum, reduce_op="sum")
        self.log("val_loss", (loss / tokens).float(), logger=False)

    def transfer_batch_to_device(self, step: Step, device: torch.device, dataloader_idx: int) -> Step:
        return Step([batch.to(device) for batch in step.micro_batches], step.target_tokens, step.tokens)

    def configure_optimizers(self) -> Any:
        self.setup_optimization(self.cfg.optim)
        return [self._optimizer], [self._scheduler]

    def _trainable(self) -> list[Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    # The state of this model is its adapter; the base is referred to by hash, not copied.
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return get_peft_model_state_dict(self.model)

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        wanted = self.state_dict().keys()
        if strict and wanted != state_dict.keys():
            raise UserError(f"the adapter's weights do not fit: {sorted(wanted ^ state_dict.keys())[:3]} … differ")
        return set_peft_model_state_dict(self.model, state_dict)

    def to_config_file(self, path2yaml_file: str) -> None:
        """As NeMo's, but without resolving: a `${` in the prompt would be a reference when the file is read again."""
        super().to_config_file(path2yaml_file)
        OmegaConf.save(self._cfg, path2yaml_file)

    # Data is passed to the trainer as `Batches`; ModelPT requires these methods.
    def setup_training_data(self, train_data_config: Any) -> None:
        raise NotImplementedError("pass Batches to trainer.fit")

    def setup_validation_data(self, val_data_config: Any) -> None:
        raise NotImplementedError("pass Batches to trainer.fit")

    @classmethod
    def list_available_models(cls) -> list[Any]:
        return []
