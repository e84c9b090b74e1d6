"""A model from its name: a packaged one, a single file (also shards, .ckpt), a diffusers folder or a hub id."""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dodgeburn.checkpoint.convert import fit_names, single_file_to_diffusers, unet_key_map
from dodgeburn.checkpoint.layout import detect_layout
from dodgeburn.checkpoint.metadata import CONFIGS
from dodgeburn.checkpoint.naming import HUB_ID
from dodgeburn.checkpoint.packaged import packaged_checkpoint
from dodgeburn.checkpoint.sources import open_tensors, weights_in
from dodgeburn.checkpoint.unet_kind import has_zero_snr, input_channels, kind_of, predicts_v
from dodgeburn.checkpoint.vae_keys import modern_vae_name
from dodgeburn.errors import DodgeburnWarning, UserError, did_you_mean
from dodgeburn.models.model import Configs, Model, choose_device, choose_dtype
from dodgeburn.models.tokenizers import find_tokenizers, load_tokenizer
from dodgeburn.pocket.model import NAMES
from dodgeburn.quiet import quiet

_CONFIGS = Path(__file__).parent / "configs"
_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
_CLASSES = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
_PIPELINES = (
    "StableDiffusionPipeline", "StableDiffusionXLPipeline",
    "StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline",
)  # fmt: skip
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
    path = find_model(name_or_path)
    name = str(name_or_path)
    if path.is_dir():
        shown = path.resolve().name if Path(name).is_dir() else name.rpartition("/")[2]
        return _load_folder(path, shown, chosen, kind)
    shown = name if name in NAMES else path.stem.partition(".safetensors")[0]
    return _load_file(path, shown, chosen, kind, tokenizer)


def find_model(name_or_path: str | Path) -> Path:
    """The single file (or index of shards) or the folder that a model's name means; a hub id is downloaded.

    Raises UserError for a name that means nothing.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    if name in NAMES:
        return packaged_checkpoint(name)
    if name and path.is_dir() or path.is_file():
        return path
    if path.name and path.with_name(f"{path.name}.index.json").is_file():
        return path.with_name(f"{path.name}.index.json")
    if path.suffix == ".safetensors" or path.parent.is_dir() and path.parent != Path("."):
        raise UserError(f"no model at {name}: the file or folder does not exist")
    if HUB_ID.fullmatch(name):
        return _download(name)
    raise UserError(_unknown(name))


def _unknown(name: str) -> str:
    return (
        f"unknown model {name!r}: {did_you_mean(name, NAMES)}known: {', '.join(NAMES)}, a .safetensors file, a "
        "diffusers folder, or a hub id (owner/name)"
    )


# ------------------------------------------------------------------------------------------------ single file


def _load_file(
    path: Path, name: str, device: torch.device, dtype: torch.dtype | None, tokenizer: str | Path | None
) -> Model:
    with open_tensors(path) as file:
        metadata = dict(file.header.metadata)
        configs = configs_of_file(metadata, {key: info.shape for key, info in file.header.tensors.items()}, path)
        _check_inputs(int(configs["unet"].get("in_channels", 4)), path)
        tokenizers = find_tokenizers(configs, path, tokenizer)
        tensors = {key: _computable(file.tensor(key)) for key in file.keys()}
    states = single_file_to_diffusers(tensors, {k: v for k, v in configs.items() if k != "scheduler"})
    del tensors
    modules = {part: _build(part, configs[part], states.pop(part), path) for part in list(states)}
    model = assemble(name, path, configs, modules, tokenizers, device, dtype)
    model.metadata = metadata
    return model


def configs_of_file(metadata: Mapping[str, str], shapes: Mapping[str, Sequence[int]], path: Path) -> Configs:
    """Component configs of a single file: those it carries, or those of the real model of its layout, with the number
    of input channels, the kind of prediction and the end of the noise schedule that the file itself shows.
    """
    try:
        layout = detect_layout(shapes, shapes)
    except UserError as error:
        raise UserError(f"{path.name}: {error}") from None
    configs = _configs_in(metadata, path) or known_configs(layout.name)
    if (channels := input_channels(shapes)) is not None:
        configs["unet"]["in_channels"] = channels
    if predicts_v(metadata, shapes):
        configs["scheduler"]["prediction_type"] = "v_prediction"
    if has_zero_snr(shapes):
        configs["scheduler"]["rescale_betas_zero_snr"] = True
    return configs


def _check_inputs(channels: int, path: Path) -> None:
    if channels != 4:
        raise UserError(
            f"{path.name} is {kind_of(channels)}: its U-Net takes {channels} input "
            "channels, and pictures from a prompt alone need 4; it can be converted and merged, but not sampled"
        )


def _computable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a type that models compute in: fp8 becomes fp16, which holds every value of it."""
    return tensor.half() if tensor.dtype.itemsize == 1 and tensor.is_floating_point() else tensor


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
    module = empty_module(part, config)
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    state = fit_names(state, wanted)
    extra = [key for key in state if key not in wanted]
    if extra:
        warnings.warn(
            f"{path}: {len(extra)} tensors are none of the {part}'s and are left out, first {extra[0]}",
            DodgeburnWarning,
            stacklevel=2,
        )
        state = {key: state[key] for key in wanted if key in state}
    check_shapes(part, wanted, {key: tuple(value.shape) for key, value in state.items()}, path)
    module.load_state_dict(state, strict=True, assign=True)
    return module


def empty_module(part: str, config: dict[str, Any]) -> Any:
    """The component of this config without memory for its weights."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return _empty(part, config)


def check_shapes(
    part: str, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    """UserError unless every tensor that the component wants is there in its shape."""
    for key, shape in wanted.items():
        if key not in found:
            raise UserError(f"{path}: the {part} lacks {key}")
        if found[key] != shape:
            raise UserError(
                f"{path}: {part} {key} is {list(found[key])} but its config asks for {list(shape)}; "
                "is it a model of other widths, or another variant?"
            )


def _empty(part: str, config: dict[str, Any]) -> Any:
    if part in _CLASSES:
        with quiet():  # unknown keys of a foreign config are ignored
            return _CLASSES[part].from_config(config)
    return _TEXT_CLASSES[part](CLIPTextConfig(**config))


# ------------------------------------------------------------------------------------------- diffusers folder


def _load_folder(folder: Path, name: str, device: torch.device, dtype: torch.dtype | None) -> Model:
    kind, configs = folder_configs(folder)
    _check_inputs(int(configs["unet"].get("in_channels", 4)), folder)
    if kind not in _PIPELINES[:2]:
        raise UserError(
            f"{folder} holds a {kind}: only {' and '.join(_PIPELINES[:2])} make pictures from a prompt alone"
        )
    modules: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for part in _weighted(configs):
        with open_tensors(weights_in(folder / part)) as source:
            state = {key: _computable(source.tensor(key)) for key in source.keys()}
            if part == "unet":
                metadata = dict(source.header.metadata)
        if part == "vae":
            state = {modern_vae_name(key): value for key, value in state.items()}
        modules[part] = _build(part, configs[part], state, folder / part)
        del state
    tokenizers = load_tokenizers(folder, configs)
    model = assemble(name, folder, configs, modules, tokenizers, device, dtype)
    model.metadata = metadata
    return model


def folder_configs(folder: Path) -> tuple[str, Configs]:
    """The pipeline's class name, and the configs of all components and the scheduler, of a diffusers folder.

    Raises UserError if it is none, is incomplete, or holds a pipeline that is not SD1.5's or SDXL's.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"{folder} is no diffusers model folder: it has no model_index.json")
    kind = _json(index).get("_class_name")
    if not isinstance(kind, str):
        raise UserError(f"{index} cannot be read: expected JSON with _class_name")
    if kind not in _PIPELINES:
        raise UserError(f"{folder} holds a {kind}: only {', '.join(_PIPELINES)} are known")
    parts = ["unet", "vae", "text_encoder"] + (["text_encoder_2"] if "XL" in kind else [])
    configs: Configs = {}
    for part in parts:
        if not (folder / part / "config.json").is_file():
            raise UserError(f"{folder} is incomplete: {part}/config.json is missing")
        configs[part] = _plain_config(_json(folder / part / "config.json"))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if not scheduler.is_file():
        raise UserError(f"{folder} is incomplete: scheduler/scheduler_config.json is missing")
    configs["scheduler"] = _plain_config(_json(scheduler))
    return kind, configs


def load_tokenizers(folder: Path, configs: Configs) -> list[Any]:
    """A diffusers folder's tokenizers, one for each text encoder."""
    return [load_tokenizer(folder / part.replace("text_encoder", "tokenizer")) for part in configs if "text" in part]


def _weighted(configs: Iterable[str]) -> list[str]:
    return [part for part in configs if part != "scheduler"]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} cannot be read: expected a JSON object")
    return found


def _plain_config(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


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
    with quiet():  # diffusers warns of every change of dtype, also where it has nothing to warn of
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
