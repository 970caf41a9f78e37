"""The meaning of every op in plain torch.

This file is the specification: kernels are tested against it, and it runs where no kernel does.

Shapes: T tokens | R rows (requests) | P blocks per row | C blocks in the cache | B tokens per block
D hidden | O outputs | N query heads | K key-value heads | H head size | E = (N + 2K)·H | F ffn size
M positions in the rotary table | V vocabulary | F sampling fields (in the ops of a step)
S rows of the device state, the last one for padding
Mixture of experts: E experts | X experts, with those elsewhere | K experts per token
F expert width | G = 2F

A cache in float8_e4m3fn holds x / scale. Each key-value head has one fp32 scale for keys and one
for values.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What `sample` gives for a row in which no token can be chosen. The newest token of the row's state
# is 0 then, so that no op looks up an id that is none.
NO_TOKEN = -1
# The largest finite float8_e4m3fn (Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433).
# The format has no infinity.
FP8_MAX = 448.0


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension.

    The normalisation is in fp32 and is rounded to x's dtype before it is multiplied by the weight.
    """
    x32 = x_TD.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return normed.to(x_TD.dtype) * weight_D


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """residual' = x + residual; returns (rms_norm(residual'), residual')."""
    residual_TD = x_TD + residual_TD
    return rms_norm(residual_TD, weight_D, eps), residual_TD


def silu_mul(gate_up_TG: Tensor) -> Tensor:
    """silu(gate) · up of an input [gate | up] along the last dimension; [T, 2F] -> [T, F]."""
    gate_TF, up_TF = gate_up_TG.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_TF) * up_TF


def rope(x_TNH: Tensor, cos_sin_MH: Tensor, pos_T: Tensor) -> Tensor:
    """Rotary embedding, half-split form: [x1·cos − x2·sin | x2·cos + x1·sin].

    Row m of the table is [cos | sin] in fp32.
    """
    cos_T1h, sin_T1h = cos_sin_MH[pos_T].unsqueeze(1).chunk(2, dim=-1)
    x1, x2 = x_TNH.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos_T1h - x2 * sin_T1h, x2 * cos_T1h + x1 * sin_T1h), dim=-1).to(
        x_TNH.dtype
    )


def store_kv(
    k_TKH: Tensor,
    v_TKH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    slot_T: Tensor,
    k_scale_K: Tensor | None = None,
    v_scale_K: Tensor | None = None,
) -> None:
    """Write token t's key and value into slot slot_T[t] = block · B + offset, in place.

    With scales the cache is float8_e4m3fn and gets x · (1 / scale), saturated at ±448: no finite
    value becomes NaN.
    """
    for x_TKH, cache_CBKH, scale_K in (
        (k_TKH, k_cache_CBKH, k_scale_K),
        (v_TKH, v_cache_CBKH, v_scale_K),
    ):
        slots = cache_CBKH.view(-1, *cache_CBKH.shape[2:])
        if scale_K is None:
            slots.index_copy_(0, slot_T.long(), x_TKH.to(cache_CBKH.dtype))
        else:
            # as bytes: torch has no index_copy_ for fp8 on a CPU
            slots.view(torch.uint8).index_copy_(
                0, slot_T.long(), to_fp8(x_TKH, scale_K).view(torch.uint8)
            )


def to_fp8(x_TKH: Tensor, scale_K: Tensor) -> Tensor:
    """x · (1 / scale) in float8_e4m3fn, rounded to nearest even, saturated at ±448."""
    return (
        (x_TKH.float() * scale_K.reciprocal()[:, None])
        .clamp(-FP8_MAX, FP8_MAX)
        .to(torch.float8_e4m3fn)
    )


def qk_norm_rope_store(
    qkv_TE: Tensor,
    q_norm_H: Tensor | None,
    k_norm_H: Tensor | None,
    cos_sin_MH: Tensor,
    pos_T: Tensor,
    slot_T: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    num_heads: int,
    eps: float,
    k_scale_K: Tensor | None = None,
    v_scale_K: Tensor | None = None,
) -> Tensor:
    """Split [q | k | v], normalise and rotate q and k, store k and v; returns q [T, N, H].

    q and k are normalised per head if their weight is given. Scales are those of `store_kv`.
    """
    num_kv_heads, head_dim = k_cache_CBKH.shape[2:]
    q_TNH, k_TKH, v_TKH = qkv_TE.view(qkv_TE.shape[0], -1, head_dim).split(
        [num_heads, num_kv_heads, num_kv_heads], dim=1
    )
    if q_norm_H is not None:
        q_TNH = rms_norm(q_TNH, q_norm_H, eps)
    if k_norm_H is not None:
        k_TKH = rms_norm(k_TKH, k_norm_H, eps)
    store_kv(
        rope(k_TKH, cos_sin_MH, pos_T),
        v_TKH,
        k_cache_CBKH,
        v_cache_CBKH,
        slot_T,
        k_scale_K,
        v_scale_K,
    )
    return rope(q_TNH, cos_sin_MH, pos_T)


def paged_attention(
    q_TNH: Tensor,
    k_cache_CBKH: Tensor,
    v_cache_CBKH: Tensor,
    block_table_RP: Tensor,
    seq_len_R: Tensor,
    q_start_S: Tensor,
    max_q_len: int,
    scale: float,
    window: int,
    k_scale_K: Tensor | None = None,
    v_scale_K: Tensor | None = None,
) -> Tensor:
    """Causal attention of each row's newest tokens over that row's blocks.

    Row r owns tokens q_start_S[r] .. q_start_S[r + 1] − 1 (S = R + 1): the last of its seq_len_R[r]
    tokens. The query at position i sees the key at position j if i − window < j <= i (window <= 0:
    all j <= i). With max_q_len 1 (decode) each row has one token, T = R, and q_start_S is not read.
    The output is zero for rows with seq_len 0 and for tokens of no row. Cache entries outside a
    row's first seq_len tokens never affect its output, even if they are NaN. With scales (see
    `store_kv`) keys and values are the cache's entries times their head's scale.
    """
    num_rows, block_size = block_table_RP.shape[0], k_cache_CBKH.shape[1]
    out_TNH = torch.zeros_like(q_TNH)
    if max_q_len == 1:
        # one gather for the whole batch: no host synchronisation
        max_len = block_table_RP.shape[1] * block_size
        k_RPBKH = _scaled(k_cache_CBKH[block_table_RP.long()], k_scale_K)
        v_RPBKH = _scaled(v_cache_CBKH[block_table_RP.long()], v_scale_K)
        k_RLKH, v_RLKH = k_RPBKH.flatten(1, 2), v_RPBKH.flatten(1, 2)
        key_pos_L = torch.arange(max_len, device=q_TNH.device)
        seen_RL = _seen(seq_len_R.unsqueeze(1) - 1, key_pos_L, window)
        out = _attend(q_TNH.unsqueeze(1), k_RLKH, v_RLKH, seen_RL.unsqueeze(1), scale).squeeze(1)
        return torch.where((seq_len_R > 0).view(-1, 1, 1), out, out_TNH)
    starts, seq_lens = q_start_S.tolist(), seq_len_R.tolist()
    for row in range(num_rows):
        start, end, seq_len = starts[row], starts[row + 1], seq_lens[row]
        if end == start or seq_len == 0:
            continue
        blocks = block_table_RP[row, : -(-seq_len // block_size)].long()
        k_LKH = _scaled(k_cache_CBKH[blocks], k_scale_K).flatten(0, 1)[:seq_len]
        v_LKH = _scaled(v_cache_CBKH[blocks], v_scale_K).flatten(0, 1)[:seq_len]
        query_pos = torch.arange(seq_len - (end - start), seq_len, device=q_TNH.device)
        seen_TL = _seen(query_pos.unsqueeze(1), torch.arange(seq_len, device=q_TNH.device), window)
        out_TNH[start:end] = _attend(
            q_TNH[None, start:end], k_LKH[None], v_LKH[None], seen_TL[None], scale
        )[0]
    return out_TNH


def segment_attention(
    q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, start_S: Tensor, max_len: int, scale: float
) -> Tensor:
    """Attention in both directions within segments: softmax(q · kᵀ · scale) · v, without a cache.

    Segment s owns tokens start_S[s] .. start_S[s + 1] − 1, at most `max_len` of them. `start_S` is
    int32 and ascends; segments may be empty. Each query sees all keys of its segment. Tokens
    outside start_S[0] .. start_S[−1] − 1 belong to no segment: they never affect others, even if
    they are NaN, and kernels may leave their output unwritten. Here it is zero.
    """
    token_T = torch.arange(q_TNH.shape[0], device=q_TNH.device)
    segment_T = (token_T.unsqueeze(1) >= start_S).sum(1)
    owned_T = (segment_T > 0) & (segment_T < start_S.shape[0])
    seen_TT = (segment_T.unsqueeze(1) == segment_T) & owned_T
    return _attend(q_TNH[None], k_TNH[None], v_TNH[None], seen_TT[None], scale)[0].contiguous()


def linear(
    x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, residual_TO: Tensor | None = None
) -> Tensor:
    """x · weightᵀ + bias, then + residual; [T, D], [O, D], [O], [T, O] -> [T, O]."""
    y_TO = torch.nn.functional.linear(x_TD, weight_OD, bias_O)
    return y_TO if residual_TO is None else y_TO + residual_TO


def linear_int8(
    x_TD: Tensor,
    weight_OD: Tensor,
    scale_O: Tensor,
    bias_O: Tensor | None,
    residual_TO: Tensor | None = None,
) -> Tensor:
    """(x · weightᵀ) · scale + bias, then + residual; int8 weights, one fp32 scale for each output.

    Sums are in fp32 and are rounded to x's dtype once, before the residual is added.
    """
    y_TO = (x_TD.float() @ weight_OD.float().t()) * scale_O
    y_TO = (y_TO if bias_O is None else y_TO + bias_O.float()).to(x_TD.dtype)
    return y_TO if residual_TO is None else y_TO + residual_TO


def linear_(residual_TO: Tensor, x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> None:
    """residual += x · weightᵀ + bias, in place."""
    residual_TO.add_(linear(x_TD, weight_OD, bias_O))


def _scaled(x: Tensor, scale_K: Tensor | None) -> Tensor:
    """x [..., K, H] times its head's scale in fp32; x itself without a scale."""
    return x if scale_K is None else x.float() * scale_K[:, None]


def _seen(query_pos: Tensor, key_pos: Tensor, window: int) -> Tensor:
    seen = key_pos <= query_pos
    return seen & (key_pos > query_pos - window) if window > 0 else seen


def _attend(
    q_RTNH: Tensor, k_RLKH: Tensor, v_RLKH: Tensor, seen_RTL: Tensor, scale: float
) -> Tensor:
    """Matmul and softmax in fp32. Keys that no query sees are zeroed first: 0 · NaN is NaN."""
    num_rows, num_tokens, num_heads, head_dim = q_RTNH.shape
    num_kv_heads = k_RLKH.shape[2]
    any_seen_RL11 = seen_RTL.any(1)[:, :, None, None]
    k_RKHL = torch.where(any_seen_RL11, k_RLKH, 0).float().permute(0, 2, 3, 1)
    v_RKLH = torch.where(any_seen_RL11, v_RLKH, 0).float().permute(0, 2, 1, 3)
    # query head n reads key-value head n // (N / K): one matrix per key-value head holds the query
    # heads and tokens of its group
    q_RKGTH = (
        q_RTNH.float().view(num_rows, num_tokens, num_kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
    )
    score_RKGTL = (q_RKGTH.flatten(2, 3) @ k_RKHL).unflatten(2, (-1, num_tokens)) * scale
    score_RKGTL = score_RKGTL.masked_fill(~seen_RTL[:, None, None], float("-inf"))
    out_RKGTH = (score_RKGTL.softmax(-1).nan_to_num(0.0).flatten(2, 3) @ v_RKLH).unflatten(
        2, (-1, num_tokens)
    )
    return (
        out_RKGTH.permute(0, 3, 1, 2, 4)
        .reshape(num_rows, num_tokens, num_heads, head_dim)
        .to(q_RTNH.dtype)
    )


MASK_32 = 0xFFFFFFFF


def hash32(x: Tensor) -> Tensor:
    """A bijective hash of 32-bit integers in int64. Constants below 2³¹ keep products within int64.

    Source: C. Wellons, hash-prospector, the "lowbias32" search, constants 21f0aaad-735a2d97 with
    shifts 16, 15, 15.
    """
    return keyed_hash32(x, torch.zeros_like(x))


def keyed_hash32(x: Tensor, key: Tensor) -> Tensor:
    """`hash32` with a key between its two rounds: a different bijection of x for every key."""
    x = (((x ^ (x >> 16)) * 0x21F0AAAD) & MASK_32) ^ key
    x = ((x ^ (x >> 15)) * 0x735A2D97) & MASK_32
    return x ^ (x >> 15)


def gumbel_noise(seed_R: Tensor, pos_R: Tensor, vocab_size: int, first_token: int = 0) -> Tensor:
    """Standard Gumbel noise [R, V] in fp32, of the tokens from `first_token` on.

    Uniforms are odd multiples of 2⁻²⁴: they are exact in fp32 and never 0 or 1.
    """
    low, high = hash32(seed_R & MASK_32), hash32((seed_R >> 32) & MASK_32)
    key_R = hash32(low ^ hash32(high ^ hash32(pos_R & MASK_32)))
    second_R = hash32(key_R ^ 0x5BD1E995)
    token_V = torch.arange(vocab_size, device=seed_R.device)
    if first_token:
        token_V = token_V + first_token
    bits_RV = keyed_hash32(token_V.unsqueeze(0) ^ key_R.unsqueeze(1), second_R.unsqueeze(1))
    uniform_RV = ((bits_RV >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform_RV))


def sample(logits_RV: Tensor, temperature_R: Tensor, seed_R: Tensor, pos_R: Tensor) -> Tensor:
    """argmax(logits / temperature + Gumbel noise): a draw from softmax(logits / temperature).

    Temperature 0 gives argmax(logits). The noise is a hash of (seed, position, token id), so a
    request's tokens do not depend on other requests, buckets or earlier draws. The smallest id wins
    among equal scores, as in torch.argmax on a CPU. NaN counts as −inf: it never wins. A row
    without a score above −inf gives NO_TOKEN.
    """
    return best_column(logits_RV, temperature_R, seed_R, pos_R)[1]


def best_column(
    logits_RV: Tensor, temperature_R: Tensor, seed_R: Tensor, pos_R: Tensor, first_token: int = 0
) -> tuple[Tensor, Tensor]:
    """The best score of `sample` [R] in fp32, and its token [R].

    The columns are those of the tokens from `first_token` on.
    """
    minus_inf = float("-inf")
    logits_RV = logits_RV.float()
    is_greedy_R1 = (temperature_R == 0).unsqueeze(1)
    scaled_RV = logits_RV / torch.where(temperature_R == 0, 1.0, temperature_R).unsqueeze(1)
    noise_RV = gumbel_noise(seed_R, pos_R, logits_RV.shape[1], first_token)
    score_RV = torch.where(is_greedy_R1, logits_RV, scaled_RV + noise_RV)
    score_RV = torch.where(score_RV > minus_inf, score_RV, minus_inf)  # no NaN is left
    token_R = score_RV.argmax(-1)
    best_R = score_RV.gather(1, token_R.unsqueeze(1)).squeeze(1)
    if first_token:
        token_R = token_R + first_token
    return best_R, torch.where(best_R > minus_inf, token_R, NO_TOKEN)


def keep_likely(
    logits_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor
) -> Tensor:
    """Logits in which tokens outside min_p, then the top k, then the top p are −inf.

    top_k 0, top_p 1 and min_p 0 turn a filter off. Probabilities are softmax(logits / temperature);
    temperature 0 counts as 1. The likeliest token always stays. Among equal logits the smaller id
    counts as likelier. NaN counts as −inf; where it stays, it is NaN.
    """
    scaled_RV = logits_RV.float() / torch.where(temperature_R == 0, 1.0, temperature_R).unsqueeze(1)
    scaled_RV = scaled_RV.masked_fill(scaled_RV.isnan(), float("-inf"))
    sorted_RV, order_RV = scaled_RV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(scaled_RV.shape[1], device=scaled_RV.device)
    # log 0 = −inf: no score is below it
    floor_R1 = sorted_RV[:, :1] + torch.log(min_p_R).unsqueeze(1)
    num_kept_R1 = torch.where(top_k_R > 0, top_k_R, scaled_RV.shape[1]).unsqueeze(1)
    kept_RV = (sorted_RV >= floor_R1) & (rank_V < num_kept_R1)
    prob_RV = sorted_RV.masked_fill(~kept_RV, float("-inf")).softmax(-1)
    before_RV = prob_RV.cumsum(-1) - prob_RV  # probability of all likelier tokens
    kept_RV &= (before_RV < top_p_R.unsqueeze(1)) | (top_p_R >= 1).unsqueeze(1)
    kept_RV[:, 0] = True
    return logits_RV.masked_fill(
        ~torch.zeros_like(kept_RV).scatter_(1, order_RV, kept_RV), float("-inf")
    )


def keep_allowed(logits_RV: Tensor, allowed_SW: Tensor, row_R: Tensor) -> Tensor:
    """Logits in which the tokens that the rows' masks leave out are −inf.

    allowed_SW: int32 [S, ceil(V / 32)]. Token v of row r stays if bit v % 32 of
    allowed_SW[row_R[r], v // 32] is 1.
    """
    bit_32 = torch.arange(32, dtype=torch.int32, device=logits_RV.device)
    word_RW1 = allowed_SW.index_select(0, row_R).unsqueeze(-1)
    is_allowed_RV = ((word_RW1 >> bit_32) & 1).flatten(1)[:, : logits_RV.shape[1]]
    return logits_RV.masked_fill(is_allowed_RV == 0, float("-inf"))


_silu_mul = silu_mul  # `fused_linear` has an argument with this name


def fused_linear(
    x_TD: Tensor,
    norm_weight_D: Tensor | None,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    residual_TO: Tensor | None,
    eps: float,
    silu_mul: bool,
) -> Tensor:
    """A linear layer fused with the ops around it.

    In order: rms_norm(x) if a norm weight is given; x · weightᵀ + bias; silu(gate) · up if
    `silu_mul` (the weight is [gate | up]); + residual if one is given.
    """
    if norm_weight_D is not None:
        x_TD = rms_norm(x_TD, norm_weight_D, eps)
    y_TO = linear(x_TD, weight_OD, bias_O)
    y_TO = _silu_mul(y_TO) if silu_mul else y_TO
    return y_TO if residual_TO is None else y_TO + residual_TO


# Mixture of experts -------------------------------------------------------------------------------


def route(logits_TE: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Choose the `top_k` likeliest experts of each token.

    Returns (weight_TK fp32, expert_TK int32): probabilities in softmax(logits), and experts, the
    likeliest first. Among equal probabilities the smaller id comes first. With `normalize` a
    token's weights are divided by their sum. A row that holds NaN gets NaN weights and valid ids.
    """
    prob_TE = logits_TE.float().softmax(-1)
    sorted_TE, order_TE = prob_TE.sort(dim=-1, descending=True, stable=True)
    weight_TK, expert_TK = sorted_TE[:, :top_k], order_TE[:, :top_k]
    if normalize:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    return weight_TK.contiguous(), expert_TK.int()


def norm_route(
    x_TD: Tensor, norm_D: Tensor, router_ED: Tensor, eps: float, top_k: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y = rms_norm(x); returns (y, weight_TK, expert_TK) with the experts that `route` chooses for
    the logits y · routerᵀ."""
    normed_TD = rms_norm(x_TD, norm_D, eps)
    return normed_TD, *route(linear(normed_TD, router_ED, None), top_k, normalize)


def experts(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    residual_TD: Tensor | None = None,
    local_X: Tensor | None = None,
) -> Tensor:
    """Σ_k weight[t, k] · down_e(silu(gate_e(x_t)) · up_e(x_t)) with e = expert[t, k], + residual.

    gate_up_EGD holds gate's rows of each expert, then up's. The sum over k is in fp32 and is
    rounded to x's dtype once, before the residual is added. No token is dropped, and the weights of
    experts that no token chooses are not read.

    With local_X, int32, the E matrices are those of some of X experts: expert e has the matrices
    local_X[e], and is left out of the sum where that is negative, whatever its weight is.
    """
    if local_X is not None:
        expert_TK = local_X[expert_TK.long()]
    inner_TKF = silu_mul(expert_linear(x_TD, expert_TK, gate_up_EGD))
    y_TKD = _expert_products(inner_TKF.flatten(0, 1), expert_TK.flatten(), down_EDF)
    y_TKD = y_TKD.view(*expert_TK.shape, -1) * weight_TK.unsqueeze(-1)
    if local_X is not None:
        y_TKD = y_TKD.masked_fill((expert_TK < 0).unsqueeze(-1), 0.0)
    y_TD = y_TKD.sum(1).to(x_TD.dtype)
    return y_TD if residual_TD is None else y_TD + residual_TD


def expert_linear(x: Tensor, expert_TK: Tensor, weight_EOD: Tensor) -> Tensor:
    """x times the transposed matrix of each of its token's experts: [T, K, O].

    x is [T, D], one row for each token, or [T, K, D], one for each of its experts.
    """
    num_chosen = expert_TK.shape[1]
    x_PD = x.repeat_interleave(num_chosen, 0) if x.dim() == 2 else x.flatten(0, 1)
    y_PO = _expert_products(x_PD, expert_TK.flatten(), weight_EOD)
    return y_PO.to(x.dtype).view(*expert_TK.shape, -1)


def _expert_products(x_PD: Tensor, expert_P: Tensor, weight_EOD: Tensor) -> Tensor:
    """Row p of x times the transposed matrix of expert p, in fp32; zeros for negative experts."""
    y_PO = x_PD.new_zeros((x_PD.shape[0], weight_EOD.shape[1]), dtype=torch.float32)
    for expert in expert_P[expert_P >= 0].unique().tolist():
        p = (expert_P == expert).nonzero().squeeze(1)
        y_PO[p] = x_PD[p].float() @ weight_EOD[expert].float().t()
    return y_PO


# Index arithmetic of a step -----------------------------------------------------------------------


def decode_inputs(
    token_S: Tensor,
    pos_S: Tensor,
    rope_offset_S: Tensor,
    block_table_SP: Tensor,
    row_idx_R: Tensor,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The inputs of a step in which every row feeds its newest token, at position pos_S.

    Returns (token_R, rope_pos_R, slot_R, block_table_RP, seq_len_R, q_start):
    rope_pos = pos + rope_offset; slot = block_table[pos // B] · B + pos % B; seq_len = pos + 1;
    q_start = 0 … R.
    """
    pos_R = pos_S[row_idx_R]
    table_RP = block_table_SP[row_idx_R]
    block_R = table_RP.gather(1, (pos_R // block_size).unsqueeze(1)).squeeze(1)
    slot_R = block_R.long() * block_size + pos_R % block_size
    q_start = torch.arange(row_idx_R.shape[0] + 1, dtype=torch.int32, device=row_idx_R.device)
    rope_pos_R = pos_R + rope_offset_S[row_idx_R]
    return token_S[row_idx_R], rope_pos_R, slot_R, table_RP, (pos_R + 1).int(), q_start


def span_inputs(
    token_S: Tensor,
    pos_S: Tensor,
    rope_offset_S: Tensor,
    block_table_SP: Tensor,
    row_idx_R: Tensor,
    num_tokens_R: Tensor,
    given_T: Tensor,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The inputs of a step in which row r feeds num_tokens_R[r] tokens, from position pos_S on.

    given_T holds the tokens, row after row; −1 stands for the row's newest token, token_S. Tokens
    after those of the last row are padding: they belong to the last row of the state and write to
    slots of block 0.

    Returns (token_T, rope_pos_T, slot_T, block_table_RP, seq_len_R, q_start, row_T, num_T, last_R):
    position, slot and rope_pos of each token as in `decode_inputs`; seq_len = pos + num_tokens, 0
    for a row without tokens; row r owns tokens q_start[r] .. q_start[r + 1] − 1; row_T is each
    token's row of the state, num_T its number within its row, from 1 on; last_R is the index of
    each row's last token, 0 for padding rows at the front.
    """
    num_tokens, num_rows = given_T.shape[0], row_idx_R.shape[0]
    end_R = num_tokens_R.cumsum(0)
    token_idx_T = torch.arange(num_tokens, device=given_T.device)
    is_real_T = token_idx_T < end_R[-1:]
    r_T = (token_idx_T.unsqueeze(1) >= end_R).sum(1).clamp(max=num_rows - 1)
    row_T = torch.where(is_real_T, row_idx_R[r_T], pos_S.shape[0] - 1)
    index_T = torch.where(is_real_T, token_idx_T - (end_R - num_tokens_R)[r_T], 0)
    pos_T = pos_S[row_T] + index_T
    flat_T = row_T * block_table_SP.shape[1] + pos_T // block_size
    slot_T = block_table_SP.flatten()[flat_T].long() * block_size + pos_T % block_size
    slot_T = torch.where(is_real_T, slot_T, token_idx_T % block_size)
    seq_len_R = torch.where(num_tokens_R > 0, pos_S[row_idx_R] + num_tokens_R, 0)
    return (
        torch.where(given_T < 0, token_S[row_T], given_T),
        pos_T + rope_offset_S[row_T],
        slot_T,
        block_table_SP[row_idx_R],
        seq_len_R.int(),
        torch.cat((torch.zeros_like(end_R[:1]), end_R)).int(),
        row_T,
        index_T + 1,
        (end_R - 1).clamp(min=0),
    )


def sampling_inputs(
    pos_S: Tensor,
    sampling_SF: Tensor,
    seed_S: Tensor,
    row_idx_R: Tensor,
    num_R: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (temperature_R, seed_R, position_R of the token to sample).

    The position is pos_S + num_R, or pos_S + 1 without num_R. The temperature is sampling field 0.
    """
    num = 1 if num_R is None else num_R
    return sampling_SF[row_idx_R, 0], seed_S[row_idx_R], pos_S[row_idx_R] + num


def accept(
    token_T: Tensor, chosen_T: Tensor, num_tokens_R: Tensor, num: int
) -> tuple[Tensor, Tensor]:
    """Verify the tokens of each row against the tokens that the model chose.

    chosen_T[t] is the model's choice after token_T[t]. A chosen token is accepted if every earlier
    choice of its row equals the token that the row fed next. Returns (token_RK, a row's chosen
    tokens, K = `num`; count_R, the number of accepted ones: at least 1, at most the row's number of
    tokens). For rows without tokens, token_RK is undefined and count_R is 1. No row feeds NO_TOKEN,
    so only a row's last accepted token can be that.

    Source: greedy verification of Leviathan et al. 2023, https://arxiv.org/abs/2211.17192. Noise is
    a function of seed and position, so sampled tokens are verified in the same way as greedy ones.
    """
    end_R = num_tokens_R.cumsum(0)
    step_K = torch.arange(num, device=token_T.device)
    index_RK = ((end_R - num_tokens_R).unsqueeze(1) + step_K).clamp(max=token_T.shape[0] - 1)
    token_RK, chosen_RK = (
        x_T.index_select(0, index_RK.flatten()).view_as(index_RK) for x_T in (token_T, chosen_T)
    )
    is_wrong_RJ = (token_RK[:, 1:] != chosen_RK[:, :-1]) | (step_K[1:] >= num_tokens_R.unsqueeze(1))
    return chosen_RK, (is_wrong_RJ.long().cumsum(1) == 0).sum(1) + 1


def advance(
    token_S: Tensor, pos_S: Tensor, row_idx_R: Tensor, token_R: Tensor, num_R: Tensor | None = None
) -> None:
    """token_S[row] = token_R, or 0 for NO_TOKEN, and pos_S[row] += num_R (1 without num_R), in
    place.

    Only padding uses the last row of the state, any number of times in one step: it stays at token
    0, position 0. Every other row occurs at most once.
    """
    is_real_R = row_idx_R != token_S.shape[0] - 1
    num = 1 if num_R is None else num_R
    token_S.index_copy_(0, row_idx_R, torch.where(is_real_R, token_R, 0).clamp(min=0))
    pos_S.index_copy_(0, row_idx_R, torch.where(is_real_R, pos_S[row_idx_R] + num, 0))
