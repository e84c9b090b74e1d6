"""A model from its name: a packaged one, a .safetensors file, a diffusers folder or a hub id."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dodgeburn.checkpoint.convert import fit_names, single_file_to_diffusers, unet_key_map
from dodgeburn.checkpoint.header import read_header
from dodgeburn.checkpoint.layout import detect_layout
from dodgeburn.checkpoint.metadata import CONFIGS
from dodgeburn.checkpoint.tensorfile import TensorFile
from dodgeburn.errors import UserError
from dodgeburn.models.model import Configs, Model, choose_device, choose_dtype
from dodgeburn.models.tokenizers import find_tokenizers, load_tokenizer
from dodgeburn.pocket.model import NAMES, weights_path

_CONFIGS = Path(__file__).parent / "configs"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
_CLASSES = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
_TEXT_CLASSES = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


def load_model(
    name_or_path: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    tokenizer: str | Path | None = None,
) -> Model:
    """Load a model for sampling (eval mode, no gradients), from a packaged name, a file, a folder or a hub
    id.

    `dtype` None is fp32 on the CPU and fp16 on cuda; "stored" leaves every component as its file has it.
    `tokenizer`: a folder with a CLIP tokenizer, for single files of real Stable Diffusion. Only a hub id
    (owner/name that is no local path) may use the network. Raises UserError.
    """
    chosen = choose_device(device)
    kind = choose_dtype(dtype, chosen)
    name = str(name_or_path)
    path = Path(name)
    if name in NAMES:
        return _load_file(weights_path(name), name, chosen, kind, tokenizer)
    if name and path.is_dir():
        return _load_folder(path, path.resolve().name, chosen, kind)
    if path.is_file():
        return _load_file(path, path.stem, chosen, kind, tokenizer)
    if path.suffix == ".safetensors" or path.parent.is_dir() and path.parent != Path("."):
        raise UserError(f"no model at {name}: the file or folder does not exist")
    if _HUB_ID.fullmatch(name):
        return _load_folder(_download(name), name.rpartition("/")[2], chosen, kind)
    raise UserError(_unknown(name))


def _unknown(name: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, NAMES, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return (
        f"unknown model {name!r}: {hint}known: {', '.join(NAMES)}, a .safetensors file, a diffusers folder, "
        "or a hub id (owner/name)"
    )


# ------------------------------------------------------------------------------------------------ single file


def _load_file(
    path: Path, name: str, device: torch.device, dtype: torch.dtype | None, tokenizer: str | Path | None
) -> Model:
    with TensorFile(path) as file:
        header = file.header
        shapes = {key: info.shape for key, info in header.tensors.items()}
        layout = detect_layout(shapes, shapes)
        configs = _configs_in(header.metadata, path) or known_configs(layout.name)
        if _predicts_v(header.metadata, shapes):
            configs["scheduler"]["prediction_type"] = "v_prediction"
        tokenizers = find_tokenizers(configs, path, tokenizer)
        tensors = {key: file.tensor(key) for key in header.tensors}
    states = single_file_to_diffusers(tensors, {k: v for k, v in configs.items() if k != "scheduler"})
    del tensors
    modules = {part: _build(part, configs[part], states.pop(part), path) for part in list(states)}
    model = assemble(name, path, configs, modules, tokenizers, device, dtype)
    model.metadata = dict(header.metadata)
    return model


def _predicts_v(metadata: Mapping[str, str], keys: Iterable[str]) -> bool:
    """Whether a file says that its U-Net predicts velocity: by ModelSpec, or by the marker tensor in use for SDXL."""
    return metadata.get("modelspec.prediction_type", "").lower() in ("v", "v_prediction") or "v_pred" in keys


def _configs_in(metadata: Mapping[str, str], path: Path) -> Configs | None:
    text = metadata.get(CONFIGS)
    if text is None:
        return None
    try:
        configs = json.loads(text)
        complete = {"unet", "vae", "text_encoder", "scheduler"} <= set(configs)
    except (ValueError, TypeError):
        complete = False
    if not complete:
        raise UserError(f"{path}: its metadata {CONFIGS} is not a set of component configs; the file is damaged")
    return configs


def known_configs(layout_name: str) -> Configs:
    """Component configs of the real SD1.5 ("sd15") or SDXL base ("sdxl")."""
    return json.loads((_CONFIGS / f"{layout_name}.json").read_text())


def is_stock(model: Model) -> bool:
    """Whether the model has the widths of the real SD1.5 or SDXL, so that other programs load its single
    file.
    """
    stock = known_configs(model.layout.name)["unet"]
    return all(model.configs["unet"].get(key) == stock[key] for key in ("block_out_channels", "cross_attention_dim"))


def _build(part: str, config: dict[str, Any], state: dict[str, torch.Tensor], path: Path) -> Any:
    """The component with these weights, without spending time on random ones first."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        module = empty_component(part, config)
    wanted = module.state_dict()
    state = {key: value for key, value in fit_names(state, wanted).items() if key in wanted}
    for key, value in wanted.items():
        if key not in state:
            raise UserError(f"{path}: the {part} lacks {key}")
        if tuple(state[key].shape) != tuple(value.shape):
            raise UserError(
                f"{path}: {part} {key} is {list(state[key].shape)} but its config asks for "
                f"{list(value.shape)}; is it an inpainting model or another variant?"
            )
    module.load_state_dict(state, strict=True, assign=True)
    return module


def empty_component(part: str, config: dict[str, Any]) -> Any:
    """A component of a config, with whatever weights the caller's context gives it."""
    if part in _CLASSES:
        with _quiet():  # unknown keys of a foreign config are ignored
            return _CLASSES[part].from_config(config)
    return _TEXT_CLASSES[part](CLIPTextConfig(**config))


# ------------------------------------------------------------------------------------------- diffusers folder


def _load_folder(folder: Path, name: str, device: torch.device, dtype: torch.dtype | None) -> Model:
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"{folder} is no diffusers model folder: it has no model_index.json")
    try:
        declared = json.loads(index.read_text())
        kind = declared["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{index} cannot be read: expected JSON with _class_name") from None
    if kind not in ("StableDiffusionXLPipeline", "StableDiffusionPipeline"):
        raise UserError(
            f"{folder} holds a {kind}: only StableDiffusionXLPipeline and StableDiffusionPipeline are known"
        )
    parts = ["unet", "vae", "text_encoder"] + (["text_encoder_2"] if kind == "StableDiffusionXLPipeline" else [])
    modules: dict[str, Any] = {}
    configs: Configs = {}
    for part in parts:
        if not (folder / part / "config.json").is_file():
            raise UserError(f"{folder} is incomplete: {part}/config.json is missing")
        configs[part] = _plain_config(json.loads((folder / part / "config.json").read_text()))
        loader: Any = _CLASSES.get(part) or _TEXT_CLASSES[part]
        kind_key = "torch_dtype" if part in _CLASSES else "dtype"
        with _quiet():
            try:
                modules[part] = loader.from_pretrained(
                    str(folder), subfolder=part, local_files_only=True, use_safetensors=True,
                    variant=_variant(folder / part), **{kind_key: _stored_dtype(folder / part)},
                )  # fmt: skip
            except (OSError, ValueError, RuntimeError) as error:
                raise UserError(f"{folder / part} cannot be loaded: {str(error).splitlines()[0]}") from error
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if not scheduler.is_file():
        raise UserError(f"{folder} is incomplete: scheduler/scheduler_config.json is missing")
    configs["scheduler"] = _plain_config(json.loads(scheduler.read_text()))
    tokenizers = [load_tokenizer(folder / part.replace("text_encoder", "tokenizer")) for part in parts[2:]]
    model = assemble(name, folder, configs, modules, tokenizers, device, dtype)
    model.metadata = {k: v for path in _weights(folder / "unet")[:1] for k, v in read_header(path).metadata.items()}
    return model


def _weights(folder: Path) -> list[Path]:
    """The weight files that are loaded: the plain ones (maybe several shards), else the fp16 variant."""
    files = sorted(path for path in folder.glob("*.safetensors") if "non_ema" not in path.name)
    return [path for path in files if ".fp16" not in path.name] or files


def _variant(folder: Path) -> str | None:
    files = _weights(folder)
    return "fp16" if files and ".fp16" in files[0].name else None


def _stored_dtype(folder: Path) -> torch.dtype:
    """The type that most of a component's floating point weights have in its files."""
    counts: Counter[str] = Counter()
    for path in _weights(folder):
        for info in read_header(path).tensors.values():
            counts[info.dtype] += info.numel
    stored = {"F16": torch.float16, "BF16": torch.bfloat16}
    return stored.get(counts.most_common(1)[0][0], torch.float32) if counts else torch.float32


def _plain_config(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' and transformers' progress bars and load reports."""
    from transformers.utils import logging as transformers_logging

    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    diffusers_level = diffusers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        diffusers_logging.set_verbosity(diffusers_level)
        if bar:
            transformers_logging.enable_progress_bar()


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repository,
                allow_patterns=["model_index.json", *(f"{part}/*" for part in _PARTS)],
                ignore_patterns=["*.bin", "*.msgpack", "*.onnx*", "*.xml", "*.fp16.*", "*non_ema*"],
            )
        )
    except Exception as error:
        raise UserError(f"cannot get {repository} from the Hub: {str(error).splitlines()[0]}") from error


# ------------------------------------------------------------------------------------------- putting together


def assemble(
    name: str,
    source: Path | None,
    configs: Configs,
    modules: dict[str, Any],
    tokenizers: list[Any],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> Model:
    """A Model from modules that are in memory already (unet, vae, text_encoder[, text_encoder_2]); training
    uses it.

    Modules are moved to `device` and `dtype` (None: each stays in its own), in eval mode and without
    gradients; a VAE whose config has force_upcast stays in fp32 (SDXL's overflows in fp16).
    """
    device = torch.device(device)
    upcast = bool(configs["vae"].get("force_upcast", True)) and dtype == torch.float16
    with _quiet():  # diffusers warns of every change of dtype, also where it has nothing to warn of
        for part, module in modules.items():
            module.to(device=device)
            if dtype is not None:
                module.to(dtype=torch.float32 if part == "vae" and upcast else dtype)
            module.eval().requires_grad_(False)
    encoders = [modules[part] for part in ("text_encoder", "text_encoder_2") if part in modules]
    return Model(
        name=name,
        source=source,
        layout=detect_layout(_keys(configs)),
        configs=configs,
        unet=modules["unet"],
        vae=modules["vae"],
        text_encoders=encoders,
        tokenizers=tokenizers,
        scheduler_config=dict(configs["scheduler"]),
        device=device,
        dtype=dtype or next(modules["unet"].parameters()).dtype,
    )


def _keys(configs: Configs) -> list[str]:
    # The layout is a matter of key names: those that the model would have as a single file.
    return list(unet_key_map(configs["unet"]))
