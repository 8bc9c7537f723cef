"""Image features: unit norm, equal to open_clip's, patches with the right meaning, images prepared as CLIP expects."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fedrt.errors import FailureReason, WorkError
from silo.clip import FrozenClip


def images_for(clip: FrozenClip) -> Tensor:
    size = clip.model.visual.image_size
    side = size if isinstance(size, int) else size[0]
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) < 1e-5


def test_pooled_features_are_open_clips(mini: FrozenClip) -> None:
    images = images_for(mini)
    expected = mini.model.encode_image(images, normalize=True)
    plain, dense = mini.encode_images(images, patches=False), mini.encode_images(images, patches=True)
    close(plain.pooled, expected)
    close(dense.pooled, expected)
    assert plain.patches is None
    assert not plain.pooled.requires_grad


def test_patches_are_unit_vectors_one_per_position(mini: FrozenClip) -> None:
    patches = mini.encode_images(images_for(mini), patches=True).patches
    assert patches is not None
    count = 16 if mini.architecture == "test-mini-vit" else 4
    assert patches.shape == (3, count, mini.feature_dim)
    close(patches.norm(dim=-1), torch.ones(3, count))


@pytest.mark.parametrize("architecture", ["test-mini-vit"], scope="session")
def test_vit_patches_are_all_tokens_normed_and_projected(mini: FrozenClip) -> None:
    images, visual = images_for(mini), mini.model.visual
    visual.output_tokens = True
    try:
        _, tokens = visual(images)  # open_clip's own tokens come out of ln_post; only the projection is missing
    finally:
        visual.output_tokens = False
    actual = mini.encode_images(images, patches=True).patches
    assert actual is not None
    close(actual, F.normalize(tokens @ visual.proj, dim=-1))


@pytest.mark.parametrize("architecture", ["test-mini-resnet"], scope="session")
def test_resnet_patch_is_the_pool_asked_at_that_position(mini: FrozenClip) -> None:
    visual, pool = mini.model.visual, mini.model.visual.attnpool
    images = images_for(mini)
    grid = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images)))))  # [B, W, 2, 2]
    tokens = torch.cat([grid.mean((2, 3))[:, None], grid.flatten(2).transpose(1, 2)], 1) + pool.positional_embedding
    keys, values, query = pool.k_proj(tokens), pool.v_proj(tokens), pool.q_proj(tokens[:, 3:4])
    heads = [x.unflatten(-1, (pool.num_heads, -1)).transpose(1, 2) for x in (query, keys, values)]
    weights = (heads[0] @ heads[1].mT / heads[0].shape[-1] ** 0.5).softmax(-1)
    expected = pool.c_proj((weights @ heads[2]).transpose(1, 2).flatten(2))[:, 0]
    actual = mini.encode_images(images, patches=True).patches
    assert actual is not None
    close(actual[:, 2], F.normalize(expected, dim=-1))


@pytest.mark.parametrize("architecture", ["test-mini-vit"], scope="session")
def test_tower_without_patches_says_so(mini: FrozenClip) -> None:
    assert mini.has_patches
    visual = mini.model.visual
    visual.pool_type = "avg"
    try:
        assert not mini.has_patches
        with pytest.raises(WorkError, match="needs patch features") as caught:
            mini.encode_images(images_for(mini), patches=True)
    finally:
        visual.pool_type = "tok"
    assert caught.value.reason is FailureReason.DATA_UNAVAILABLE


def test_preprocess_resizes_crops_and_normalises(mini: FrozenClip) -> None:
    side = images_for(mini).shape[-1]
    picture = Image.new("RGB", (4 * side, 2 * side), (255, 0, 128))
    prepared = mini.preprocess(picture)
    assert prepared.shape == (3, side, side)
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073))
    std = torch.tensor((0.26862954, 0.26130258, 0.27577711))
    close(prepared.mean(dim=(1, 2)), (torch.tensor((1.0, 0.0, 128 / 255)) - mean) / std)


def test_preprocess_keeps_the_centre(mini: FrozenClip) -> None:
    side = images_for(mini).shape[-1]
    picture = Image.new("RGB", (3 * side, side), (0, 0, 0))
    picture.paste((255, 255, 255), (side, 0, 2 * side, side))
    assert float(mini.preprocess(picture)[:, 2:-2, 2:-2].min()) > 1.0
