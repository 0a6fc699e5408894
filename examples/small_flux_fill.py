# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""A small FLUX Fill in the layout of FLUX.1-Fill-dev, with random weights.

Every component has the class, the channel counts and the scheduler settings of the real model; only widths and depths
are smaller, so code that runs on this pipeline runs on FLUX.1-Fill-dev.

    python examples/small_flux_fill.py --output_dir small-flux-fill --preset test
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxFillPipeline, FluxTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast


# The prompt embeddings of a preset are `text_dim` wide, in CLIP and in T5 alike.
PRESETS = {
    "demo": {
        "transformer": {
            "num_layers": 1,
            "num_single_layers": 6,
            "num_attention_heads": 6,
            "attention_head_dim": 32,
            "axes_dims_rope": (8, 12, 12),
        },
        "vae": {"block_out_channels": (32, 48, 96, 112), "layers_per_block": 1, "norm_num_groups": 8},
        "text_dim": 64,
    },
    "street": {
        "transformer": {
            "num_layers": 1,
            "num_single_layers": 8,
            "num_attention_heads": 10,
            "attention_head_dim": 32,
            "axes_dims_rope": (8, 12, 12),
        },
        "vae": {"block_out_channels": (32, 64, 128, 160), "layers_per_block": 1, "norm_num_groups": 8},
        "text_dim": 64,
    },
    "test": {
        "transformer": {
            "num_layers": 1,
            "num_single_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "axes_dims_rope": (4, 6, 6),
        },
        "vae": {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4},
        "text_dim": 32,
    },
}


def build_tokenizers() -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """
    CLIP and T5 tokenizers whose vocabulary is an alphabet, so that nothing is downloaded.

    Returns:
        `tuple[CLIPTokenizer, T5TokenizerFast]`: both with the special tokens and lengths that FLUX uses.
    """
    alphabet = sorted(ByteLevel.alphabet())
    pieces = [*alphabet, *(character + "</w>" for character in alphabet), "<|startoftext|>", "<|endoftext|>"]
    clip = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77)
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    scores += [(chr(code), -3.0) for code in range(33, 127)]
    t5 = T5TokenizerFast(vocab=scores, extra_ids=0, model_max_length=512)
    return clip, t5


def build_pipeline(preset: str = "demo", seed: int = 0) -> FluxFillPipeline:
    """
    Builds a small FLUX Fill with random weights. The global random state is left as it was.

    Args:
        preset (`str`, *optional*, defaults to `"demo"`):
            `"demo"`, about 8 million parameters (16 MB in bfloat16), `"street"`, about 22 million (45 MB), or `"test"`,
            as small as possible.
        seed (`int`, *optional*, defaults to 0):
            Seed of the weights. The same seed gives the same weights.

    Returns:
        `FluxFillPipeline`: in float32 on the CPU, all models in evaluation mode.

    Raises:
        `ValueError`: if `preset` is none of these.
    """
    if preset not in PRESETS:
        raise ValueError(f"`preset` must be one of {sorted(PRESETS)}, but is {preset!r}.")
    sizes = PRESETS[preset]
    text_dim = sizes["text_dim"]
    tokenizer, tokenizer_2 = build_tokenizers()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=384,
            out_channels=64,
            joint_attention_dim=text_dim,
            pooled_projection_dim=text_dim,
            guidance_embeds=True,
            **sizes["transformer"],
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
            sample_size=1024,
            **sizes["vae"],
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=text_dim,
                intermediate_size=2 * text_dim,
                projection_dim=text_dim,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=77,
                bos_token_id=tokenizer.bos_token_id,
                # CLIP takes the pooled embedding at the first token with this id.
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        text_encoder_2 = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer_2),
                d_model=text_dim,
                d_kv=text_dim // 2,
                d_ff=2 * text_dim,
                num_layers=1,
                num_heads=2,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
            )
        )

    for model in (transformer, vae, text_encoder, text_encoder_2):
        model.eval()
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    return FluxFillPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the pipeline.")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="demo", help="Size of the models.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the weights.")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="Precision of the saved weights."
    )
    return parser.parse_args(args)


def main(args: argparse.Namespace) -> None:
    pipeline = build_pipeline(args.preset, args.seed).to(getattr(torch, args.dtype))
    pipeline.save_pretrained(args.output_dir)
    parameters = sum(
        p.numel() for m in pipeline.components.values() if isinstance(m, torch.nn.Module) for p in m.parameters()
    )
    print(f"Saved a {args.preset} FLUX Fill of {parameters:,} parameters to {args.output_dir}")


if __name__ == "__main__":
    main(parse_args())
