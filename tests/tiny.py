"""Tiny random models of SDXL's and SD1.5's topology, for tests: built in a fraction of a second, no files
needed.
"""

from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dodgeburn.models.loading import assemble
from dodgeburn.models.model import Model

Configs = dict[str, dict[str, Any]]


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP-style tokenizer without merges: one token a letter, 514 in all."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *[letter + "</w>" for letter in letters]]
    return CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)},
        merges=[],
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=77,
    )


def tiny_configs(layout: str = "sdxl") -> Configs:
    """Component configs, keyed as in a diffusers folder; latents 8x8, pictures 16x16."""
    text = {
        "vocab_size": 514, "max_position_embeddings": 77, "num_hidden_layers": 2, "num_attention_heads": 2,
        "hidden_size": 16, "intermediate_size": 32, "projection_dim": 16,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    configs: Configs = {
        "vae": {
            "in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": 16,
            "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4,
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2, "scaling_factor": 0.5, "force_upcast": False,
        },
        "text_encoder": dict(text),
        "scheduler": {
            "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
            "num_train_timesteps": 1000, "prediction_type": "epsilon", "timestep_spacing": "leading",
            "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False,
        },
    }  # fmt: skip
    unet: dict[str, Any] = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "norm_num_groups": 4,
    }  # fmt: skip
    if layout == "sdxl":
        configs["vae"] |= {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 0.6, 0.7, 0.8]}
        configs["text_encoder_2"] = {**text, "hidden_size": 24, "projection_dim": 20, "hidden_act": "gelu"}
        unet |= {
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [8, 16, 16], "transformer_layers_per_block": [1, 1, 2],
            "attention_head_dim": [1, 2, 2], "cross_attention_dim": 40, "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 20 + 6 * 4,
        }  # fmt: skip
    else:
        unet |= {
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
            "block_out_channels": [8, 8, 16, 16], "attention_head_dim": 2, "cross_attention_dim": 16,
        }  # fmt: skip
    return {"unet": unet, **configs}


def tiny_modules(configs: Configs, seed: int = 0) -> dict[str, Any]:
    """Modules with random weights of a seed; weights are scaled up so that prompts and times visibly
    matter.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        modules: dict[str, Any] = {
            "unet": UNet2DConditionModel(**configs["unet"]),
            "vae": AutoencoderKL(**configs["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
        }
        if "text_encoder_2" in configs:
            modules["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**configs["text_encoder_2"]))
        with torch.no_grad():
            for part, module in modules.items():
                for name, weight in module.named_parameters():
                    if part.startswith("text") and "embedding" in name:
                        weight.mul_(30)  # transformers draws them with std 0.02
                    elif ".attn2.to_out" in name:
                        weight.mul_(4)
    return modules


def tiny_model(layout: str = "sdxl", seed: int = 0, prediction_type: str = "epsilon") -> Model:
    """A whole random model on the CPU."""
    configs = tiny_configs(layout)
    configs["scheduler"]["prediction_type"] = prediction_type
    modules = tiny_modules(configs, seed)
    tokenizers = [tiny_tokenizer() for _ in range(len(modules) - 2)]
    return assemble(f"tiny-{layout}", None, configs, modules, tokenizers)
