"""Whole calls, blocks compiled inside the hooks of the cache: `inner`, `graphs` or `cpp`, then `flux fp8 1`. Reads base.json."""
import sys, os, json, time, statistics, traceback
sys.path[:0] = [os.path.dirname(os.path.abspath(__file__)), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
import torch, inference_speed as I
from diffusers import FirstBlockCacheConfig
from semantic_fill.precision import quantize_blocks
import semantic_attention as sa
mode, shape, precision = sys.argv[1:4]; pictures = sys.argv[4] if len(sys.argv) > 4 else "1"
rounds = int(sys.argv[5]) if len(sys.argv) > 5 else 3
args = I.parse_args(["--shape", shape, "--pictures", pictures] + (["--steps", "6"] if shape == "test" else []))
rows = []; B = time.time()
def say(**kw):
    kw = {"mode": mode, "precision": precision, "pictures": pictures} | kw
    rows.append(kw); print(json.dumps(kw), flush=True)
if mode == "graphs":
    plain = sa.inputs_of_pass
    def forget(t): pass
@torch.no_grad()
def main():
    torch._dynamo.config.recompile_limit = 64
    decisions = I.CacheDecisions()
    p = I.Painter(args)
    t = p.transformer
    if precision == "fp8": quantize_blocks(t, "fp8")
    blocks = (*t.transformer_blocks, *t.single_transformer_blocks)
    if mode == "cpp":
        for b in blocks: b.forward = torch.compile(b.forward, dynamic=False, options={"cpp_wrapper": True})
        real = sa.inputs_of_pass
        def passing(view, *a):
            torch.compiler.set_stance("force_eager" if view == "visible" else "default")
            return real(view, *a)
        sa.inputs_of_pass = passing
    if mode in ("inner", "graphs"):
        for b in blocks:
            b.forward = torch.compile(b.forward, mode="reduce-overhead" if mode == "graphs" else None)
    if mode == "graphs":
        t.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
        # Kept keys and values outlive their step.
        def keep(block, a, o):
            pr = block.attn.processor
            if getattr(pr, "kept", ()) and not getattr(pr, "cloned", False):
                pr.kept = tuple(x.clone() for x in pr.kept); pr.cloned = True
        for b in blocks: b.register_forward_hook(keep)
        old = sa.forget_visible
        def forget(t):
            old(t)
            for b in blocks: b.attn.processor.cloned = False
        sa.forget_visible = forget
    elif mode == "outer":
        t.compile_repeated_blocks()
    def turns(name, replay=None):
        decisions.taken, decisions.replayed = [], replay
        times = {w: [] for w in (("causal",) if mode == "cpp" else ("guided", "causal"))}
        for i in range(rounds + 1):
            for w in times:
                a = time.time(); _, s = p.paint(w)
                if i: times[w].append(s)
                else: say(row=name, who=w, first=time.time()-a)
        m = {w: statistics.median(x) for w, x in times.items()}
        say(row=name, **m, ratio=m["causal"]/m.get("guided", 1), each=times, peak=torch.cuda.max_memory_allocated()/2**30 if torch.cuda.is_available() else None, at=time.time()-B)
    turns("no cache")
    if mode == "cpp":
        import gc
        gc.freeze(); gc.disable(); turns("no gc"); gc.enable()
    if mode == "inner" and precision == "fp8":
        acts = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
        with torch.profiler.profile(activities=acts) as prof: p.paint("causal")
        found = sorted(((e.key[:60], e.count, round(e.self_cpu_time_total/1e3, 1), round(e.cpu_time_total/1e3, 1)) for e in prof.key_averages()), key=lambda r: -r[2])[:30]
        say(row="profile", kernels=sum(e.time_range.elapsed_us() for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA)/1e3, top=found)
    t.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    if mode == "outer":
        torch._dynamo.reset(); t.compile_repeated_blocks()
    computed = json.load(open("base.json"))["computed"]["0.1"][:args.steps]
    turns("cache 0.1", computed)
try: main()
except Exception as e:
    traceback.print_exc(); say(row="failed", error=repr(e)[:400])
