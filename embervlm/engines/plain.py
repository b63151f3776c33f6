"""Plain torch, without DeepSpeed or FSDP."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
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
    """Plain torch; gradients are summed over the processes here. Computes under autocast, keeps float32 weights."""

    is_replicated = True

    def _wrap(self, phase: PhaseConfig) -> Any:
        self._clip = phase.gradient_clipping
        self._scaler = torch.amp.GradScaler(
            self.world.device.type, growth_interval=1000, enabled=self.precision == "fp16"
        )
        self._shard()
        optimizer = self._adamw(phase)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._make_state(optimizer, self._parameters)
        learning = [p for p in self.module.parameters() if p.requires_grad]
        self._sums = GradientSums(learning) if self.is_replicated and self.world.size > 1 else None
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
        if self._sums is not None and is_last:
            self._sums.begin()
        self._scaler.scale(loss).backward()
        if self._sums is not None and is_last:
            self._sums.send_rest()

    def _update(self, rates: Mapping[str, float]) -> bool:
        for parameter in self._parameters:
            if parameter.grad is None:  # as with the other engines, it decays and counts the step all the same
                parameter.grad = torch.zeros_like(parameter)
        if self._sums is not None:
            self._sums.wait()
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


class GradientSums:
    """Gradients summed over all processes in few large messages, sent while the backward pass still computes others
    (Li et al. 2020, PyTorch Distributed, section 3.2): each message costs as much as sending some 100 KB.

    A process's batch may leave parameters out. The messages have one order on every process all the same.

    Args:
        parameters: in the order in which a forward pass comes to them.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._buckets = _in_buckets(parameters[::-1])
        self._missing: list[int] = []
        """Gradients that each bucket still waits for; empty outside a backward pass that is summed."""
        self._sent: list[tuple[Tensor, Any]] = []
        for number, bucket in enumerate(self._buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, number))

    def begin(self) -> None:
        """Before the backward pass behind which the gradients are complete."""
        self._missing, self._sent = [len(bucket) for bucket in self._buckets], []

    def _arrived(self, number: int, _: Tensor) -> None:
        if not self._missing:
            return
        self._missing[number] -= 1
        while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
            self._send()

    def _send(self) -> None:
        for parameter in (bucket := self._buckets[len(self._sent)]):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        values = torch.cat([parameter.grad.flatten() for parameter in bucket])  # type: ignore[union-attr]
        self._sent.append((values, dist.all_reduce(values, async_op=True)))

    def send_rest(self) -> None:
        """Behind the backward pass: what waits for gradients that did not come."""
        while len(self._sent) < len(self._buckets):
            self._send()
        self._missing = []

    def wait(self) -> None:
        """Until every gradient is the sum."""
        for bucket, (values, work) in zip(self._buckets, self._sent):
            work.wait()
            for parameter, summed in zip(bucket, values.split([parameter.numel() for parameter in bucket])):
                parameter.grad.copy_(summed.view_as(parameter))  # type: ignore[union-attr]
        self._sent = []


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
