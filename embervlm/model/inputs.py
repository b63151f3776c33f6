"""What one forward pass reads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from embervlm.data.length_groups import LengthGroup


@dataclass(kw_only=True)
class Inputs:
    """One micro-batch as the network reads it: whole sequences, and what is asked about them.

    `*_index` count over the flattened `[batch * length]` positions. None leaves out what the field is for.
    """

    input_ids: Tensor
    """`[batch, length]` int64, padded to the right."""
    text_mask: Tensor
    """`[batch, length]` bool, False at padding."""
    image_mask: Tensor
    """`[batch]` bool, False for a record without a picture."""
    pictures: Tensor | None = None
    """`[batch, image_size, image_size, 3]` uint8, or `[pictures, ...]` with `picture_rows`."""
    picture_rows: Tensor | None = None
    """`[batch]` int64, which of `pictures` each record has, where several share one; any, where it has none."""
    visual: Tensor | None = None
    """`[batch, num_visual_tokens, hidden]`, computed before, in place of `pictures`."""
    groups: list[LengthGroup] | None = None
    """The rows of like length, each read without the padding of the others; None reads all at once. The numbers are
    the same."""
    use_reasoning: bool = True
    """False leaves the reasoning head out (Stage 3 and the no-reasoning baseline)."""
    score_index: Tensor | None = None
    """`[scored]`, positions whose next token is scored."""
    answer_index: Tensor | None = None
    """`[records]`, where the answer head reads."""
    candidate_ids: Tensor | None = None
    """`[(records,) candidates, length]`, padded with -1."""
    pair_ids: Tensor | None = None
    """`[pairs, length]`, what the validator reads; `pair_segments` and `pair_mask` are of the same shape."""
    pair_segments: Tensor | None = None
    pair_mask: Tensor | None = None
    pair_record: Tensor | None = None
    """`[pairs]`, row of each pair's record."""
    pair_groups: list[LengthGroup] | None = None
    """As `groups`, of the pairs."""
    own_record: Tensor | None = None
    """`[chains]`, rows of which the validator also reads the model's own mistake, behind the pairs."""
    own_prompt: Tensor | None = None
    """`[chains]`, tokens of its question."""
    own_length: int | None = None
    """Tokens up to which the validator may read of any of them."""
    own_places: Tensor | None = None
    """`[chains, values, 4]`: of each known value its row in the token logits, the column of its first token, and the
    first and one-past-last column of its step."""
    ground_index: Tensor | None = None
    """`[grounded]`, tokens whose attention is supervised."""
    sampled_index: Tensor | None = None
    """`[sampled]`, inputs that are replaced by the model's own predictions (scheduled sampling; Bengio et al. 2015, in
    two parallel passes after Mihaylova and Martins 2019)."""
    repeated: Tensor | None = None
    """`[repeated]`, rows whose text the last rows repeat behind other pictures."""
