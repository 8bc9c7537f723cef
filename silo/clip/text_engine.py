"""Runs packed prompts through CLIP's frozen text tower: what is the same is computed once, exactly.

* The start token sees only itself: its keys and values are constants of the weights.
* Tokens that all classes share, the context at the end position, are computed once per context; every chunk of class
  tokens (`silo.clip.packing`) attends to their keys and values and to its own.
* Nothing follows an end token, and the last layer computes its queries and what comes after them for end tokens only.
* In the first layer the queries, keys and values of class tokens are constants if no context stands among them.
* Weights are frozen: no operation keeps what only their gradients would need.

Products of all tokens of all contexts with the weights take most of the time. Where a step would hold more than
`activation_limit` bytes for its backward pass, layers are computed a second time there instead. Residuals, norms and
the projection are in float32 in every precision.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from silo.clip.packing import Packing
from silo.clip.text_weights import Layer, TextWeights, text_weights

# Bytes that a layer keeps of a token for the backward pass, in units of the tower's width: at most. With ViT-B/16 it is
# 9 to 13 times 4 in float32, most with many classes, and 6 to 8 times 4 in bfloat16.
HELD_PER_TOKEN = 14 * 4


@dataclass(frozen=True)
class Arrangement:
    """A `Packing` on the device, for contexts of R rows: S tokens that all share, J chunks of Q slots, n ends a chunk.

    Masks are added to scores. Their columns are the keys: of the start token, the shared ones, and a chunk's own.
    """

    shared_count: int
    row_count: int
    embeddings: Tensor  # [U, E], of the frozen tokens
    rows: Tensor  # [J·Q], of the table [context; embeddings]
    places: Tensor  # [S + J·Q, E], positional embeddings
    shared_mask: Tensor  # [S, 1 + S]
    mask: Tensor  # [J, 1, Q, 1 + S + Q]
    end_mask: Tensor  # [J, 1, n, 1 + S + Q]
    ends: Tensor  # [J·n], of the tokens [shared; slots]
    order: Tensor  # [C], of the ends
    is_constant: bool  # no context stands in a slot
    known: dict[torch.dtype, Tensor] = field(default_factory=dict)  # then, what the first layer makes of the slots

    @property
    def chunk_count(self) -> int:
        """J."""
        return self.mask.shape[0]


class TextEngine:
    """The text tower of one CLIP, whatever the class names; makes its weights in an element type when first asked.

    `start_row`: the token, as a row of the embedding, that begins every prompt. `activation_limit`: bytes that a step
    may hold for its backward pass.
    """

    def __init__(self, model: CLIP, start_row: int, activation_limit: int) -> None:
        self._model = model
        self._start_row = start_row
        self._activation_limit = activation_limit
        self._weights: dict[torch.dtype, TextWeights] = {}
        self._starts: dict[torch.dtype, tuple[Tensor, ...]] = {}

    @property
    def width(self) -> int:
        """E."""
        return int(self._model.token_embedding.weight.shape[1])

    @property
    def context_length(self) -> int:
        """The most tokens that a prompt can have, start and end included."""
        return int(self._model.positional_embedding.shape[0])

    @property
    def logit_scale(self) -> Tensor:
        """The exponential of the trained temperature, a scalar."""
        scale: Tensor = self._model.logit_scale.detach().exp().reshape(())
        return scale

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self._model.token_embedding.weight.device
        return device

    def embed(self, rows: Tensor) -> Tensor:
        """The frozen token embeddings of rows [...] of the vocabulary, as [..., E]."""
        return F.embedding(rows, self._model.token_embedding.weight.detach())

    @torch.inference_mode(False)  # what is kept must serve training, whoever asked first
    def arrange(self, packing: Packing, shared_count: int, row_count: int) -> Arrangement:
        """A packing on the device, for contexts of `row_count` rows of which all classes share the first few."""
        chunk_count, width = packing.tokens.shape
        tokens: list[int] = packing.tokens.flatten().tolist()
        frozen = sorted({token for token in tokens if token >= 0})
        table = {token: row_count + number for number, token in enumerate(frozen)}
        places = torch.cat([torch.arange(1, 1 + shared_count), torch.from_numpy(packing.places).flatten()])
        before = torch.ones(chunk_count, width, 1 + shared_count, dtype=torch.bool)
        mask = _additive(torch.cat([before, torch.from_numpy(packing.visible)], 2))
        chunks, ends = torch.arange(chunk_count)[:, None], torch.from_numpy(packing.ends)
        device = self.device
        return Arrangement(
            shared_count=shared_count,
            row_count=row_count,
            embeddings=self.embed(torch.tensor(frozen, dtype=torch.long, device=device)),
            rows=torch.tensor([table.get(token, ~token) for token in tokens], device=device),
            places=self._model.positional_embedding.detach()[places.to(device)],
            shared_mask=_additive(torch.ones(shared_count, 1 + shared_count, dtype=torch.bool).tril(1)).to(device),
            mask=mask[:, None].to(device),
            end_mask=mask[chunks, ends][:, None].to(device),
            ends=(shared_count + chunks * width + ends).flatten().to(device),
            order=torch.from_numpy(packing.order).to(device),
            is_constant=min(tokens) >= 0,
        )

    def features(self, contexts: Tensor, arrangement: Arrangement, dtype: torch.dtype) -> Tensor:
        """Unit-norm features [G, C, D] of G contexts [G, R, E], with products of matrices in `dtype`."""
        with torch.autocast(self.device.type, enabled=False):
            weights, starts = self._in(dtype), self._start_in(dtype)
            x = _tokens(contexts, arrangement)
            held = x.shape[0] * x.shape[1] * x.shape[2] * HELD_PER_TOKEN * len(weights.layers)
            is_repeated = x.requires_grad and held > self._activation_limit
            for number, (layer, start) in enumerate(zip(weights.layers[:-1], starts, strict=False)):
                known = self._known_in(dtype, arrangement) if number == 0 and arrangement.is_constant else None
                block = partial(_block, layer, start, arrangement, known)
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False) if is_repeated else block(x)
            x = _last_block(weights.layers[-1], starts[-1], arrangement, x)
            return F.normalize(F.linear(weights.final_norm(x), *weights.projection), dim=-1)

    @torch.inference_mode(False)
    def _in(self, dtype: torch.dtype) -> TextWeights:
        if dtype not in self._weights:
            self._weights[dtype] = text_weights(self._model, dtype)
        return self._weights[dtype]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _start_in(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """For each layer the key and the value [2, H, 1, E / H] of the start token, which sees only itself."""
        if dtype not in self._starts:
            x = self.embed(torch.tensor([self._start_row], device=self.device))
            x = x + self._model.positional_embedding[:1]
            found = []
            for layer in self._in(dtype).layers:
                _, key, value = F.linear(layer.norm_1(x).to(dtype), *layer.attention).chunk(3, dim=-1)
                found.append(torch.stack([key, value]).view(2, layer.head_count, 1, -1))
                x = _widened(layer, x + F.linear(value, *layer.out))
            self._starts[dtype] = tuple(found)
        return self._starts[dtype]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _known_in(self, dtype: torch.dtype, arrangement: Arrangement) -> Tensor:
        """Queries, keys and values [J·Q, 3·E] of slots without context in the first layer."""
        if dtype not in arrangement.known:
            layer = self._in(dtype).layers[0]
            x = arrangement.embeddings[arrangement.rows - arrangement.row_count]
            x = x + arrangement.places[arrangement.shared_count :]
            arrangement.known[dtype] = F.linear(layer.norm_1(x).to(dtype), *layer.attention)
        return arrangement.known[dtype]


def _tokens(contexts: Tensor, arrangement: Arrangement) -> Tensor:
    """What enters the first layer: shared tokens and slots [G, S + J·Q, E]."""
    groups = contexts.shape[0]
    table = torch.cat([contexts, arrangement.embeddings.expand(groups, -1, -1)], dim=1)
    slots = table.index_select(1, arrangement.rows)
    return torch.cat([contexts[:, : arrangement.shared_count], slots], dim=1) + arrangement.places


def _block(layer: Layer, start: Tensor, arrangement: Arrangement, known: Tensor | None, x: Tensor) -> Tensor:
    """One residual block on all tokens [G, S + J·Q, E]; `known` are the slots' queries, keys and values."""
    if known is None:
        projected = F.linear(layer.norm_1(x).to(layer.dtype), *layer.attention)
    else:
        shared = layer.norm_1(x[:, : arrangement.shared_count]).to(layer.dtype)
        projected = torch.cat([F.linear(shared, *layer.attention), known.expand(len(x), -1, -1)], dim=1)
    (shared_q, shared_k, shared_v), (q, k, v) = _by_head(projected, layer.head_count, arrangement)
    seen = _attend(q, _keys(start[0], shared_k, k), _keys(start[1], shared_v, v), arrangement.mask)
    seen = _together(seen)
    if arrangement.shared_count:
        start_k, start_v = (one.expand(len(x), -1, -1, -1) for one in start)
        k, v = torch.cat([start_k, shared_k], dim=2), torch.cat([start_v, shared_v], dim=2)
        before = _attend(shared_q, k, v, arrangement.shared_mask)
        seen = torch.cat([_together(before.unsqueeze(1)), seen], dim=1)
    return _widened(layer, x + F.linear(seen, *layer.out))


def _last_block(layer: Layer, start: Tensor, arrangement: Arrangement, x: Tensor) -> Tensor:
    """The last residual block, for the end tokens of the classes only: [G, C, E]."""
    groups, _, width = x.shape
    weight, bias = layer.attention
    ends = x.index_select(1, arrangement.ends)  # [G, J·n, E]
    q = F.linear(layer.norm_1(ends).to(layer.dtype), weight[:width], bias[:width])
    q = q.view(groups, arrangement.chunk_count, -1, layer.head_count, width // layer.head_count).transpose(2, 3)
    projected = F.linear(layer.norm_1(x).to(layer.dtype), weight[width:], bias[width:])
    (shared_k, shared_v), (k, v) = _by_head(projected, layer.head_count, arrangement)
    seen = _attend(q, _keys(start[0], shared_k, k), _keys(start[1], shared_v, v), arrangement.end_mask)
    ends = ends.index_select(1, arrangement.order)
    return _widened(layer, ends + F.linear(_together(seen).index_select(1, arrangement.order), *layer.out))


def _by_head(projected: Tensor, head_count: int, arrangement: Arrangement) -> tuple[Tensor, Tensor]:
    """P projections [G, S + J·Q, P·E] of shared tokens [P, G, H, S, d] and of slots [P, G, J, H, Q, d]."""
    groups, shared_count, chunk_count = len(projected), arrangement.shared_count, arrangement.chunk_count
    size = arrangement.places.shape[1] // head_count
    shared, slots = torch.split(projected, [shared_count, len(arrangement.rows)], dim=1)
    shared = shared.reshape(groups, shared_count, projected.shape[2] // (head_count * size), head_count, size)
    slots = slots.reshape(groups, chunk_count, -1, shared.shape[2], head_count, size)
    return shared.permute(2, 0, 3, 1, 4), slots.permute(3, 0, 1, 4, 2, 5)


def _together(seen: Tensor) -> Tensor:
    """What heads saw, chunk by chunk [G, J, H, Q, d], as tokens [G, J·Q, E]."""
    groups, chunks, heads, width, size = seen.shape
    return seen.transpose(2, 3).reshape(groups, chunks * width, heads * size)


def _widened(layer: Layer, x: Tensor) -> Tensor:
    """The second half of a residual block, for each token by itself."""
    hidden = layer.activation(F.linear(layer.norm_2(x).to(layer.dtype), *layer.widen))
    return x + F.linear(hidden, *layer.narrow)


def _keys(start: Tensor, shared: Tensor, own: Tensor) -> Tensor:
    """Keys, or values, that a chunk sees [G, J, H, 1 + S + Q, d]: of the start token, the shared ones, and its own."""
    groups, chunks = own.shape[:2]
    first = start.expand(groups, chunks, -1, -1, -1)
    return torch.cat([first, shared.unsqueeze(1).expand(-1, chunks, -1, -1, -1), own], dim=-2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention [..., Q, d] of scaled queries. A fused kernel is no faster here, and may add in any order."""
    return torch.softmax(q @ k.mT + mask.to(q.dtype), dim=-1) @ v


def _additive(visible: Tensor) -> Tensor:
    """0 where a key is seen, and else minus infinity."""
    return torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)
