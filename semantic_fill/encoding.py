# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Encodings of pictures and prompts: made once with the pipeline's own encoders, and cached on disk.

Latents and prompts are cached by what they depend on, never by the step that uses them, so a cache is right for any order
of samples and serves later runs too. Each encoding is one file with a checksum.
"""

import copy
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from accelerate import Accelerator, cpu_offload
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from diffusers.training_utils import free_memory
from tqdm.auto import tqdm

from pipeline_flux_fill_semantic import SEMANTIC_MODES, FluxFillSemanticPipeline, tile_across_panels
from semantic_fill.data import TriptychDataset
from semantic_fill.files import (
    FileMemory,
    explain_write_errors,
    file_stamp,
    fingerprint,
    has_header,
    is_intact,
    read_encoding,
    remove_temporary_files,
    tokenizer_fingerprint,
    write_encoding,
)
from semantic_fill.layout import Layout, canvas_settings
from semantic_fill.memory import device_memory, parameter_bytes
from semantic_fill.options import Options
from semantic_fill.sampling import SampleSpec, ValidationPlan


logger = get_logger(__name__)

# What the cache remembers about files that stay unchanged.
MEMORY, MEMORY_VERSION = "intact.json", "1"


# -- Encoders ---------------------------------------------------------------------------------------------------------


def load_encoders(options: Options, dtype: torch.dtype) -> FluxFillSemanticPipeline:
    """The pipeline without its transformer, on the CPU: training encodes with the code that inference encodes with."""
    source = options.pretrained_model_name_or_path
    try:
        pipeline = FluxFillSemanticPipeline.from_pretrained(
            source,
            transformer=None,
            dtype=dtype,
            **canvas_settings(options),
            **options.loading,
        )
    except safetensors.SafetensorError as error:
        # transformers does not say which file is damaged.
        damaged = [str(path) for path in sorted(Path(source).rglob("*.safetensors")) if not has_header(path)]
        raise ValueError(
            f"--pretrained_model_name_or_path {source} holds a damaged file"
            f" ({', '.join(damaged) or 'of a text encoder'}): {error}"
        ) from error
    for component in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        component.requires_grad_(False).eval()
    return pipeline


def offload_encoders(pipeline: FluxFillSemanticPipeline, device: torch.device) -> None:
    """
    Installs hooks that bring the encoders to the device while they are used. They take turns as whole models, or layer
    by layer where the device has no room for one of them. The encodings are the same.
    """
    names = ("text_encoder", "text_encoder_2", "vae")
    sizes = {name: parameter_bytes([getattr(pipeline, name)]) for name in names}
    free, limit = device_memory(device)
    streamed = [name for name in names if sizes[name] > limit]
    if not streamed:
        # Together they would need more memory than a quantized transformer does.
        pipeline.enable_model_cpu_offload(device=device)
        return
    for name in streamed:
        logger.info(
            f"The pipeline's {name} is streamed through {device} layer by layer, which is slower: it has"
            f" {sizes[name] / 2**30:.1f} GiB, and of {free / 2**30:.1f} GiB that are free, room for"
            f" {max(0, limit) / 2**30:.1f} GiB"
        )
    # The hooks return weights to where they found them, so everything has to start on the CPU.
    pipeline.remove_all_hooks()
    pipeline.to("cpu", silence_dtype_warnings=True)
    for name in names:
        if name in streamed:
            cpu_offload(getattr(pipeline, name), device)
        else:
            getattr(pipeline, name).to(device)


def release_encoders(pipeline: FluxFillSemanticPipeline) -> None:
    """Frees the text encoders once everything is encoded, and moves the VAE to the CPU until something is painted."""
    pipeline.remove_all_hooks()
    pipeline.vae.to("cpu")
    pipeline.text_encoder = pipeline.text_encoder_2 = None


def count_tokens(tokenizer: transformers.PreTrainedTokenizerBase, captions: Iterable[str]) -> dict[str, int]:
    """T5 tokens of each caption."""
    captions = sorted(captions)
    found = tokenizer(captions, return_attention_mask=False, verbose=False).input_ids
    return {caption: len(ids) for caption, ids in zip(captions, found)}


def longest_prompt(lengths: Iterable[int]) -> int:
    """The length of the longest prompt, rounded up to a multiple of 16, which kernels prefer, and at most FLUX's 512."""
    return min(512, -(-max(lengths) // 16) * 16)


# -- Encodings --------------------------------------------------------------------------------------------------------


class Encoder:
    """
    Encodes samples.

    Args:
        pipeline (`FluxFillSemanticPipeline`):
            The pipeline without its transformer.
        dataset (`TriptychDataset`):
            The samples.
        max_sequence_length (`int`):
            T5 tokens of a prompt.
        cache_dir (`Path`, *optional*):
            Folder that keeps encodings, each in a file named by all that it depends on. Without it, batches are encoded
            when they are used.
        from_files (`bool`):
            Whether the pipeline's weights are those of the files that it was loaded from, whose hashes are remembered.
    """

    def __init__(
        self,
        pipeline: FluxFillSemanticPipeline,
        dataset: TriptychDataset,
        max_sequence_length: int,
        cache_dir: Path | None = None,
        from_files: bool = False,
    ):
        self.pipeline: Any = pipeline
        self.dataset, self.max_sequence_length = dataset, max_sequence_length
        self.mode, self.maps = SEMANTIC_MODES[pipeline.config["semantic_mode"]], dataset.maps
        self.panels = self.mode.panels_of(self.maps)
        self.cached, self.folder = cache_dir is not None, cache_dir or Path()
        self.layouts = self._layouts()
        if self.cached:
            memory = FileMemory(self.folder / MEMORY, MEMORY_VERSION) if from_files else None
            self.map_key = fingerprint(pipeline.vae, memory)
            # Modes that put the same on the canvas share its encoding.
            self.canvas_key = (self.map_key, self.panels, self.mode.fuses and pipeline.config["fusion_alpha"])
            if pipeline.config["visible_attention"] != "joint":
                self.canvas_key += (pipeline.config["visible_attention"],)
            encoders = [fingerprint(e, memory) for e in (pipeline.text_encoder, pipeline.text_encoder_2)]
            tokenizers = [tokenizer_fingerprint(t) for t in (pipeline.tokenizer, pipeline.tokenizer_2)]
            self.prompt_key = (*encoders, *tokenizers, max_sequence_length)
            if memory is not None:
                memory.save()

    def over(self, dataset: TriptychDataset) -> "Encoder":
        """The same encoder for other samples. The hashes of its models, which take long, are shared."""
        other = copy.copy(self)
        other.dataset = dataset
        other.layouts = other._layouts()
        return other

    def _layouts(self) -> dict[tuple[int, int], Layout]:
        return {size: Layout(self.pipeline, *size, len(self.panels)) for size in self.dataset.sizes}

    def used_layouts(self) -> list[Layout]:
        """The canvases that samples of the data set have."""
        return [self.layouts[self.dataset.sizes[group]] for group in sorted(set(self.dataset.groups()))]

    @property
    def image_tokens(self) -> int:
        """Number of image tokens on the largest canvas."""
        return max(layout.image_tokens for layout in self.used_layouts())

    def encode_views(self, views: dict[str, torch.Tensor], drop_maps: Sequence[str] = ()) -> dict[str, torch.Tensor]:
        """Batched views -> all that the mode needs of them."""
        encoded = self.encode_canvas(views, drop_maps)
        if self.mode.module_class is not None:
            encoded["semantic"] = self._stack([self.encode_map(views, name)["semantic"] for name in self.maps], dim=1)
        return encoded

    @torch.no_grad()
    def encode_canvas(self, views: dict[str, torch.Tensor], drop_maps: Sequence[str] = ()) -> dict[str, torch.Tensor]:
        """Batched views -> VAE posteriors of the diptych and the masked diptych."""
        shown = [name for name in self.maps if self.mode.map_on_canvas and name not in drop_maps]
        on_canvas = {name: views[name] for name in shown}
        diptych, mask = self.pipeline.prepare_diptych(views["visible"], views["target"], on_canvas)
        moments, masked_moments = self.pipeline.encode_moments(diptych, mask)
        return {"moments": moments, "masked_moments": masked_moments}

    @torch.no_grad()
    def encode_map(self, views: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
        """Batched views -> semantic tokens of one panel."""
        return {"semantic": self.pipeline.encode_semantic(views[name])}

    def _stack(self, tokens: list[torch.Tensor], dim: int) -> torch.Tensor:
        """The tokens of one map as they are, or those of several along a dimension of their own."""
        return tokens[0] if len(tokens) == 1 else torch.stack(tokens, dim)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Prompts -> `prompt_embeds (batch, max_sequence_length, channels)` and `pooled_prompt_embeds (batch, channels)`."""
        embeds, pooled, _ = self.pipeline.encode_prompt(prompts, prompts, max_sequence_length=self.max_sequence_length)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    # Read: what the data loader's workers do.

    def read(self, spec: SampleSpec) -> dict:
        """One sample: its encodings from the cache, or without a cache its views and caption."""
        prompt = "" if spec.drop_caption else self.dataset.caption(spec.index, spec.caption)
        if not self.cached:
            return {"spec": spec, "views": self._views(spec), "prompt": prompt}
        encoded, maps = read_encoding(self.prompt_file(prompt)), []
        for file in self.sample_files(spec):
            encoded |= (found := read_encoding(file))
            maps += [found["semantic"]] if "semantic" in found else []
        return {"spec": spec, "encoded": encoded | ({"semantic": self._stack(maps, dim=0)} if maps else {})}

    def _views(self, spec: SampleSpec) -> dict[str, torch.Tensor]:
        views = self.dataset.views(spec.index, spec.flip)
        if spec.wrong_map is not None:
            name, other = spec.wrong_map
            views[name] = self.dataset.views(other, spec.flip)[name]
        # A map that is missing is gray, which is never looked at or is what an empty panel shows.
        views = dict.fromkeys(self.maps, torch.full_like(views["visible"], 0.5)) | views
        return {name: view[None] for name, view in views.items()}

    def _keeps(self, spec: SampleSpec) -> list[bool]:
        """Which of the maps a sample has and does not drop."""
        return [self.dataset.has_map(spec.index, name) and name not in spec.drop_maps for name in self.maps]

    # Encode: read samples become the model's inputs.

    def layout(self, samples: list[dict]) -> Layout:
        """The canvas of a batch, whose samples all have one size."""
        return self.layouts[self.dataset.size(samples[0]["spec"].index)]

    def encode_batch(
        self, samples: list[dict], generators: list[torch.Generator], device: torch.device, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """Read samples -> `x_0`, `x_cond` and all other inputs of the model that are not noise, on the device."""
        if self.cached:
            names = samples[0]["encoded"]
            encoded = {n: torch.stack([sample["encoded"][n] for sample in samples]).to(device) for n in names}
        else:
            parts = []
            for sample in samples:
                encoded_views = self.encode_views(sample["views"], sample["spec"].drop_maps)
                parts.append(encoded_views | self.encode_prompts([sample["prompt"]]))
            encoded = {name: torch.cat([part[name] for part in parts]).to(device) for name in parts[0]}
        layout = self.layout(samples).to(device)
        moments = (encoded["moments"], encoded["masked_moments"])
        x_0, x_cond, img_ids = self.pipeline.encode_diptych(None, layout.mask, moments, generators, dtype)
        inputs = {"x_0": x_0, "x_cond": x_cond, "img_ids": img_ids}
        inputs |= {name: encoded[name].to(dtype) for name in ("prompt_embeds", "pooled_prompt_embeds")}
        if "semantic" in encoded:
            tokens, grid = encoded["semantic"], (layout.rows, layout.columns, layout.panels)
            tiled = tile_across_panels(tokens.flatten(0, -3), *grid).unflatten(0, tokens.shape[:-2])
            inputs["semantic_tokens"] = tiled.to(dtype)
            inputs["positions"] = layout.positions
            inputs["keep_map"] = torch.tensor([self._keeps(sample["spec"]) for sample in samples], device=device)
        return inputs

    # The cache.

    def _file(self, *key) -> Path:
        return self.folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()}.safetensors"

    def sample_files(self, spec: SampleSpec) -> dict[Path, Callable]:
        """The files of a sample's encodings, and what makes each from its views."""
        rows = dict.fromkeys(self.maps, spec.index) | dict([spec.wrong_map] if spec.wrong_map else [])
        views = {i: (*self.dataset.digests(i), *self.dataset.size(i), spec.flip) for i in (spec.index, *rows.values())}
        # Several maps are told by their places, because names may change places. The only one needs none.
        places = [(place,) if len(rows) > 1 else () for place in range(len(rows))]
        maps = {name: (*views[row], *place) for (name, row), place in zip(rows.items(), places)}
        dropped = spec.drop_maps if len(rows) > 1 else bool(spec.drop_maps)
        on_canvas = (dropped, *itertools.chain(*maps.values())) if self.mode.map_on_canvas else ()
        encode = functools.partial(self.encode_canvas, drop_maps=spec.drop_maps)
        files: dict[Path, Callable] = {self._file(*views[spec.index], *on_canvas, self.canvas_key): encode}
        for name, key in maps.items() if self.mode.module_class is not None else ():
            files[self._file(*key, self.map_key)] = lambda views, name=name: self.encode_map(views, name)
        return files

    def prompt_file(self, prompt: str) -> Path:
        return self._file(prompt, self.prompt_key)

    def specs(self, flips: bool = False, dropped_maps: bool = False) -> Iterator[SampleSpec]:
        """Every sample, in all forms that training reads it in."""
        # Any of the maps may be dropped.
        subsets = [itertools.combinations(self.maps, count) for count in range(len(self.maps) + 1)]
        drops = list(itertools.chain(*subsets)) if dropped_maps and self.mode.map_on_canvas else [()]
        for index, flip, drop in itertools.product(range(len(self.dataset)), range(1 + flips), drops):
            yield SampleSpec(0, index, bool(flip), False, drop)

    def fill_cache(self, accelerator: Accelerator, specs: Iterable[SampleSpec]) -> None:
        """Encodes prompts and samples that the cache lacks. The processes share the work, so all have to call this."""
        # All prompts come first, so that text encoders and VAE each move to the device once. Encoding one item at a time
        # needs the least memory, and no encoding depends on its neighbors.
        jobs: dict[Path, tuple[Callable, Callable]] = {}
        for prompt in sorted(self.dataset.all_captions() | {""}):
            jobs[self.prompt_file(prompt)] = (functools.partial(list, [prompt]), self.encode_prompts)
        for spec in specs:
            read = functools.partial(self._views, spec)
            for path, encode in self.sample_files(spec).items():
                jobs.setdefault(path, (read, encode))

        # An encoding is read once to see that it is intact, by one process, and again only if its file has changed.
        memory = FileMemory(self.folder / MEMORY, MEMORY_VERSION)
        rank, processes = accelerator.process_index, accelerator.num_processes
        own = list(jobs)[rank::processes]
        unread = [path for path in own if not memory.get(path.name, file_stamp([path]))]
        damaged = [path for path in unread if not is_intact(path)]
        if processes > 1:
            unread, damaged = gather_object(unread), gather_object(damaged)
        damaged = set(damaged)
        missing = [path for path in jobs if path in damaged]
        logger.info(f"Encodings: {len(jobs) - len(missing)} found in {self.folder}, {len(missing)} to make")
        with explain_write_errors("--cache_root"):
            self.folder.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process:
            # Other runs may be writing to the same folder.
            remove_temporary_files(self.folder, age=24 * 60 * 60)
        # What comes of one sample is encoded together, so that it is read once.
        groups = [list(paths) for _, paths in itertools.groupby(missing, key=lambda path: jobs[path][0])]
        if own := groups[rank::processes]:
            offload_encoders(self.pipeline, accelerator.device)
        for paths in tqdm(own, desc="Encoding", disable=not accelerator.is_local_main_process):
            source = jobs[paths[0]][0]()
            for path in paths:
                encoded = {name: tensor[0].contiguous().cpu() for name, tensor in jobs[path][1](source).items()}
                with explain_write_errors("--cache_root", "What is encoded already is kept."):
                    write_encoding(path, encoded)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for path in unread:
                memory.put(path.name, file_stamp([path]), True)
            memory.save()


def encode_datasets(
    options: Options,
    accelerator: Accelerator,
    dtype: torch.dtype,
    dataset: TriptychDataset,
    plan: ValidationPlan | None = None,
    pipeline: FluxFillSemanticPipeline | None = None,
) -> tuple[Encoder, Encoder | None]:
    """
    Encodes all samples, and what validation needs of the held-out ones, with the encoders alone on the accelerator.
    Without a cache, steps encode.
    """
    # Of a model's variants in one folder, a remembered hash does not tell which one it is of.
    from_files = pipeline is None and options.variant is None
    pipeline = load_encoders(options, dtype) if pipeline is None else pipeline
    captions = dataset.all_captions() | (set() if plan is None else plan.dataset.all_captions())
    lengths = count_tokens(pipeline.tokenizer_2, captions)
    length = options.max_sequence_length
    if length == "auto":
        length = longest_prompt(lengths.values())
        logger.info(f"Prompts are {length} tokens long, as the longest in the data")
    cut = {caption: count for caption, count in lengths.items() if count > length}
    if cut:
        longest = max(cut, key=cut.__getitem__)
        logger.warning(
            f"{len(cut)} of {len(captions)} captions are longer than the {length} tokens of --max_sequence_length and are"
            f" cut. The longest has {cut[longest]} tokens: {longest[:200]!r}"
        )
    folder = Path(options.cache_root) if options.cache_latents else None
    encoder = Encoder(pipeline, dataset, length, folder, from_files)
    held_out = None if plan is None else encoder.over(plan.dataset)
    if not options.cache_latents:
        pipeline.to(accelerator.device)
        return encoder, held_out
    if plan is not None and held_out is not None:
        held_out.fill_cache(accelerator, plan.specs())
    encoder.fill_cache(accelerator, encoder.specs(options.random_flip, options.semantic_dropout > 0))
    release_encoders(pipeline)
    free_memory()
    return encoder, held_out
