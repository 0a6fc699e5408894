# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""A single block whose Q, K, V and feed-forward are one product of the fp8 base, against the block as it is.

    python benchmarks/one_product.py --attention_backend _native_cudnn

The weights of the four layers are rows of one matrix. Forward gives views of one result. Backward quantizes the four gradients as one
row with one scale, so that the sum over all of them is one product, in place of four that are added.
"""
import argparse, json, statistics, sys, time
import flux_shape, torch, torch.nn as nn, torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.training_utils import cast_training_params
from semantic_fill.lora import add_lora, compiler_options
from semantic_fill.precision import EIGHT_BITS, FP8, blocks_of, to_fp8, fp8_product

p = argparse.ArgumentParser()
p.add_argument("--shape", default="flux"); p.add_argument("--precision", default="fp8"); p.add_argument("--attention_backend", default="native")
p.add_argument("--batch", type=int, default=4); p.add_argument("--tokens", type=int, default=2560); p.add_argument("--passes", type=int, default=20)
p.add_argument("--rounds", type=int, default=3); p.add_argument("--no-compile", action="store_true")
a = p.parse_args()
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, scale, bias, columns, sizes):
        ctx.save_for_backward(weight, scale, columns)
        ctx.sizes = sizes
        rows, row_scales = to_fp8(x.flatten(0, -2))
        out = fp8_product(rows, weight, row_scales, scale.t(), x.dtype, bias).unflatten(0, x.shape[:-1])
        return out.split(sizes, -1)

    @staticmethod
    def backward(ctx, *grads):
        weight, scale, columns = ctx.saved_tensors
        grad = torch.cat([g.flatten(0, -2) for g in grads], -1)
        rows, row_scales = to_fp8(grad * scale.t())
        columns = weight.t().contiguous() if columns is None else columns
        ones = torch.ones(1, weight.shape[1], dtype=torch.float32, device=grad.device)
        out = fp8_product(rows, columns, row_scales, ones, grads[0].dtype)
        return out.unflatten(0, grads[0].shape[:-1]), None, None, None, None, None


def lora(layer, x, base):
    shape, result = base.shape, base.flatten(0, -2)
    down, up = layer.lora_A["default"].weight.to(x.dtype), layer.lora_B["default"].weight.to(x.dtype)
    low = F.linear(x, down).flatten(0, -2)
    return (result + low @ (layer.scaling["default"] * up).t()).view(shape)


def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
    text = encoder_hidden_states.shape[1]
    hidden = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    residual = hidden
    norm, gate = self.norm(hidden, emb=temb)
    norm = norm.to(torch.bfloat16)
    bases = Joined.apply(norm, self.joined_weight, self.joined_scale, self.joined_bias, self.joined_columns, self.joined_sizes)
    layers = (self.attn.to_q, self.attn.to_k, self.attn.to_v, self.proj_mlp)
    q, k, v, mlp = (lora(layer, norm, base) for layer, base in zip(layers, bases))
    mlp = self.act_mlp(mlp)
    q, k, v = (x.unflatten(-1, (-1, self.attn.head_dim)) for x in (q, k, v))
    q, k = self.attn.norm_q(q), self.attn.norm_k(k)
    q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k))
    out = dispatch_attention_fn(q, k, v, backend=self.attn.processor._attention_backend).flatten(2, 3).to(q.dtype)
    hidden = residual + gate.unsqueeze(1) * self.proj_out(torch.cat([out, mlp], dim=2))
    return hidden[:, :text], hidden[:, text:]


def build():
    torch.manual_seed(0)
    t = flux_shape.build_transformer(a.shape, a.precision, device, torch.bfloat16, num_layers=1, num_single_layers=1)
    t.requires_grad_(False).train()
    t.set_attention_backend(a.attention_backend)
    add_lora(t, 16, 16)
    cast_training_params(t, dtype=torch.float32)
    torch.manual_seed(1)
    for n, q in t.named_parameters():
        if "lora_B" in n: nn.init.normal_(q, std=0.02)
    return t, blocks_of(t)[1]


t, block = build()
layers = [x.base_layer for x in (block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp)]
block.joined_weight = torch.cat([x.weight.data for x in layers]); block.joined_scale = torch.cat([x.scale for x in layers])
block.joined_bias = torch.cat([x.bias.data for x in layers]); block.joined_sizes = [x.weight.shape[0] for x in layers]
block.joined_columns = block.joined_weight.t().contiguous() if a.precision == "fp8x2" else None
cls = type(block); stock = cls.forward
config = t.config; width = config["num_attention_heads"] * config["attention_head_dim"]; text_tokens = a.tokens // 5
draw = lambda *s: torch.randn(a.batch, *s, device=device, dtype=torch.bfloat16)
image, text, temb = draw(a.tokens - text_tokens, width).requires_grad_(), draw(text_tokens, width).requires_grad_(), draw(width)
out_grads = (draw(text_tokens, width), draw(a.tokens - text_tokens, width))
angles = torch.randn(a.tokens, config["attention_head_dim"], device=device)
trained = [q for q in block.parameters() if q.requires_grad]
both = {}
for name, f in (("as it is", stock), ("one product", forward)):
    fn = f if a.no_compile else torch.compile(f, fullgraph=True, dynamic=False, options=compiler_options(fused_lora=True))
    both[name] = fn


def step(fn):
    for x in (image, text, *trained): x.grad = None
    with torch.autocast(device.type, torch.bfloat16):
        out = fn(block, image, text, temb, (angles.cos(), angles.sin()))
    torch.autograd.backward(out, out_grads)
    return [out[1].detach().float(), image.grad.float(), *(q.grad.float() for q in trained)]


found = {name: step(fn) for name, fn in both.items()}
x, y = found.values()
print("relative differences:", [f"{((u - v).norm() / u.norm()).item():.4f}" for u, v in zip(x, y)][:8])
sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
for fn in both.values():
    for _ in range(3): step(fn)
sync()
times = {name: [] for name in both}
for _ in range(a.rounds):
    for name, fn in both.items():
        sync(); begin = time.perf_counter()
        for _ in range(a.passes): step(fn)
        sync(); times[name].append(1e3 * (time.perf_counter() - begin) / a.passes)
for name, values in times.items(): print(a.precision, name, [round(v, 3) for v in values], "ms")
if device.type == "cuda":
    for name, fn in both.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
            step(fn); sync()
        kernels = {}
        for e in prof.events():
            if e.device_type == torch.autograd.DeviceType.CUDA: kernels[e.name] = kernels.get(e.name, 0) + e.time_range.elapsed_us() / 1e3
        print(name, "busy", round(sum(kernels.values()), 3))
        for k, v in sorted(kernels.items(), key=lambda i: -i[1])[:22]: print(f"   {v:7.3f} {k[:110]}")
