"""PromptFL with FedProx, local half: PromptFL's loss with a pull back to the context that was received.

Tian Li, Anit Kumar Sahu, Manzil Zaheer, Maziar Sanjabi, Ameet Talwalkar, Virginia Smith: "Federated Optimization in
Heterogeneous Networks", MLSys 2020, arXiv:1812.06127. PromptFL: Guo et al., arXiv:2208.11625.
"""

from torch import Tensor

from fedrt.methods.fedprox import FedProx
from silo.method import Batch, LocalMethod, Params, TextTower
from silo.methods import promptfl


def build(method: FedProx, text: TextTower) -> LocalMethod:
    """PromptFL's logits; the loss is cross-entropy + μ/2 · ‖context − received‖², differentiated as it stands.

    The squared norm sums over all entries, and over all contexts where there are several.
    """
    plain = promptfl.build(method, text)

    def loss(params: Params, received: Params, batch: Batch) -> Tensor:
        distance = (params["context"] - received["context"]).square().sum()
        return plain.loss(params, received, batch) + method.proximal_weight / 2 * distance

    return LocalMethod(plain.classify, loss)
