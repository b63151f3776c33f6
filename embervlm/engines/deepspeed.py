"""DeepSpeed ZeRO 0 to 3, and its JSON. The only file that names DeepSpeed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embervlm.config import REPOSITORY, ConfigError, PhaseConfig, TrainConfig
from embervlm.data.collate import Batch
from embervlm.engines.base import MOMENTS, WEIGHT, Engine
from embervlm.world import World


class DeepSpeedEngine(Engine):
    """DeepSpeed around a torch AdamW; the schedule and the checkpoints stay ours."""

    def __init__(
        self, module: nn.Module, phase: PhaseConfig, world: World, precision: str, settings: dict[str, Any]
    ) -> None:
        self._settings = settings
        self._zero_stage = settings["zero_optimization"]["stage"]
        self.is_replicated = self._zero_stage == 0
        super().__init__(module, phase, world, precision)

    def _wrap(self, phase: PhaseConfig) -> Any:
        import deepspeed

        if self.world.device.type == "cpu":
            _skip_compiled_collectives()
        self._engine, optimizer, _, _ = deepspeed.initialize(
            model=self.module, optimizer=self._adamw(phase), config=self._settings, dist_init_required=False
        )
        if self._zero_stage == 3:
            parameters = optimizer.fp32_partitioned_groups_flat
        else:
            parameters = [p for group in self._torch_optimizer.param_groups for p in group["params"]]
        self._make_state(self._torch_optimizer, parameters)
        # DeepSpeed itself links all groups' moments after the first group's first update, when the others have none
        if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
            optimizer._lazy_init_hp_params_optimizer_state()
        return optimizer

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return self._engine.basic_optimizer

    def _pieces(self) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
        return {0: self._whole_pieces, 1: self._linked_pieces, 2: self._linked_pieces, 3: self._zero3_pieces}[
            self._zero_stage
        ]()

    def _whole_pieces(self) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
        """ZeRO-0 keeps everything everywhere; under half precision the optimizer works on float32 copies."""
        masters: dict[int, Any] = {}
        if self.precision != "fp32":
            for half, full in zip(self._engine.optimizer.fp16_groups, self._engine.optimizer.fp32_groups):
                masters |= {id(parameter): copy for parameter, copy in zip(half, full)}
        for name, parameter in self._learning_parameters().items():
            master = masters.get(id(parameter), parameter)
            state = self._torch_optimizer.state[master]
            yield name, 0, {WEIGHT: master, **{kind: state[kind] for kind in MOMENTS}}

    def _linked_pieces(self) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
        """ZeRO 1 and 2 cut the flattened groups, so that a parameter may lie on two processes."""
        for name, parameter in self._learning_parameters().items():
            if (link := parameter._hp_mapping) is not None:
                kinds = {WEIGHT: link.get_hp_fragment(), **{kind: link.get_hp_fragment(kind) for kind in MOMENTS}}
                yield name, link.lp_fragment_address.start, kinds

    def _zero3_pieces(self) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
        """ZeRO-3 cuts every parameter into equal parts, the last one padded."""
        for name, parameter in self._learning_parameters().items():
            kinds, start = {}, 0
            for kind in (WEIGHT, *MOMENTS):
                key = None if kind == WEIGHT else kind
                values, _ = self._engine.optimizer._get_fp32_opt_state_partition(parameter, False, key)
                start = min(self.world.rank * len(values), parameter.ds_numel)
                kinds[kind] = values[: parameter.ds_numel - start]
            yield name, start, kinds

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        return self._engine(batch)

    def _backward(self, loss: Tensor, is_last: bool) -> None:
        # DeepSpeed averages over processes and micro-batches; the loss is a sum's share already
        loss = loss * (self.world.size * self._settings["gradient_accumulation_steps"])
        if self.precision == "fp16" and self._zero_stage == 0:  # DeepSpeed divides these gradients by it, that is all
            loss = loss * self._scaler.cur_scale
        self._engine.backward(loss)
        if not is_last:
            self._engine.step()

    def _update(self, rates: Mapping[str, float]) -> bool:
        if self._zero_stage == 0 and self.precision == "fp32":  # the one case that DeepSpeed would update all the same
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            if not nn.utils.get_total_norm(gradients).isfinite():
                return False
        self._set_rates(rates)
        self._engine.step()
        return bool(self._engine.was_step_applied())

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """ZeRO-3's parameters in one piece, and no hook that cuts a module's up again when it has been called."""
        if self._zero_stage != 3:
            yield
            return
        import deepspeed

        hooks = self._optimizer.parameter_offload
        with deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            for hook in (*hooks.forward_hooks, *hooks.backward_hooks):
                hook.remove()
            hooks.forward_hooks, hooks.backward_hooks = [], []
            try:
                yield
            finally:
                hooks._register_deepspeed_module(hooks.module)

    @property
    def _scaler(self) -> Any:
        """What holds the loss scale; ZeRO-0 has it elsewhere."""
        return getattr(self._optimizer, "loss_scaler", None) or self._optimizer.loss_scale_config

    @property
    def loss_scale(self) -> dict[str, float] | None:
        if self.precision != "fp16":
            return None
        scaler = self._scaler
        good_steps = scaler.cur_iter - scaler.last_overflow_iter - 1
        if good_steps > 0:  # DeepSpeed counts on where the scale grows, torch's scaler begins again
            good_steps = (good_steps - 1) % scaler.scale_window + 1
        return {"scale": float(scaler.cur_scale), "good_steps": good_steps}

    def _set_loss_scale(self, state: Mapping[str, float]) -> None:
        scaler = self._scaler
        scaler.cur_scale = state["scale"]
        scaler.last_overflow_iter = scaler.cur_iter - int(state["good_steps"]) - 1


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
            raise ConfigError(f'{path}: {key} is {settings[key]}, but the run has {value}; write "auto" there')
        settings[key] = value
    zero_stage = settings.get("zero_optimization", {}).get("stage")
    if zero_stage is None:
        raise ConfigError(f"{path}: zero_optimization.stage is missing; write 0, 1, 2 or 3 there")
    if zero_stage != config.zero_stage:
        raise ConfigError(f"{path}: zero_optimization.stage is {zero_stage}, but --zero_stage is {config.zero_stage}")
    for owned in ("optimizer", "scheduler"):
        if owned in settings:
            raise ConfigError(
                f"{path}: {owned} is set there; remove it, because rates and optimizer come from the training YAML"
            )
    if precision == "fp32" and not config.deepspeed_config:
        settings["bf16"] = {"enabled": False}
    for name in ("fp16", "bf16"):
        if settings.get(name, {}).get("enabled") == "auto":
            settings[name]["enabled"] = precision == name
    enabled = {name for name in ("fp16", "bf16") if settings.get(name, {}).get("enabled")}
    if enabled != ({precision} - {"fp32"}):
        raise ConfigError(f"{path}: enables {sorted(enabled) or 'fp32'}, but the run's precision is {precision}")
    settings["zero_allow_untested_optimizer"] = True
    settings["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW also where it is offloaded: nothing to compile
    settings.setdefault("steps_per_print", 10**9)
    return settings
