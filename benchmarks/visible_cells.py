# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Cells of the visible view computed once. A worker takes cells from a queue until none is left.

Each cell trains one variant, then paints held-out pictures with the right map, with a wrong one, and with the right one from
other noise, and decodes the same latents beside several latents of the visible view. `visible_driver.py` starts workers.
"""

import argparse
import fcntl
import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch


torch.set_num_threads(1)
torch.set_float32_matmul_precision("high")
logging.disable(logging.WARNING)
import ablation  # noqa: E402
import cells  # noqa: E402
from measurement import StepTracker  # noqa: E402, F401
from thermal import Streets  # noqa: E402

import train_semantic_fill_lora as trainer  # noqa: E402
from pipeline_flux_fill_semantic import FluxFillSemanticPipeline, _Canvas  # noqa: E402
from semantic_attention import CausalAttention, join_panels, split_panels  # noqa: E402
from semantic_fill.boxes import BoxFigures  # noqa: E402
from semantic_fill.checks import check_samples  # noqa: E402
from semantic_fill.data import TriptychDataset  # noqa: E402
from semantic_fill.sources import list_folder  # noqa: E402


TIMES = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0)

# -- The target alone -------------------------------------------------------------------------------------------------

whole_canvas = FluxFillSemanticPipeline.encode_moments
encoders = {False: cells.encoders, True: {}}


def target_alone(pipeline, diptych, mask):
    """The posterior of the canvas, but with that of the target on a canvas of its own in the target's half."""
    moments, masked = whole_canvas(pipeline, diptych, mask)
    right = diptych[..., diptych.shape[-1] // 2 :]
    alone = whole_canvas(pipeline, right, torch.zeros_like(mask[..., : right.shape[-1]]))[0]
    return torch.cat((moments[..., : moments.shape[-1] // 2], alone), dim=-1), masked


def set_alone(alone: bool) -> None:
    FluxFillSemanticPipeline.encode_moments = target_alone if alone else whole_canvas
    cells.encoders = encoders[alone]


# -- Paint and decode -------------------------------------------------------------------------------------------------

plain_see = CausalAttention.see


def see(self, transformer, hidden_states, timestep, **inputs):
    plain_see(self, transformer, hidden_states, timestep, **inputs)
    if not torch.is_grad_enabled() and self.seen_at == 1.0:
        # Where the visible view's own velocity leads.
        CausalAttention.own_end = hidden_states[..., : self.velocity.shape[-1]] - self.velocity


CausalAttention.see = see


@torch.no_grad()
def denoise(run, variant, views, maps, args, offset=0):
    """Latents `(count, tokens, 64)` of both panels, and those where the visible view's own velocity leads or None."""
    painter, found, ends = cells.make_painter(run), [], []
    for start in range(0, len(views), 32):
        batch = views[start : start + 32]
        CausalAttention.own_end = None
        found.append(
            painter(
                image=torch.stack([view["visible"] for view in batch]),
                semantic_image=None if maps is None else maps[start : start + 32],
                semantic_scale=variant.paint_scale,
                num_inference_steps=args.num_inference_steps,
                max_sequence_length=run.options.max_sequence_length,
                generator=[torch.Generator().manual_seed(offset + start + i) for i in range(len(batch))],
                output_type="latent",
                return_diptych=True,
                **cells.prompt_of(run, len(batch)),
            ).images.float()
        )
        ends.append(CausalAttention.own_end)
    ends = None if ends[0] is None else torch.cat(ends).float()
    return torch.cat(found), ends


@torch.no_grad()
def encode(painter, visible, right, columns):
    """Latents of both panels of a diptych, and those of the visible view in its condition."""
    parts = []
    for start in range(0, len(visible), 32):
        seen = visible[start : start + 32].to(painter.vae.device)
        diptych, mask = painter.prepare_diptych(seen, right[start : start + 32].to(seen))
        generator = torch.Generator().manual_seed(start)
        x_0, x_cond, _ = painter.encode_diptych(
            None, mask, whole_canvas(painter, diptych, mask), generator, torch.float32
        )
        parts.append((split_panels(x_0, columns)[0], split_panels(x_cond[..., :64], columns)[0]))
    return tuple(torch.cat(part) for part in zip(*parts))


@torch.no_grad()
def decode(painter, target, size, seen=None):
    """Pictures of the target's latents, decoded beside latents of the visible view or alone."""
    height, width = size
    pictures = []
    for start in range(0, len(target), 16):
        tokens, wide = target[start : start + 16], width
        if seen is not None:
            tokens, wide = join_panels(seen[start : start + 16].to(tokens), tokens, width // 16), 2 * width
        latents = painter._unpack_latents(tokens, height, wide, painter.vae_scale_factor)
        latents = latents / painter.vae.config.scaling_factor + painter.vae.config.shift_factor
        picture = painter.vae.decode(latents.to(painter.vae.dtype)).sample[..., wide - width :].float() / 2 + 0.5
        pictures.append(picture.clamp(0, 1).cpu())
    return torch.cat(pictures)


# -- Judge ------------------------------------------------------------------------------------------------------------


def judge_boxes(streets, painted, target, shown=None):
    figures = BoxFigures()
    for index, boxes in enumerate(streets.boxes):
        figures.add(painted[index], target[index], boxes, None if shown is None else streets.boxes[shown[index]])
    return figures.summary()


def region_iou(painted, target, label):
    ious = []
    for ours, theirs in zip(painted, target):
        a, b = (label(cells.to_bytes(x).permute(1, 2, 0).numpy()) for x in (ours, theirs))
        ious.append(
            sum(((a == k) & (b == k)).sum() / ((a == k) | (b == k)).sum() for k in set(b.ravel()))
            / len(set(b.ravel()))
        )
    return float(sum(ious) / len(ious))


def spread(a, b, target):
    """What two paintings from different noise tell: how far they differ, and how far their expectation is off."""
    errors = (((a - target) ** 2).flatten(1).mean(1) + ((b - target) ** 2).flatten(1).mean(1)) / 2
    variance = ((a - b) ** 2).flatten(1).mean(1) / 2
    brightness = (a.mean(dim=(1, 2, 3)) - target.mean(dim=(1, 2, 3))).square().mean().sqrt()
    even = a - a.mean(dim=(1, 2, 3), keepdim=True) + target.mean(dim=(1, 2, 3), keepdim=True)
    db = lambda x: (-10 * torch.log10(x.clamp_min(1e-7))).mean().item()  # noqa: E731
    edges = lambda x: x.mean(1).diff(dim=-1).abs().mean().item()  # noqa: E731
    return {
        "psnr of both": db(errors),
        "psnr of the expectation": db(errors - variance),
        "noise, gray levels": 255 * variance.mean().sqrt().item(),
        "brightness off, gray levels": 255 * brightness.item(),
        "psnr without it": db(((even - target) ** 2).flatten(1).mean(1)),
        "edges of target": edges(a) / edges(target),
    }


@torch.no_grad()
def held_out(run, painter, visible, target, maps):
    """
    The loss of held-out targets by time. *known*: with noisy latents of the visible view that lead to the condition's, in
    place of those that were encoded beside the target and so tell something about it.
    """
    model, columns, rows = run.engine.unwrap(run.model).eval(), visible.shape[-1] // 16, visible.shape[-2] // 16
    device = painter.vae.device
    joint = run.options.visible_attention == "joint"
    sums: dict = {}
    for start in range(0, len(visible), 32):
        seen, right, shown = (x[start : start + 32].to(device) for x in (visible, target, maps))
        diptych, mask = painter.prepare_diptych(seen, right)
        generator = torch.Generator().manual_seed(start)
        x_0, x_cond, img_ids = painter.encode_diptych(diptych, mask, generator=generator, dtype=torch.float32)
        tokens = positions = keep = None
        if model.semantic_attention is not None:
            canvas = _Canvas(rows, columns, 2, 1)
            tokens, positions = painter._prepare_semantic_tokens(shown, canvas, len(seen), False)
            keep = torch.ones(len(seen), dtype=torch.bool, device=device)
        prompt = cells.prompt_of(run, len(seen))
        for time_ in TIMES:
            x_1 = torch.randn(x_0.shape, generator=generator).to(device)
            starts = {"": x_0}
            if joint:
                clean = split_panels(x_cond[..., :64], columns)[0]
                starts["known"] = join_panels(clean, split_panels(x_0, columns)[1], columns)
            for name, begin in starts.items():
                batch = SimpleNamespace(
                    x_0=x_0,
                    x_1=x_1,
                    x_t=torch.lerp(begin, x_1, time_),
                    t=torch.full((len(seen),), time_, device=device),
                    x_cond=x_cond,
                    img_ids=img_ids,
                    prompt_embeds=prompt["prompt_embeds"].float(),
                    pooled_prompt_embeds=prompt["pooled_prompt_embeds"].float(),
                    guidance=torch.full((len(seen),), run.options.guidance_scale, device=device),
                    columns=columns,
                    semantic_tokens=tokens,
                    positions=positions,
                    keep_map=keep,
                )
                pred = model.predict(model.attend(batch), batch)
                error = split_panels((pred.float() - (x_1 - x_0)) ** 2, columns)[1]
                key = f"{time_:g} {name}".strip()
                sums[key] = sums.get(key, 0) + error.mean(dim=(1, 2)).sum().item() / len(visible)
    return {key: round(value, 4) for key, value in sums.items()}


# -- A cell -----------------------------------------------------------------------------------------------------------


def run_cell(task, name, seed, args, sheet=None):
    started = time.monotonic()
    variant = ablation.VARIANTS[name]
    set_alone(variant.alone)
    args = argparse.Namespace(**vars(args))
    if variant.alone:
        args.cache_root = args.cache_root.with_name(args.cache_root.name + "-alone")
    steps = max(1, round(variant.steps * args.steps))
    run, tracker = cells.build(task, variant, seed, steps, args, args.num_train)
    if (variant.causal or "").endswith("JointAtFirst"):
        # `cells.build` overlooks that of `first step`.
        run.engine.unwrap(run.model).causal.joint_steps = steps // 3
    start = time.monotonic()
    trainer.train(run)
    seconds, losses = time.monotonic() - start, tracker.losses
    found = cells.find_task(task, args)
    size, columns = (found.height, found.width), found.width // 16
    source = list_folder(found.folder / "test", run.options)
    findings = check_samples(source, found.width / found.height, pairs=False)
    test = TriptychDataset(source, run.options, findings, list(range(min(args.num_test, len(source)))))
    views = [test.views(i) for i in range(len(test))]
    visible, target, maps = (torch.stack([v[n] for v in views]) for n in ("visible", "target", "semantic"))
    streets = Streets(found.folder / "test", [source.name(i) for i in range(len(test))]) if task == "thermal" else None
    others = [*range(1, len(test)), 0] if streets is None else streets.others()
    row = {
        "task": task,
        "variant": name,
        "seed": seed,
        "tokens": run.encoder.image_tokens,
        "trained": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        "steps": len(losses),
        "seconds": seconds,
        "step_ms": 1000 * sorted(tracker.seconds(1))[len(losses) // 2 - 1] if len(losses) > 3 else None,
        "loss": sum(losses[-max(1, len(losses) // 4) :]) / max(1, len(losses) // 4),
    }
    window = max(1, len(losses) // 20)
    row["curve"] = [
        round(sum(losses[i : i + window]) / window, 4) for i in range(0, len(losses) // window * window, window)
    ]
    causal = run.options.visible_attention == "causal"
    painter = cells.make_painter(run)
    twice, condition = encode(painter, visible, visible, columns)
    paintings = {}
    for kind, shown, offset in (("right", maps, 0), ("wrong", maps[others], 0), ("noise", maps, 10**6)):
        latents, ends = denoise(run, variant, views, shown, args, offset)
        own, painted = split_panels(latents, columns)
        if variant.alone:
            paintings[kind] = decode(painter, painted, size)
            continue
        paintings[kind] = decode(painter, painted, size, own)
        again = encode(painter, visible, paintings[kind], columns)[0]
        paintings[f"{kind}, again"] = decode(painter, painted, size, again)
        if kind == "right":
            paintings["right, twice"] = decode(painter, painted, size, twice)
            if not causal:
                paintings["right, condition's"] = decode(painter, painted, size, condition)
        if ends is not None and ends.shape == painted.shape and kind != "noise":
            paintings[f"{kind}, follows"] = decode(painter, painted, size, ends)
    for kind, picture in paintings.items():
        if kind.startswith("noise"):
            continue
        # SSIM takes long on one core.
        row[kind] = cells.figures(picture.to(painter.vae.device), target.to(painter.vae.device), None)
        if kind == "right" and found.label is not None:
            row[kind]["iou"] = region_iou(picture, target, found.label)
        if streets is not None and kind in ("right", "wrong", "right, again", "wrong, again"):
            shown = others if kind.startswith("wrong") else None
            row[kind] |= judge_boxes(streets, cells.to_bytes(picture), cells.to_bytes(target), shown)
    row["spread"] = spread(paintings["right"], paintings["noise"], target)
    if "noise, again" in paintings:
        row["spread, again"] = spread(paintings["right, again"], paintings["noise, again"], target)
    row["held_out"] = held_out(run, painter, visible, target, maps)
    if sheet is not None and seed == 0:
        shown = {"visible": visible, "map": maps, "target": target} | paintings
        cells.draw_sheet(shown, rows=4).save(sheet / f"{task}-{ablation.file_stem(name)}.jpg", quality=80)
    row["all_seconds"] = time.monotonic() - started
    if torch.cuda.is_available():
        row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
    return row


# -- A worker ---------------------------------------------------------------------------------------------------------


def append(path, row):
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(row) + "\n")


def next_cell(queue, output, claims, tries=2):
    """The first cell that nobody has begun, or that failed once. Then `None`."""
    done = {(row["task"], row["variant"], row["seed"]) for row in ablation.read_output(output)}
    for attempt in range(tries):
        for task, name, seed in queue:
            stem = f"{task}-{ablation.file_stem(name)}-{seed}"
            if (task, name, seed) in done or (attempt and not (claims / f"{stem}.{attempt - 1}.failed").exists()):
                continue
            try:
                os.close(os.open(claims / f"{stem}.{attempt}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            return (task, name, seed), claims / f"{stem}.{attempt}"
    return None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--queue", type=Path, required=True)
    parser.add_argument("--claims", type=Path, required=True)
    parser.add_argument("--number", type=int, default=0)
    parser.add_argument("--until", type=float, default=1e18)
    parser.add_argument("--sheets", type=Path)
    own, others = parser.parse_known_args()
    args = ablation.parse_args(others)
    queue = [tuple(cell) for cell in json.loads(own.queue.read_text())]
    tasks = list(dict.fromkeys(task for task, _, _ in queue))
    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
    for task in tasks:
        for alone in (False, True):
            if alone and not any(ablation.VARIANTS[name].alone for t, name, _ in queue if t == task):
                continue
            ready = own.claims / f"encoded-{task}-{alone}"
            if own.number == 0 and not ready.exists():
                # One worker encodes, so that the others find the encodings.
                variant = ablation.VARIANTS["projection, target alone" if alone else "projection"]
                set_alone(alone)
                copied = argparse.Namespace(**vars(args))
                if alone:
                    copied.cache_root = args.cache_root.with_name(args.cache_root.name + "-alone")
                try:
                    cells.build(task, variant, 0, 1, copied, args.num_train)
                except Exception:
                    traceback.print_exc()
                ready.touch()
            waited = time.time()
            while own.number and not ready.exists() and time.time() - waited < 240:
                time.sleep(0.5)
    print(f"worker {own.number} ready at {time.strftime('%H:%M:%S')}", flush=True)
    while time.time() < own.until:
        found = next_cell(queue, args.output, own.claims)
        if found is None:
            break
        cell, claim = found
        try:
            row = run_cell(*cell, args, own.sheets)
            append(args.output, row)
            text = f"{row['right']['psnr']:.2f} dB, {row['seconds']:.0f} s training, {row['all_seconds']:.0f} s"
            print(f"{time.strftime('%H:%M:%S')} {cell}: {text}", flush=True)
        except Exception as error:
            traceback.print_exc()
            append(args.output.with_suffix(".failed.jsonl"), {"cell": cell, "error": repr(error)[:500]})
            claim.with_name(claim.name + ".failed").touch()
            print(f"{time.strftime('%H:%M:%S')} {cell} FAILED: {error!r}"[:300], flush=True)
            if "CUDA" in repr(error) or "cuda" in repr(error):
                sys.exit(3)


if __name__ == "__main__":
    main()
