"""The oracle of `append`."""

from torch import Tensor

from kvpaged_kernels.checks import ORACLE_FLOATS, check_append


def append(
    k: Tensor,
    v: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor | None,
    slots: Tensor,
) -> None:
    """Write the K and V of new tokens into their slots.

    - `k`: `[tokens, kv_heads, k_dim]`, last stride 1; `v`: `[tokens, kv_heads, v_dim]` or None.
    - `k_pages`: `[entries, kv_heads, page_size, k_dim]`, **mutated**; `v_pages` likewise with
      `v_dim`, or None exactly when `v` is.
    - `slots`: int64 `[tokens]`, `entry * page_size + slot`, distinct; -1: the token goes nowhere.

    Bytes are copied exactly. Raises ValueError where shapes, strides, dtypes or devices disagree.
    """
    check_append(k, v, k_pages, v_pages, slots, dtypes=ORACLE_FLOATS)
    page_size = k_pages.shape[2]
    for entry, slot, token in zip(
        (slots // page_size).tolist(),
        (slots % page_size).tolist(),
        range(slots.shape[0]),
        strict=True,
    ):
        if entry < 0:
            continue
        k_pages[entry, :, slot] = k[token]
        if v is not None and v_pages is not None:
            v_pages[entry, :, slot] = v[token]
