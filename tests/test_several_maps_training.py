# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Several semantic maps in data, training and evaluation: each is called by its name, and any sample may lack some."""

import json
import logging

import numpy as np
import PIL.Image
import pytest
import reference as ref
import torch
from accelerate import Accelerator
from helpers import (
    arguments,
    assemble,
    draw_triptych,
    encode_picture,
    fresh_state,
    load_data,
    read_dataset,
    run,
    write_files,
)
from pipeline_helpers import differs, make_pipe
from several_maps_helpers import MAPS, enhanced_by_reference

import train_semantic_fill_lora as trainer
from pipeline_flux_fill_semantic import read_trained_settings
from semantic_fill import evaluate
from semantic_fill.options import DataOptions
from semantic_fill.sampling import SampleSpec, plan_validation
from semantic_fill.tables import TableSource


# -- Data -------------------------------------------------------------------------------------------------------------


def views_of(seed: int) -> dict[str, PIL.Image.Image]:
    """Four views of 32x32 pixels. The second map is the first one of another scene, mirrored."""
    pixels = [np.asarray(draw_triptych(number)) for number in (seed, seed + 50)]
    views = dict(zip(("visible", "target", "land"), np.split(pixels[0], 3, axis=1)))
    views["rivers"] = np.split(pixels[1], 3, axis=1)[2][:, ::-1]
    return {name: PIL.Image.fromarray(view) for name, view in views.items()}


def write_views(folder, seeds, missing=()):
    """Folders of views, where the last sample has no rivers unless `missing` says otherwise."""
    files = {}
    for index, seed in enumerate(seeds):
        for name, view in views_of(seed).items():
            if (index, name) not in missing:
                place = name if name in ("visible", "target") else f"semantic_{name}"
                files[f"{place}/{index}.png"] = encode_picture(view)
        files[f"{index}.txt"] = f"caption {index}"
    return write_files(folder, files)


def test_every_form_of_data_gives_the_same_views(tmp_path):
    seeds, missing = range(3), [(1, "rivers"), (2, "land"), (2, "rivers")]
    found = {"folders": read_dataset(train_data_dir=str(write_views(tmp_path / "folders", seeds, missing)))}
    columns = {"visible_column": "visible", "target_column": "target", "semantic_column": "land,rivers"}
    rows, canvases = [], {}
    for index, seed in enumerate(seeds):
        views = views_of(seed)
        canvas = np.concatenate([np.asarray(view) for view in views.values()], axis=1)
        canvases[f"{index}.png"] = encode_picture(PIL.Image.fromarray(canvas))
        cells = {name: None if (index, name) in missing else encode_picture(view) for name, view in views.items()}
        rows.append({"text": f"caption {index}"} | cells)
    table = [{n: {"bytes": c, "path": None} if isinstance(c, bytes) else c for n, c in row.items()} for row in rows]
    options = DataOptions(dataset_name="unused", resolution=32, **columns)
    found["table"] = read_dataset(options, TableSource(table, options))
    files = {f"{n}/{i}.png": c for i, row in enumerate(rows) for n, c in row.items() if isinstance(c, bytes)}
    named = [{n: f"{n}/{i}.png" if isinstance(c, bytes) else c for n, c in row.items()} for i, row in enumerate(rows)]
    write_files(tmp_path / "named", files | {"metadata.jsonl": "\n".join(map(json.dumps, named))})
    found["metadata"] = read_dataset(train_data_dir=str(tmp_path / "named"), **columns)
    write_files(tmp_path / "canvas", canvases)
    more = {"train_data_dir": str(tmp_path / "canvas"), "instance_prompt": "x", "semantic_panels": "land,rivers"}
    found["canvas"] = read_dataset(**more)
    for form, dataset in found.items():
        assert dataset.maps == MAPS and len(dataset) == 3
        for index, seed in enumerate(seeds):
            expected = {n: v for n, v in views_of(seed).items() if form == "canvas" or (index, n) not in missing}
            views = dataset.views(index)
            assert views.keys() == expected.keys() and [dataset.has_map(index, n) for n in MAPS] == [
                n in expected for n in MAPS
            ]
            for name, view in expected.items():
                assert (views[name] * 255).round().byte().permute(1, 2, 0).numpy().tolist() == np.asarray(
                    view
                ).tolist()
        lacking = "3 samples (1 without `land`, 2 without `rivers`), "
        assert dataset.summary().startswith("3 samples, " if form == "canvas" else lacking)
    assert DataOptions(**more | {"semantic_panels": "2"}).semantic_maps == ("map_1", "map_2")
    assert DataOptions(**more | {"semantic_panels": "1"}).semantic_maps == ("semantic",)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--semantic_panels 0", "has to be 1 or more"),
        ("--semantic_panels a,a", "has to hold different names"),
        ("--semantic_panels 2 --visible_column a --target_column b --semantic_column c", "cannot go with"),
        ("--visible_column a --target_column b --semantic_column c,b", "--target_column b is what is painted"),
        (
            "--semantic_panels 2 --semantic_mode pixel_fusion",
            "pixel_fusion takes one map, but the data has map_1, map_2",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        arguments("unused", tmp_path, *options.split(), data=tmp_path)
    assert message in capsys.readouterr().err


def test_labels_of_one_map_take_the_palette(tmp_path):
    data = write_views(tmp_path / "data", range(2))
    for index in range(2):
        labels = PIL.Image.fromarray(np.full((32, 32), index, np.uint8))
        (data / "semantic_land" / f"{index}.png").write_bytes(encode_picture(labels))
    with pytest.raises(ValueError, match="All semantic maps of `land` have one channel"):
        read_dataset(train_data_dir=str(data))
    (tmp_path / "palette.json").write_text('["red", "lime"]')
    dataset = read_dataset(train_data_dir=str(data), palette=str(tmp_path / "palette.json"))
    assert dataset.views(1)["land"][:, 0, 0].tolist() == [0, 1, 0]
    assert (dataset.views(1)["rivers"] * 255).byte()[:, 0, 0].tolist() == [*np.asarray(views_of(1)["rivers"])[0, 0]]


def test_maps_that_change_places_are_encoded_anew(base_folder, tmp_path):
    for index in range(2):
        canvas = np.concatenate([np.asarray(view) for view in views_of(index).values()], axis=1)
        write_files(tmp_path / "data", {f"{index}.png": encode_picture(PIL.Image.fromarray(canvas))})
    found = []
    for names, place in (("land,rivers", "shared"), ("rivers,land", "shared"), ("rivers,land", "own")):
        more = ["--semantic_panels", names, "--instance_prompt", "x", "--cache_root", tmp_path / place]
        assembled = assemble(arguments(base_folder, tmp_path / "out", *more, data=tmp_path / "data"))
        found.append(assembled.encoder.read(SampleSpec(0, 0, False, False))["encoded"]["semantic"])
    assert torch.equal(found[1], found[2]) and not torch.equal(found[2][0], found[2][1])


# -- Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kind", ["rope", "projection"])
def test_a_step_equals_the_reference(base_folder, tmp_path, posterior_mode, kind, cached):
    data = write_views(tmp_path / "data", range(2), [(1, "rivers")])
    mode = ["--semantic_mode", "projection" if kind == "projection" else "cross_attention"]
    more = [*mode, *([] if cached else ["--no-cache_latents"])]
    assembled = assemble(arguments(base_folder, tmp_path / "out", *more, data=data))
    model, module = assembled.model, assembled.model.semantic_attention
    assert list(model.scales()) == ["land layer 0", "rivers layer 0"]
    for layer in module.layers:
        torch.nn.init.normal_(layer.scale, std=0.3)
    samples = next(trainer.read_samples(assembled)[1])
    batch, rows = assembled.make_batch(samples), [sample["spec"].index for sample in samples]
    assert sorted(rows) == [0, 1] and batch.keep_map.tolist() == [[True, row == 0] for row in rows]
    hidden_states = torch.cat([batch.x_t, batch.x_cond], dim=2)
    attended = model.attend(batch)
    vae = assembled.encoder.pipeline.vae
    for place, row in enumerate(rows):
        tokens = []
        for name in MAPS:
            pixels = torch.from_numpy(np.array(views_of(row)[name])).permute(2, 0, 1)[None] / 127.5 - 1
            with torch.no_grad():
                tokens.append(ref.encode_semantic(vae, pixels))
        strengths, own = (1, 1 if row == 0 else 0), hidden_states[place : place + 1]
        expected = enhanced_by_reference(kind, module, own, tokens, strengths, ref.panel_positions(2, 2))
        torch.testing.assert_close(attended[place : place + 1], expected, rtol=1e-4, atol=1e-4)
    loss = trainer.compare(model(batch), batch, assembled.objective)
    grads = torch.autograd.grad(loss, [layer.scale for layer in module.layers])
    assert all(gradient.abs().max() > 0 for gradient in grads)


def test_dropped_maps_are_panels_of_gray(base_folder, tmp_path):
    data = write_views(tmp_path / "data", range(2), [(1, "rivers")])
    assembled = assemble(arguments(base_folder, tmp_path / "out", "--semantic_mode", "in_context", data=data))
    encoder = assembled.encoder
    # Canvas and mask of four panels, and an encoding for each set of maps that may be dropped.
    assert encoder.panels == ("visible", "target", *MAPS) and encoder.image_tokens == 2 * 2 * 4
    specs = list(encoder.specs(dropped_maps=True))
    assert [spec.drop_maps for spec in specs[:4]] == [(), ("land",), ("rivers",), MAPS]
    files = [next(iter(encoder.sample_files(spec))) for spec in specs]
    assert len(set(files)) == len(specs) == 8
    views = {name: view[None] for name, view in encoder.dataset.views(0).items()}
    gray = views | {"rivers": torch.full_like(views["rivers"], 0.5)}
    dropped = encoder.encode_canvas(views, ("rivers",))
    assert torch.equal(dropped["moments"], encoder.encode_canvas(gray)["moments"])
    assert differs(dropped["moments"], encoder.encode_canvas(views)["moments"])


@pytest.fixture(scope="module")
def trained(base_folder, tmp_path_factory):
    """A finished run on two maps, and its held-out data."""
    folder = tmp_path_factory.mktemp("several")
    data, held_out = (
        write_views(folder / "data", range(4), [(3, "rivers")]),
        write_views(folder / "test", range(20, 23)),
    )
    more = "--semantic_mode projection --max_train_steps 4 --semantic_dropout 0.4 --semantic_learning_rate 0.05"
    more = [*more.split(), "--validation_data_dir", held_out, "--num_validation_images", 1]
    more += ["--validation_inference_steps", 1]
    return run(base_folder, folder / "out", *more, data=data), data, held_out


def test_a_run_names_its_maps_everywhere(base, trained):
    out, _, _ = trained
    (found,) = map(json.loads, (out / "validation.jsonl").read_text().splitlines())
    losses = ["loss", "wrong_map_land", "wrong_map_rivers", "no_map"]
    assert [name for name in found if "map" in name or name == "loss"] == [
        *losses, "map_worth_land", "map_worth_rivers"
    ]  # fmt: skip
    for name in MAPS:
        assert found[f"map_worth_{name}"] == found[f"wrong_map_{name}"] - found["loss"] != 0
    assert len(found["scales"]) == 2
    card, page = (out / "README.md").read_text(), (out / "samples" / "index.html").read_text()
    for name in MAPS:
        assert f"wrong {name}" in card and f"what the map is worth: {name}" in card
        assert f"wrong {name}" in page and f"worth of the map: {name}" in page
    assert "guided by the maps `land`, `rivers`" in card
    assert 'semantic_image={"land": map_1, "rivers": map_2}' in card
    assert read_trained_settings(out)["semantic_maps"] == MAPS
    pipe = make_pipe(base, own=True)
    pipe.load_lora_weights(out)
    assert pipe.semantic_maps == MAPS and min(pipe.semantic_attention.scales()) > 0


def test_logs_name_the_maps(base_folder, trained, tmp_path, caplog):
    _, data, _ = trained
    caplog.set_level(logging.DEBUG, logger="semantic_fill")
    more = ["--semantic_mode", "projection", "--max_train_steps", 1, "--log_level", "debug"]
    run(base_folder, tmp_path / "out", *more, data=data)
    said = [record.getMessage().removeprefix("[RANK 0] ") for record in caplog.records]
    assert "Using a projection with 1 layers for each of the maps land, rivers" in said
    assert {"land layer 0 scale: 0.000000", "rivers layer 0 scale: 0.000000"} <= set(said)
    assert {"land_img: (2, 3, 32, 32)", "semantic_tokens: (2, 2, 8, 64)"} <= set(said)


def test_only_runs_on_the_same_maps_continue(base_folder, trained, tmp_path):
    out, data, _ = trained
    mode = ["--semantic_mode", "projection", "--max_train_steps", 5]
    single = [*mode, "--resume_from_checkpoint", out / "checkpoint-4", "--allow_changed_data"]
    other = write_views(tmp_path / "other", range(2))
    (other / "semantic_rivers").rename(other / "semantic_roads")
    with pytest.raises(ValueError, match="with --semantic_maps land,rivers, so a run with --semantic_maps land,roads"):
        run(base_folder, tmp_path / "a", *single, data=other)
    with pytest.raises(ValueError, match="a module for the maps land, rivers, but the data has land, roads"):
        run(base_folder, tmp_path / "b", *mode, "--semantic_weights", out, data=other)
    run(base_folder, tmp_path / "c", *single, data=data)


def test_wrong_maps_are_planned_for_each_map(tmp_path):
    # All samples have the same rivers, and one has no land.
    data = write_views(tmp_path / "data", range(4), [(2, "land")])
    for index in range(4):
        (data / "semantic_rivers" / f"{index}.png").write_bytes(encode_picture(views_of(0)["rivers"]))
    fresh_state()
    Accelerator(cpu=True)
    options = arguments("unused", tmp_path, "--max_train_steps", 1000, data=data)
    plan = plan_validation(options, load_data(tmp_path, data)[0], 8)
    assert plan.maps == ("right", "wrong land", "none") and plan.rows == [0, 1, 3]
    assert plan.spec(0, "wrong land").wrong_map == ("land", 1) and plan.spec(0, "none").drop_maps == MAPS
    # The sample without land is never somebody's wrong one.
    assert plan.wrong_maps["land"] == {0: 1, 1: 3, 3: 0} and not plan.wrong_maps["rivers"]


def test_evaluation_has_each_map_wrong_in_turn(base_folder, trained, tmp_path):
    out, _, held_out = trained
    (held_out / "semantic_rivers" / "2.png").unlink()

    def evaluated(data, *more):
        options = ["--pretrained_model_name_or_path", base_folder, "--trained", out, "--train_data_dir", data]
        options += ["--output_dir", tmp_path / "evaluation", "--metrics", "psnr", "--num_inference_steps", 1, *more]
        return evaluate.main(evaluate.parse_args([str(option) for option in options]))

    report = evaluated(held_out)
    assert list(report["figures"]) == ["right", "wrong land", "wrong rivers", "none"]
    psnr = {kind: found["psnr"] for kind, found in report["figures"].items()}
    assert len({*psnr.values()}) == 4
    other = write_views(tmp_path / "other", range(2))
    (other / "semantic_rivers").rename(other / "semantic_roads")
    with pytest.raises(
        ValueError, match="The data has the maps land, roads, but the weights were trained with land, riv"
    ):
        evaluated(other)
