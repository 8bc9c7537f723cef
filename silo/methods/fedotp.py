"""FedOTP, local half: cross-entropy of logits that match patches with a shared and a private context by transport.

Hongxia Li, Wei Huang, Jingya Wang, Ye Shi: "Global and Local Prompts Cooperation via Optimal Transport for Federated
Learning", CVPR 2024, arXiv:2403.00041.
"""

import torch
from torch import Tensor

from fedrt.methods.fedotp import FedOTP
from silo.contexts import class_features
from silo.method import Classifier, ImageFeatures, LocalMethod, Params, TextTower, cross_entropy
from silo.transport import Transport, transport_plan


def build(method: FedOTP, text: TextTower) -> LocalMethod:
    """Logits are s · Σ_mn T·S of the cosines S of patches and prompts; the plan T from S is a constant.

    The features of all prompts, shared ones first, come from one pass. The pooled features of images are not used.
    """
    transport = Transport(
        entropy=method.entropy,
        mass=method.mass if method.solver == "unbalanced" else None,
        threshold=method.threshold,
        max_sweeps=method.max_sweeps,
        stopping=method.stopping,
    )

    def classify(params: Params) -> Classifier:
        prompts = class_features(text, method, params["shared_context"], params["private_context"])
        prompts = prompts.flatten(0, 1)  # [2, N / 2, C, D] -> [N, C, D]

        def logits(images: ImageFeatures) -> Tensor:
            if images.patches is None:
                raise ValueError("method 'fedotp' classifies by patches, but the images have pooled features only")
            cosines = similarity(images.patches, prompts)
            plan = transport_plan(cosines, transport)
            return text.logit_scale * (plan * cosines).sum((-2, -1)).T  # [B, C]

        return logits

    return LocalMethod(classify, cross_entropy(classify))


def similarity(patches: Tensor, prompts: Tensor) -> Tensor:
    """Cosines S [C, B, M, N] of unit-norm patches [B, M, D] and prompts [N, C, D].

    In float32 at least, also under autocast: the plan divides them by ε, and a rounding error with them. In memory they
    are [N, C, B, M], as one product of matrices gives them and as `transport_plan` takes them, so nothing is copied.
    """
    exact = torch.promote_types(patches.dtype, torch.float32)
    with torch.autocast(patches.device.type, enabled=False):
        return torch.einsum("ncd,bmd->ncbm", prompts.to(exact), patches.to(exact)).movedim(0, -1)
