# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Converts a FLUX LoRA from diffusers' key names to the kohya layout that ComfyUI and others read, and back.

    python examples/convert_lora.py output_dir/pytorch_lora_weights.safetensors lora_comfyui.safetensors
    python examples/convert_lora.py lora_comfyui.safetensors pytorch_lora_weights.safetensors

The keys of the source tell the direction. The kohya layout names the layers of the original FLUX code, where one layer
does what several do in diffusers: `img_attn.qkv` is `to_q`, `to_k` and `to_v`; `linear1` of a single block is those and
`proj_mlp`. The LoRAs of n such parts become one LoRA with n times the rank, with the downs stacked and the ups on a block
diagonal. The conversion is exact, and diffusers' own reader, which converts back, splits the result into the same n LoRAs.
A part without a LoRA gets a LoRA of zeros.

Mode, prompt length and size of a trained LoRA stay in the file's metadata. Its semantic module lies in a folder of its
own, which other tools have no place for: they paint without the map. sd-scripts also has none for a LoRA on the last
layer and refuses the file, unless you pass --skip_final_layer.
"""

import argparse
import re
import sys
from pathlib import Path

import safetensors.torch
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from peft.utils.other import get_pattern_key

from pipeline_flux_fill_semantic import SEMANTIC_METADATA_KEY, read_trained_settings, save_tensors
from semantic_attention import check_lora, parse_json, read_header


PREFIX = "transformer."
KOHYA_PARTS = ("lora_down.weight", "lora_up.weight", "alpha")

# Original layer -> its parts in diffusers, with the rows (outputs) of each part in multiples of the model's width.
DOUBLE_BLOCK = {
    "img_attn_qkv": {"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1},
    "img_attn_proj": {"attn.to_out.0": 1},
    "img_mlp_0": {"ff.net.0.proj": 4},
    "img_mlp_2": {"ff.net.2": 1},
    "img_mod_lin": {"norm1.linear": 6},
    "txt_attn_qkv": {"attn.add_q_proj": 1, "attn.add_k_proj": 1, "attn.add_v_proj": 1},
    "txt_attn_proj": {"attn.to_add_out": 1},
    "txt_mlp_0": {"ff_context.net.0.proj": 4},
    "txt_mlp_2": {"ff_context.net.2": 1},
    "txt_mod_lin": {"norm1_context.linear": 6},
}
SINGLE_BLOCK = {
    "linear1": {"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1, "proj_mlp": 4},
    "linear2": {"proj_out": 1},
    "modulation_lin": {"norm.linear": 3},
}
BLOCKS = {
    "transformer_blocks": ("lora_unet_double_blocks", DOUBLE_BLOCK),
    "single_transformer_blocks": ("lora_unet_single_blocks", SINGLE_BLOCK),
}
# PEFT also adapts the transformer's last layer if `proj_out` is named for the single blocks.
LAST_MODULE, LAST_LAYER = "proj_out", "lora_unet_final_layer_linear"


def layer_alphas(modules: dict[str, tuple[torch.Tensor, torch.Tensor]], metadata: dict | None) -> dict[str, float]:
    """The alpha of every module, from the LoRA config in a diffusers file's metadata. Without one, alpha is the rank."""
    config = {key.removeprefix(PREFIX): value for key, value in (metadata or {}).items()}
    patterns = config.get("alpha_pattern") or {}
    alphas = {}
    for module, (down, _) in modules.items():
        pattern = get_pattern_key(patterns, module)
        alphas[module] = float(patterns.get(pattern, config.get("lora_alpha", down.shape[0])))
        if config.get("use_rslora"):
            # This kind scales by alpha / sqrt(rank), and the kohya layout knows alpha / rank only.
            alphas[module] *= down.shape[0] ** 0.5
    return alphas


def read_modules(state_dict: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """
    The (down, up) weights of every module of a LoRA in diffusers' key names.

    Raises:
        ValueError: If a key is no LoRA weight of the FLUX transformer, or one of a pair is missing.
    """
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, weight in state_dict.items():
        match = re.fullmatch(r"transformer\.(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise ValueError(f"`state_dict` has to hold `transformer.*.lora_A/B.weight` keys only, got {key!r}.")
        modules.setdefault(match[1], {})[match[2]] = weight
    for module, pair in modules.items():
        if len(pair) < 2:
            raise ValueError(
                f"`state_dict` has to hold lora_A and lora_B of every module, got one only of {module!r}."
            )
    return {module: (pair["A"], pair["B"]) for module, pair in modules.items()}


def original_layer(module: str) -> tuple[str, dict[str, int]]:
    """
    The name of the original layer of a module, and all parts of that layer with their rows in multiples of the width.

    Raises:
        ValueError: If the kohya layout has no such layer.
    """
    if module == LAST_MODULE:
        return LAST_LAYER, {module: 1}
    match = re.fullmatch(r"((?:single_)?transformer_blocks)\.(\d+)\.(.+)", module)
    prefix, layers = BLOCKS[match[1]] if match else (None, {})
    for layer, parts in layers.items():
        if match[3] in parts:
            block = f"{match[1]}.{match[2]}."
            return f"{prefix}_{match[2]}_{layer}", {block + part: rows for part, rows in parts.items()}
    raise ValueError(
        "`state_dict` may hold LoRAs on the linear layers of the FLUX blocks and on the last layer only, got one on"
        f" {module!r}."
    )


def fuse(
    parts: list[tuple[torch.Tensor, torch.Tensor, float] | None], rows: list[int]
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """
    One LoRA for parts stacked by rows: (down [n * rank, in], up [sum of rows, n * rank], alpha).

    `None` stands for a part without a LoRA. Parts with a lower rank are padded with zeros. If alpha / rank differs between
    parts, the downs are multiplied by it, in float32.
    """
    present = [part for part in parts if part is not None]
    rank = max(down.shape[0] for down, _, _ in present)
    scales = {alpha / down.shape[0] for down, _, alpha in present}
    dtype = present[0][0].dtype if len(scales) == 1 else torch.float32
    scale = scales.pop() if len(scales) == 1 else 1.0
    down = torch.zeros(rank * len(parts), present[0][0].shape[1], dtype=dtype)
    up = torch.zeros(sum(rows), rank * len(parts), dtype=dtype)
    for index, part in enumerate(parts):
        if part is None:
            continue
        part_down, part_up, alpha = part
        start, own = sum(rows[:index]), part_down.shape[0]
        columns = slice(rank * index, rank * index + own)
        down[columns] = part_down.to(dtype) * (alpha / own / scale)
        up[start : start + rows[index], columns] = part_up.to(dtype)
    return down, up, scale * down.shape[0]


def to_kohya(state_dict: dict[str, torch.Tensor], metadata: dict | None = None) -> dict[str, torch.Tensor]:
    """
    A diffusers FLUX LoRA in the kohya layout.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            `transformer.<module>.lora_A.weight` [rank, in] and `lora_B.weight` [out, rank].
        metadata (`dict`, *optional*):
            The LoRA config in the metadata of diffusers' file (`transformer.lora_alpha` and so on). Without it, alpha is
            the rank.

    Returns:
        `dict[str, torch.Tensor]`: `lora_unet_<layer>.lora_down.weight`, `.lora_up.weight` and `.alpha`.

    Raises:
        ValueError: If a key cannot be expressed in the kohya layout. Nothing is left out silently.
    """
    modules = read_modules(state_dict)
    alphas = layer_alphas(modules, metadata)
    converted, done = {}, set()
    for module in modules:
        name, parts = original_layer(module)
        if name in done:
            continue
        done.add(name)
        # Any part that has a LoRA tells the model's width.
        width = next(modules[part][1].shape[0] // units for part, units in parts.items() if part in modules)
        down, up, alpha = fuse(
            [(*modules[part], alphas[part]) if part in modules else None for part in parts],
            [units * width for units in parts.values()],
        )
        weights = (down.contiguous(), up.contiguous(), torch.tensor(alpha, dtype=torch.float32))
        converted |= {f"{name}.{part}": weight for part, weight in zip(KOHYA_PARTS, weights)}
    return converted


def to_diffusers(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    A kohya FLUX LoRA in diffusers' key names, multiplied by its alpha. Diffusers' own reader converts it.

    Raises:
        ValueError: If that reader cannot: it knows the layers of FLUX.1 only, whose width is 3072.
    """
    state_dict = dict(state_dict)
    # That reader leaves out the prefix and the alpha of this layer.
    down, up, alpha = (state_dict.pop(f"{LAST_LAYER}.{part}", None) for part in KOHYA_PARTS)
    try:
        converted = _convert_kohya_flux_lora_to_diffusers(state_dict)
    except AssertionError as error:
        raise ValueError(
            "diffusers can only read a kohya LoRA whose layers have the sizes of FLUX.1, which is 3072 wide. This one is of"
            " another base model."
        ) from error
    if down is not None:
        converted[f"{PREFIX}{LAST_MODULE}.lora_A.weight"] = down * (
            1 if alpha is None else alpha.item() / down.shape[0]
        )
        converted[f"{PREFIX}{LAST_MODULE}.lora_B.weight"] = up
    # Chunks of one stacked tensor share memory, which safetensors does not save.
    return {key: weight.clone(memory_format=torch.contiguous_format) for key, weight in converted.items()}


def convert_file(source: Path, target: Path, skip_final_layer: bool = False) -> str:
    """
    Converts the file `source` into `target` and returns the name of the layout that it wrote. `skip_final_layer` leaves
    the LoRA on the last layer out of a kohya file.
    """
    if read_trained_settings(source).get("visible_attention") == "causal":
        raise ValueError(
            'it was trained with `visible_attention="causal"`. Programs that read a converted LoRA do not know this, and would'
            " paint wrong pictures."
        )
    _, metadata = read_header(source)
    state_dict = safetensors.torch.load_file(source)
    config = parse_json(metadata.get(LORA_ADAPTER_METADATA_KEY, "null"), LORA_ADAPTER_METADATA_KEY)
    # PEFT would run regular expressions in it.
    config = check_lora(state_dict, config, str(source))
    kept = {"format": "pt"} | {key: text for key, text in metadata.items() if key == SEMANTIC_METADATA_KEY}
    if any(key.endswith(".lora_down.weight") for key in state_dict):
        save_tensors(to_diffusers(state_dict), target, kept)
        return "diffusers"
    if skip_final_layer:
        state_dict = {key: w for key, w in state_dict.items() if not key.startswith(f"{PREFIX}{LAST_MODULE}.")}
    converted = to_kohya(state_dict, config)
    if f"{LAST_LAYER}.alpha" in converted:
        print(
            f"Warning: sd-scripts has no place for {LAST_LAYER} and refuses the whole file. Pass --skip_final_layer to leave"
            " it out. ComfyUI uses it.",
            file=sys.stderr,
        )
    save_tensors(converted, target, kept)
    return "kohya"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="LoRA as .safetensors in either layout.")
    parser.add_argument("target", type=Path, help="File to write in the other layout.")
    parser.add_argument("--skip_final_layer", action="store_true", help="Leave out the last layer, for sd-scripts.")
    args = parser.parse_args()
    if not args.source.is_file():
        parser.error(f"source has to be a .safetensors file, got {args.source}")
    if args.target.exists() and args.target.samefile(args.source):
        parser.error("target has to be another file than source")
    try:
        layout = convert_file(args.source, args.target, args.skip_final_layer)
    except (ValueError, safetensors.SafetensorError) as error:
        parser.error(f"{args.source}: {error}")
    print(f"Wrote {args.target} in the {layout} layout")


if __name__ == "__main__":
    main()
