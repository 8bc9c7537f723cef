"""Prompt learning as the papers describe it, plainly: what the engine is compared with, and what it must agree with.

What the papers' code does, without its accidental waste. In every step: the image tower on the batch, prompts of the
full context length, every class in full, every prompt in a call of its own, open_clip's own modules, and the transport
of FedOTP by scaling the kernel of all images and classes together. Not done, though some of that code does it: constant
features once more in each step, features that no loss uses, an image tower run twice. So FedPGP counts two text passes
here (the shared context and the personal one), and its frozen prompt is encoded once, before the first step.

The formulas: CoOp and PromptFL (arXiv:2109.01134, 2208.11625), FedOTP (2403.00041), FedPGP (2405.09771), PromptFolio
(2409.19610). The tensors of a method have the names that fedrt gives them. Nothing here comes from `silo`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

METHODS = ("promptfl", "fedotp", "fedpgp", "promptfolio")
HANDCRAFTED = "a photo of a"
MASS, ENTROPY, THRESHOLD, MAX_SWEEPS = 0.8, 0.1, 1e-3, 100  # of FedOTP
CONTRAST_WEIGHT, TEMPERATURE = 0.5, 0.5  # of FedPGP
SHARE = 0.4  # of PromptFolio

Params = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Textbook:
    """One method with one list of classes on one frozen CLIP in evaluation mode."""

    method: str
    model: CLIP
    tokens: Tensor  # rows of the embedding [C, 77], zeros where the context goes
    frozen: Tensor  # unit-norm features [C, D] of a constant prompt, FedPGP's positive pair

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Unit-norm features of [B, 3, H, W]: pooled [B, D], or for FedOTP all tokens [B, 1 + M, D]."""
        if self.method != "fedotp":
            return F.normalize(self.model.encode_image(pixels), dim=-1)
        visual = self.model.visual
        tokens = visual.ln_post(visual.transformer(visual._embeds(pixels))) @ visual.proj
        return F.normalize(tokens, dim=-1)

    def text(self, context: Tensor) -> Tensor:
        """Unit-norm features [C, D] of one context [L, E] in front of every class name."""
        return text_features(self.model, self.tokens, context)

    def encode_prompts(self, params: Params, to_train: bool = True) -> Tensor:
        """Features [K, C, D], each context in a call of its own; FedPGP's shared one is needed only to train."""
        match self.method:
            case "promptfl":
                contexts = [params["context"]]
            case "fedotp" | "promptfolio":
                contexts = [params["shared_context"], params["private_context"]]
            case "fedpgp":
                personal = params["shared_context"] + params["left"] @ params["right"]
                contexts = [params["shared_context"], personal] if to_train else [personal]
            case _:
                raise ValueError(f"method {self.method!r} is not in the textbook; it has {', '.join(METHODS)}")
        return torch.stack([self.text(context) for context in contexts])

    def logits(self, prompts: Tensor, images: Tensor) -> Tensor:
        """Logits [B, C] of what `encode_prompts` and `encode_images` gave."""
        scale = self.model.logit_scale.exp()
        if self.method == "fedotp":
            similarity = torch.einsum("bmd,ncd->bcmn", images[:, 1:], prompts)
            plan, _ = unbalanced_plan(similarity.detach())
            return scale * (plan * similarity).sum((-2, -1))
        if self.method == "promptfolio":
            return scale * images @ ((1 - SHARE) * prompts[0] + SHARE * prompts[1]).T
        return scale * images @ prompts[-1].T

    def loss(self, params: Params, pixels: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch of images."""
        images, prompts = self.encode_images(pixels), self.encode_prompts(params)
        loss = F.cross_entropy(self.logits(prompts, images), labels)
        if self.method == "fedpgp":
            loss = loss + CONTRAST_WEIGHT * contrast(self.frozen, prompts[0], prompts[1])
        return loss


def make_textbook(
    method: str, model: CLIP, class_names: Sequence[str], context_length: int, kept_ids: Sequence[int] | None = None
) -> Textbook:
    """The textbook's own tokens and constants; `kept_ids` are the byte-pair ids that a small embedding table keeps."""
    model = model.eval().requires_grad_(False)
    device = model.token_embedding.weight.device
    rows = {original: row for row, original in enumerate(kept_ids)} if kept_ids is not None else None
    empty = [[0] * context_length for _ in class_names]
    tokens = prompt_rows(model.context_length, empty, class_names, rows).to(device)
    written = [SimpleTokenizer().encode(HANDCRAFTED)] * len(class_names)
    with torch.no_grad():
        frozen = text_features(model, prompt_rows(model.context_length, written, class_names, rows).to(device))
    return Textbook(method, model, tokens, frozen)


def prompt_rows(
    length: int, leading: Sequence[Sequence[int]], class_names: Sequence[str], rows: Mapping[int, int] | None
) -> Tensor:
    """Rows [C, T] of the embedding for start, leading tokens, "<name>.", end, and zeros up to the context length."""
    tokenizer = SimpleTokenizer()
    table = torch.zeros(len(class_names), length, dtype=torch.long)
    for place, (first, name) in enumerate(zip(leading, class_names, strict=True)):
        named = tokenizer.encode(f"{name.replace('_', ' ')}.")
        ids = [tokenizer.sot_token_id, *first, *named, tokenizer.eot_token_id]
        if len(ids) > length:
            raise ValueError(f"the prompt of class {name!r} needs {len(ids)} tokens, the model takes {length}")
        found = [0 if one == 0 else one if rows is None else rows[one] for one in ids]
        table[place, : len(found)] = torch.tensor(found)
    return table


def text_features(model: CLIP, rows: Tensor, context: Tensor | None = None) -> Tensor:
    """Unit-norm features [C, D] of token rows [C, 77]; a context [L, E] takes the places after the start token."""
    x = model.token_embedding(rows)
    if context is not None:
        x = torch.cat([x[:, :1], context.expand(len(rows), -1, -1), x[:, 1 + len(context) :]], dim=1)
    x = model.ln_final(model.transformer(x + model.positional_embedding, attn_mask=model.attn_mask))
    ends = rows.argmax(dim=-1)  # the end token is the largest id
    return F.normalize(x[torch.arange(len(rows), device=rows.device), ends] @ model.text_projection, dim=-1)


def unbalanced_plan(
    similarity: Tensor,
    mass: float = MASS,
    entropy: float = ENTROPY,
    threshold: float = THRESHOLD,
    max_sweeps: int = MAX_SWEEPS,
) -> tuple[Tensor, int]:
    """FedOTP's plans for similarities [..., M, N], and the sweeps it took: columns sum to γ/N, rows to at most 1/M.

    All problems go on together until v moves by less than `threshold` in their mean.
    """
    kernel = torch.exp((similarity - 1) / entropy)
    row, column = 1 / similarity.shape[-2], mass / similarity.shape[-1]
    v = torch.ones_like(kernel[..., :1, :]).mT
    sweeps = 0
    for sweeps in range(1, max_sweeps + 1):  # noqa: B007  # returned
        u = (row / (kernel @ v)).clamp(max=1)
        before, v = v, column / (kernel.mT @ u)
        if float((v - before).abs().mean()) < threshold:
            break
    return u * kernel * v.mT, sweeps


def contrast(frozen: Tensor, shared: Tensor, personal: Tensor) -> Tensor:
    """Mean over classes of −log(e^{p/τ} / (e^{p/τ} + e^{n/τ})): cosines p to the frozen, n to the personal prompt."""
    pairs = torch.stack([(frozen * shared).sum(-1), (shared * personal).sum(-1)], dim=-1) / TEMPERATURE
    return F.cross_entropy(pairs, torch.zeros(len(pairs), dtype=torch.long, device=pairs.device))


def sgd_step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> float:
    """One training step; returns the loss."""
    optimizer.zero_grad()
    value = loss()
    value.backward()
    optimizer.step()
    return float(value.detach())
