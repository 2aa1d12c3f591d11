"""Tiny vision-language models, whose logits really depend on positions and visibility, and prompts for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.2,
    vocab_size=90,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=0,
)
IMAGE, VIDEO, VSTART, VEND = 80, 81, 82, 83
LAYERS = 6


def _llava(layers: int, text: str = "llama") -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT, num_hidden_layers=layers),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        image_seq_length=9,
    )
    return LlavaForConditionalGeneration(config)


def _llava_next(layers: int) -> Any:
    from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, MistralConfig

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=MistralConfig(**TEXT, num_hidden_layers=layers, sliding_window=None),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
    )
    return LlavaNextForConditionalGeneration(config)


def _qwen2_vl(layers: int) -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    config = Qwen2VLConfig(
        text_config={**text, "num_hidden_layers": layers},
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VSTART,
        vision_end_token_id=VEND,
    )
    return Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl(layers: int) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    config = Qwen2_5_VLConfig(
        text_config={**text, "num_hidden_layers": layers},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "out_hidden_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [0],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VSTART,
        vision_end_token_id=VEND,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _internvl(layers: int) -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config

    vision = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=[24, 24],
        patch_size=[4, 4],
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=Qwen2Config(**TEXT, num_hidden_layers=layers),
        image_token_id=IMAGE,
        image_seq_length=9,
        downsample_ratio=0.5,
    )
    return InternVLForConditionalGeneration(config)


MAKERS = {
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "internvl": _internvl,
}


def make_vlm(name: str, *, layers: int = LAYERS, sharpen: float = 2.0, dtype: torch.dtype = torch.float32) -> Any:
    """A random model in eval mode, eager attention. Query and key weights are multiplied: nearly uniform attention
    would hide wrong masks and positions."""
    torch.manual_seed(0)
    model = MAKERS[name](layers).to(dtype).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for layer in text_of(model).layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight *= sharpen
    return model


def text_of(model: Any) -> Any:
    """The language model inside."""
    return model.model.language_model


@dataclass
class Prompt:
    """Keyword arguments of a forward, and which tokens of it are vision."""

    inputs: dict[str, Any]
    vision: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        ids = self.inputs["input_ids"]
        self.vision = (ids == IMAGE) | (ids == VIDEO)


def prompt_of(name: str, samples: list[list[Any]], *, seed: int = 0, side: str = "left") -> Prompt:
    """A batch of prompts. A sample is a list of ints (so many text tokens), "image" and "video"; padded on `side`."""
    random = torch.Generator().manual_seed(seed)
    qwen = name.startswith("qwen")
    rows, images, videos, sizes = [], [], [], []
    for sample in samples:
        row: list[int] = []
        for part in sample:
            if part == "image":
                row += ([VSTART] if qwen else []) + [IMAGE] * _image_tokens(name) + ([VEND] if qwen else [])
                images.append(_pixels(name, random))
                sizes.append([8, 16])
            elif part == "video":
                row += [VSTART] + [VIDEO] * 8 + [VEND]
                videos.append(torch.randn(32, 3 * 2 * 16, generator=random))
            else:
                row += torch.randint(2, 80, (part,), generator=random).tolist()
        rows.append(row)
    T = max(map(len, rows))
    pads = [[0] * (T - len(row)) for row in rows]
    left = side == "left"
    ids = torch.tensor([pad + row if left else row + pad for pad, row in zip(pads, rows, strict=True)])
    ones = [[1] * len(row) for row in rows]
    mask = torch.tensor([pad + one if left else one + pad for pad, one in zip(pads, ones, strict=True)])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if images:
        inputs["pixel_values"] = torch.cat(images)
    if name == "llava_next" and images:
        inputs["image_sizes"] = torch.tensor(sizes)
    if qwen:
        kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        inputs["mm_token_type_ids"] = kinds
        if images:
            inputs["image_grid_thw"] = torch.tensor([[1, 4, 6]] * len(images))
        if videos:
            inputs["pixel_values_videos"] = torch.cat(videos)
            inputs["video_grid_thw"] = torch.tensor([[2, 4, 4]] * len(videos))
    return Prompt(inputs)


def _image_tokens(name: str) -> int:
    # llava-next: a base tile of 2 x 2, two tiles side by side, and a newline for each of their two rows
    return {"llava": 9, "internvl": 9, "llava_next": 4 + 8 + 2}.get(name, 6)


def _pixels(name: str, random: torch.Generator) -> torch.Tensor:
    if name == "llava":
        return torch.randn(1, 3, 12, 12, generator=random)
    if name == "llava_next":
        return torch.randn(1, 3, 3, 8, 8, generator=random)
    if name == "internvl":
        return torch.randn(1, 3, 24, 24, generator=random)
    return torch.randn(24, 3 * 2 * 16, generator=random)
