# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Takes the documents' pictures of the three pages, in a real browser: the demo's, a run's, and the one to paint in.

    make demo
    accelerate launch --cpu train_semantic_fill_lora.py --pretrained_model_name_or_path examples/base \\
        --train_data_dir demo/train --validation_data_dir demo/test --cache_root demo/cache --output_dir trained \\
        --semantic_mode projection --resolution 128 --max_sequence_length 32 --max_train_steps 150 --train_batch_size 8 \\
        --learning_rate 3e-3 --loss_region target --validation_steps 50 --num_validation_images 2 --overwrite_output_dir
    python examples/screenshots.py --demo demo/index.html --run trained/samples/index.html --weights demo/projection

It needs `playwright` and a Chromium, as `demo_page.py` does, and for the last page `gradio`.
"""

import argparse
from pathlib import Path

import app
import PIL.Image
from demo_page import as_picture, open_browser, save_small


WIDTH, APP_WIDTH, HEIGHT = 900, 1280, 1000
# Milliseconds. The page to paint in loads its scripts and paints in this time, also while other programs compute.
PATIENCE = 120_000


def show_file(window, page: Path, whole: bool = False) -> PIL.Image.Image:
    """The first screen of a page on disk, or all of it."""
    window.goto(page.resolve().as_uri())
    return as_picture(window.screenshot(full_page=whole))


def show_app(window, args: argparse.Namespace) -> PIL.Image.Image:
    """The page to paint in, after the first sample was painted."""
    painter = app.Painter(app.parse_args(["--weights", str(args.weights), "--base", args.base]))
    samples = app.read_triptychs(args.demo.parent / "test")[:6]
    with app.serve(painter, samples, quiet=True) as page:
        # Its columns stand side by side only on a wide screen.
        window.set_viewport_size({"width": APP_WIDTH, "height": HEIGHT})
        window.goto(page.local_url)
        canvas = window.locator("#map canvas").first
        canvas.wait_for()
        empty = canvas.screenshot()
        window.locator("#samples img").first.click()
        window.locator("#picture img").wait_for()
        # The editor says nowhere when it has drawn a map, and sends it a moment later.
        for _ in range(PATIENCE // 500):
            if canvas.screenshot() != empty:
                break
            window.wait_for_timeout(500)
        window.wait_for_timeout(2000)
        window.locator("#paint").click()
        window.locator("#painted img").wait_for()
        return as_picture(window.screenshot(full_page=True))


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo/index.html"), help="Page of the demo.")
    parser.add_argument("--run", type=Path, default=Path("trained/samples/index.html"), help="Page of a training.")
    parser.add_argument("--base", default=str(app.EMBEDDED_BASE), help="What the page to paint in starts from.")
    parser.add_argument("--weights", type=Path, default=Path("demo/projection"), help="Weights that it paints with.")
    parser.add_argument("--output_dir", type=Path, default=Path("docs"))
    return parser.parse_args(args)


def main(args: argparse.Namespace) -> None:
    with open_browser() as browser:
        window = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        window.set_default_timeout(PATIENCE)
        pictures = {
            "demo": show_file(window, args.demo),
            "run": show_file(window, args.run, whole=True),
            "app": show_app(window, args),
        }
    for name, picture in pictures.items():
        save_small(picture, args.output_dir / f"page_{name}.png")


if __name__ == "__main__":
    main(parse_args())
