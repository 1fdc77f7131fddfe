"""Which models there are, where they lie, and what identifies their weights. Reads no weights, imports no torch."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from t2vz.errors import ModelError, UnknownModel, UnsupportedModel
from t2vz.media.fingerprint import fingerprint
from t2vz.media.local import shown
from t2vz.models import hub
from t2vz.spec import JobSpec

# The embedded models: part of the package, in diffusers' layout. The version is raised when they change: their jobs
# then count as not done.
MINI_FOLDER = Path(__file__).resolve().parents[1] / "mini" / "weights"
MINI_VERSION = "2"
_TEXT_TO_IMAGE, _EDIT = "a text-to-image model", "an InstructPix2Pix model"
MINI_MEMBERS = {
    "base": _TEXT_TO_IMAGE,
    "dreambooth": _TEXT_TO_IMAGE,
    "edit": _EDIT,
    "lora": "a LoRA",
    "controlnet-edge": "a ControlNet",
    "controlnet-depth": "a ControlNet",
    "controlnet-pose": "a ControlNet",
    "depth": "a depth estimator",
    "pose": "a pose estimator",
    "detector": "a person detector",
}
# What the columns take of them; `model` by its mode. For the others there is none.
_TAKES = {
    "controlnet": "a ControlNet",
    "lora": "a LoRA",
    "depth_model": "a depth estimator",
    "pose_model": "a pose estimator",
    "person_detector": "a person detector",
}


@dataclass(frozen=True)
class Family:
    """Models that fit together: one text-to-image model's usual companions. References are folders or hub ids."""

    text_to_image: str
    edit: str
    controlnets: dict[str, str] = field(default_factory=dict)
    depth: str = "depth-anything/Depth-Anything-V2-Small-hf"
    pose: str = "usyd-community/vitpose-base-simple"
    detector: str = "PekingU/rtdetr_r50vd_coco_o365"
    annotators: str = "lllyasviel/Annotators"


SD15 = Family(
    text_to_image="stable-diffusion-v1-5/stable-diffusion-v1-5",
    edit="timbrooks/instruct-pix2pix",
    controlnets={
        "edge": "lllyasviel/control_v11p_sd15_canny",
        "depth": "lllyasviel/control_v11f1p_sd15_depth",
        "pose": "lllyasviel/control_v11p_sd15_openpose",
        "openpose": "lllyasviel/control_v11p_sd15_openpose",
        "hed": "lllyasviel/control_v11p_sd15_softedge",
        "lineart": "lllyasviel/control_v11p_sd15_lineart",
        "normal": "lllyasviel/control_v11p_sd15_normalbae",
    },
)
SDXL = Family(
    text_to_image="stabilityai/stable-diffusion-xl-base-1.0",
    edit="diffusers/sdxl-instructpix2pix-768",
    controlnets={
        "edge": "diffusers/controlnet-canny-sdxl-1.0",
        "depth": "diffusers/controlnet-depth-sdxl-1.0",
        "pose": "xinsir/controlnet-openpose-sdxl-1.0",
        "openpose": "xinsir/controlnet-openpose-sdxl-1.0",
    },
)
MINI = Family(
    text_to_image="mini/base",
    edit="mini/edit",
    controlnets={
        "edge": "mini/controlnet-edge",
        "depth": "mini/controlnet-depth",
        "pose": "mini/controlnet-pose",
        "openpose": "mini/controlnet-pose",
    },
    depth="mini/depth",
    pose="mini/pose",
    detector="mini/detector",
)

# Names that a manifest may use instead of a folder or hub id. An unlisted model is taken for one of SD 1.5's family.
MODELS: dict[str, Family] = {"mini": MINI, "sd15": SD15, "sdxl": SDXL}

_WEIGHTS = (".safetensors", ".json", ".txt", ".model", ".pth", ".pt")
_PIPELINE = "model_index.json"  # what a diffusers folder begins with
_SIGNS = (_PIPELINE, "config.json", ".safetensors", ".pth", ".pt")  # of a model, in its folder's top
_PATH_STARTS = ("/", "./", "../", "~")


def family(spec: JobSpec) -> Family:
    return MINI if spec.model.startswith("mini/") else MODELS.get(spec.model, SD15)


def model_reference(spec: JobSpec) -> str:
    """Folder, hub id or single file of the row's model, for its mode."""
    known = MODELS.get(spec.model)
    if known is None:
        return spec.model
    return known.edit if spec.mode == "edit" else known.text_to_image


def controlnet_references(spec: JobSpec) -> tuple[str, ...]:
    """One reference for each of the row's conditions."""
    if spec.controlnet:
        return spec.controlnet
    known = family(spec).controlnets
    missing = [name for name in spec.condition if name not in known]
    if missing:
        raise UnknownModel(
            f"model {spec.model}: it has no ControlNet for {', '.join(missing)}; name one in `controlnet`"
        )
    return tuple(known[name] for name in spec.condition)


def image_encoder_reference(spec: JobSpec) -> str:
    """The CLIP vision model of the row's IP-Adapter: the row's, else the folder beside the adapter's file."""
    adapter = Path(spec.ip_adapter or "")
    return spec.image_encoder or str((adapter if adapter.is_dir() else adapter.parent) / "image_encoder")


# The column of each role.
_COLUMNS = {
    "depth": "depth_model",
    "pose": "pose_model",
    "detector": "person_detector",
    "annotators": "annotators",
}


def annotator_references(spec: JobSpec) -> dict[str, str]:
    """What extracts the row's conditions: references by role (depth, pose, detector, annotators)."""
    usual = family(spec)
    return {role: getattr(spec, column) or getattr(usual, role) for role, column in _COLUMNS.items()}


def resolve(reference: str) -> str:
    """A reference as the libraries take it: a local path, or a hub id."""
    if reference.startswith("mini/"):
        return str(MINI_FOLDER / reference.removeprefix("mini/"))
    return reference


def identity(spec: JobSpec) -> str:
    """What identifies every weight that the row uses, for `job_id`: fingerprints of local files, commits of hub models.

    Raises UnknownModel, UnsupportedModel, ModelError.
    """
    parts = [base_identity(spec), *adapters_identity(spec)]
    if spec.vae is not None:
        parts.append(_named("vae", spec.vae))
    if spec.segmentation_model is not None:
        parts.append(_named("segmentation_model", spec.segmentation_model))
    if spec.mode == "control":
        parts += [revision(reference, column="controlnet") for reference in controlnet_references(spec)]
    if spec.conditions_extracted:
        roles = annotator_references(spec)
        parts += [revision(roles[role], column=_COLUMNS[role]) for role in _needed_roles(spec)]
    return " ".join(parts)


def references(spec: JobSpec) -> Iterator[tuple[str, str, str | None]]:
    """(column, reference, wanted revision) of every model that `identity` takes in. Raises UnknownModel."""
    model = model_reference(spec)
    yield "model", model, spec.revision
    if spec.base_config is not None and Path(model).is_file():
        yield "base_config", spec.base_config, None
    yield from (("lora", reference, None) for reference in spec.lora)
    yield from (("textual_inversion", reference, None) for reference in spec.textual_inversion)
    if spec.ip_adapter is not None:
        yield "ip_adapter", spec.ip_adapter, None
        yield "image_encoder", image_encoder_reference(spec), None
    for column in ("vae", "segmentation_model"):
        if (reference := getattr(spec, column)) is not None:
            yield column, reference, None
    if spec.mode == "control":
        yield from (("controlnet", reference, None) for reference in controlnet_references(spec))
    if spec.conditions_extracted:
        roles = annotator_references(spec)
        yield from ((_COLUMNS[role], roles[role], None) for role in _needed_roles(spec))


def _needed_roles(spec: JobSpec) -> list[str]:
    return sorted({role for name in spec.condition for role in _ROLES.get(name, ("annotators",))})


def base_identity(spec: JobSpec) -> str:
    """What identifies the row's model without ControlNets and annotators. Raises as `identity`."""
    reference = model_reference(spec)
    kind = _EDIT if spec.mode == "edit" else _TEXT_TO_IMAGE
    found = revision(reference, spec.revision, takes=kind)
    _check_whole(reference)
    if spec.base_config is None or not Path(reference).is_file():  # a folder or hub model has its own configs
        return found
    try:
        _check_whole(spec.base_config)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"base_config: {error.message}") from error
    return f"{found} {revision(spec.base_config, column='base_config', takes=kind)}"


def _check_whole(reference: str) -> None:
    if Path(reference).is_dir() and not Path(reference, _PIPELINE).is_file():
        raise UnsupportedModel(f"{shown(reference)}: not a whole diffusers model, it has no {_PIPELINE}")


def adapters_identity(spec: JobSpec) -> tuple[str, ...]:
    """What identifies what is put onto the row's model, in the row's order. Raises as `identity`."""
    parts = [_named("lora", reference) for reference in spec.lora]
    # The file's name is what prompts call the new word, in the formats that name none themselves.
    parts += [
        f"{Path(reference).stem}:{_named('textual_inversion', reference)}" for reference in spec.textual_inversion
    ]
    if spec.ip_adapter is not None:
        parts.append(_named("ip_adapter", spec.ip_adapter))
        encoder = image_encoder_reference(spec)
        if spec.image_encoder is None and not Path(encoder).is_dir():
            raise UnknownModel(
                f"ip_adapter {shown(spec.ip_adapter)}: no folder image_encoder beside it; name one in `image_encoder`"
            )
        parts.append(_named("image_encoder", encoder))
    return tuple(parts)


def _named(column: str, reference: str) -> str:
    """The revision of what a column names, with the column: the same file may stand in two."""
    return f"{column}={revision(reference, column=column)}"


_ROLES: dict[str, tuple[str, ...]] = {"edge": (), "depth": ("depth",), "pose": ("pose", "detector")}


def revision(reference: str, wanted: str | None = None, *, column: str = "model", takes: str | None = None) -> str:
    """Identity of one model: `mini/…@version`, `folder@` or `file@fingerprint` wherever it lies, `hub id@commit`.

    column: where it stands, for the errors. takes: which kind of the embedded models (see MINI_MEMBERS) it must be;
    the column's if absent. Raises UnknownModel, UnsupportedModel, ModelError.
    """
    try:
        return _revision(reference, wanted, column, takes or _TAKES.get(column))
    except ModelError as error:
        if column == "model":
            raise
        raise type(error)(f"{column}: {error.message}") from error


def _revision(reference: str, wanted: str | None, column: str, takes: str | None) -> str:
    if reference.startswith("mini/"):
        _check_member(reference, column, takes)
        return f"{reference}@{MINI_VERSION}"
    if column != "model" and reference in MODELS:
        mine = _members(takes) if reference == "mini" else []
        one = f"e.g. {mine[0]}" if mine else "a folder, a .safetensors file or a hub id"
        raise UnknownModel(f"{reference} is a whole family; name {one}")
    try:
        local = _local_revision(Path(reference))
    except OSError as error:
        raise ModelError(f"{shown(reference)}: can't be read ({error.strerror})") from error
    if local is not None:
        return local
    if reference.startswith(_PATH_STARTS) or reference.endswith(".safetensors"):
        written_out = "; write the home folder out" if reference.startswith("~") else ""
        raise UnknownModel(f"{shown(reference)}: no such file or folder{written_out}")
    if not hub.HUB_ID.fullmatch(reference):
        if column != "model":
            raise UnknownModel(f"no model `{shown(reference)}`: give a folder, a .safetensors file or a hub id")
        near = difflib.get_close_matches(reference.lower(), MODELS, n=1)
        hint = f"did you mean `{near[0]}`?" if near else "give a known name, a folder, a .safetensors file or a hub id"
        raise UnknownModel(f"no model `{shown(reference)}`: {hint} (known names: {', '.join(MODELS)})")
    return f"{reference}@{hub.commit(reference, wanted)}"


def _members(kind: str | None) -> list[str]:
    return [f"mini/{name}" for name, its in MINI_MEMBERS.items() if its == kind]


def _check_member(reference: str, column: str, takes: str | None) -> None:
    kind = MINI_MEMBERS.get(reference.removeprefix("mini/"))
    if kind is None:
        raise UnknownModel(f"no model `{shown(reference)}`; mini has {', '.join(sorted(MINI_MEMBERS))}")
    if takes is None and column == "model":  # of no particular row
        return
    if kind != takes:
        fitting = " or ".join(_members(takes))
        wanted = f"{takes}: name {fitting}" if fitting else "what this column takes, and mini has nothing that is"
        raise UnsupportedModel(f"{'model ' if column == 'model' else ''}{reference} is {kind}, not {wanted}")


def _local_revision(path: Path) -> str | None:
    if path.is_dir():
        return f"folder@{_folder_fingerprint(path)}"
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UnsupportedModel(f"{shown(path)}: only .safetensors files are loaded (others can run code)")
        return f"file@{fingerprint(path)}"
    if path.exists():
        raise UnsupportedModel(f"{shown(path)}: not a regular file; name a folder or a .safetensors file")
    return None


def _folder_fingerprint(folder: Path) -> str:
    # Before its files are looked for: a folder of something else may be a whole disk.
    if not any(path.name in _SIGNS or path.suffix in _SIGNS for path in folder.iterdir()):
        raise UnknownModel(f"{shown(folder)}: no model there (no {_PIPELINE}, config.json, .safetensors or .pth)")
    digest = hashlib.blake2b(digest_size=16)
    for file in model_files(folder):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{fingerprint(file)}\n".encode())
    return digest.hexdigest()


def model_files(folder: Path) -> list[Path]:
    """The files of a model's folder that decide what it does: configurations and weights, sorted.

    Links to folders are followed, as loaders do, but to each folder once: they may be made to lead round and round.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        found += [Path(parent, name) for name in names]
    return sorted(path for path in found if path.suffix in _WEIGHTS and path.is_file())
