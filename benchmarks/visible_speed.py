"""One denoising step at FLUX's size as one CUDA graph: joint, against the target's pass with kept keys and values.

    python benchmarks/visible_speed.py --output speed.json

The kept keys and values are buffers that stay in place: the pass of the visible view writes them, and the target's pass reads
them. The same operations as those of `CausalAttention` (`--check` compares the two on a tiny model). Batch 1, compiled blocks.
A step that a cache leaves out runs the first block and adds a kept residual. Its decision, which the host waits for, is not
in these times, for joint and causal alike.
"""

import argparse
import gc
import json
import statistics
import time
import traceback
from pathlib import Path

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, _get_qkv_projections
from flux_shape import build_transformer
from measurement import describe, markdown

from semantic_fill.precision import quantize_blocks


BEGIN = time.time()


class Keeping(FluxAttnProcessor):
    """FLUX's attention, whose view comes last. Keys and values of the visible view are buffers of the layer."""

    records = False

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        projected = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in projected[:3])
        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            text = [x.unflatten(-1, (-1, attn.head_dim)) for x in projected[3:]]
            text[:2] = attn.norm_added_q(text[0]), attn.norm_added_k(text[1])
            query, key, value = (torch.cat(pair, dim=1) for pair in zip(text, (query, key, value)))
        query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        if self.records:
            kept = attn.kept_keys.shape[1]
            attn.kept_keys.copy_(key[:, -kept:])
            attn.kept_values.copy_(value[:, -kept:])
        else:
            key, value = torch.cat((key, attn.kept_keys), dim=1), torch.cat((value, attn.kept_values), dim=1)
        out = dispatch_attention_fn(query, key, value, backend=self._attention_backend).flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return out
        text_tokens = encoder_hidden_states.shape[1]
        text_out, image_out = out.split_with_sizes([text_tokens, out.shape[1] - text_tokens], dim=1)
        return attn.to_out[1](attn.to_out[0](image_out.contiguous())), attn.to_add_out(text_out.contiguous())


class Recording(Keeping):
    records = True


class Bench:
    def __init__(self, args):
        self.args, self.cuda = args, torch.cuda.is_available()
        self.device, self.dtype = torch.device("cuda" if self.cuda else "cpu"), torch.bfloat16
        if not self.cuda:
            self.dtype = torch.float32
        torch.manual_seed(0)
        self.transformer = build_transformer(args.shape, "bf16", self.device, self.dtype)
        # `forward` computes the same rotary embedding in every step. A graph of them all is easier to capture without.
        self.pos_embed = self.transformer.pos_embed.forward
        self.transformer.pos_embed.forward = lambda ids: self.now
        self.layers = [block.attn for block in (*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks)]
        self.stock = [layer.processor for layer in self.layers]
        self.use, self.record = Keeping(), Recording()
        self.rows, self.about = [], describe(self.device)

    # -- Parts ---------------------------------------------------------------------------------------------------------

    def keep(self, tokens):
        config = self.transformer.config
        for layer in self.layers:
            for name in ("kept_keys", "kept_values"):
                shape = (1, tokens, config.num_attention_heads, config.attention_head_dim)
                layer.register_buffer(name, torch.randn(shape, device=self.device, dtype=self.dtype), persistent=False)
        kept = sum(2 * layer.kept_keys.numel() * layer.kept_keys.element_size() for layer in self.layers)
        return kept / 2**20

    def act(self, how):
        for layer, stock in zip(self.layers, self.stock):
            layer.processor = {"joint": stock, "use": self.use, "record": self.record}[how]

    def inputs(self, image, text, side):
        config, options = self.transformer.config, {"device": self.device, "dtype": self.dtype}
        ids = torch.zeros(text + image, 3, device=self.device)
        ids[text:, 1], ids[text:, 2] = torch.arange(image) // side, torch.arange(image) % side
        return {
            "hidden_states": torch.randn(1, image, config.in_channels, **options),
            "timestep": torch.full((1,), 0.5, **options),
            "guidance": torch.full((1,), 30.0, **options),
            "pooled_projections": torch.randn(1, config.pooled_projection_dim, **options),
            "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim, **options),
            "txt_ids": ids[:text],
            "img_ids": ids[text:],
            "return_dict": False,
        }, self.pos_embed(ids)

    def step(self, how, image, text, side):
        """A function that runs one whole step."""
        inputs, rotary = self.inputs(image, text, side)

        def run():
            return self.transformer(**inputs)[0]

        def prepare():
            self.act(how)
            self.now = rotary

        return run, prepare

    def skipped(self, how, image, text, side):
        """A step that a cache leaves out: the first block, and a residual in place of the others."""
        inputs, rotary = self.inputs(image, text, side)
        t = self.transformer
        residual = torch.randn(1, image, t.inner_dim, device=self.device, dtype=self.dtype)
        before = torch.randn_like(residual)

        def run():
            hidden = t.x_embedder(inputs["hidden_states"])
            temb = t.time_text_embed(inputs["timestep"] * 1000, inputs["guidance"] * 1000, inputs["pooled_projections"])
            text_states = t.context_embedder(inputs["encoder_hidden_states"])
            _, hidden_after = t.transformer_blocks[0](
                hidden_states=hidden, encoder_hidden_states=text_states, temb=temb, image_rotary_emb=self.now, joint_attention_kwargs=None
            )
            # What the decision looks at.
            change = ((hidden_after - hidden) - before).abs().mean() / before.abs().mean()
            return t.proj_out(t.norm_out(hidden_after + residual, temb)), change

        def prepare():
            self.act(how)
            self.now = rotary

        return run, prepare

    def capture(self, function):
        """A function that replays another as one graph."""
        run, prepare = function
        prepare()
        if not self.cuda:
            run()

            def again():
                prepare()
                run()

            return again
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        def busy():
            prepare()
            run()

        return busy

    def clock(self, function):
        if not self.cuda:
            begin = time.perf_counter()
            function()
            return 1000 * (time.perf_counter() - begin)
        # The time of the kernels alone, without the gaps between them.
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            function()
            torch.cuda.synchronize()
        return sum(e.time_range.elapsed_us() for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA) / 1e3

    def turns(self, functions, count, warm=True):
        for function in functions.values() if warm else ():
            function()
        times = {name: [] for name in functions}
        for _ in range(count):
            for name, function in functions.items():
                times[name].append(self.clock(function))
        return {name: statistics.median(values) for name, values in times.items()}

    # -- Rows ----------------------------------------------------------------------------------------------------------

    def add(self, **row):
        self.rows.append(row | {"at, s": time.time() - BEGIN})
        self.args.output.write_text(json.dumps({"about": self.about, "rows": self.rows}, indent=1))
        print(json.dumps(row), flush=True)

    def attempt(self, function, *values):
        if time.time() - BEGIN > self.args.seconds:
            self.add(row=f"{function.__name__} {values}", result="no time left")
            return
        try:
            function(*values)
        except Exception as error:
            traceback.print_exc()
            self.add(row=f"{function.__name__} {values}", result=repr(error)[:300])
            if self.cuda:
                torch.cuda.synchronize()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def backend(self, name):
        found = None if name == "native" else AttentionBackendName(name)
        for processor in (*self.stock, self.use, self.record):
            processor._attention_backend = found

    @torch.no_grad()
    def measure(self, precision, backend, text, whole):
        """
        Single steps in turns. With `whole`, also all 28 of a painting with and without a cache, and half resolution.
        """
        self.backend(backend)
        n, side, self.kept_outputs = self.args.tokens, self.args.side, []
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        mib = self.keep(n)
        label = {"precision": precision, "attention": backend, "text tokens": text}
        functions = {"joint": self.capture(self.step("joint", 2 * n, text, 2 * side))}
        functions["causal"] = self.capture(self.step("use", n, text, side))
        if whole:
            functions["visible pass"] = self.capture(self.step("record", n, text, side))
        times = self.turns(functions, self.args.replays)
        row = label | {"joint, ms": times["joint"], "causal, ms": times["causal"], "times as fast": times["joint"] / times["causal"]}
        row |= {"visible pass, ms": times.get("visible pass"), "kept, MiB": mib}
        row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30 if self.cuda else None
        self.add(row="one step", **row)
        if not whole:
            return
        functions["joint, left out"] = self.capture(self.skipped("joint", 2 * n, text, 2 * side))
        functions["causal, left out"] = self.capture(self.skipped("use", n, text, side))
        computed = [step * 13 // 28 != (step - 1) * 13 // 28 for step in range(28)]

        def painting(who, cached):
            def run():
                if who == "causal":
                    functions["visible pass"]()
                for step in range(28):
                    functions[who if not cached or computed[step] else f"{who}, left out"]()

            return run

        names = {(who, cached): painting(who, cached) for cached in (False, True) for who in ("joint", "causal")}
        times = self.turns(names, self.args.rounds, False)
        for cached in (False, True):
            a, b = times["joint", cached], times["causal", cached]
            what = f"28 steps, {sum(computed)} of them computed" if cached else "28 steps"
            self.add(row=what, **label, **{"joint, ms": a, "causal, ms": b, "times as fast": a / b, "share": b / a})
        single = self.turns({k: functions[k] for k in ("joint, left out", "causal, left out")}, self.args.replays)
        self.add(row="a step left out", **label, **{"joint, ms": single["joint, left out"], "causal, ms": single["causal, left out"]})

    @torch.no_grad()
    def fewer(self, precision, backend, text, whole):
        """The same with a quarter of the visible tokens, and with the prompt kept too, against joint. One of them `whole`."""
        self.backend(backend)
        n, side, self.kept_outputs = self.args.tokens, self.args.side, []
        label = {"precision": precision, "attention": backend, "text tokens": text}
        joint = self.capture(self.step("joint", 2 * n, text, 2 * side))
        ways = {"half resolution": (n // 4, side // 2, text), "prompt kept": (n, side, 0)}
        for way, (seen, seen_side, left) in ways.items():
            # The keys and values of the prompt are kept where the target's pass has none.
            mib = self.keep(seen + text - left)
            functions = {"joint": joint, "causal": self.capture(self.step("use", n, left, side))}
            times = self.turns(functions, self.args.replays)
            a, b = times["joint"], times["causal"]
            self.add(row=f"one step, {way}", **label, **{"joint, ms": a, "causal, ms": b, "times as fast": a / b, "kept, MiB": mib})
            if not whole:
                continue
            first = self.capture(self.step("record", seen, text, seen_side))
            skip = {"joint": self.capture(self.skipped("joint", 2 * n, text, 2 * side)), "causal": self.capture(self.skipped("use", n, left, side))}
            first_ms = self.turns({"first": first}, self.args.replays)["first"]
            skipped = self.turns(skip, self.args.replays)
            for count in (28, 13):
                a, b = ((28 - count) * skipped[who] + count * times[who] for who in ("joint", "causal"))
                b += first_ms
                self.add(row=f"28 steps, {count} of them computed, {way}, summed", **label, **{"joint, ms": a, "causal, ms": b, "times as fast": a / b, "share": b / a, "visible pass, ms": first_ms})

    def compile(self):
        torch._dynamo.reset()
        if self.cuda or self.args.compile:
            self.transformer.compile_repeated_blocks(dynamic=False)

    def main(self):
        torch._dynamo.config.recompile_limit = 64
        self.compile()
        texts = self.args.texts
        for text in texts:
            self.attempt(self.measure, "bf16", "native", text, False)
        for text in texts:
            self.attempt(self.fewer, "bf16", "native", text, False)
        self.attempt(lambda: quantize_blocks(self.transformer, "fp8"))
        self.compile()
        self.attempt(self.measure, "fp8", "native", texts[0], True)
        self.attempt(self.fewer, "fp8", "native", texts[0], True)
        for text in texts[1:]:
            self.attempt(self.measure, "fp8", "native", text, False)
            self.attempt(self.fewer, "fp8", "native", text, False)
        print(markdown(self.rows))

    # -- Check ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def check(self):
        """The same target as the real `CausalAttention` computes, on the CPU."""
        from semantic_attention import CausalAttention, join_panels

        n, side, text = self.args.tokens, self.args.side, 8
        self.keep(n)
        visible, _ = self.inputs(n, text, side)
        target, _ = self.inputs(n, text, side)
        target |= {key: visible[key] for key in ("encoder_hidden_states", "pooled_projections", "txt_ids")}
        target["img_ids"] = target["img_ids"] + torch.tensor([0, 0, side])
        for how, inputs in (("record", visible), ("use", target)):
            self.act(how)
            self.now = self.pos_embed(torch.cat((inputs["txt_ids"], inputs["img_ids"])))
            out = self.transformer(**inputs | {"timestep": torch.zeros(1) if how == "record" else inputs["timestep"]})[0]
        self.act("joint")
        self.now, self.transformer.pos_embed.forward = None, self.pos_embed
        causal = CausalAttention(self.transformer, gradients=True)
        ids = torch.cat((visible["img_ids"], target["img_ids"]))[None]
        both = target | {"hidden_states": join_panels(visible["hidden_states"], target["hidden_states"], side)}
        both["img_ids"] = join_panels(ids[:, :n], ids[:, n:], side)[0]
        theirs = causal(self.transformer, columns=side, **both)[0].unflatten(1, (-1, 2, side))[:, :, 1].flatten(1, 2)
        print("largest difference from CausalAttention:", (theirs - out).abs().max().item(), "of", out.abs().max().item())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("speed.json"))
    parser.add_argument("--shape", choices=["flux", "test"], default="flux")
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3, help="Turns of whole paintings.")
    parser.add_argument("--seconds", type=float, default=150, help="No row is begun after so many.")
    parser.add_argument("--texts", type=int, nargs="+", default=[512, 80])
    parser.add_argument("--compile", action="store_true", help="Also on a CPU.")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    arguments.side = 32 if arguments.shape == "flux" else 4
    arguments.tokens = arguments.side**2
    bench = Bench(arguments)
    bench.check() if arguments.check else bench.main()
