"""What models of all kinds are given: three rows each, always the same."""

from __future__ import annotations

import torch

from zoo.sizes import IMAGE_TOKEN


def pixels(size: int = 8) -> dict:
    return {"pixel_values": torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(3))}


def patches(temporal: int = 2) -> dict:
    """Images as Qwen-VL's processors give them: 2x2 patches each, one row a patch."""
    values = torch.randn(12, 3 * temporal * 4 * 4, generator=torch.Generator().manual_seed(3))
    return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, 2, 2]] * 3)}


def tiles() -> dict:
    """Images of two tiles as Mllama's processor gives them, which all tokens may look at."""
    return {
        "pixel_values": torch.randn(3, 1, 2, 3, 8, 8, generator=torch.Generator().manual_seed(3)),
        "aspect_ratio_ids": torch.full((3, 1), 2),
        "aspect_ratio_mask": torch.ones(3, 1, 2, dtype=torch.long),
        "cross_attention_mask": torch.ones(3, 11, 1, 2, dtype=torch.long),
    }


def single_tile() -> dict:
    return {"pixel_values": pixels()["pixel_values"][:, None]}


def sized() -> dict:
    return pixels() | {"image_sizes": torch.tensor([[8, 8]] * 3)}


def base_and_tile(size: int = 4) -> dict:
    """Each image whole, and once more as its only tile."""
    values = torch.randn(3, 2, 3, size, size, generator=torch.Generator().manual_seed(3))
    return {"pixel_values": values, "image_sizes": torch.tensor([[size, size]] * 3)}


def flat_patches() -> dict:
    """2x2 patches for each image, which keep the form of images."""
    values = torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    return patches(1) | {"pixel_values": values}


def rows_of_patches() -> dict:
    """2x2 patches for each image, one row an image."""
    return {"pixel_values": torch.randn(3, 4, 48, generator=torch.Generator().manual_seed(3))}


def padded_patches() -> dict:
    """2x2 patches for each image as LFM2-VL's processor gives them."""
    return rows_of_patches() | {
        "spatial_shapes": torch.tensor([[2, 2]] * 3),
        "pixel_attention_mask": torch.ones(3, 4, dtype=torch.long),
    }


def images_at(tokens: int) -> torch.Tensor:
    """Where images are in a prompt."""
    places = torch.arange(11).expand(3, -1)
    return ((places >= 4) & (places < 4 + tokens)).long()


def mel(frames: int, *masks: str, shown: int | None = None, bins_last: bool = False) -> dict:
    """Sounds as most processors give them, with masks of what is no padding."""
    values = torch.randn(3, 8, frames, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(3, frames, dtype=torch.long)
    mask[:, shown or frames :] = 0
    return {"input_features": values.mT if bins_last else values} | dict.fromkeys(masks, mask)


def words() -> dict:
    """Texts of three lengths, padded on the right."""
    ids = torch.randint(5, 90, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = mask[2, 3:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def pictured_words(tokens: int) -> dict:
    """Texts behind so many tokens of an image."""
    given = words()
    return {
        "input_ids": torch.cat([torch.full((3, tokens), IMAGE_TOKEN), given["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.ones(3, tokens).long(), given["attention_mask"]], dim=1),
    }


def answers() -> torch.Tensor:
    return torch.randint(5, 90, (3, 4), generator=torch.Generator().manual_seed(4))


def sources() -> dict:
    return words() | {"decoder_input_ids": answers()}


def sounds() -> dict:
    sound = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(3))
    return {"input_features": sound, "decoder_input_ids": answers()}


def pictured_sources() -> dict:
    """Texts behind the five tokens of an image."""
    return sources() | pictured_words(5) | pixels(16)


def flattened() -> dict:
    """Images as Pix2Struct takes them, one row a patch, its place first; padded."""
    seen = (torch.arange(9) < torch.tensor([[9], [6], [4]])).long()
    places = torch.stack([torch.arange(9) // 3 + 1, torch.arange(9) % 3 + 1], dim=-1).expand(3, -1, -1)
    values = torch.randn(3, 9, 12, generator=torch.Generator().manual_seed(3))
    flat = torch.cat([places, values], dim=-1) * seen[..., None]
    return {"flattened_patches": flat, "attention_mask": seen, "decoder_input_ids": answers()}


def regions() -> dict:
    generator = torch.Generator().manual_seed(3)
    feats, boxes = torch.randn(3, 5, 12, generator=generator), torch.rand(3, 5, 4, generator=generator)
    seen = torch.tensor([[1] * 5, [1] * 5, [1, 1, 1, 0, 0]])
    return words() | {"visual_feats": feats, "visual_pos": boxes, "visual_attention_mask": seen}


def boxed_words() -> dict:
    """Texts with where each word is on its page."""
    boxes = torch.randint(0, 50, (3, 7, 4), generator=torch.Generator().manual_seed(3))
    return words() | {"bbox": boxes.sort(dim=-1).values}


def region_words() -> dict:
    """Texts with regions of an image behind them, as VisualBERT takes them."""
    regions_ = regions()
    return words() | {
        "visual_embeds": regions_["visual_feats"], "visual_attention_mask": regions_["visual_attention_mask"]
    }  # fmt: skip


def patches_of_shapes() -> dict:
    """Images of different shapes as SigLIP 2 takes them, one row a patch, padded."""
    shapes = torch.tensor([[2, 2], [2, 1], [1, 3]])
    seen = (torch.arange(4) < shapes.prod(dim=1, keepdim=True)).long()
    values = torch.randn(3, 4, 3 * 8 * 8, generator=torch.Generator().manual_seed(3))
    return {"pixel_values": values * seen[..., None], "pixel_attention_mask": seen, "spatial_shapes": shapes}


def frames(count: int) -> dict:
    """Short films."""
    return {"pixel_values": torch.randn(3, count, 3, 16, 16, generator=torch.Generator().manual_seed(3))}


def heard() -> dict:
    """Sounds of three lengths, one row a frame."""
    mask = (torch.arange(16) < torch.tensor([[16], [12], [8]])).long()
    return {"input_features": mel(16)["input_features"].mT * mask[..., None], "attention_mask": mask}


def waves(samples: int = 400) -> dict:
    return {"input_values": torch.randn(3, samples, generator=torch.Generator().manual_seed(3))}


CLASSES = {"labels": torch.tensor([0, 1, 2])}
