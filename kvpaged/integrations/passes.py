"""What a forward pass is given, as far as it matters to pages that others may have."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpaged.integrations.lengths import LengthRule
from kvpaged.integrations.prompts import Ints, to_host

PLAIN = {
    "attention_mask", "cache_position", "input_ids", "inputs_embeds", "labels", "logits_to_keep",
    "output_attentions", "output_hidden_states", "past_key_values", "position_ids", "return_dict",
    "use_cache",
}  # fmt: skip
"""Arguments of a forward pass that a token's keys do not depend on, or that are looked at."""


def what_is_unusual(
    given: dict[str, Any], length: int, rule: LengthRule, regime: bytes | None, device_type: str
) -> str | None:
    """Why the keys of a pass are not those of a plain pass over the same tokens, or `None`.

    Args:
        given: its arguments, by name.
        length: of its longest row, in tokens.
        rule, regime: of the model's angles, and of the passes before.
        device_type: where it runs.
    """
    beyond = [name for name, value in given.items() if value is not None and name not in PLAIN]
    if beyond:
        return f"was given {', '.join(sorted(beyond))}"
    if rule.regime(length) != regime:
        return f"ends at {length} tokens, where the rotary embedding has other angles than before"
    if torch.is_autocast_enabled(device_type):
        return "ran under autocast"
    return None


def is_whole_prompt(ids: Tensor, given: dict[str, Any], prompt: Ints, pads: Ints) -> bool:
    """Whether a pass has the whole of a prompt (`[rows, columns]`), though some of it was found: so
    does assisted generation, and who feeds a model by hand may.
    """
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    rows, columns = prompt.shape
    width = ids.shape[1]
    if width < columns or (mask is None and positions is None and width > columns):
        return False
    if isinstance(mask, Tensor) and mask.shape[-1] != width:
        return False
    if mask is None and isinstance(positions, Tensor) and int(positions.max()) != width - 1:
        return False
    times = len(ids) // rows
    same = to_host(ids[:, :columns]) == np.repeat(prompt, times, axis=0)
    padded = np.arange(columns) < np.repeat(pads, times)[:, None]
    return bool((same | padded).all())
