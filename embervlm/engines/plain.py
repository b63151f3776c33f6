"""Plain torch, without DeepSpeed or FSDP."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from embervlm.config import PhaseConfig
from embervlm.data.collate import Batch
from embervlm.engines.base import DTYPES, MOMENTS, WEIGHT, Engine

BUCKET = 8 << 20
"""Values that are summed over the processes in one message."""


class TorchEngine(Engine):
    """Plain torch; gradients are summed over processes by hand. Computes under autocast, keeps float32 weights."""

    is_replicated = True

    def _wrap(self, phase: PhaseConfig) -> Any:
        self._clip = phase.gradient_clipping
        self._scaler = torch.amp.GradScaler(
            self.world.device.type, growth_interval=1000, enabled=self.precision == "fp16"
        )
        self._shard()
        optimizer = self._adamw(phase)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._buckets = _in_buckets(self._parameters)
        self._make_state(optimizer, self._parameters)
        return optimizer

    def _shard(self) -> None:
        """Nothing here; what shards parameters does so before the optimizer sees them."""

    def _pieces(self) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
        for name, parameter in self._learning_parameters().items():
            state = self._optimizer.state[parameter]
            yield name, 0, {WEIGHT: parameter, **{kind: state[kind] for kind in MOMENTS}}

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        with torch.autocast(self.world.device.type, DTYPES[self.precision], enabled=self.precision != "fp32"):
            return self.module(batch)

    def _backward(self, loss: Tensor, is_last: bool) -> None:
        self._scaler.scale(loss).backward()

    def _sum_gradients(self) -> None:
        """Over all processes, in few large messages: each costs as much as sending some 100 KB."""
        if self.world.size == 1:
            return
        buckets: list[list[Any]] = [[parameter.grad for parameter in bucket] for bucket in self._buckets]
        flat = [torch.cat([grad.flatten() for grad in bucket]) for bucket in buckets]
        sent = [dist.all_reduce(values, async_op=True) for values in flat]
        for bucket, values, work in zip(buckets, flat, sent):
            work.wait()
            for grad, summed in zip(bucket, values.split([grad.numel() for grad in bucket])):
                grad.copy_(summed.view_as(grad))

    def _update(self, rates: Mapping[str, float]) -> bool:
        for parameter in self._parameters:
            if parameter.grad is None:  # as with the other engines, it decays and counts the step all the same
                parameter.grad = torch.zeros_like(parameter)
        self._sum_gradients()
        self._scaler.unscale_(self._optimizer)
        norm: Any = nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._set_rates(rates)
        if self._scaler.is_enabled():
            scale = self._scaler.get_scale()
            self._scaler.step(self._optimizer)  # skipped where a gradient is not finite
            self._scaler.update()
            updated = self._scaler.get_scale() >= scale
        else:
            updated = math.isfinite(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
            if updated:
                self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return updated

    @property
    def loss_scale(self) -> dict[str, float] | None:
        if not self._scaler.is_enabled():
            return None
        state = self._scaler.state_dict()
        return {"scale": state["scale"], "good_steps": state["_growth_tracker"]}

    def _set_loss_scale(self, state: Mapping[str, float]) -> None:
        # beyond the interval the scale would never grow again; DeepSpeed's count may stand just there
        good_steps = min(int(state["good_steps"]), self._scaler.get_growth_interval() - 1)
        found = {"scale": state["scale"], "_growth_tracker": good_steps}
        self._scaler.load_state_dict({**self._scaler.state_dict(), **found})


def _in_buckets(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """The parameters in their order, at least `BUCKET` values in each bucket but the last."""
    buckets: list[list[Tensor]] = [[]]
    size = 0
    for parameter in parameters:
        if size >= BUCKET:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel()
    return buckets
