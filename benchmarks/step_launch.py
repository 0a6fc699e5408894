"""How long the host takes to launch a compiled painting step at FLUX's size, and CUDA graphs of whole steps: `graph bf16`."""
import sys, os, time, statistics, json, traceback
sys.path[:0] = [os.path.dirname(os.path.abspath(__file__)), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
import torch
from flux_shape import build_transformer
from semantic_attention import causal_painting
from semantic_fill.precision import quantize_blocks
variant, precision = sys.argv[1:3]
cuda = torch.cuda.is_available()
dev = torch.device("cuda" if cuda else "cpu")
tiny = {} if cuda else dict(num_attention_heads=2, attention_head_dim=16, axes_dims_rope=(4, 6, 6), joint_attention_dim=32, pooled_projection_dim=32, num_layers=2, num_single_layers=2)
out = {"variant": variant, "precision": precision}
def say(**kw):
    out.update(kw); print(json.dumps(kw), flush=True)
B = time.time()
def sync():
    if cuda: torch.cuda.synchronize()
@torch.no_grad()
def main():
    torch.manual_seed(0)
    t = build_transformer("flux", "bf16", dev, torch.bfloat16, **tiny)
    if precision == "fp8" and cuda:
        quantize_blocks(t, "fp8")
    say(built=time.time()-B)
    torch._dynamo.config.recompile_limit = 64
    g = 32 if cuda else 4
    c = t.config
    def inputs(txt):
        N = 2*g*g
        ids = torch.zeros(N, 3, device=dev); ids[:, 1] = torch.arange(N, device=dev)//(2*g); ids[:, 2] = torch.arange(N, device=dev) % (2*g)
        o = dict(device=dev, dtype=torch.bfloat16)
        return dict(hidden_states=torch.randn(1, N, 384, **o), timestep=torch.full((1,), .5, **o), guidance=torch.full((1,), 30., device=dev),
          pooled_projections=torch.randn(1, c.pooled_projection_dim, **o), encoder_hidden_states=torch.randn(1, txt, c.joint_attention_dim, **o),
          txt_ids=torch.zeros(txt, 3, device=dev), img_ids=ids, return_dict=False)
    if variant == "cpp":
        t.compile_repeated_blocks(options={"cpp_wrapper": True})
    elif variant == "reduce":
        t.compile_repeated_blocks(mode="reduce-overhead")
    elif variant == "fullgraph":
        t.compile_repeated_blocks(fullgraph=True, dynamic=False)
    elif variant != "eager":
        t.compile_repeated_blocks()
    def step(kw):
        if variant == "reduce": torch.compiler.cudagraph_mark_step_begin()
        return t(**kw)[0]
    def wall(f, n=10):
        # Launch time (no sync) and whole time.
        sync(); a = time.perf_counter()
        for _ in range(n): f()
        b = time.perf_counter(); sync(); c = time.perf_counter()
        return {"launch ms": 1e3*(b-a)/n, "wall ms": 1e3*(c-a)/n}
    def profile(f, name):
        acts = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if cuda else [])
        with torch.profiler.profile(activities=acts) as p:
            f(); sync()
        rows = sorted(((e.key[:50], e.count, round(e.self_cpu_time_total/1e3, 2), round(e.cpu_time_total/1e3, 2)) for e in p.key_averages()), key=lambda r: -r[2])[:22]
        if cuda:
            say(**{name+" kernels": sum(e.time_range.elapsed_us() for e in p.events() if e.device_type == torch.autograd.DeviceType.CUDA)/1e3})
        for r in rows: print("    ", *r, flush=True)
        out[name] = rows
    def graph(f, name):
        s = torch.cuda.Stream(); s.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(s):
            for _ in range(2): f()
        torch.cuda.current_stream().wait_stream(s); sync()
        want = f().clone()
        sync(); a = time.perf_counter()
        gr = torch.cuda.CUDAGraph()
        with torch.cuda.graph(gr, capture_error_mode="thread_local"):
            got = f()
        sync(); say(**{name+" capture s": time.perf_counter()-a})
        gr.replay(); sync()
        say(**{name+" graph error": ((got-want).float().norm()/want.float().norm()).item()})
        say(**{name+" graph": wall(gr.replay)})
        return gr
    keep = []
    for txt in (512, 80):
        if txt == 80 and variant in ("cpp", "eager"): continue
        kw = inputs(txt if cuda else 8)
        a = time.perf_counter(); 
        for _ in range(3): step(kw)
        sync(); say(**{f"joint {txt} compile s": time.perf_counter()-a})
        say(**{f"joint {txt}": wall(lambda: step(kw))})
        if variant == "plain" and txt == 512: profile(lambda: step(kw), f"joint {txt} profile")
        if variant == "graph" and cuda: keep.append(graph(lambda: step(kw), f"joint {txt}"))
        with causal_painting(t, g):
            a = time.perf_counter(); 
            for _ in range(3): step(kw)
            sync(); say(**{f"causal {txt} compile s": time.perf_counter()-a})
            say(**{f"causal {txt}": wall(lambda: step(kw))})
            if variant == "plain" and txt == 512: profile(lambda: step(kw), f"causal {txt} profile")
            if variant == "graph" and cuda: keep.append(graph(lambda: step(kw), f"causal {txt}"))
        if variant == "plain" and txt == 512:
            torch.compiler.set_stance(skip_guard_eval_unsafe=True)
            with causal_painting(t, g):
                for _ in range(3): step(kw)
                say(**{f"causal {txt}, no guards": wall(lambda: step(kw))})
            torch.compiler.set_stance(skip_guard_eval_unsafe=False)
    say(seconds=time.time()-B)
try:
    main()
except Exception as e:
    traceback.print_exc(); say(error=repr(e)[:300])
