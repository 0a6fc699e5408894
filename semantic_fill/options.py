# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The options as typed, frozen dataclasses in groups, with their help texts and their rules.

`Options` is all groups at once, so a function can ask for the group it needs (`DataOptions`, say) and be handed the whole.
Options never change: what a run finds out on its way makes a new object with `dataclasses.replace`.

A field whose default is `None` but whose type is not follows from other options, or from what the run finds out: from the
data (`max_train_steps`) or with --fast from the GPU. It is filled in before anything uses it.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.optimization import SchedulerType

from pipeline_flux_fill_semantic import SEMANTIC_MODES
from semantic_attention import SEMANTIC_POSITIONS, SINGLE_MAP, VISIBLE_ATTENTIONS, check_map_names
from semantic_fill.memory import CHECKPOINTING
from semantic_fill.option_fields import OptionGroup, check_output_dir, option
from semantic_fill.precision import PRECISIONS


# Piecewise constant takes rules that no option states.
LR_SCHEDULERS = tuple(s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT)
TRACKERS = (*LOGGER_TYPE_TO_CLASS, "all", "none")
HUB_CHECKPOINT = "last-checkpoint"


@dataclass(frozen=True, kw_only=True)
class ModelOptions(OptionGroup):
    """Model"""

    pretrained_model_name_or_path: str = option(help="FLUX.1 Fill: a folder or a Hub repository.")
    revision: str | None = option(None, help="Revision of the model on the Hub.")
    variant: str | None = option(None, help="Variant of the model's files, for example fp16.")
    cache_dir: str | None = option(None, help="Folder for downloaded models and data sets.")

    @property
    def loading(self) -> dict:
        """Keyword arguments of every `from_pretrained` call that loads a part of the base model."""
        return {
            "revision": self.revision,
            "variant": self.variant,
            "cache_dir": self.cache_dir,
            "use_safetensors": True,
        }


@dataclass(frozen=True, kw_only=True)
class DataOptions(OptionGroup):
    """Data"""

    dataset_name: str | None = option(None, help="Data set on the Hub, or a folder of parquet or webdataset files.")
    dataset_config_name: str | None = option(None, help="Configuration of the Hub data set.")
    train_split: str = option("train", help="Split of --dataset_name to train on. Other splits are never read.")
    train_data_dir: str | None = option(
        None,
        help="Local folder of triptychs, or of the folders visible/, target/ and semantic/ with pictures of the same names."
        " Several maps have a folder semantic_NAME/ each.",
    )
    follow_links: bool = option(False, help="Also read linked files that lie outside of the data set's folder.")
    image_column: str = option("image", help="Column of the triptych (visible | target | semantic).")
    visible_column: str | None = option(None, help="Column of the visible view, where the views are three pictures.")
    target_column: str | None = option(None, help="Column of the target view.")
    semantic_column: str | None = option(None, help="Column of the semantic map, or of several maps: a,b.")
    semantic_panels: str | None = option(
        None, help="Maps on each canvas, behind visible and target: their number, or their names, a,b."
    )
    caption_column: str | None = option(None, help="Column of the captions. Default: `text` where the data has it.")
    caption_lines: bool = option(False, help="Each line of a .txt file beside a picture is a caption of its own.")
    instance_prompt: str | None = option(None, help="Prompt of the samples that have no caption.")
    palette: str | None = option(
        None, help="JSON file of the classes' colors, where semantic maps hold label numbers."
    )
    max_train_samples: int | None = option(None, at_least=1, help="Use only the first rows, up to this number.")
    resolution: int = option(512, help="Height of a panel in pixels, a multiple of 16. Also its width unless --width.")
    width: int = option(None, help="Width of a panel in pixels, a multiple of 16.")
    aspect_buckets: bool = option(
        False, help="Train on several shapes of the area --resolution x --width, each sample in the nearest one."
    )

    def __post_init__(self):
        super().__post_init__()
        self._set_defaults(width=self.resolution)
        for name in ("resolution", "width"):
            size = getattr(self, name)
            if size is not None and (size <= 0 or size % 16):
                raise ValueError(f"--{name} has to be a positive multiple of 16 but is {size}.")
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise ValueError("Pass exactly one of --dataset_name and --train_data_dir.")
        views = [self.visible_column, self.target_column, self.semantic_column]
        if any(views) and not all(views):
            raise ValueError("--visible_column, --target_column and --semantic_column have to be passed together.")
        maps = (self.semantic_column or "").split(",")
        if self.target_column and self.target_column in (self.visible_column, *maps):
            raise ValueError(f"--target_column {self.target_column} is what is painted, so no other view can show it.")
        if self.semantic_panels and (any(views) or self.semantic_panels == "0"):
            raise ValueError(
                f"--semantic_panels {self.semantic_panels} has to be 1 or more, and counts the maps of a canvas, so it cannot"
                " go with --semantic_column."
            )
        try:
            check_map_names(self.semantic_maps)
        except ValueError as error:
            raise ValueError(f"--semantic_column, --semantic_panels and folders name the maps: {error}.") from error

    @property
    def semantic_maps(self) -> tuple[str, ...]:
        """
        Names of the semantic maps, in their order: those of the columns, the panels or the folders. One map needs no name
        and is called `semantic`.
        """
        names, folder = (self.semantic_column or self.semantic_panels or "").split(","), self.train_data_dir
        if self.semantic_panels and self.semantic_panels.isdecimal():
            names = [f"map_{index + 1}" for index in range(int(self.semantic_panels))]
        elif names == [""] and folder is not None and not Path(folder, "semantic").is_dir():
            names = sorted(path.name.removeprefix("semantic_") for path in Path(folder).glob("semantic_*/"))
        return tuple(names) if len(names) > 1 else SINGLE_MAP


@dataclass(frozen=True, kw_only=True)
class SemanticOptions(OptionGroup):
    """Semantic guidance"""

    semantic_mode: str = option("cross_attention", choices=SEMANTIC_MODES, help="How the semantic map enters.")
    fusion_alpha: float = option(0.5, at_most=1, help="Share of the map in the blend of pixel_fusion.")
    semantic_num_layers: int = option(1, at_least=1, help="Layers of the module.")
    semantic_num_heads: int = option(8, at_least=1, help="Attention heads of a cross-attention layer.")
    semantic_head_dim: int = option(16, at_least=1, help="Channels of an attention head.")
    semantic_position: str = option(
        "rope",
        choices=SEMANTIC_POSITIONS,
        help="How cross-attention finds places: rope rotates queries and keys by row and column, none compares contents.",
    )
    semantic_dropout: float = option(0.0, below=1, help="Share of samples trained without their map.")
    semantic_weights: str | None = option(
        None, help="Trained module to start from, with its own configuration: a trained folder or Hub repository."
    )
    visible_attention: str = option(
        "joint", choices=VISIBLE_ATTENTIONS, help="`causal`: painting computes prompt and visible view only once."
    )
    visible_gradients: bool = option(True, help="Gradients through the pass of the visible view, if it is causal.")


@dataclass(frozen=True, kw_only=True)
class LoraOptions(OptionGroup):
    """LoRA"""

    rank: int = option(16, at_least=1, help="Rank of the LoRA.")
    lora_alpha: int = option(None, at_least=1, help="Scale of the LoRA. Default: the rank.")
    lora_dropout: float = option(0.0, below=1, help="Dropout in front of the LoRA's matrices.")
    lora_layers: str | None = option(
        None, help="Comma-separated module names. Default: attention and feed-forward of all blocks, last layer."
    )
    fused_lora: bool = option(
        True,
        help="Compute LoRA products in the base's dtype, and with --compile join those of layers that read the same"
        " input. --no-fused_lora: PEFT's own layers.",
    )
    lora_weights: str | None = option(None, help="Trained LoRA to start from: a folder or Hub repository.")


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions(OptionGroup):
    """Objective"""

    seed: int = option(0, below=2**32, help="Every random draw follows from it and the sample's place in the run.")
    max_sequence_length: int = option(
        None,
        words=("auto",),
        at_least=1,
        at_most=512,
        help="T5 tokens of a prompt. `auto`: as many as the longest caption needs. Default: 512, or auto with --fast.",
    )
    random_flip: bool = option(
        False, help="Mirror all views of a sample half of the time. Captions that say left or right do not follow."
    )
    caption_dropout: float = option(0.0, at_most=1, help="Share of samples trained with an empty prompt.")
    guidance_scale: float = option(1.0, help="Fed to the guidance embedding while training.")
    weighting_scheme: str = option(
        "logit_normal",
        choices=("sigma_sqrt", "logit_normal", "mode", "cosmap", "none"),
        help="Distribution of timesteps (logit_normal, mode) or weight of the loss (sigma_sqrt, cosmap).",
    )
    logit_mean: float = option(0.0, at_least=-math.inf, help="Mean of logit_normal's normal distribution.")
    logit_std: float = option(1.0, above=0, help="Standard deviation of logit_normal's normal distribution.")
    # Above 2 / (pi - 2) timesteps would leave (0, 1), see https://huggingface.co/papers/2403.03206.
    mode_scale: float = option(1.29, at_most=2 / (math.pi - 2), help="Scale of the mode distribution.")
    timestep_shift: float | str = option(
        "resolution",
        words=("resolution", "none"),
        above=0,
        help="`resolution`: shift timesteps as inference does at this size. `none`, or a factor such as 3.0.",
    )
    loss_region: str = option(
        None,
        choices=("diptych", "target"),
        help="Panels that the loss is taken over. Default: diptych, or target with --visible_attention causal.",
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(OptionGroup):
    """Optimizer and schedule"""

    train_batch_size: int = option(4, at_least=1, help="Samples in a forward pass of one process.")
    gradient_accumulation_steps: int = option(1, at_least=1, help="Forward passes in an optimizer step.")
    num_train_epochs: int = option(1, at_least=1, help="Passes over the data.")
    max_train_steps: int = option(None, at_least=1, help="Optimizer steps; overrides --num_train_epochs.")
    max_bad_steps: int = option(10, at_least=1, help="Stop after so many steps in a row without finite gradients.")
    optimizer: str = option("adamw", choices=("adamw", "prodigy"), help="AdamW or Prodigy.")
    use_8bit_adam: bool = option(False, help="Use bitsandbytes' AdamW, whose states have 8 bits.")
    learning_rate: float = option(
        None, help="Learning rate of the LoRA. Default: 1e-4, or 1 for Prodigy, which scales it to what it estimates."
    )
    semantic_learning_rate: float = option(None, help="Rate of the module. Default: --learning_rate.")
    semantic_scale_learning_rate: float = option(
        None, help="Rate of the module's gates, which start at zero. Default: ten times --semantic_learning_rate."
    )
    prodigy_use_bias_correction: bool = option(True, help="Prodigy's bias correction.")
    prodigy_safeguard_warmup: bool = option(True, help="Keep Prodigy's estimate from growing during warm-up.")
    adam_beta1: float = option(0.9, below=1, help="First beta of both optimizers.")
    adam_beta2: float = option(0.999, below=1, help="Second beta of both optimizers.")
    adam_weight_decay: float = option(1e-4, help="Weight decay of both optimizers.")
    adam_epsilon: float = option(1e-8, above=0, help="Epsilon of both optimizers.")
    max_grad_norm: float = option(1.0, above=0, help="Norm that gradients are clipped to.")
    ema_decay: float | None = option(
        None, above=0, below=1, help="Decay of a moving average of LoRA and module, which the result then holds."
    )
    lr_scheduler: str = option("constant", choices=LR_SCHEDULERS, help="Schedule of the learning rates.")
    lr_warmup_steps: int = option(0, help="Steps in which the rates rise from zero.")
    lr_num_cycles: int = option(1, help="Restarts of cosine_with_restarts.")
    lr_power: float = option(1.0, help="Power of polynomial.")


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions(OptionGroup):
    """Precision, memory and speed"""

    mixed_precision: str | None = option(None, choices=("no", "fp16", "bf16"), help="Default: accelerate's setting.")
    allow_tf32: bool = option(False, help="Allow TF32 in float32 matrix products.")
    fast: bool = option(
        False,
        help="Choose --base_precision, --checkpointing, --compile and --attention_backend by the GPU and its free"
        " memory, and --max_sequence_length auto. Options you pass explicitly are never overridden.",
    )
    base_precision: str = option(
        None,
        choices=PRECISIONS,
        help="Precision of the frozen blocks. Default: bf16, which keeps the dtype of --mixed_precision. fp8, fp8x2 and"
        " int8mm also multiply in 8 bits, int8mm on GPUs without fp8. nf4 needs bitsandbytes.",
    )
    checkpointing: float | str = option(
        None,
        words=tuple(CHECKPOINTING),
        above=0,
        below=1,
        help="What backward recomputes: nothing (none, the default), all but matrix products and attention"
        " (selective), or everything (full). offload is full with the blocks' inputs kept in the CPU's memory, and stream"
        " is offload with a quantized base's weights kept there too. A number is full for this share of the blocks, for"
        " example 0.3.",
    )
    gradient_checkpointing: bool = option(False, help="The same as --checkpointing full, unless that is passed.")
    compile: bool = option(None, help="Compile the transformer's repeated blocks. Default: no.")
    cuda_graphs: bool = option(
        None,
        help="Launch forward and backward at once, as a CUDA graph. Your changes to the model or the loss then run in"
        " Python only in the first steps and after validations. Default: with --compile, where it is possible.",
    )
    attention_backend: str = option(
        None,
        choices=[backend.value for backend in AttentionBackendName],
        help="As in diffusers' `set_attention_backend`. Default: native, or with --fast cuDNN's where it works.",
    )
    cache_latents: bool = option(True, help="Encode pictures and prompts once, before training.")
    cache_root: str = option(None, help="Folder for encodings. Default: OUTPUT_DIR/cache.")
    dataloader_num_workers: int = option(0, help="Processes that read samples.")


@dataclass(frozen=True, kw_only=True)
class OutputOptions(OptionGroup):
    """Checkpoints, validation, tracking and the Hub"""

    output_dir: str = option("semantic-fill-lora", help="Folder for checkpoints and the result.")
    overwrite_output_dir: bool = option(
        False, help="Replace the result of an earlier run in --output_dir, and delete its checkpoints and samples."
    )
    checkpointing_steps: int = option(500, at_least=1, help="Optimizer steps between checkpoints.")
    checkpoints_total_limit: int | None = option(None, at_least=1, help="Number of checkpoints to keep.")
    resume_from_checkpoint: str | None = option(
        None, help="`latest`, the path of a checkpoint, or a Hub repository that one was pushed to."
    )
    allow_changed_data: bool = option(
        False, help="Continue although the samples, the seed or the base's weights are others."
    )
    validation_data_dir: str | None = option(
        None, help="Folder of held-out samples: pictures as for --train_data_dir, or tables."
    )
    validation_fraction: float = option(
        0.0, below=1, help="Share of the samples that is held out, chosen by the content of their pictures."
    )
    validation_steps: int | None = option(
        None, at_least=1, help="Optimizer steps between validations, which measure held-out samples and paint some."
    )
    keep_best: bool = option(False, help="Keep the weights of the lowest held-out loss in `best/`.")
    early_stopping_patience: int | None = option(None, at_least=1, help="Validations without a gain that end the run.")
    num_validation_images: int = option(
        4, at_least=1, help="Samples painted, the first of the held-out data if there is any."
    )
    validation_inference_steps: int = option(28, at_least=1, help="Denoising steps of a validation painting.")
    validation_guidance_scale: float = option(30.0, help="Guidance scale of a validation painting.")
    logging_dir: str = option("logs", help="Folder inside --output_dir for the tracker's files.")
    log_level: str = option("info", choices=("debug", "info", "warning", "error"), help="Level of log messages.")
    report_to: str = option("tensorboard", choices=TRACKERS, help="Where losses, rates and paintings are logged to.")
    push_to_hub: bool = option(False, help="Push the result, with the token of `hf auth login` or HF_TOKEN.")
    hub_model_id: str | None = option(None, help="Hub repository. Default: the name of --output_dir.")
    hub_private_repo: bool = option(False, help="Create the repository as private.")
    hub_strategy: str = option(
        "end",
        choices=("end", "every_checkpoint"),
        help=f"Push the result only, or also each checkpoint as `{HUB_CHECKPOINT}/`.",
    )


@dataclass(frozen=True, kw_only=True)
class Options(
    ModelOptions,
    DataOptions,
    SemanticOptions,
    LoraOptions,
    ObjectiveOptions,
    OptimizerOptions,
    RuntimeOptions,
    OutputOptions,
):
    """All options of a training run."""

    def __post_init__(self):
        super().__post_init__()
        self._set_defaults(learning_rate=1.0 if self.optimizer == "prodigy" else 1e-4)
        self._set_defaults(
            lora_alpha=self.rank,
            max_sequence_length="auto" if self.fast else 512,
            semantic_learning_rate=self.learning_rate,
            cache_root=str(Path(self.output_dir, "cache")),
            loss_region="diptych" if self.visible_attention == "joint" else "target",
        )
        # Prodigy finds the step size itself and knows one rate only.
        factor = 1 if self.optimizer == "prodigy" else 10
        self._set_defaults(semantic_scale_learning_rate=factor * self.semantic_learning_rate)
        if self.gradient_checkpointing:
            self._set_defaults(checkpointing="full")
        if not self.fast:
            self._set_defaults(base_precision="bf16", checkpointing="none", compile=False, attention_backend="native")
        self._check_rules()

    def _check_rules(self) -> None:
        """Refuses combinations with which a run would fail late or silently go wrong."""
        if self.resume_from_checkpoint is not None and (self.lora_weights or self.semantic_weights):
            raise ValueError(
                "--lora_weights and --semantic_weights cannot go with --resume_from_checkpoint: the checkpoint's weights"
                " would replace them."
            )
        if self.semantic_position == "rope" and self.semantic_head_dim % 4:
            raise ValueError(
                "--semantic_head_dim has to be a multiple of 4 with --semantic_position rope, half for rows and half for"
                f" columns, but is {self.semantic_head_dim}."
            )
        if SEMANTIC_MODES[self.semantic_mode].fuses and len(self.semantic_maps) > 1:
            raise ValueError(
                f"--semantic_mode {self.semantic_mode} takes one map, but the data has {', '.join(self.semantic_maps)}."
            )
        target_alone = SEMANTIC_MODES[self.semantic_mode].is_diptych and self.loss_region == "target"
        if self.visible_attention == "causal" and not target_alone:
            got = f"--loss_region {self.loss_region} with --semantic_mode {self.semantic_mode}"
            raise ValueError(f"--visible_attention causal paints the target alone, so it cannot go with {got}.")
        rates = {self.learning_rate, self.semantic_learning_rate, self.semantic_scale_learning_rate}
        if self.optimizer == "prodigy" and len(rates) > 1:
            raise ValueError(f"--optimizer prodigy takes one learning rate for all weights but got {sorted(rates)}.")
        if self.max_train_steps is not None and self.lr_warmup_steps >= self.max_train_steps:
            raise ValueError(
                f"--lr_warmup_steps {self.lr_warmup_steps} has to be below the {self.max_train_steps} steps of the run."
            )
        if self.validation_data_dir is not None and self.validation_fraction:
            raise ValueError(
                "--validation_data_dir and --validation_fraction cannot go together: each says what is held out."
            )
        held_out = self.validation_steps and (self.validation_data_dir or self.validation_fraction)
        for name in ("keep_best", "early_stopping_patience"):
            if getattr(self, name) and not held_out:
                raise ValueError(
                    f"--{name} needs --validation_steps, and --validation_data_dir or --validation_fraction."
                )
        check_output_dir(
            self.output_dir, train_data_dir=self.train_data_dir, validation_data_dir=self.validation_data_dir
        )
