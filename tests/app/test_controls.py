"""The playground's controls are JobSpec's columns: all of them, with their ranges, choices, defaults and meanings."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import ValidationError

from t2vz.app.controls import TABS, Control, cells, control, groups
from t2vz.manifest import BadRow, read
from t2vz.spec import COLUMN_MODES, JobSpec, Mode

MODES = get_args(Mode)


def controls(mode: Any) -> list[Control]:
    return [one for group in groups(mode) for one in group.controls]


@pytest.mark.parametrize("mode", MODES)
def test_every_column_of_a_mode_has_its_control(mode: Any) -> None:
    columns = [one.column for one in controls(mode)]
    assert set(columns) == {name for name, modes in COLUMN_MODES.items() if mode in modes} - {"id", "mode"}
    twice = {name for name in columns if columns.count(name) > 1}
    assert twice == ({"foreground_mask"} if mode == "text" else set())
    assert "More" not in {group.title for group in groups(mode)}, "a new column stands in no group yet"


@pytest.mark.parametrize("name", sorted(set(JobSpec.model_fields) - {"id", "mode"}))
def test_a_control_says_what_the_column_says(name: str) -> None:
    field, made = JobSpec.model_fields[name], control(name)
    assert made.meaning == field.description
    extra: Any = field.json_schema_extra
    assert made.label == (f"{name} ({extra['unit']})" if extra["unit"] else name)
    if made.kind in ("number", "slider"):
        step = made.step or 1
        if made.low is not None:
            assert takes(name, made.low + (0 if made.kind == "slider" else step))
            assert not takes(name, made.low - step)
        if made.high is not None:
            assert takes(name, made.high)
            assert not takes(name, made.high + step)


def takes(name: str, value: float) -> bool:
    """Whether JobSpec finds nothing wrong with the value in itself."""
    try:
        JobSpec.model_validate({"prompt": "-", name: str(round(value, 6)).removesuffix(".0")})
    except ValidationError as error:
        return name not in [detail["loc"][0] for detail in error.errors() if detail["loc"]]
    return True


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("guidance_scale", Control("guidance_scale", "slider", "guidance_scale",
                                   "weight of the prompt; 1 or less switches guidance off", 7.5, (), 0, 100, 0.5)),
        ("width", Control("width", "number", "width (px)",
                          "output width, multiple of 8; from the model, or from the source's aspect", None, (), 64,
                          4096, 8)),
        ("scheduler", Control("scheduler", "choice", "scheduler", "sampler; ddim, in edit mode euler_a", None,
                              ("ddim", "euler", "euler_a", "dpmpp_2m", "unipc", "lcm"))),
        ("offload", Control("offload", "switch", "offload", "keep the parts of the model in the host's memory while "
                            "they are not at work; slower, the same frames", False)),
        ("lora_scale", Control("lora_scale", "text", "lora_scale",
                               "weight of each LoRA, joined by `+`; one value serves all", "1")),
    ],
)  # fmt: skip
def test_some_controls(name: str, expected: Control) -> None:
    assert control(name) == expected


def test_columns_of_choices_and_files() -> None:
    assert (control("condition").kind, control("condition").choices[:3]) == ("choices", ("edge", "depth", "pose"))
    kinds = {name: control(name).kind for name in ("source", "condition_video", "ip_adapter_image", "fps", "seed")}
    assert kinds == {"source": "video", "condition_video": "video", "ip_adapter_image": "picture", "fps": "text",
                     "seed": "number"}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_only_what_differs_from_the_defaults_is_in_the_row(mode: Any) -> None:
    asked = controls(mode)
    assert cells(mode, asked, [one.default for one in asked]) == {"mode": mode}
    assert cells(mode, asked, [None if one.default is None else "" for one in asked]) == {"mode": mode}


def test_values_become_cells() -> None:
    asked = [control(name) for name in ("prompt", "num_inference_steps", "guidance_scale", "audio", "condition", "t0")]
    values = [" a boat ", 20.0, 3.25, False, ["edge", "depth"], 0]
    assert cells("control", asked, values) == {
        "mode": "control",
        "prompt": "a boat",
        "num_inference_steps": "20",
        "guidance_scale": "3.25",
        "audio": "false",
        "condition": "edge+depth",
        "t0": "0",
    }


def test_presets_are_rows(tmp_path: Any) -> None:
    from t2vz.app.runs import line
    from t2vz.mini.clips import CLIPS

    for tab in TABS:
        asked = controls(tab.mode)
        assert tab.presets
        for preset in tab.presets:
            assert set(preset.cells) <= {one.column for one in asked}, preset.name
            values = [preset.cells.get(one.column) if one.kind != "choice" else None for one in asked]
            row = cells(tab.mode, asked, values)
            for name in ("source", "condition_video"):
                assert row.get(name, "ball") in CLIPS
            path = tmp_path / "row.csv"
            path.write_text(line(row, header=True))
            (found,) = read(path)
            assert not isinstance(found, BadRow), found.error
            assert found.spec.model.startswith("mini")
