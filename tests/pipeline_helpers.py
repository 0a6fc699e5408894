# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What the tests of the pipeline and its modules share: pipelines, pictures, short calls, and trained or older weights."""

import contextlib
import copy
import json
from pathlib import Path

import PIL.Image
import reference as ref
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model_state_dict

from pipeline_flux_fill_semantic import SEMANTIC_MODES, FluxFillSemanticPipeline
from semantic_attention import SemanticAttentionModel, SemanticModel


STEPS = 2


def make_pipe(base, cls=FluxFillSemanticPipeline, own: bool = False, **kwargs):
    """A pipeline over the base's very modules, or over copies where the test changes them."""
    components = {name: copy.deepcopy(part) if own else part for name, part in base.components.items()}
    pipe = cls(**components, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(seed: int, height: int = 32, width: int = 48, batch: int = 1) -> torch.Tensor:
    """`(batch, 3, height, width)` in [0, 1], of values that a PIL image can hold."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, height, width), generator=generator).float() / 255


def to_pil(pixels: torch.Tensor) -> PIL.Image.Image:
    return PIL.Image.fromarray((pixels[0].movedim(0, -1) * 255).round().byte().numpy())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def paint(pipe, image=None, prompt="a hill", **kwargs):
    """One short call; the pictures as tensors unless asked otherwise."""
    defaults = {"num_inference_steps": STEPS, "max_sequence_length": 16, "output_type": "pt", "generator": seeded()}
    if kwargs.get("prompt_embeds") is not None:
        prompt = None
    return pipe(prompt=prompt, image=picture(1) if image is None else image, **(defaults | kwargs)).images


def fill(pipe, canvas: torch.Tensor, mask: torch.Tensor, **kwargs):
    """`FluxFillPipeline` itself on a canvas made by hand."""
    height, width = canvas.shape[-2:]
    return paint(pipe, canvas, mask_image=mask, height=height, width=width, **kwargs)


def diptych_of(visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    canvas = ref.make_diptych(visible, visible)
    return canvas, ref.make_mask(canvas[:1])


@contextlib.contextmanager
def watched(transformer):
    """Collects, for each step, the tokens that the pipeline passes and those that the transformer really works on."""
    passed, fed = [], []
    # Registered before the pipeline's own hook, so this one sees what comes into it.
    handles = [
        transformer.register_forward_pre_hook(lambda _, a, kw: passed.append(kw["hidden_states"]), with_kwargs=True),
        transformer.x_embedder.register_forward_pre_hook(lambda _, a: fed.append(a[0])),
    ]
    try:
        yield passed, fed
    finally:
        for handle in handles:
            handle.remove()


def differs(a: torch.Tensor, b: torch.Tensor, by: float = 1e-3) -> bool:
    return (a.float() - b.float()).abs().max().item() > by


def trained_like(seed: int = 0, model_class: type = SemanticAttentionModel, **config) -> SemanticModel:
    """A module whose every parameter is away from where it starts."""
    torch.manual_seed(seed)
    model = model_class(**config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


class Trained:
    """A LoRA folder, and what its weights paint before they are saved."""

    def __init__(
        self,
        base,
        folder: Path,
        seed: int,
        semantic_mode: str = "cross_attention",
        semantic_maps=None,
        visible="joint",
    ):
        self.folder, self.semantic_mode = folder, semantic_mode
        module_class = SEMANTIC_MODES[semantic_mode].module_class
        named = {} if semantic_maps is None else {"maps": semantic_maps}
        self.module = None if module_class is None else trained_like(seed, model_class=module_class, **named)
        modes = {"semantic_mode": semantic_mode, "semantic_maps": semantic_maps, "visible_attention": visible}
        pipe = make_pipe(base, own=True, semantic_attention=self.module, **modes)
        # The rank is not the alpha, so that a lost alpha shows.
        config = LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0", "proj_out"])
        torch.manual_seed(seed)
        pipe.transformer.add_adapter(config)
        layers = get_peft_model_state_dict(pipe.transformer)
        for name, parameter in pipe.transformer.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        self.plain = paint(pipe, return_diptych=True)
        maps = picture(2) if semantic_maps is None else [picture(2 + index) for index in range(len(semantic_maps))]
        self.guided = paint(pipe, semantic_image=maps if SEMANTIC_MODES[semantic_mode].uses_map else None)
        FluxFillSemanticPipeline.save_lora_weights(
            folder,
            transformer_lora_layers=layers,
            semantic_attention=self.module,
            **modes,
            transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
        )


def write_old_module(folder, num_layers: int = 2, **changes) -> dict[str, torch.Tensor]:
    """A module as commit bd5985d saved it: the class was always `SemanticAttentionModel`, with `injection`."""
    config = {
        "_class_name": "SemanticAttentionModel",
        "_diffusers_version": "0.42.1",
        "head_dim": 16,
        "in_channels": 64,
        "injection": "noise",
        "num_heads": 8,
        "num_layers": num_layers,
        "position": "none",
    } | changes
    shapes = {"norm_semantic.weight": [64], "norm_semantic.bias": [64], "to_v.weight": [128, 64]}
    shapes |= {"to_out.weight": [64, 128], "scale": [64]}
    if config["position"] != "aligned":
        shapes |= {"norm_image.weight": [64], "norm_image.bias": [64]}
        shapes |= {"to_q.weight": [128, 64], "to_k.weight": [128, 64]}
    if config["position"] == "direct":
        shapes = {"linear.weight": [64, 64], "linear.bias": [64], "scale": [64]}
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"layers.{layer}.{name}": torch.randn(shape, generator=generator) * 0.3
        for layer in range(num_layers)
        for name, shape in shapes.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    safetensors.torch.save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return weights
