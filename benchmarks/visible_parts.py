# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What each part of computing the visible view once costs an untrained base, in dB of what it paints.

    python benchmarks/visible_parts.py --base street/base --data street/test --prompt "visible to infrared" --width 336 \\
        --resolution 256 --count 24 --steps 10

`--data` holds triptychs, or the folders `visible` and `target`. Each row is one way to show the visible view: *joint* (both
views see each other in every step), or a pass of its own that does not see the target, with the noise channels and the time
that its name says. Each column is one set of latents that stands in the visible half when the VAE decodes both halves
together: the condition's, which were encoded beside a gray half; those of the visible view encoded beside itself; those
encoded beside the real target, which no user has; those encoded beside what was painted; and the row's own.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux_fill import calculate_shift

from pipeline_flux_fill_semantic import FluxFillSemanticPipeline, read_picture
from semantic_attention import BOTH, CausalAttention, join_panels, split_panels
from semantic_fill.data import read_triptychs


def read_views(args: argparse.Namespace) -> torch.Tensor:
    """Visible view and target `(count, 2, 3, height, width)` in [0, 1], of scenes spread over the folder."""
    folders = [args.data / name for name in ("visible", "target")]
    if all(folder.is_dir() for folder in folders):
        scenes = [[read_picture(path) for path in pair] for pair in zip(*(sorted(f.iterdir()) for f in folders))]
    else:
        scenes = [[triptych["visible"], triptych["target"]] for triptych in read_triptychs(args.data)]
    chosen = torch.arange(args.count) * len(scenes) // args.count
    size = (args.width or args.resolution, args.resolution)
    scenes = [[np.array(view.convert("RGB").resize(size)) for view in scenes[row]] for row in chosen]
    return torch.from_numpy(np.array(scenes)).permute(0, 1, 4, 2, 3).float() / 255


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    views = read_views(args)
    visible, target = views.unbind(1)
    width, columns, rows = visible.shape[-1], visible.shape[-1] // 16, visible.shape[-2] // 16
    settings = {"semantic_mode": "none", "max_sequence_length": 32}
    pipe = FluxFillSemanticPipeline.from_pretrained(args.base, dtype=torch.float32, **settings)
    transformer, generator = pipe.transformer, torch.Generator().manual_seed(0)
    mask = pipe.prepare_diptych(visible[:1])[1]
    embeds, pooled, text_ids = pipe.encode_prompt(args.prompt, max_sequence_length=32)

    def encode(right: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return pipe.encode_diptych(torch.cat((visible, right), dim=3), mask, None, generator)

    def score(visible_latents: torch.Tensor, target_latents: torch.Tensor) -> tuple[float, torch.Tensor]:
        tokens = join_panels(visible_latents, target_latents, columns)
        latents = tokens.unflatten(1, (rows, 2 * columns)).unflatten(3, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5)
        latents = latents.flatten(4, 5).flatten(2, 3) / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        painted = torch.cat([pipe.vae.decode(part).sample for part in latents.split(8)])[..., width:] / 2 + 0.5
        painted = painted.clamp(0, 1)
        return (-10 * torch.log10(((painted - target) ** 2).flatten(1).mean(1))).mean().item(), painted

    x_0, x_cond, img_ids = encode(target)
    beside_itself = split_panels(encode(visible)[0], columns)[0]
    x_1 = torch.randn(x_0.shape, generator=generator)
    own, true_target = split_panels(x_0, columns)
    noise, start = split_panels(x_1, columns)
    channels = x_0.shape[-1]
    seen, hidden = split_panels(x_cond, columns)
    clean = seen[..., :channels]
    known = {"condition's": clean, "beside itself": beside_itself, "beside the target": own}
    correlation = torch.corrcoef(torch.stack((own.flatten(), clean.flatten())))[0, 1]
    print(f"The condition's visible latents correlate {correlation:.2f} with those encoded beside the target.")
    scores = ", ".join(f"{name} {score(latents, true_target)[0]:.2f}" for name, latents in known.items())
    print(f"The real target's latents, decoded beside visible latents that are the: {scores} dB.\n")

    sigmas = np.linspace(1.0, 1 / args.steps, args.steps)
    pipe.scheduler.set_timesteps(sigmas=sigmas, mu=calculate_shift(x_0.shape[1]), device="cpu")
    times = pipe.scheduler.sigmas.tolist()

    def call(hidden_states: list[torch.Tensor], t: list[float], ids: torch.Tensor) -> torch.Tensor:
        """The velocities of all scenes. With two sets of tokens, these are the passes of the visible view and the target."""
        found = []
        for part in torch.arange(args.count).split(8):
            states = torch.cat([tokens[part] for tokens in hidden_states])
            found.append(
                transformer(
                    hidden_states=states,
                    timestep=torch.tensor(t).repeat_interleave(len(part)),
                    guidance=torch.full((len(states),), 30.0),
                    pooled_projections=pooled.expand(len(states), -1),
                    encoder_hidden_states=embeds.expand(len(states), -1, -1),
                    txt_ids=text_ids,
                    img_ids=ids,
                    return_dict=False,
                )[0].unflatten(0, (len(t), -1))
            )
        return torch.cat(found, dim=1)

    print("| visible view | " + " | ".join(known) + " | beside the painting | its own |\n" + "| --- " * 6 + "|")

    def report(name: str, painted: torch.Tensor, ends: torch.Tensor | None = None) -> None:
        scores = [score(latents, painted) for latents in known.values()]
        scores.append(score(split_panels(encode(scores[0][1])[0], columns)[0], painted))
        scores += [] if ends is None else [score(ends, painted)]
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value, _ in scores) + " |", flush=True)

    x_t = x_1
    for now, after in zip(times, times[1:]):
        x_t = x_t + (after - now) * call([torch.cat((x_t, x_cond), dim=-1)], [now], img_ids)[0]
    ends, painted = split_panels(x_t, columns)
    report("joint", painted, ends)

    # Its processors stay in place from here on.
    CausalAttention(transformer).passes = BOTH
    ids = torch.cat(split_panels(img_ids, columns, dim=0))
    ways = {
        "first step: noise, t = 1": (noise, 1.0),
        "zeros, t = 1": (torch.zeros_like(noise), 1.0),
        "zeros, t = 0": (torch.zeros_like(noise), 0.0),
        "causal: the condition's latents, t = 0": (clean, 0.0),
        "latents encoded beside itself, t = 0": (beside_itself, 0.0),
    }
    for name, (shown, t) in ways.items():
        x_t = start
        for now, after in zip(times, times[1:]):
            states = [torch.cat((shown, seen), dim=-1), torch.cat((x_t, hidden), dim=-1)]
            velocity, moved = call(states, [t, now], ids)
            x_t = x_t + (after - now) * moved
        report(name, x_t, noise - velocity if t == 1.0 and shown is noise else None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--width", type=int)
    parser.add_argument("--count", type=int, default=32, help="Scenes.")
    parser.add_argument("--steps", type=int, default=8, help="Steps of a painting.")
    main(parser.parse_args())
