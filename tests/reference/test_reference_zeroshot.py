"""Zero-shot CLIP: features of both image towers, logits of the handcrafted prompt, and of an ensemble of templates."""

import torch
import torch.nn.functional as F
from recorded import Reference, close, settings, values
from torch import Tensor

from fedrt.methods.zeroshot import ZeroShot


def template_features(reference: Reference, template: str) -> Tensor:
    """Unit-norm features [C, D] of one template for all classes: its first word is the context, the rest a class."""
    features = []
    for name in reference.class_names:
        first, rest = template.removesuffix(".").format(name.replace("_", " ")).split(maxsplit=1)
        context = reference.clip.embed_phrase(first, len(reference.clip.vocabulary.encode(first)))
        features.append(reference.clip.text_tower([rest]).encode(context))
    return torch.cat(features)


def test_image_features_of_both_towers(reference: Reference) -> None:
    recorded, images = values("zeroshot"), values("images")
    close(reference.clip.model.encode_image(reference.images[:4]), recorded["image_features_raw"])
    close(reference.batch(0).images.pooled, F.normalize(recorded["image_features_raw"], dim=-1))
    for patches in (False, True):
        features = reference.resnet.encode_images(images["images_rn"], patches)
        close(features.pooled, F.normalize(recorded["image_features_raw_rn"], dim=-1))


def test_logits_of_the_handcrafted_prompt(reference: Reference) -> None:
    recorded = values("zeroshot")
    close(reference.text_tower().handcrafted(), recorded["text_features_norm"])
    logits = reference.local(ZeroShot()).classify({})(reference.batch(0).images)
    close(logits, recorded["logits"])
    assert logits.argmax(1).tolist() == recorded["predictions"].tolist()


def test_text_features_and_the_ensemble(reference: Reference) -> None:
    recorded = values("zeroshot")
    raw = F.normalize(recorded["text_features_raw"], dim=-1)
    close(template_features(reference, "a photo of a {}."), raw)
    units = [template_features(reference, template) for template in settings("zeroshot")["ensemble_templates"]]
    ensemble = F.normalize(torch.stack(units).mean(0), dim=-1)
    close(ensemble, recorded["ensemble_text_features_norm"])
    close(
        reference.text_tower().logit_scale * reference.batch(0).images.pooled @ ensemble.T, recorded["ensemble_logits"]
    )


def test_patches_of_both_towers(reference: Reference) -> None:
    """The recorded visual tokens lie with FedOTP's case; index 0 is the global feature."""
    recorded = values("fedotp")
    vit = reference.clip.encode_images(reference.images[:4], patches=True)
    resnet = reference.resnet.encode_images(values("images")["images_rn"], patches=True)
    for features, name in ((vit, "cot_visual_tokens_raw"), (resnet, "rn_visual_tokens_raw")):
        tokens = F.normalize(recorded[name].transpose(0, 1), dim=-1)  # [B, 1 + M, D]
        close(features.pooled, tokens[:, 0])
        assert features.patches is not None
        close(features.patches, tokens[:, 1:])
