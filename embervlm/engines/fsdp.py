"""FSDP2: parameters, gradients and moments sharded over the processes. The only file that names it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from embervlm.data.collate import Batch
from embervlm.engines.base import DTYPES, WEIGHT
from embervlm.engines.plain import TorchEngine


class FsdpEngine(TorchEngine):
    """`fully_shard` around the whole module; float32 shards, half-precision compute by its policy.

    The module is one unit: gathered in bf16 it takes 78 MB for 39M parameters, and the model may then call its parts
    in any order (the validator reads the language model twice), where units of their own would gather at every call.
    """

    is_replicated = False

    def _shard(self) -> None:
        mesh = init_device_mesh(self.world.device.type, (self.world.size,))
        dtype = DTYPES[self.precision]
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        wrapped = fully_shard(self.module, mesh=mesh, mp_policy=policy)
        assert isinstance(wrapped, FSDPModule)
        # a rank's batch may leave a part of the model out, which torch before 2.13 would not reduce on that rank
        self._touch_all = not hasattr(wrapped, "set_reduce_scatter_unused_params")
        if not self._touch_all:
            wrapped.set_reduce_scatter_unused_params(True)
        self._fsdp = wrapped

    def _pieces(self) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
        for name, _, kinds in super()._pieces():
            parameter: Any = kinds[WEIGHT]
            rows = parameter.shape[0] if parameter.dim() else 1
            per_rank = -(-rows // self.world.size)  # as torch.chunk deals them
            start = min(self.world.rank * per_rank, rows) * (parameter.numel() // max(1, rows))
            yield name, start, {kind: value.detach().to_local() for kind, value in kinds.items()}  # type: ignore[attr-defined]

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        terms = self.module(batch)
        if self._touch_all:  # still unsharded here, as the outermost unit stays until its backward pass
            nothing = sum(0.0 * p.reshape(-1)[0] for p in self.module.parameters() if p.requires_grad)
            name = next(iter(terms))
            terms = {**terms, name: terms[name] + nothing}
        return terms

    def _backward(self, loss: Tensor, is_last: bool) -> None:
        self._fsdp.set_requires_gradient_sync(is_last)
        super()._backward(loss * self.world.size, is_last)  # FSDP averages; the loss is a sum's share already

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        self._fsdp.unshard()
        try:
            yield
        finally:
            self._fsdp.reshard()

    @property
    def compute_dtype(self) -> torch.dtype:
        return DTYPES[self.precision]
