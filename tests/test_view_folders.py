# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Data sets of three folders visible/, target/ and semantic/, or of two: pictures of one name belong together."""

import json
from pathlib import Path

import pytest
import torch
from helpers import draw_triptych, encode_picture, read_dataset, run, weights_of, write_files, write_triptychs

from semantic_fill.options import DataOptions
from semantic_fill.sources import list_folder
from semantic_fill.views import PANELS, cut_triptych


VIEW = {name: encode_picture(view) for name, view in cut_triptych([draw_triptych(0)]).items()}


def write_views(folder: Path, names: dict[str, tuple[str, ...]] | list[str], views=PANELS) -> Path:
    """Pictures of each view by their stems, with the endings of the views, or all as PNG."""
    names = names if isinstance(names, dict) else dict.fromkeys(names, (".png",) * 3)
    for seed, (stem, endings) in enumerate(names.items()):
        for (name, view), ending in zip(cut_triptych([draw_triptych(seed)]).items(), endings):
            if name in views:
                path = folder / name / f"{stem}{ending}"
                path.parent.mkdir(parents=True, exist_ok=True)
                view.save(path)
    return folder


def listed(folder, pairs: bool = False, **options):
    return list_folder(Path(folder), DataOptions(train_data_dir=str(folder), **options), pairs)


def captions_of(folder, **options) -> dict[str, list]:
    source = listed(folder, **options)
    assert source.problems == []
    return {source.name(index): list(source.captions(index)) for index in range(len(source))}


def test_three_folders_are_what_a_folder_of_triptychs_is(tmp_path):
    """Whatever the endings, in sub-folders, through links, and for any characters in names."""
    names = {
        "a/test 1": (".PNG", ".tiff", ".bmp"),
        "b [v2]/50% #1": (".webp", ".png", ".png"),
        "train": (".png", ".ppm", ".png"),
        "v1.5": (".png",) * 3,
        "x\udcffé": (".png",) * 3,
    }
    folder = write_views(tmp_path / "data", names)
    (folder / "visible" / "b [v2]" / "50% #1.webp").unlink()
    cut_triptych([draw_triptych(1)])["visible"].save(folder / "visible" / "b [v2]" / "50% #1.webp", lossless=True)
    (folder / "semantic").rename(tmp_path / "maps")
    (folder / "semantic").symlink_to(tmp_path / "maps")
    dataset = read_dataset(train_data_dir=str(folder), instance_prompt="a hill")
    triptychs = write_triptychs(tmp_path / "triptychs", len(names))
    expected = read_dataset(train_data_dir=str(triptychs))
    assert [dataset.source.name(index) for index in range(len(dataset))] == list(names)
    for index in range(len(names)):
        for name, view in expected.views(index).items():
            assert torch.equal(dataset.views(index)[name], view), (index, name)


def test_captions_beside_the_folders_or_in_them(tmp_path):
    folder = write_views(tmp_path / "data", ["1", "2", "3", "sub/4", "sub/5", "6"])
    texts = {"1.txt": "beside\n", "sub/4.txt": "below", "visible/2.txt": "\ufeffvisible", "target/3.txt": "target"}
    write_files(folder, texts | {"semantic/sub/5.txt": "semantic", "target/2.txt": "visible"})
    rows = [{"file_name": "6.jpg", "text": ["one", "two"]}, {"file_name": "visible/1.png", "text": "beside"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = {"1": ["beside"], "2": ["visible"], "3": ["target"], "6": ["one", "two"]}
    assert captions_of(folder) == expected | {"sub/4": ["below"], "sub/5": ["semantic"]}
    # Metadata inside a folder names what lies beside it.
    (folder / "visible" / "sub" / "4.txt").write_text("below")
    (folder / "sub" / "4.txt").unlink()
    (folder / "semantic" / "sub" / "5.txt").unlink()
    (folder / "target" / "sub" / "metadata.csv").write_text("file_name,text\n5.png,from a table\n")
    assert captions_of(folder) == expected | {"sub/4": ["below"], "sub/5": ["from a table"]}
    (folder / "target" / "2.txt").write_text("another")
    assert listed(folder).problems == ["2: has different captions in two places, ['visible', 'another']"]


def test_each_line_and_the_instance_prompt(tmp_path):
    folder = write_files(write_views(tmp_path / "data", ["1", "2"]), {"1.txt": "a\nb"})
    expected = {"1": ["a", "b"], "2": ["a hill"]}
    assert captions_of(folder, caption_lines=True, instance_prompt="a hill") == expected


def test_names_without_partners_and_twins(tmp_path):
    folder = write_views(tmp_path / "data", ["1", "2", "3", "4"])
    (folder / "target" / "2.png").unlink()
    (folder / "visible" / "3.png").unlink()
    (folder / "semantic" / "3.png").unlink()
    write_files(folder, {"visible/4.jpg": VIEW["visible"], "5.txt": "lost", "visible/6.txt": "lost"})
    (folder / "metadata.jsonl").write_text('{"file_name": "7.png", "text": "lost"}')
    source = listed(folder)
    lost = [f"{name}: has a caption or a metadata row, but there is no picture" for name in "567"]
    assert source.problems == [
        "visible/4.png: differs from 4.jpg in its ending only",
        "2: has no target picture",
        "3: has no visible and no semantic picture",
        *lost,
    ]
    with pytest.raises(ValueError, match="2: has no target picture"):
        read_dataset(train_data_dir=str(folder), instance_prompt="a hill")


def test_other_files_are_named(tmp_path):
    folder = write_views(tmp_path / "data", ["1"])
    more = {"preview.png": VIEW["target"], "depth/1.png": VIEW["target"], "visible/1.json": "{}", "list.csv": ""}
    source = listed(write_files(folder, more), instance_prompt="a hill")
    assert source.left_out == ["depth/1.png", "list.csv", "preview.png", "visible/1.json"]
    assert len(source) == 1 and source.problems == []


@pytest.mark.parametrize("missing", PANELS)
def test_a_missing_folder_is_no_triptych(tmp_path, missing):
    """The pictures of two views can be wide enough to be cut in three."""
    views = [view for view in PANELS if view != missing]
    folder = write_views(tmp_path / "data", ["1"], views)
    with pytest.raises(ValueError) as error:
        listed(folder, instance_prompt="a hill")
    assert f"{folder} holds {views[0]}/ and {views[1]}/ but no {missing}/. All three are needed" in str(error.value)
    if missing == "semantic":
        assert len(listed(folder, pairs=True, instance_prompt="a hill")) == 1
    else:
        with pytest.raises(ValueError, match=f"but no {missing}/.$"):
            listed(folder, pairs=True, instance_prompt="a hill")


def test_a_lonely_folder_of_that_name_says_nothing(tmp_path):
    data = write_triptychs(tmp_path / "data" / "visible", 2).parent
    assert [listed(data).name(index) for index in range(2)] == ["visible/000.png", "visible/001.png"]


def test_views_of_different_sizes_are_refused(tmp_path):
    folder = write_views(tmp_path / "data", ["1", "2"])
    draw_triptych(0).save(folder / "target" / "2.png")
    with pytest.raises(ValueError) as error:
        read_dataset(train_data_dir=str(folder), instance_prompt="a hill")
    assert str(error.value).splitlines() == [
        "1 samples cannot be used:",
        "  2: has views of different sizes (visible 32x32, target 96x32, semantic 32x32). examples/make_triptychs.py brings them to one size",
    ]


def test_pairs_are_trained_on_from_two_folders_and_from_diptychs(base_folder, tmp_path):
    """Both are the same samples, and so give the same weights as triptychs whose third view is not used."""
    folders = write_views(tmp_path / "folders", [f"{index:03d}" for index in range(4)], PANELS[:2])
    triptychs = write_triptychs(tmp_path / "triptychs", 4)
    diptychs = write_triptychs(tmp_path / "diptychs", 4)
    for path in diptychs.glob("*.png"):
        draw_triptych(int(path.stem)).crop((0, 0, 64, 32)).save(path)
    (folders / "metadata.jsonl").write_text((triptychs / "metadata.jsonl").read_text())
    more = ["--semantic_mode", "none", "--max_train_steps", 2, "--validation_steps", 2, "--num_validation_images", 1]
    more += ["--validation_inference_steps", 1]
    trained = []
    for data in (folders, diptychs, triptychs):
        out = run(base_folder, tmp_path / f"out-{data.name}", *more, data=data)
        assert (out / "samples" / "step-000002.png").is_file()
        trained.append(weights_of(out))
    for name, weight in trained[0].items():
        assert torch.equal(weight, trained[1][name]) and torch.equal(weight, trained[2][name]), name
    with pytest.raises(ValueError, match="000.png: is 64x32 pixels, which by the shape of this run are two views"):
        run(base_folder, tmp_path / "refused", "--max_train_steps", 1, data=diptychs)
