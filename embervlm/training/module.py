"""The module that an engine wraps: the model with its loss terms, and the dense head that only Stage 3 needs."""

from __future__ import annotations

from torch import Tensor, nn

from embervlm.data.collate import Batch
from embervlm.model.embervlm import EmberVLM
from embervlm.training.losses import PolicyLoss, dense_loss_sum, loss_sums


class TrainingModule(nn.Module):
    """`forward(batch)` gives the sum of every loss term over the micro-batch."""

    def __init__(self, model: EmberVLM, dense_sizes: list[int] | None = None, policy: PolicyLoss | None = None) -> None:
        super().__init__()
        self.model = model
        self.policy = policy
        self.dense_sizes = dense_sizes or []
        if self.dense_sizes:
            self.auxiliary = nn.Linear(model.language_model.hidden_size, sum(self.dense_sizes))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        out = self.model(**batch.inputs)
        sums = loss_sums(out, batch.targets, self.policy)
        if self.dense_sizes and "dense" in batch.targets:
            sums["dense"] = dense_loss_sum(self.auxiliary(out.patch_features), batch.targets["dense"], self.dense_sizes)
        if batch.muted:
            return {term: value * 0 for term, value in sums.items()}
        return sums
