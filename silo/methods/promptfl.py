"""PromptFL, local half: cross-entropy of CLIP's logits with one learnable context.

Tao Guo, Song Guo, Junxiao Wang, Wenchao Xu: "PromptFL: Let Federated Participants Cooperatively Learn Prompts Instead
of Models", IEEE Transactions on Mobile Computing 2023, arXiv:2208.11625. The context is CoOp's (Zhou et al., IJCV 2022,
arXiv:2109.01134).
"""

from fedrt.methods.promptfl import PromptFL
from silo.method import LocalMethod, TextTower
from silo.methods import coop


def build(method: PromptFL, text: TextTower) -> LocalMethod:
    """CoOp's logits and loss: what makes the difference is that the context is shared."""
    return coop.build(method, text)
