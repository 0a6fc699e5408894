# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Tables for RESULTS of what `visible_cells.py` wrote: means of paired differences from the reference of the same seed."""

import argparse
import json
from pathlib import Path
from statistics import mean


NAMES = {"earth": "Earth", "emoji": "emoji", "thermal": "streets"}


def reference_of(name):
    """Who a variant is compared with at equal rank, steps and rates. The table says it where it is not `projection`."""
    for more in (", rank 32", ", 3 x the steps", ", rates / 3", ", untrained"):
        if name.endswith(more) and name != f"projection{more}":
            return f"projection{more}"
    return None


def get(row, *path):
    for key in path:
        row = row.get(key) if isinstance(row, dict) else None
    return row


def drop(row, way=""):
    right, wrong = get(row, f"right{way}", "psnr"), get(row, f"wrong{way}", "psnr")
    return None if right is None or wrong is None else right - wrong


def line(label, pairs, way="", other_way=""):
    pairs = [(x, y) for x, y in pairs if get(x, f"right{way}") and get(y, f"right{other_way}")]
    if not pairs:
        return None
    psnr, ssim = ([x[f"right{way}"][k] - y[f"right{other_way}"][k] for x, y in pairs] for k in ("psnr", "ssim"))
    drops = [(drop(x, way), drop(y, other_way)) for x, y in pairs]
    drops = [d for d in drops if None not in d]
    share = (
        f"{mean(d for d, _ in drops) / mean(d for _, d in drops):.0%}"
        if drops and abs(mean(d for _, d in drops)) > 1e-6
        else ""
    )
    seeds = ", ".join(f"{v:+.2f}" for v in psnr)
    time = mean(x["seconds"] / y["seconds"] for x, y in pairs)
    return f"| {label} | {mean(psnr):+.2f} | {seeds} | {mean(ssim):+.3f} | {share} | {time:.2f} |"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--reference", default="projection")
    args = parser.parse_args()
    rows = [json.loads(text) for file in args.files for text in file.read_text().splitlines() if text.strip()]
    out = []
    for task in dict.fromkeys(r["task"] for r in rows):
        cells = {(r["variant"], r["seed"]): r for r in rows if r["task"] == task}
        names = list(dict.fromkeys(n for n, _ in cells))
        seeds = {n: sorted(s for m, s in cells if m == n) for n in names}
        title = NAMES.get(task, task)

        def pairs(name, reference):
            return [(cells[name, s], cells[reference, s]) for s in seeds[name] if (reference, s) in cells]

        out += [
            f"\n## {title}\n",
            f"| against `{args.reference}` with the same seed | PSNR, dB | seed by seed | SSIM | wrong-map drop | training time |",
            "| --- " * 6 + "|",
        ]
        for name in names:
            if name != args.reference:
                out.append(line(f"{title}, {name}", pairs(name, args.reference)))
            other = reference_of(name)
            if other in names:
                out.append(line(f"{title}, {name}, against `{other}`", pairs(name, other)))
        out += [
            f"\n### Other ways to decode, {title}\n",
            "Each against `projection` decoded as usual. Like with like: beside the condition's latents, and *again*. Causal variants are decoded beside the condition's as usual.\n",
            "| variant, decoded | PSNR, dB | seed by seed | SSIM | wrong-map drop | training time |",
            "| --- " * 6 + "|",
        ]
        for name in names:
            for way in (", again", ", twice", ", follows", ", condition's"):
                out.append(line(f"{name}{way}", pairs(name, args.reference), way))
            if name != args.reference:
                out.append(
                    line(
                        f"{name}, against `projection`, condition's", pairs(name, args.reference), "", ", condition's"
                    )
                )
                out.append(
                    line(
                        f"{name}, again, against `projection`, again",
                        pairs(name, args.reference),
                        ", again",
                        ", again",
                    )
                )
        out += [
            f"\n### Means, {title}\n",
            "*Expectation*: the PSNR of the mean of all paintings from other noise, from two of them. *Noise*: how far these differ.\n",
            "| variant | seeds | PSNR | SSIM | drop, dB | again: PSNR | of the expectation | noise, gray levels | brightness off | PSNR without it | edges of target's | loss | training s | step ms | all s | peak MiB |",
            "| --- " * 16 + "|",
        ]

        def avg(name, *path, digits=2):
            values = [get(cells[name, s], *path) for s in seeds[name]]
            values = [v for v in values if v is not None]
            return f"{mean(values):.{digits}f}" if values else ""

        for name in sorted(names, key=lambda n: -mean(cells[n, s]["right"]["psnr"] for s in seeds[n])):
            drops = [drop(cells[name, s]) for s in seeds[name]]
            out.append(
                f"| {name} | {len(seeds[name])} | "
                + " | ".join(
                    [
                        avg(name, "right", "psnr"),
                        avg(name, "right", "ssim", digits=3),
                        f"{mean(drops):.2f}",
                        avg(name, "right, again", "psnr"),
                        avg(name, "spread", "psnr of the expectation"),
                        avg(name, "spread", "noise, gray levels", digits=1),
                        avg(name, "spread", "brightness off, gray levels", digits=1),
                        avg(name, "spread", "psnr without it"),
                        avg(name, "spread", "edges of target"),
                        avg(name, "loss", digits=4),
                        avg(name, "seconds", digits=0),
                        avg(name, "step_ms", digits=0),
                        avg(name, "all_seconds", digits=0),
                        avg(name, "peak_mib", digits=0),
                    ]
                )
                + " |"
            )
        keys = list(dict.fromkeys(k for r in cells.values() for k in r.get("held_out", {})))
        out += [
            f"\n### Held-out loss of the target by time, {title}\n",
            "*known*: the visible view's noisy latents lead to the condition's, which know nothing of the target.\n",
            "| variant | " + " | ".join(keys) + " |",
            "| --- " * (len(keys) + 1) + "|",
        ]
        for name in names:
            out.append(f"| {name} | " + " | ".join(avg(name, "held_out", k, digits=3) for k in keys) + " |")
        if task == "thermal":
            out += [
                "\n| night's persons in thermal alone that stand out | right map | again | the wrong map's |",
                "| --- " * 4 + "|",
            ]
            key = "person, night, target only"
            for name in names:
                out.append(
                    f"| {name} | "
                    + " | ".join(
                        [
                            avg(name, "right", "own", key, "painted_share"),
                            avg(name, "right, again", "own", key, "painted_share"),
                            avg(name, "wrong", "map", key, "painted_share"),
                        ]
                    )
                    + " |"
                )
        lacking = [f"{n} ({len(seeds[n])})" for n in names if len(seeds[n]) < 3]
        if lacking:
            out.append(f"\nFewer than three seeds: {', '.join(lacking)}")
    text = "\n".join(x for x in out if x is not None)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
