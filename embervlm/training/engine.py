"""What runs a training step: DeepSpeed ZeRO, or plain torch. The only file that names DeepSpeed."""

from __future__ import annotations

import contextlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from embervlm.config import LOSS_TERMS, REPOSITORY, ConfigError, PhaseConfig, TrainConfig
from embervlm.data.collate import Batch
from embervlm.training.param_groups import build_param_groups

TERMS = (*LOSS_TERMS, "dense")
_WHOLE = -1
"""Stands for `Engine.whole` among the modules, numbered from 0, that use a parameter under ZeRO-3."""


class NonFiniteLossError(RuntimeError):
    """A loss term became NaN or infinite; no rank has updated anything."""


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls) -> World:
        """Join the processes that `deepspeed`, `torchrun` or `srun` started; alone where none did."""
        env = os.environ
        if "RANK" not in env and "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
            env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
            env.setdefault("LOCAL_RANK", env.get("SLURM_LOCALID", "0"))
            env.setdefault("MASTER_ADDR", env.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
            env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))
        rank, size = int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1"))
        local_rank = int(env.get("LOCAL_RANK", "0"))
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
            device = torch.device("cuda", torch.cuda.current_device())
        else:
            device = torch.device("cpu")
            env.setdefault("DS_ACCELERATOR", "cpu")
        if not dist.is_initialized():
            env.setdefault("MASTER_ADDR", "127.0.0.1")
            backend = "nccl" if device.type == "cuda" else "gloo"
            store = None if "MASTER_PORT" in env else dist.HashStore()  # alone: no port to collide on
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(minutes=30))
        return cls(rank, size, device)

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """Process 0's `value` (anything picklable) on every process."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's `value`, by rank."""
        out: list[Any] = [None] * self.size
        if self.size > 1:
            dist.all_gather_object(out, value)
            return out
        return [value]


def resolve_precision(precision: str, device: torch.device) -> str:
    """`fp32`, `bf16` or `fp16` on `device`; ConfigError for fp16 where it cannot run."""
    if precision == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if precision == "fp16" and device.type != "cuda":
        raise ConfigError(f"precision: fp16 cannot train on {device.type}; use fp32 or bf16 here")
    return precision


class Engine(ABC):
    """Runs steps on wrapped modules. `module` is the unwrapped one, `model` its EmberVLM."""

    def __init__(self, module: nn.Module, world: World) -> None:
        self.module, self.world = module, world
        self.learning = {name for name, parameter in module.named_parameters() if parameter.requires_grad}

    @abstractmethod
    def _forward(self, batch: Batch) -> dict[str, Tensor]: ...

    @abstractmethod
    def _backward(self, loss: Tensor, is_last: bool) -> None: ...

    @abstractmethod
    def _update(self, rates: Mapping[str, float]) -> None:
        """Clip and update with `rates` (group name -> learning rate)."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The whole module's state in float32 on the CPU, by name. Collective; only rank 0 need keep it."""

    @abstractmethod
    def optimizer_state(self) -> dict[str, Any]:
        """Moments by parameter name and the update count, independent of the number of processes. Collective."""

    @abstractmethod
    def load_optimizer_state(self, state: Mapping[str, Any]) -> None: ...

    def whole(self) -> contextlib.AbstractContextManager[Any]:
        """Within it every process holds all parameters, so that the model can be used apart from training steps."""
        return contextlib.nullcontext()

    @property
    @abstractmethod
    def rates(self) -> dict[str, float]:
        """Group name -> learning rate of the last update."""

    def train_step(
        self, batches: Sequence[Batch], weights: Mapping[str, float], rates: Mapping[str, float], step: int
    ) -> tuple[dict[str, float], dict[str, float]]:
        """One optimizer update over `batches`, this process's micro-batches.

        Every term is divided by what is scored in the whole step, over all processes and micro-batches, so how the
        samples were dealt out does not change the gradient.

        Returns:
            Mean of each loss term over the step, and its count.
        """
        counts = torch.tensor([[batch.counts.get(term, 0.0) for term in TERMS] for batch in batches]).sum(0)
        totals = self.world.sum(counts.to(self.world.device))
        scale = {
            term: weights.get(term, 0.0) / total if total else 0.0 for term, total in zip(TERMS, totals.tolist())
        }  # fmt: skip
        sums = torch.zeros(len(TERMS), device=self.world.device)
        for index, batch in enumerate(batches):
            found = self._forward(batch.to(self.world.device))
            loss = torch.stack([value * scale[term] for term, value in found.items()]).sum()
            self._backward(loss, index == len(batches) - 1)
            sums += _in_order(found, sums)
        local = sums.clone()
        means = (self.world.sum(sums) / totals.clamp_min(1)).tolist()  # the one wait for the device in a step
        terms = dict(zip(TERMS, means))
        if bad := [term for term, value in terms.items() if not math.isfinite(value)]:
            mine = [] if bool(torch.isfinite(local).all()) else [name for b in batches for name in b.record_ids]
            named = [f"rank {rank}: {', '.join(names)}" for rank, names in enumerate(self.world.gather(mine)) if names]
            raise NonFiniteLossError(
                f"step {step}: loss term {', '.join(bad)} is not finite; nothing was updated. Records of "
                f"{'; '.join(named)[:600]}. Lower the learning rate, or look at these records"
            )
        self._update(rates)
        return {term: terms[term] for term, total in zip(TERMS, totals.tolist()) if total}, dict(
            zip(TERMS, totals.tolist())
        )


def _in_order(found: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """The terms' sums as one vector in the order of `TERMS`."""
    zero = like.new_zeros(())
    return torch.stack([found[term].detach().float() if term in found else zero for term in TERMS])


def _set_rates(optimizer: Any, rates: Mapping[str, float]) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rates[group["name"]]


def _adamw(groups: list[dict[str, Any]], phase: PhaseConfig) -> torch.optim.AdamW:
    # the rate is 0 until the first update sets it: an engine may run a dry step to make its state
    return torch.optim.AdamW(
        [{**group, "lr": 0.0} for group in groups], lr=0.0, betas=(0.9, 0.95), weight_decay=phase.weight_decay
    )


class TorchEngine(Engine):
    """Plain torch; gradients are summed over processes by hand."""

    def __init__(
        self, module: nn.Module, phase: PhaseConfig, world: World, precision: str, groups: list[dict[str, Any]]
    ) -> None:
        if precision == "fp16":
            raise ConfigError("engine: torch trains in fp32 or bf16; use --engine deepspeed for fp16")
        super().__init__(module.to(world.device), world)
        self._autocast = precision == "bf16"
        self._clip = phase.gradient_clipping
        self._optimizer = _adamw(groups, phase)
        self._parameters = [p for group in self._optimizer.param_groups for p in group["params"]]

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self._autocast):
            return self.module(batch)

    def _backward(self, loss: Tensor, is_last: bool) -> None:
        loss.backward()

    def _update(self, rates: Mapping[str, float]) -> None:
        if self.world.size > 1:
            for parameter in self._parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
        nn.utils.clip_grad_norm_(self._parameters, self._clip)
        _set_rates(self._optimizer, rates)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def weights(self) -> dict[str, Tensor]:
        return {key: value.detach().float().cpu() if value.is_floating_point() else value.cpu()
                for key, value in self.module.state_dict().items()}  # fmt: skip

    def optimizer_state(self) -> dict[str, Any]:
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        moments, steps = {}, 0
        for parameter, state in self._optimizer.state.items():
            moments[names[id(parameter)]] = {"exp_avg": state["exp_avg"].cpu(), "exp_avg_sq": state["exp_avg_sq"].cpu()}
            steps = int(state["step"])
        return {"moments": moments, "updates": steps}

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        named = dict(self.module.named_parameters())
        for name, moments in state["moments"].items():
            parameter = named[name]
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(state["updates"])),
                "exp_avg": moments["exp_avg"].to(parameter),
                "exp_avg_sq": moments["exp_avg_sq"].to(parameter),
            }

    @property
    def rates(self) -> dict[str, float]:
        return {group["name"]: group["lr"] for group in self._optimizer.param_groups}


class DeepSpeedEngine(Engine):
    """DeepSpeed ZeRO 1, 2 or 3 around a torch AdamW; the schedule stays ours."""

    def __init__(
        self, module: nn.Module, phase: PhaseConfig, world: World, config: dict[str, Any],
        groups: list[dict[str, Any]],
    ) -> None:  # fmt: skip
        import deepspeed

        super().__init__(module, world)
        if world.device.type == "cpu":
            _skip_compiled_collectives()
        # a half-precision engine rounds these, and has no float32 copy of what does not learn
        self._unrounded = {
            name: value.detach().float().cpu().clone()
            for name, value in module.state_dict().items()
            if name not in self.learning and value.is_floating_point()
        }  # fmt: skip
        self._accumulation = config["gradient_accumulation_steps"]
        self._zero_stage = config["zero_optimization"]["stage"]
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=_adamw(groups, phase), config=config, dist_init_required=False
        )
        self._make_state()
        self._dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())

    def _make_state(self) -> None:
        """Fresh AdamW state for every partition, before the first update, and DeepSpeed's links to it.

        DeepSpeed links all groups' moments after the first group's first update, when the others have none yet; and
        ZeRO-3 makes its state in a dry step, which counts as an update.
        """
        optimizer = self._optimizer.optimizer
        for group in optimizer.param_groups:
            for partition in group["params"]:
                optimizer.state[partition] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(partition),
                    "exp_avg_sq": torch.zeros_like(partition),
                }
        if hasattr(self._optimizer, "_lazy_init_hp_params_optimizer_state"):
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _torch_state(self) -> list[tuple[Any, dict[str, Any]]]:
        return list(self._optimizer.optimizer.state.items())

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        return self._engine(batch)

    def _backward(self, loss: Tensor, is_last: bool) -> None:
        # DeepSpeed averages over processes and micro-batches; the loss is a sum's share already
        self._engine.backward(loss * (self.world.size * self._accumulation))
        if not is_last:
            self._engine.step()

    def _update(self, rates: Mapping[str, float]) -> None:
        _set_rates(self._optimizer, rates)
        self._engine.step()

    def weights(self) -> dict[str, Tensor]:
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        named = dict(self.module.named_parameters(remove_duplicate=False))
        out: dict[str, Tensor] = {}
        for name, value in self.module.state_dict().items():
            parameter = named.get(name)
            if parameter is not None and parameter.requires_grad:
                full = safe_get_full_fp32_param(parameter)
                if full is None:
                    with deepspeed.zero.GatheredParameters([parameter], enabled=self._zero_stage == 3):
                        full = parameter.detach().clone()
                out[name] = full.detach().float().cpu().clone()
            else:
                out[name] = self._unrounded[name] if name in self._unrounded else value.detach().cpu()
        return out

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        import deepspeed

        parameters: list[Any] = list(self.module.parameters()) if self._zero_stage == 3 else []
        with deepspeed.zero.GatheredParameters(parameters, enabled=bool(parameters)):
            for parameter in parameters:  # in use, or a module's parameters are gone once its forward is over
                parameter.ds_active_sub_modules.add(_WHOLE)
            try:
                yield
            finally:
                for parameter in parameters:
                    parameter.ds_active_sub_modules.discard(_WHOLE)

    def optimizer_state(self) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        moments = {}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                moments[name] = {
                    key: safe_get_full_optimizer_state(parameter, key).detach().float().cpu().clone()
                    for key in ("exp_avg", "exp_avg_sq")
                }
        steps = [int(state["step"]) for _, state in self._torch_state() if "step" in state]
        out: dict[str, Any] = {"moments": moments, "updates": max(steps, default=0)}
        if hasattr(self._optimizer, "cur_scale") or hasattr(self._optimizer, "loss_scaler"):
            out["loss_scale"] = float(getattr(self._optimizer, "cur_scale", 0) or self._optimizer.loss_scale)
        return out

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                for key, value in state["moments"][name].items():
                    safe_set_full_optimizer_state(parameter, value, key)
        for _, held in self._torch_state():
            if "step" in held:
                held["step"].fill_(state["updates"])

    @property
    def rates(self) -> dict[str, float]:
        return {group["name"]: group["lr"] for group in self._optimizer.param_groups}


def _skip_compiled_collectives() -> None:
    """Keep DeepSpeed from compiling its own collectives at the first start: gloo does, and needs no compiler."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None:
        deepspeed.ops.__compatible_ops__[builder.NAME] = False


def deepspeed_settings(
    config: TrainConfig, phase: PhaseConfig, precision: str, batch_size: int, accumulation: int, world_size: int
) -> dict[str, Any]:
    """The DeepSpeed config of a run: the JSON with `"auto"` filled in. A value that disagrees with ours is an error."""
    path = Path(
        config.deepspeed_config
        or REPOSITORY
        / "configs"
        / "deepspeed"
        / f"zero{config.zero_stage}_{'fp16' if precision == 'fp16' else 'bf16'}.json"
    )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable DeepSpeed config ({error})") from error
    ours = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": batch_size * accumulation * world_size,
        "gradient_clipping": phase.gradient_clipping,
    }
    for key, value in ours.items():
        if settings.get(key, "auto") not in ("auto", value):
            raise ConfigError(f'{path}: {key} is {settings[key]}, the run has {value}; write "auto" there')
        settings[key] = value
    zero_stage = settings.get("zero_optimization", {}).get("stage")
    if zero_stage is None:
        raise ConfigError(f"{path}: zero_optimization.stage is missing; write 1, 2 or 3 there")
    if zero_stage != config.zero_stage:
        raise ConfigError(f"{path}: zero_optimization.stage is {zero_stage}, --zero_stage is {config.zero_stage}")
    for owned in ("optimizer", "scheduler"):
        if owned in settings:
            raise ConfigError(f"{path}: {owned} is set there; rates and optimizer come from the training YAML")
    if precision == "fp32" and not config.deepspeed_config:
        settings["bf16"] = {"enabled": False}
    enabled = {name for name in ("fp16", "bf16") if settings.get(name, {}).get("enabled")}
    if enabled != ({precision} - {"fp32"}):
        raise ConfigError(f"{path}: enables {sorted(enabled) or 'fp32'}, the run's precision is {precision}")
    settings["zero_allow_untested_optimizer"] = True
    settings.setdefault("steps_per_print", 10**9)
    return settings


def build_engine(
    module: nn.Module, config: TrainConfig, phase: PhaseConfig, world: World, *, batch_size: int, accumulation: int
) -> Engine:
    """Freeze, group and wrap `module` for one phase."""
    precision = resolve_precision(config.precision, world.device)
    module.to(world.device)
    if world.size > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.data, src=0)
    groups = build_param_groups(module, phase)
    expected = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    if config.engine == "torch":
        engine: Engine = TorchEngine(module, phase, world, precision, groups)
    else:
        settings = deepspeed_settings(config, phase, precision, batch_size, accumulation, world.size)
        engine = DeepSpeedEngine(module, phase, world, settings, groups)
    wrapped = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    if wrapped != expected:
        raise RuntimeError(f"wrapping changed what learns: {sorted(wrapped ^ expected)[:5]}")
    return engine
