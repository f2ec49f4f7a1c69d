"""Causal attention behind one interface: `attend(q, k, v, mask, impl)`.

Shape letters: B batch rows, T query positions, S key positions, N query heads, K key/value heads, G = N // K query
heads per key/value head, H head_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Queries that the CPU works on at a time.
_QUERIES = 128
# The most blocks of queries where each is compiled by itself.
_MOST_BLOCKS = 4


class Mask:
    """Who may look at whom, kept as token ids so that each implementation builds only what it needs.

    A query sees a key when the key is not later in the row, carries the same segment id, and lies within the window.
    Padding is a segment of its own (id 0), so a Hugging Face ``attention_mask`` is a valid ``segment_ids``.
    """

    def __init__(self, segment_ids_BS: torch.Tensor | None = None, q_index_T: torch.Tensor | None = None) -> None:
        """
        Args:
            segment_ids_BS: the document each key belongs to; None: every row is one document.
            q_index_T: the queries' places among the keys when there are fewer queries than keys, as in decoding with
                a cache; None: there are as many, in the same order.
        """
        self.segment_ids_BS = segment_ids_BS
        self.q_index_T = q_index_T
        self._dense: dict[tuple[int, int | None], torch.Tensor] = {}
        self._blocks: dict[tuple[int, int | None], BlockMask] = {}

    @property
    def is_plain_causal(self) -> bool:
        return self.segment_ids_BS is None and self.q_index_T is None

    def dense(self, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor:
        """The mask as booleans, True where visible: ``[B, 1, T, S]``, or ``[1, 1, T, S]`` without segments."""
        if (num_keys, window) not in self._dense:
            self._dense[num_keys, window] = self._build(num_keys, window, device)
        return self._dense[num_keys, window]

    def blocks(self, num_keys: int, window: int | None, device: torch.device) -> BlockMask:
        """The mask of as many queries as keys, in blocks of positions, without those that nobody sees."""
        # It loads torch's compiler, which takes a second.
        from torch.nn.attention.flex_attention import create_block_mask

        if (num_keys, window) not in self._blocks:
            segment_ids_BS = self.segment_ids_BS

            def sees(b, _n, t, s):
                visible = t >= s
                if window is not None:
                    visible = visible & (t - s < window)
                return visible if segment_ids_BS is None else visible & (segment_ids_BS[b, t] == segment_ids_BS[b, s])

            rows = None if segment_ids_BS is None else segment_ids_BS.shape[0]
            self._blocks[num_keys, window] = create_block_mask(sees, rows, None, num_keys, num_keys, device)
        return self._blocks[num_keys, window]

    def prepare(self, impl: str, num_keys: int, window: int | None, device: torch.device) -> None:
        """Build what an implementation needs of it, where queries are as many as keys: compiled code then finds it."""
        if impl == "flex":
            self.blocks(num_keys, window, device)
        else:
            self.dense(num_keys, window, device)

    def _build(self, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor:
        # In 32 bits: a TPU has no more.
        k_index_S = torch.arange(num_keys, dtype=torch.int32, device=device)
        q_index_T = k_index_S if self.q_index_T is None else self.q_index_T
        distance_TS = q_index_T[:, None] - k_index_S[None, :]
        visible_TS = distance_TS >= 0
        if window is not None:
            visible_TS = visible_TS & (distance_TS < window)
        visible = visible_TS[None, None]
        if self.segment_ids_BS is not None:
            k_seg_BS = self.segment_ids_BS
            q_seg_BT = k_seg_BS if self.q_index_T is None else k_seg_BS[:, self.q_index_T]
            visible = visible & (q_seg_BT[:, None, :, None] == k_seg_BS[:, None, None, :])
        return visible


def attend(
    q_BTNH: torch.Tensor,
    k_BSKH: torch.Tensor,
    v_BSKH: torch.Tensor,
    mask: Mask,
    *,
    window: int | None = None,
    scale: float | None = None,
    impl: str = "sdpa",
) -> torch.Tensor:
    """Scaled dot-product attention with shared key/value heads (arXiv:2305.13245); returns ``[B, T, N, H]``.

    Args:
        window: positions a query sees, itself included; None: all before it.
        scale: what scores are multiplied by; None: H^-0.5.
        impl: a key of `IMPLEMENTATIONS`.
    """
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    return IMPLEMENTATIONS[impl](q_BTNH, k_BSKH, v_BSKH, mask, window, scale)


def _reference(q_BTNH, k_BSKH, v_BSKH, mask: Mask | _Rows, window: int | None, scale: float) -> torch.Tensor:
    """Every step spelled out, softmax in float32. Key/value heads are shared without being copied.

    The heads that share a key are stacked along the queries, so that scores come out of plain batched products in the
    order they are used in: transposing them would cost more than the products.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BKGTH = q_BTNH.unflatten(2, (K, N // K)).permute(0, 2, 3, 1, 4)
    scores = torch.matmul(q_BKGTH.flatten(2, 3), k_BSKH.permute(0, 2, 3, 1))
    scores_BKGTS = scores.unflatten(2, (N // K, T)).float() * scale
    visible = mask.dense(S, window, q_BTNH.device)[:, :, None]
    # A finite filler: a row with nothing to see must not become NaN.
    scores_BKGTS = torch.where(visible, scores_BKGTS, torch.finfo(torch.float32).min)
    probs_BKGTS = torch.softmax(scores_BKGTS, dim=-1).to(q_BTNH.dtype)
    out = torch.matmul(probs_BKGTS.flatten(2, 3), v_BSKH.transpose(1, 2))
    return out.unflatten(2, (N // K, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)


class _Rows:
    """The part of a mask that belongs to some of its queries and the first of its keys."""

    def __init__(self, mask: Mask, start: int, end: int, num_keys: int) -> None:
        self.mask, self.queries, self.num_keys = mask, slice(start, end), num_keys

    def dense(self, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor:
        return self.mask.dense(self.num_keys, window, device)[..., self.queries, :num_keys]


def _blocks(q_BTNH, k_BSKH, v_BSKH, mask: Mask, window: int | None, scale: float) -> torch.Tensor:
    """`_reference` for one block of queries after the other, each without the keys behind it, which none of it sees."""
    if mask.q_index_T is not None:
        return _reference(q_BTNH, k_BSKH, v_BSKH, mask, window, scale)
    T = q_BTNH.shape[1]
    queries = max(_QUERIES, -(-T // _MOST_BLOCKS))
    blocks = []
    for start in range(0, T, queries):
        end = min(start + queries, T)
        rows = _Rows(mask, start, end, T)
        blocks.append(_reference(q_BTNH[:, start:end], k_BSKH[:, :end], v_BSKH[:, :end], rows, window, scale))
    return torch.cat(blocks, dim=1)


def _sdpa(q_BTNH, k_BSKH, v_BSKH, mask: Mask, window: int | None, scale: float) -> torch.Tensor:
    """PyTorch's fused kernels."""
    causal = mask.is_plain_causal and window is None
    q_BNTH, k_BKSH, v_BKSH = (x.transpose(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    options = {"enable_gqa": q_BTNH.shape[2] != k_BSKH.shape[2], "scale": scale}
    if causal:
        return F.scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, is_causal=True, **options).transpose(1, 2)
    visible = mask.dense(k_BSKH.shape[1], window, q_BTNH.device)
    if q_BTNH.device.type != "cpu" or mask.q_index_T is not None:
        return F.scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, attn_mask=visible, **options).transpose(1, 2)
    # With a mask, the CPU's kernel computes what no query sees too: leave out the keys behind each block of queries.
    blocks = []
    for start in range(0, q_BTNH.shape[1], _QUERIES):
        end = start + _QUERIES
        q, k, v = q_BNTH[:, :, start:end], k_BKSH[:, :, :end], v_BKSH[:, :, :end]
        blocks.append(F.scaled_dot_product_attention(q, k, v, attn_mask=visible[..., start:end, :end], **options))
    return torch.cat(blocks, dim=2).transpose(1, 2)


def _flex(q_BTNH, k_BSKH, v_BSKH, mask: Mask, window: int | None, scale: float) -> torch.Tensor:
    """PyTorch's kernel for masks of blocks, for a GPU: a fused one where what calls it is compiled.

    With a mask of single positions, PyTorch's other fused kernels refuse shared heads or compute what nobody sees.
    """
    if mask.q_index_T is not None:
        return _sdpa(q_BTNH, k_BSKH, v_BSKH, mask, window, scale)
    from torch.nn.attention.flex_attention import flex_attention

    blocks = mask.blocks(k_BSKH.shape[1], window, q_BTNH.device)
    q_BNTH, k_BKSH, v_BKSH = (x.transpose(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    shared = q_BTNH.shape[2] != k_BSKH.shape[2]
    out = flex_attention(q_BNTH, k_BKSH, v_BKSH, block_mask=blocks, scale=scale, enable_gqa=shared)
    return out.transpose(1, 2)


IMPLEMENTATIONS = {"reference": _reference, "blocks": _blocks, "sdpa": _sdpa, "flex": _flex}
