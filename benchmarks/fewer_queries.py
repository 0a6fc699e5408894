"""cuDNN's attention where there are fewer queries than keys, compiled and eager, forward and backward."""
import json, os, torch, statistics
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
torch.manual_seed(0)
out = []
B, H, D = 4, 24, 128
for q, k, grads_kv in ((2560, 2560, True), (1536, 1536, True), (1024, 2560, True), (1024, 2560, False), (1024, 2128, True)):
    mk = lambda n: torch.randn(B, n, H, D, device="cuda", dtype=torch.bfloat16)
    Q, own_k, own_v, kept_k, kept_v, G = mk(q), mk(min(q, k)), mk(min(q, k)), mk(k-q), mk(k-q), mk(q)
    leaves = [Q, own_k, own_v] + ([kept_k, kept_v] if grads_kv and k > q else [])
    def run(double=False):
        for l in leaves: l.requires_grad_(True); l.grad = None
        K = torch.cat((kept_k, own_k), 1) if k > q else own_k
        V = torch.cat((kept_v, own_v), 1) if k > q else own_v
        a, b, c = (x.transpose(1, 2) for x in (Q, K, V))
        if double: a, b, c = (x[:1].double() for x in (a, b, c))
        o = F.scaled_dot_product_attention(a, b, c).transpose(1, 2)
        (o * (G[:1].double() if double else G)).sum().backward()
        return [o.detach()[:1].double()] + [l.grad[:1].double() for l in leaves]
    ref = [r.clone() for r in run(True)]
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        try:
            with sdpa_kernel(backend):
                got = run()
                err = max(((a-b).norm()/b.norm()).item() for a, b in zip(got, ref))
                ts = []
                for _ in range(8):
                    s, e = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    s.record(); run(); e.record(); torch.cuda.synchronize(); ts.append(s.elapsed_time(e))
                # In a graph as well, replayed.
                for l in leaves: l.grad = torch.zeros_like(l)
                g = torch.cuda.CUDAGraph()
                with torch.cuda.graph(g):
                    K = torch.cat((kept_k, own_k), 1) if k > q else own_k
                    V = torch.cat((kept_v, own_v), 1) if k > q else own_v
                    o = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (Q, K, V))).transpose(1, 2)
                    gr = torch.autograd.grad(o, leaves, G)
                g.replay(); torch.cuda.synchronize()
                gerr = max(((a[:1].double()-b).norm()/b.norm()).item() for a, b in zip((o.detach(), *gr), ref))
            row = dict(q=q, k=k, grads_kv=grads_kv, backend=name, ms=statistics.median(ts), err=err, graph_err=gerr)
        except Exception as ex:
            row = dict(q=q, k=k, grads_kv=grads_kv, backend=name, error=repr(ex)[:200])
        out.append(row); print(json.dumps(row), flush=True)
