"""The policy: a small Llama with a key-value cache, its sampling and its log-probabilities.

Knows ids and tensors; nothing of tasks, rewards or files. Called by `sft`, `dpo` and `measure`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from loadtests.table1.recipe import PolicyConfig

MLP_RATIO = 3
NORM_EPS = 1e-6
ROPE_THETA = 10_000.0
MAX_NEW_TOKENS = 20
"""The longest right response has 14 words and an end."""

_NUMBER_PERIODS = (2, 3, 5, 7, 10, 20, 40)
_NUMBER_SCALE = 0.15

Wave = tuple[Tensor, Tensor]
"""cos and sin of the positions' angles."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Conversations, prompts padded on the left and responses on the right.

    Attributes:
        ids: (B, T) int64.
        positions: (B, T) int64; 0 for padding on the left.
        real: (B, T) bool, False for padding.
        start: column where all responses start.
    """

    ids: Tensor
    positions: Tensor
    real: Tensor
    start: int


def number_code(value: int) -> list[float]:
    """Size, logarithm and residues of a number: an embedding to start from, that sums need not be learned by rote."""
    waves = [wave(2 * math.pi * value / period) for period in _NUMBER_PERIODS for wave in (math.cos, math.sin)]
    return [value / 20 - 1, math.log(value + 1) - 2, *waves]


def code_numbers(table: Tensor, tokens: Sequence[tuple[int, int]]) -> None:
    """Write the code of each (token, value) over the start of its row of the embedding table (V, d)."""
    with torch.no_grad():
        for token, value in tokens:
            code = torch.tensor(number_code(value))
            table[token, : len(code)] = _NUMBER_SCALE * code


def collate(prompts: Sequence[list[int]], responses: Sequence[list[int]], pad: int) -> Batch:
    """Pad and align. `responses` may be empty lists, for sampling."""
    start = max(map(len, prompts))
    width = start + max(map(len, responses))
    ids = torch.full((len(prompts), width), pad)
    real = torch.zeros((len(prompts), width), dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        first, last = start - len(prompt), start + len(response)
        ids[row, first:last] = torch.tensor(prompt + response)
        real[row, first:last] = True
    positions = (real.cumsum(1) - 1).clamp(min=0)
    return Batch(ids, positions, real, start)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, h: Tensor, wave: Wave, mask: Tensor, cache: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        B, T, width = h.shape
        q, k, v = (
            project(h).view(B, T, self.heads, width // self.heads).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _turn(q, wave), _turn(k, wave)
        if cache is not None:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(seen.transpose(1, 2).reshape(B, T, width)), [k, v]


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, MLP_RATIO * width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(MLP_RATIO * width, width, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(h)) * self.up_proj(h))
        return out


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = _Attention(width, heads), _Mlp(width)
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(width, eps=NORM_EPS) for _ in range(2))

    def forward(self, h: Tensor, wave: Wave, mask: Tensor, cache: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        seen, kept = self.self_attn(self.input_layernorm(h), wave, mask, cache)
        h = h + seen
        return h + self.mlp(self.post_attention_layernorm(h)), kept


class Policy(nn.Module):
    """Logits of the next token. A Llama with tied embeddings, its parameters named as transformers names them, so that
    a reward model can start from its weights.
    """

    def __init__(self, vocabulary: int, config: PolicyConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, config.width)
        self.layers = nn.ModuleList(_Layer(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        self._head_dim = config.width // config.heads
        nn.init.normal_(self.embed_tokens.weight, std=0.05)

    def forward(
        self, ids: Tensor, positions: Tensor, mask: Tensor, caches: list[list[Tensor]] | None = None
    ) -> tuple[Tensor, list[list[Tensor]]]:
        """Ids to logits.

        Args:
            ids, positions: (B, T).
            mask: (B, 1, T, S) bool, whether a token may look at another; S counts what the caches hold too.
            caches: keys and values of each layer so far.

        Returns:
            logits (B, T, V) and the caches with these tokens.
        """
        wave = _wave(positions, self._head_dim)
        h = self.embed_tokens(ids)
        kept = []
        for number, layer in enumerate(self.layers):
            h, cache = layer(h, wave, mask, caches[number] if caches else None)
            kept.append(cache)
        return functional.linear(self.norm(h), self.embed_tokens.weight), kept


def _wave(positions: Tensor, head_dim: int) -> Wave:
    """cos and sin of the rotary embedding: (B, 1, T, head_dim) each."""
    frequencies = ROPE_THETA ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = (positions[:, None, :, None] * frequencies).repeat(1, 1, 1, 2)
    return angles.cos(), angles.sin()


def _turn(x: Tensor, wave: Wave) -> Tensor:
    """Rotate the halves of each head, as Llama does."""
    first, second = x.chunk(2, -1)
    return x * wave[0] + torch.cat([-second, first], -1) * wave[1]


def causal_mask(real: Tensor) -> Tensor:
    """(B, T) to (B, 1, T, T): earlier real tokens, and oneself."""
    T = real.shape[1]
    allowed = real[:, None, :] & torch.ones(T, T, dtype=torch.bool).tril()
    return (allowed | torch.eye(T, dtype=torch.bool))[:, None]


def log_probabilities(policy: Policy, batch: Batch) -> Tensor:
    """log π(response | prompt) of every conversation, summed over its tokens: (B,)."""
    logits, _ = policy(batch.ids, batch.positions, causal_mask(batch.real))
    first = batch.start - 1
    targets = batch.ids[:, first + 1 :, None]
    token = functional.log_softmax(logits[:, first:-1], dim=-1).gather(2, targets)[..., 0]
    return (token * batch.real[:, first + 1 :]).sum(1)


@torch.inference_mode()
def sample(
    policy: Policy, prompts: Sequence[list[int]], *, pad: int, end: int, temperature: float, generator: torch.Generator
) -> list[list[int]]:
    """One response per prompt, without its end token; cut after MAX_NEW_TOKENS.

    Args:
        policy: gives the logits.
        prompts: ids up to where the response begins.
        pad, end: ids.
        temperature: 0 takes the likeliest token.
        generator: of the draws.
    """
    batch = collate(prompts, [[] for _ in prompts], pad)
    ids, positions, real, mask = batch.ids, batch.positions, batch.real, causal_mask(batch.real)
    last, caches = positions[:, -1:], None
    going = torch.ones(len(prompts), dtype=torch.bool)
    columns: list[Tensor] = []
    for _ in range(MAX_NEW_TOKENS):
        logits, caches = policy(ids, positions, mask, caches)
        drawn = _draw(logits[:, -1], temperature, generator)
        drawn = torch.where(going, drawn, pad)
        columns.append(drawn)
        going = going & (drawn != end)
        if not going.any():
            break
        ids, last = drawn[:, None], last + 1
        positions = last
        real = torch.cat([real, torch.ones(len(prompts), 1, dtype=torch.bool)], 1)
        mask = real[:, None, None, :]
    rows: list[list[int]] = torch.stack(columns, 1).tolist()
    return [[token for token in row if token not in (pad, end)] for row in rows]


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0.0:
        return logits.argmax(1)
    return torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)[:, 0]
