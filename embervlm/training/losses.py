"""Loss terms: tensors in, sums out. The caller divides by the counts of the whole step over all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from embervlm.model.network import EmberVLMOutput


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """How far a policy may go from the one that drew the chains."""

    temperature: float
    clip_low: float
    clip_high: float
    has_reference: bool = False
    """Whether there is a divergence from another model. Every micro-batch then has that term, chains or not: sharded
    engines count on the same terms everywhere."""
    closed_ids: tuple[int, int]
    """The tokens that begin a further step and a conclusion: the decoder closes them, see `Writer`."""

    def sums(self, logits: Tensor, labels: Tensor, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`policy` and `kl` to be minimised, and what is only reported: `entropy` in nats, the number of `clipped`
        tokens, and `drift`, how far log-probabilities are from those of drawing, in nats.

        The policy is the decoder's: logits over the temperature, without the tokens that could not be drawn. Clipped
        surrogate of PPO (Schulman et al. 2017, equation 7), token by token; the divergence by the estimator k3
        (Schulman 2020), as in GRPO's equation 4.

        Args:
            logits: `[tokens, vocab]` of the drawn chains' tokens alone.
            labels: `[tokens]`, what was drawn.
            targets: of `embervlm.data.drawn.policy_targets`.
        """
        scores = logits.float() / self.temperature
        closed = torch.zeros_like(scores, dtype=torch.bool)
        closed[:, self.closed_ids] = targets["policy_closed"]
        every = scores.masked_fill(closed, -torch.inf).log_softmax(-1)
        own = every.gather(1, labels[:, None])[:, 0]
        weight, advantage = targets["policy_weight"], targets["policy_advantage"]
        ratio = (own - targets["policy_old"]).exp()
        bounded = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        surrogate = torch.minimum(ratio * advantage, bounded * advantage)
        sums = {"policy": -(surrogate * weight).sum()}
        if self.has_reference:
            margin = targets["policy_reference"] - own
            sums["kl"] = ((margin.exp() - margin - 1) * weight).sum()
        with torch.no_grad():
            sums["entropy"] = -(every.exp() * every.masked_fill(closed, 0.0)).sum()
            sums["clipped"] = (bounded * advantage < ratio * advantage).sum().float()
            sums["drift"] = (own - targets["policy_old"]).abs().sum()
        return sums


def loss_sums(
    out: EmberVLMOutput, targets: Mapping[str, Tensor], policy: PolicyLoss | None = None
) -> dict[str, Tensor]:
    """The sum of every loss term that can be computed from the outputs, under the names of
    `embervlm.config.LOSS_TERMS` and `POLICY_TERMS`."""
    sums: dict[str, Tensor] = {}
    if out.token_logits is not None:
        direct = targets["direct"]
        every = token_losses(out.token_logits, targets["labels"])
        if policy is not None:
            drawn = targets["policy_index"]
            sums |= policy.sums(out.token_logits[drawn], targets["labels"][drawn], targets)
            every = every.index_fill(0, drawn, 0.0)  # nobody imitates a chain for having been drawn
        losses, repeated = every.split([len(direct), len(every) - len(direct)])
        sums["direct"] = (losses * direct).sum()
        sums["reasoning"] = (losses * ~direct).sum()
        if "contrast_own" in targets:
            sums["multimodal"] = contrastive_loss_sum(
                losses[targets["contrast_own"]], repeated, targets["contrast_lengths"]
            )
    if out.answer_logits is not None:
        losses = F.binary_cross_entropy_with_logits(out.answer_logits, targets["answers"], reduction="none")
        sums["answer"] = (losses * targets["answers_real"]).sum()
    if out.validator_logits is not None:
        losses = F.binary_cross_entropy_with_logits(out.validator_logits, targets["valid"], reduction="none")
        sums["consistency"] = (losses * targets["valid_weight"]).sum()
    if out.grounding_attention is not None:
        sums["multimodal"] = grounding_loss_sum(out.grounding_attention, targets["ground"])
    return sums


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Next-token cross-entropy in nats, `[scored]`, computed in float32. `labels` `[scored]` are already shifted."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def contrastive_loss_sum(own: Tensor, other: Tensor, lengths: Tensor) -> Tensor:
    """Summed `-log p(own picture)` of chains, each read behind its own picture and behind another one.

    InfoNCE (van den Oord et al. 2018) of two pictures, scored with the chain's likelihood: with both equally likely
    before, the chance that the chain is about its own is the sigmoid of the difference of its log-likelihoods. A chain
    that does not depend on the picture costs log 2, and text alone has no gradient. Used where no boxes are known.

    Args:
        own, other: `[tokens]`, `-log p` of each token behind the one and the other picture, chain after chain.
        lengths: `[chains]` int64, their tokens.
    """
    chain = torch.repeat_interleave(lengths, output_size=len(own))
    margin = own.new_zeros(len(lengths)).index_add(0, chain, own - other)
    return F.softplus(margin).sum()


def grounding_loss_sum(attention: Tensor, target: Tensor) -> Tensor:
    """Summed `-log` of the attention on the right patches.

    Attention supervision: tokens of a step that reads something off the picture should look where it is.

    Args:
        attention: `[grounded, grid.size]`, at most 1 in sum.
        target: the same shape, bool; a row without any is not counted.
    """
    inside = (attention * target).sum(-1)
    return -(inside.clamp_min(1e-6).log() * target.any(-1)).sum()


def dense_loss_sum(logits: Tensor, labels: Tensor, sizes: list[int]) -> Tensor:
    """Summed cross-entropy of what is in each patch.

    Args:
        logits: `[batch, grid.size, sum(sizes)]`, the classes of each kind side by side.
        labels: `[batch, grid.size, len(sizes)]` int64; -1 is not scored.
    """
    parts = logits.float().split(sizes, dim=-1)
    sums = [
        F.cross_entropy(part.flatten(0, 1), labels[..., kind].flatten(), ignore_index=-1, reduction="sum")
        for kind, part in enumerate(parts)
    ]
    return torch.stack(sums).sum()
