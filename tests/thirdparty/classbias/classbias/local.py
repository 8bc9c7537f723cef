"""ClassBias, local half: the logits of the context, plus the bias of each class."""

from torch import Tensor

from classbias.declaration import ClassBias
from silo.contexts import class_features, class_logits
from silo.method import Classifier, ImageFeatures, LocalMethod, Params, TextTower, cross_entropy


def build(method: ClassBias, text: TextTower) -> LocalMethod:
    """Logits are s · unit(img) · unit(text(context))ᵀ + bias_scale · bias; the loss is their cross-entropy."""

    def classify(params: Params) -> Classifier:
        features = class_features(text, method, params["context"])[0].mean(0)  # [C, D]

        def logits(images: ImageFeatures) -> Tensor:
            return class_logits(text, images, features) + method.bias_scale * params["bias"]

        return logits

    return LocalMethod(classify, cross_entropy(classify))
