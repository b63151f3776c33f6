"""The `Engine` that runs a training step, and plain torch. DeepSpeed and FSDP have their own files."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from embervlm.config import LOSS_TERMS, POLICY_TERMS, ConfigError, PhaseConfig
from embervlm.data.collate import Batch
from embervlm.engines.param_groups import build_param_groups
from embervlm.errors import UserError
from embervlm.world import World

TERMS = (*LOSS_TERMS, "dense", *POLICY_TERMS, "entropy", "clipped", "drift")
"""What a step sums up over all processes: loss terms, and what is only reported, which has no weight."""
WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter, under torch's own names."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLossError(UserError):
    """A loss term or gradient became NaN or infinite; no rank has updated anything."""


class Engine(ABC):
    """Runs steps on a module, which it wraps. `module` keeps its parameters' names."""

    is_replicated = False
    """Every process holds the whole state."""

    def __init__(self, module: nn.Module, phase: PhaseConfig, world: World, precision: str) -> None:
        self.module, self.world, self.precision = module, world, precision
        self.overflowed = False
        """Whether the last step updated nothing because an fp16 gradient was not finite; it must be repeated."""
        self.keys = list(module.state_dict())
        self._norms = [
            part for part in module.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None
        ]
        first_name = {id(parameter): name for name, parameter in module.named_parameters()}
        groups = build_param_groups(module, phase)
        self.peak_rates: dict[str, float] = {group["name"]: group["lr"] for group in groups}
        """Group name -> peak learning rate."""
        self._groups = [
            {"name": group["name"], "params": [first_name[id(parameter)] for parameter in group["params"]]}
            for group in groups
        ]
        self.learning = set(self._learning_parameters())
        self.names = {key: first_name[id(p)] for key, p in module.named_parameters(remove_duplicate=False)}
        """Key of the state dict -> the parameter's first name: tied parameters have several."""
        self.shapes = {name: p.shape for name, p in self._learning_parameters().items()}
        unrounded = {name: p.detach().float() for name, p in module.named_parameters()}
        buffers = {key: value.detach().clone() for key, value in module.named_buffers() if key in self.keys}
        self._optimizer = self._wrap(phase)
        # sharding code has unfrozen parameters before (torchtitan #4267)
        if changed := self._learning_parameters().keys() ^ self.learning:
            raise RuntimeError(f"wrapping changed which parameters are trained: {sorted(changed)[:5]}")
        self._fragments = [
            Fragment(name=name, kind=kind, start=start, values=values.detach().view(-1))
            for name, start, kinds in self._pieces()
            for kind, values in kinds.items()
        ]
        if precision != "fp32":  # wrapping may have rounded the weights that the optimizer works on
            for fragment in self._fragments:
                if fragment.kind == WEIGHT:
                    _copy_piece(unrounded[fragment.name], fragment)
        self.frozen: dict[str, Tensor] = {}
        """Parameters that do not learn, unrounded; on rank 0."""
        if world.rank == 0:
            self.frozen = {name: value.cpu() for name, value in unrounded.items() if name not in self.learning}
        wrapped = {key: value.clone() for key, value in module.named_buffers() if key in self.keys}
        self._buffers = {key: (buffers[key].cpu(), value) for key, value in wrapped.items()}
        self.saved = self._fragments if world.rank == 0 or not self.is_replicated else []
        """The part of a checkpoint that this process contributes."""
        own = [(fragment.name, fragment.kind, fragment.start, len(fragment.values)) for fragment in self.saved]
        self.layouts: list[list[tuple[str, str, int, int]]] = world.gather(own)
        """By rank: name, kind, start and size of every fragment that it contributes to a checkpoint."""
        # touched now, so that the first checkpoint does not wait for memory
        self.share = torch.zeros(sum(size for *_, size in own), pin_memory=world.device.type == "cuda").fill_(0)
        """Where `saved` is copied to, on the CPU."""
        self._uncopied: Snapshot | None = None
        self.copy_wait_s = 0.0
        """Seconds that updates have waited for the copy of a snapshot so far."""

    def train_step(
        self, batches: Sequence[Batch], weights: Mapping[str, float], rates: Mapping[str, float], step: int
    ) -> tuple[dict[str, float], dict[str, float]]:
        """One optimizer update over `batches`, this process's micro-batches; see `overflowed`.

        Every term is divided by what is scored in the whole step, over all processes and micro-batches, so how the
        samples were dealt out does not change the gradient.

        Returns:
            Mean of each loss term over the step, and its count.
        """
        counts = torch.tensor([[batch.counts.get(term, 0.0) for term in TERMS] for batch in batches]).sum(0)
        totals = self.world.sum(counts.to(self.world.device))
        scale = {term: weights.get(term, 0.0) / total if total else 0.0 for term, total in zip(TERMS, totals.tolist())}
        sums = torch.zeros(len(TERMS), device=self.world.device)
        for index, batch in enumerate(batches):
            found = self._forward(batch.to(self.world.device))
            loss = torch.stack([value * scale[term] for term, value in found.items()]).sum()
            self._backward(loss, index == len(batches) - 1)
            sums += _in_order(found, sums)
        local = sums.clone()
        self._sum_with_statistics(sums)
        means = (sums / totals.clamp_min(1)).tolist()  # the one wait for the device in a step
        terms = dict(zip(TERMS, means))
        if bad := [term for term, value in terms.items() if not math.isfinite(value)]:
            mine = [] if bool(torch.isfinite(local).all()) else [name for b in batches for name in b.record_ids]
            named = [f"rank {rank}: {', '.join(names)}" for rank, names in enumerate(self.world.gather(mine)) if names]
            raise NonFiniteLossError(
                f"step {step}: loss term {', '.join(bad)} is not finite; nothing was updated. Records of "
                f"{'; '.join(named)[:600]}. Lower the learning rate, or look at these records"
            )
        self._wait_for_copy()
        self.overflowed = not self._update(rates)
        if self.overflowed and (self.loss_scale is None or self.loss_scale["scale"] <= 1):
            hint = ", or use --precision bf16 or fp32" if self.loss_scale else ""
            raise NonFiniteLossError(
                f"step {step}: the gradient is not finite; nothing was updated. Lower the learning rate{hint}"
            )
        return {term: terms[term] for term, total in zip(TERMS, totals.tolist()) if total}, dict(
            zip(TERMS, totals.tolist())
        )

    def _sum_with_statistics(self, sums: Tensor) -> None:
        """`sums` over all processes, in place; running statistics that move become the mean of theirs on the way.

        Each process sees its own share of the pictures, and rank 0's statistics are saved.
        """
        if self.world.size == 1:
            return
        moving = [norm for norm in self._norms if norm.training]
        found = [value for norm in moving for value in (norm.running_mean, norm.running_var) if value is not None]
        sent = self.world.sum(torch.cat([sums, *(value.detach().float().flatten() for value in found)]))
        sums.copy_(sent[: len(sums)])
        shared = (sent[len(sums) :] / self.world.size).split([value.numel() for value in found])
        for value, mean in zip(found, shared):
            value.copy_(mean.view_as(value))

    def _wait_for_copy(self) -> None:
        """Until the snapshot's values are copied, which the update is about to change."""
        if self._uncopied is not None:
            began = time.monotonic()
            self._uncopied.copied.wait()
            self.copy_wait_s += time.monotonic() - began
            self._uncopied = None

    def snapshot(self) -> Snapshot:
        """The state as it is now, to be collected in another thread or before the next step.

        Not a collective; the snapshot before it must have been collected. No update takes place before it is copied.
        """
        buffers = {}
        if self.world.rank == 0:
            found = dict(self.module.named_buffers())
            for key, (original, wrapped) in self._buffers.items():  # one that has not moved is saved unrounded
                moved = not torch.equal(found[key], wrapped)
                value = found[key].detach().cpu().clone() if moved else original
                buffers[key] = value.float() if value.is_floating_point() else value
        steps = [int(state["step"]) for state in self._torch_optimizer.state.values()]
        optimizer: dict[str, Any] = {"updates": max(steps, default=0)}
        if self.loss_scale is not None:
            optimizer["loss_scale"] = self.loss_scale
        self._uncopied = Snapshot(self, buffers, optimizer)
        return self._uncopied

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Put `EngineState.optimizer` back, whichever engine and number of processes it came from.

        Raises:
            ConfigError: it has other parameters than those that are trained here.
        """
        if wrong := sorted(state["moments"].keys() ^ self.shapes.keys()):
            raise ConfigError(
                f"the checkpoint's optimizer has other parameters than those that are trained now "
                f"({', '.join(wrong[:3])}"
                f"{', ...' if len(wrong) > 3 else ''}); restore learning_rate_multipliers and freeze_backbone, or "
                f"start in another --output_dir"
            )
        for fragment in self._fragments:
            if fragment.kind in MOMENTS:
                _copy_piece(state["moments"][fragment.name][fragment.kind], fragment)
        for held in self._torch_optimizer.state.values():
            held["step"].fill_(state["updates"])
        if self.loss_scale is not None and state.get("loss_scale"):
            self._set_loss_scale(state["loss_scale"])

    def whole(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which every process has all parameters, so the model can be used outside training steps."""
        return contextlib.nullcontext()

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the module takes its floating-point inputs in."""
        return next(p.dtype for p in self.module.parameters() if p.is_floating_point())

    @property
    def rates(self) -> dict[str, float]:
        """Group name -> learning rate of the last update."""
        return {group["name"]: group["lr"] for group in self._optimizer.param_groups}

    def _adamw(self, phase: PhaseConfig) -> torch.optim.AdamW:
        """The optimizer of every engine, over the module's present parameters."""
        named = dict(self.module.named_parameters())
        groups = [{**group, "params": [named[name] for name in group["params"]]} for group in self._groups]
        # the rate is 0 until the first update sets it: an engine may run a dry step to make its state
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=phase.weight_decay)

    @staticmethod
    def _make_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
        """Fresh AdamW state for `parameters`, before the first update."""
        for parameter in parameters:
            moments = {kind: torch.zeros_like(parameter, requires_grad=False) for kind in MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}

    def _set_rates(self, rates: Mapping[str, float]) -> None:
        """Write the learning rate of every group."""
        for group in self._optimizer.param_groups:
            group["lr"] = rates[group["name"]]

    def _learning_parameters(self) -> dict[str, Any]:
        return {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        """The AdamW inside."""
        return self._optimizer  # type: ignore[no-any-return]

    @abstractmethod
    def _wrap(self, phase: PhaseConfig) -> Any:
        """Wrap the module for training; returns the optimizer, whose state exists."""

    @abstractmethod
    def _pieces(self) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
        """What this process holds of every parameter that learns: its name, where the piece starts in the flattened
        parameter, and the piece of the weights and of each moment."""

    @abstractmethod
    def _forward(self, batch: Batch) -> dict[str, Tensor]: ...

    @abstractmethod
    def _backward(self, loss: Tensor, is_last: bool) -> None: ...

    @abstractmethod
    def _update(self, rates: Mapping[str, float]) -> bool:
        """Clip and update with `rates` (group name -> learning rate). False where a gradient that is not finite kept it
        from that."""

    @property
    @abstractmethod
    def loss_scale(self) -> dict[str, float] | None:
        """`scale` and `good_steps` of fp16's dynamic loss scaling."""

    @abstractmethod
    def _set_loss_scale(self, state: Mapping[str, float]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """A piece of one tensor of the training state, as an engine holds it in this process."""

    name: str
    """The parameter."""
    kind: str
    """`weight`, or which of AdamW's moments."""
    start: int
    """The piece's first element, counted in the flattened tensor."""
    values: Tensor
    """`[elements]` float32, a view into the engine's memory: reading and writing it reads and writes the state."""


@dataclass(frozen=True, kw_only=True)
class EngineState:
    """The state of an engine, whole, on the CPU: independent of the engine and of the number of processes."""

    weights: dict[str, Tensor]
    """The wrapped module's state dict in float32."""
    optimizer: dict[str, Any]
    """`moments` (parameter -> exp_avg, exp_avg_sq), `updates` done, and under fp16 `loss_scale` (`scale`,
    `good_steps` since the last overflow)."""


class Snapshot:
    """This process's share of the state between two steps.

    Weights and moments are copied by `collect`, in the thread that writes the checkpoint; the next update waits for the
    copy, so that it takes place beside the forward and backward pass before it.
    """

    def __init__(self, engine: Engine, buffers: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
        self._engine, self._buffers, self._optimizer = engine, buffers, optimizer
        self._updated = torch.cuda.Event() if engine.world.device.type == "cuda" else None
        if self._updated is not None:
            self._updated.record()  # the update before may still be running on the device
        self.copied = threading.Event()

    def _copy(self) -> Tensor:
        engine = self._engine
        pieces = engine.share.split([len(fragment.values) for fragment in engine.saved])
        stream = None if self._updated is None else torch.cuda.Stream(engine.world.device)
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            if stream is not None and self._updated is not None:
                stream.wait_event(self._updated)
            for piece, fragment in zip(pieces, engine.saved, strict=True):
                piece.copy_(fragment.values, non_blocking=True)
        if stream is not None:
            stream.synchronize()
        return engine.share

    def collect(self) -> EngineState | None:
        """The whole state on rank 0, None elsewhere. A collective, while training continues.

        The next snapshot overwrites this one.
        """
        engine, world = self._engine, self._engine.world
        try:
            own = self._copy()
        finally:
            self.copied.set()
        if world.rank != 0:
            dist.send(own, 0, group=world.background)
            return None
        shares = [own]
        for rank in range(1, world.size):
            share = torch.empty(sum(size for *_, size in engine.layouts[rank]))
            dist.recv(share, rank, group=world.background)
            shares.append(share)
        whole = {
            (name, kind): torch.empty(shape) for name, shape in engine.shapes.items() for kind in (WEIGHT, *MOMENTS)
        }
        for layout, share in zip(engine.layouts, shares, strict=True):
            pieces = share.split([size for *_, size in layout])
            for (name, kind, start, size), piece in zip(layout, pieces, strict=True):
                whole[name, kind].view(-1)[start : start + size] = piece
        weights = dict(self._buffers)
        for key, name in engine.names.items():
            weights[key] = engine.frozen[name] if name in engine.frozen else whole[name, WEIGHT]
        moments = {name: {kind: whole[name, kind] for kind in MOMENTS} for name in engine.shapes}
        return EngineState(
            weights={key: weights[key] for key in engine.keys}, optimizer={"moments": moments, **self._optimizer}
        )


def _copy_piece(whole: Tensor, fragment: Fragment) -> None:
    """Write the part of `whole` that `fragment` stands for into the engine's memory."""
    fragment.values.copy_(whole.flatten()[fragment.start : fragment.start + len(fragment.values)])


def _in_order(found: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """The terms' sums as one vector in the order of `TERMS`."""
    zero = like.new_zeros(())
    return torch.stack([found[term].detach().float() if term in found else zero for term in TERMS])
