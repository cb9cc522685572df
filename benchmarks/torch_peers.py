"""The same meta-gradient in PyTorch, three ways: torch.func with vmap, higher, and TorchOpt.

Second-order per-layer Meta-SGD with plain functional models, so that every system computes the same numbers. Params
are dicts "layer/tensor" -> tensor, as metalr names them; rates are logarithms, one a layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Params = dict[str, Tensor]


def mlp(params: Params, x: Tensor) -> Tensor:
    """ReLU stack on flattened images [n, 28, 28, 1]."""
    layers = sorted({name.split("/")[0] for name in params} - {"head"})
    x = x.reshape(x.shape[0], -1)
    for layer in layers:
        x = F.relu(x @ params[f"{layer}/kernel"] + params[f"{layer}/bias"])
    return x @ params["head/kernel"] + params["head/bias"]


def conv4(params: Params, x: Tensor) -> Tensor:
    """Four 3x3 stride-2 convolutions with batch-statistics norm. Kernels are [out, in, 3, 3] here."""
    x = x.movedim(-1, 1)
    for i in range(4):
        total = 1 if x.shape[-1] % 2 == 0 else 2  # "same" padding of a stride-2 convolution
        x = F.pad(x, (total // 2, total - total // 2) * 2)
        x = F.conv2d(x, params[f"conv_{i}/kernel"], params[f"conv_{i}/bias"], stride=2)
        mean = x.mean((0, 2, 3), keepdim=True)
        variance = (x * x).mean((0, 2, 3), keepdim=True) - mean * mean
        scale, bias = (params[f"norm_{i}/{t}"][None, :, None, None] for t in ("scale", "bias"))
        x = F.relu((x - mean) * torch.rsqrt(variance + 1e-5) * scale + bias)
    return x.movedim(1, -1).reshape(x.shape[0], -1) @ params["head/kernel"] + params["head/bias"]


def gru(params: Params, x: Tensor) -> Tensor:
    """A GRU over the rows of the image, as Flax writes its cell."""
    rows = x.reshape(x.shape[0], 28, 28)
    p = {name.split("/", 1)[1] if name.startswith("GRU") else name: value for name, value in params.items()}
    from_x = {g: rows @ p[f"i{g}/kernel"] + p[f"i{g}/bias"] for g in "rzn"}
    h = torch.zeros(x.shape[0], p["hr/kernel"].shape[0], dtype=x.dtype, device=x.device)
    for t in range(28):
        r = torch.sigmoid(from_x["r"][:, t] + h @ p["hr/kernel"])
        z = torch.sigmoid(from_x["z"][:, t] + h @ p["hz/kernel"])
        n = torch.tanh(from_x["n"][:, t] + r * (h @ p["hn/kernel"] + p["hn/bias"]))
        h = (1 - z) * n + z * h
    return h @ p["head/kernel"] + p["head/bias"]


MODELS: dict[str, Callable[[Params, Tensor], Tensor]] = {"mlp": mlp, "conv4": conv4, "rnn": gru}


def to_torch(named: dict[str, np.ndarray]) -> Params:
    """Arrays by name as tensors; convolution kernels transposed to PyTorch's layout."""
    return {
        name: torch.tensor(value if value.ndim != 4 else value.transpose(3, 2, 0, 1).copy())
        for name, value in named.items()
    }


def to_numpy(params: Params) -> dict[str, np.ndarray]:
    """The inverse of to_torch."""
    return {
        n: v.detach().numpy() if v.ndim != 4 else v.detach().numpy().transpose(2, 3, 1, 0) for n, v in params.items()
    }


def _layer(name: str) -> str:
    return name.rpartition("/")[0]


def torch_func(model: Callable, steps: int, chunk: int) -> Callable[..., tuple[Params, Params, Tensor]]:
    """vmap over `chunk` tasks at a time, gradients by torch.func."""

    def task_loss(params: Params, log_rates: Params, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        rates, fast = {k: v.exp() for k, v in log_rates.items()}, params
        for _ in range(steps):
            grads = torch.func.grad(lambda p: F.cross_entropy(model(p, sx), sy))(fast)
            fast = {name: value - rates[_layer(name)] * grads[name] for name, value in fast.items()}
        return F.cross_entropy(model(fast, qx), qy)

    def meta_gradient(params: Params, log_rates: Params, *episodes: Tensor) -> tuple[Params, Params, Tensor]:
        count = len(episodes[0])
        totals: Any = None
        for part in range(0, count, chunk):
            group = [e[part : part + chunk] for e in episodes]

            def loss(params: Params, log_rates: Params, group: list[Tensor] = group) -> Tensor:
                return torch.func.vmap(task_loss, (None, None, 0, 0, 0, 0))(params, log_rates, *group).sum() / count

            (g_params, g_rates), value = torch.func.grad_and_value(loss, (0, 1))(params, log_rates)
            if totals is None:
                totals = g_params, g_rates, value
            else:
                for total, more in ((totals[0], g_params), (totals[1], g_rates)):
                    for name in total:
                        total[name] = total[name] + more[name]
                totals = totals[0], totals[1], totals[2] + value
        return totals

    return meta_gradient


class _Module(nn.Module):
    """A functional model as a module, for higher."""

    def __init__(self, model: Callable, params: Params) -> None:
        super().__init__()
        self.model, self.names = model, list(params)
        for i, value in enumerate(params.values()):
            self.register_parameter(f"p{i}", nn.Parameter(value.clone()))

    def forward(self, x: Tensor) -> Tensor:
        return self.model({name: getattr(self, f"p{i}") for i, name in enumerate(self.names)}, x)


def with_higher(model: Callable, steps: int) -> Callable[..., tuple[Params, Params, Tensor]]:
    """higher.innerloop_ctx, one task after the other."""
    import higher

    def meta_gradient(params: Params, log_rates: Params, *episodes: Tensor) -> tuple[Params, Params, Tensor]:
        net = _Module(model, params)
        logs = {k: v.clone().requires_grad_() for k, v in log_rates.items()}
        weights = list(net.parameters())
        groups = [{"params": [w for w, n in zip(weights, net.names, strict=True) if _layer(n) == g]} for g in logs]
        inner = torch.optim.SGD(groups, lr=0.1)
        total = torch.zeros(())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for sx, sy, qx, qy in zip(*episodes, strict=True):
                override = {"lr": [v.exp() for v in logs.values()]}
                with higher.innerloop_ctx(net, inner, copy_initial_weights=False, override=override) as (fast, opt):
                    for _ in range(steps):
                        opt.step(F.cross_entropy(fast(sx), sy))
                    loss = F.cross_entropy(fast(qx), qy) / len(episodes[0])
                    loss.backward()
                    total += loss.detach()
        grads = {
            n: w.grad if w.grad is not None else torch.zeros_like(w) for n, w in zip(net.names, weights, strict=True)
        }
        return grads, {k: v.grad for k, v in logs.items()}, total

    return meta_gradient


def with_torchopt(model: Callable, steps: int) -> Callable[..., tuple[Params, Params, Tensor]]:
    """TorchOpt's functional SGD, differentiated through, one task after the other."""
    import torchopt

    optimizer = torchopt.sgd(lr=1.0)

    def meta_gradient(params: Params, log_rates: Params, *episodes: Tensor) -> tuple[Params, Params, Tensor]:
        start = {k: v.clone().requires_grad_() for k, v in params.items()}
        logs = {k: v.clone().requires_grad_() for k, v in log_rates.items()}
        total = torch.zeros(())
        for sx, sy, qx, qy in zip(*episodes, strict=True):
            rates = {k: v.exp() for k, v in logs.items()}
            fast, state = start, optimizer.init(start)
            for _ in range(steps):
                loss = F.cross_entropy(model(fast, sx), sy)
                grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                scaled = {n: rates[_layer(n)] * g for n, g in zip(fast, grads, strict=True)}
                updates, state = optimizer.update(scaled, state, params=fast, inplace=False)
                fast = torchopt.apply_updates(fast, updates, inplace=False)
            loss = F.cross_entropy(model(fast, qx), qy) / len(episodes[0])
            loss.backward()
            total += loss.detach()
        return {k: v.grad for k, v in start.items()}, {k: v.grad for k, v in logs.items()}, total

    return meta_gradient
