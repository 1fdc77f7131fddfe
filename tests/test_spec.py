"""JobSpec's rules, and what is in a job's identity and what isn't."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from t2vz.spec import JobSpec, default_t0_t1, evaluations, job_id, keyframes, seed_of, t0_t1


def id_of(**columns: object) -> str:
    return job_id(JobSpec(**({"id": "a", "prompt": "a ball"} | columns)), "model@1", None)


@pytest.mark.parametrize(
    "columns",
    [
        {"chunk_size": 3},
        {"model": "elsewhere/model", "revision": "main"},
        {"guidance_scale": 7.5},
        {"scheduler": "ddim"},
    ],
)
def test_what_does_not_change_the_frames_is_not_in_the_identity(columns):
    assert id_of(**columns) == id_of()


@pytest.mark.parametrize(
    "columns",
    [
        {"id": "b"},
        {"prompt": "a cat"},
        {"seed": 1},
        {"dtype": "float16"},
        {"scheduler": "euler"},
        {"num_inference_steps": 49},
        {"width": 64},
        {"crf": 20},
        {"fps": "8"},
    ],
)
def test_what_changes_the_video_is_in_the_identity(columns):
    assert id_of(**columns) != id_of()


@pytest.mark.parametrize("column", ["pan_x_per_s", "rotation_deg_per_s", "zoom_per_s"])
def test_a_camera_that_is_told_to_stand_still_is_another_job_than_the_papers_motion(column):
    assert id_of(**{column: 1 if column == "zoom_per_s" else 0}) != id_of()


def test_a_condition_to_extract_is_another_job_than_one_given():
    columns = {"prompt": "x", "mode": "control", "condition": "edge"}
    given, extracted = (JobSpec(**columns, **{name: "a.mp4"}) for name in ("condition_video", "source"))
    assert job_id(given, "m", "s") != job_id(extracted, "m", "s")


def test_without_motion_dynamics_two_steps_are_enough():
    assert evaluations(JobSpec(prompt="x", num_inference_steps=2, motion_dynamics=False), 3) == 6


def test_one_weight_and_one_span_serve_all_or_each_has_its_own():
    spec = JobSpec(
        prompt="x",
        lora="a + b",
        lora_scale="0.5",
        mode="control",
        source="s",
        condition="edge+depth",
        control_guidance_start="0+0.25",
        control_guidance_end=0.75,
    )
    assert spec.lora_scales == (0.5, 0.5)
    assert spec.control_spans == ((0.0, 0.75), (0.25, 0.75))


def test_the_keyframes_of_a_camera_path():
    assert keyframes("0: 0 0 1 0; 1.5: .2 -0.1 1.1 -5;") == ((0, 0, 0, 1, 0), (1.5, 0.2, -0.1, 1.1, -5))
    assert JobSpec(prompt="x", camera_path="0: 0 0 1 0").moves_camera
    assert not JobSpec(prompt="x", motion_field_strength_x=3).moves_camera


@pytest.mark.parametrize(
    ("columns", "count"),
    [
        ({"motion_dynamics": False}, 50 * 8),
        ({"background_smoothing": 0.4, "foreground_mask": "masks.mp4"}, 389),
        ({"background_smoothing": 0.4, "foreground_mask": "attention"}, 389 + 48),
        ({"background_smoothing": 0.4, "foreground_mask": "segmentation", "segmentation_model": "m"}, 389 + 48 * 8),
        ({"attention_anchor": "first_previous"}, 389),
        ({"guidance_end": 0.5}, 389),
    ],
)
def test_what_options_cost_in_evaluations(columns, count):
    assert evaluations(JobSpec(prompt="x", **columns), 8) == count


def test_a_mask_video_is_in_the_identity_by_its_content():
    columns = {"background_smoothing": 0.4}
    one, other = (JobSpec(prompt="x", foreground_mask=name, **columns) for name in ("a.mp4", "b.mp4"))
    assert one.sources == ("a.mp4",)
    assert job_id(one, "m", "s") == job_id(other, "m", "s") != job_id(other, "m", "t")
    drawn = JobSpec(prompt="x", foreground_mask="attention", **columns)
    assert drawn.sources == ()
    assert job_id(drawn, "m", "s") != job_id(one, "m", "s")


def test_model_and_source_are_in_the_identity():
    spec = JobSpec(prompt="a ball", mode="edit", source="a.mp4")
    moved = JobSpec(prompt="a ball", mode="edit", source="elsewhere/b.mp4")
    assert job_id(spec, "m", "s") == job_id(moved, "m", "s")
    assert len({job_id(spec, "m", "s"), job_id(spec, "m", "t"), job_id(spec, "n", "s")}) == 3


def test_a_drawn_seed_depends_on_what_is_asked_and_not_on_how_it_is_written():
    def seed(**columns: object) -> int:
        return seed_of(JobSpec(**({"id": "a", "prompt": "a ball"} | columns)), "model@1", None)

    assert seed() == seed(crf=20, format="mp4") == seed(chunk_size=1) == seed(format="gif")
    assert len({seed(), seed(id="b"), seed(prompt="a cat"), seed(num_inference_steps=49)}) == 4
    assert seed(seed=5) == 5
    assert 0 <= seed() < 2**63


def test_the_papers_t0_and_t1():
    assert default_t0_t1(50) == (44, 47)
    assert evaluations(JobSpec(prompt="x"), 8) == 389
    assert evaluations(JobSpec(prompt="x"), 1) == 50
    assert evaluations(JobSpec(prompt="x", mode="edit", source="s"), 7) == 350


@given(st.integers(3, 999))
def test_t0_and_t1_fit_for_every_number_of_steps(steps):
    t0, t1 = t0_t1(JobSpec(prompt="x", num_inference_steps=steps))
    assert 0 <= t0 < t1 <= steps - 1


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("24", Fraction(24)),
        ("23.976", Fraction(24000, 1001)),
        ("29.97", Fraction(30000, 1001)),
        ("30000/1001", Fraction(30000, 1001)),
        ("12.5", Fraction(25, 2)),
        (".5", Fraction(1, 2)),
        (8, Fraction(8)),
        (2.133, Fraction(2133, 1000)),
    ],
)
def test_rates_are_exact(text, rate):
    assert JobSpec(prompt="x", fps=text).fps == rate


@pytest.mark.parametrize("text", ["0", "1001", "-1", "24fps", "1/0", "1e9999999", "nan", "1_0", "", "²"])
def test_what_is_no_rate_is_refused_at_once(text):
    with pytest.raises(ValidationError):
        JobSpec(prompt="x", fps=text)


def columns_that_disagree(**columns: object) -> set[str]:
    with pytest.raises(ValidationError) as caught:
        JobSpec(**({"prompt": "x"} | columns))
    (error,) = caught.value.errors()
    return {column for column, _ in error["ctx"]["problems"]}


@pytest.mark.parametrize(
    ("columns", "blamed"),
    [
        ({"source": "a.mp4"}, {"source"}),
        ({"mode": "edit"}, {"source"}),
        ({"mode": "control"}, {"condition", "source"}),
        ({"mode": "control", "source": "a", "condition": "edge", "t0": 3}, {"t0"}),
        ({"mode": "control", "source": "a", "condition": "edge+edge"}, {"condition"}),
        ({"mode": "control", "source": "a", "condition_video": "b", "condition": "edge"}, {"condition_video"}),
        ({"mode": "control", "condition_video": "b", "condition": "edge+depth"}, {"condition"}),
        (
            {"mode": "control", "source": "a", "condition": "edge", "controlnet_conditioning_scale": "1+2"},
            {"controlnet_conditioning_scale"},
        ),
        ({"mode": "edit", "source": "a", "start_s": 2, "end_s": 1}, {"end_s"}),
        ({"num_inference_steps": 2}, {"num_inference_steps"}),
        ({"num_inference_steps": 20, "t1": 47}, {"t1"}),
        ({"t1": 1}, {"t1"}),
        ({"t0": 47}, {"t0"}),
        ({"t0": 47, "t1": 47}, {"t0"}),
        ({"scheduler": "lcm", "num_inference_steps": 60}, {"num_inference_steps"}),
        ({"format": "webm", "codec": "h264"}, {"codec"}),
        ({"format": "gif", "crf": 20}, {"crf"}),
        ({"crf": 60}, {"crf"}),
        ({"prompt": "  "}, {"prompt"}),
        ({"lora_scale": "0.5"}, {"lora_scale"}),
        ({"guidance_end": 0.5, "guidance_scale": 1}, {"guidance_end"}),
        (
            {
                "mode": "control",
                "source": "a",
                "condition": "edge",
                "num_inference_steps": 10,
                "control_guidance_start": 0.5,
                "control_guidance_end": 0.51,
            },
            {"control_guidance_end"},
        ),
        ({"lora": "a+b+c", "lora_scale": "0.5+1"}, {"lora_scale"}),
        ({"textual_inversion": "a+b+a"}, {"textual_inversion"}),
        ({"ip_adapter": "a.safetensors"}, {"ip_adapter_image"}),
        ({"ip_adapter_image": "a.png"}, {"ip_adapter_image"}),
        ({"cross_frame_attention": False, "attention_anchor": "first_previous"}, {"attention_anchor"}),
        ({"attention_anchor": "scene"}, {"attention_anchor"}),
        ({"zoom_per_s": 1.2, "motion_field_strength_x": 3}, {"motion_field_strength_x"}),
        ({"zoom_per_s": 1.2, "camera_path": "0: 0 0 1 0"}, {"zoom_per_s"}),
        ({"camera_path": "0: 0 0 1"}, {"camera_path"}),
        ({"camera_path": "1: 0 0 1 0; 1: 0 0 1 0"}, {"camera_path"}),
        ({"camera_path": "0: 0 0 0 0"}, {"camera_path"}),
        ({"camera_path": ";"}, {"camera_path"}),
        ({"motion_dynamics": False, "t1": 40, "warp": "subpixel"}, {"t1", "warp"}),
        ({"foreground_mask": "attention"}, {"foreground_mask"}),
        ({"background_smoothing": 0.4}, {"foreground_mask"}),
        (
            {"background_smoothing": 0.4, "foreground_mask": "segmentation", "foreground": "x"},
            {"foreground", "segmentation_model"},
        ),
        ({"background_smoothing": 0.4, "foreground_mask": "attention", "foreground": "cat"}, {"foreground"}),
        (
            {"mode": "control", "source": "a", "condition": "edge", "control_guidance_end": "0.5+1"},
            {"control_guidance_end"},
        ),
        (
            {
                "mode": "control",
                "source": "a",
                "condition": "edge",
                "control_guidance_start": 0.5,
                "control_guidance_end": 0.5,
            },
            {"control_guidance_end"},
        ),
    ],
)
def test_columns_that_do_not_fit_together_are_named(columns, blamed):
    assert columns_that_disagree(**columns) == blamed


CONTROL = {"mode": "control", "source": "a"}
GIVEN = {"mode": "control", "condition_video": "a"}


@pytest.mark.parametrize(
    ("columns", "blamed"),
    [
        ({"revision": "main"}, "revision"),
        ({"revision": "main", "model": "mini/dreambooth"}, "revision"),
        ({"revision": "main", "model": "/models/one"}, "revision"),
        ({"base_config": "sd", "model": "org/model"}, "base_config"),
        ({"negative_prompt": "blue", "guidance_scale": 1}, "negative_prompt"),
        ({"negative_prompt": "b", "mode": "edit", "source": "a", "image_guidance_scale": 0.5}, "negative_prompt"),
        ({**CONTROL, "condition": "edge+pose", "depth_model": "d"}, "depth_model"),
        ({**CONTROL, "condition": "edge", "pose_model": "p"}, "pose_model"),
        ({**CONTROL, "condition": "openpose", "person_detector": "p"}, "person_detector"),
        ({**CONTROL, "condition": "edge+depth+pose", "annotators": "a"}, "annotators"),
        ({**CONTROL, "condition": "depth", "canny_low": 50}, "canny_low"),
        ({**GIVEN, "condition": "depth", "depth_model": "d"}, "depth_model"),
        ({"video_length": 1, "warp": "subpixel"}, "warp"),
        ({"video_length": 1, "background_smoothing": 0.4, "foreground_mask": "attention"}, "background_smoothing"),
    ],
)
def test_what_has_no_effect_is_refused_unless_a_default_says_it_for_all_rows(columns, blamed):
    assert columns_that_disagree(**columns) == {blamed}
    assert JobSpec.model_validate({"prompt": "x"} | columns, context={blamed})


@pytest.mark.parametrize(
    "columns",
    [
        {"revision": "main", "model": "org/model"},
        {"revision": "main", "model": "sd15"},
        {"base_config": "sd", "model": "/models/one.safetensors"},
        {"negative_prompt": "blue"},
        {**CONTROL, "condition": "edge", "depth_model": None, "annotators": None},
        {**CONTROL, "condition": "depth+edge", "depth_model": "d", "canny_low": 50},
        {**GIVEN, "condition": "edge", "canny_high": 250},
        {**CONTROL, "condition": "pose", "pose_model": "p", "person_detector": "d"},
        {**CONTROL, "condition": "hed", "annotators": "a"},
        {"video_length": 2, "warp": "subpixel"},
    ],
)
def test_what_has_an_effect_is_not(columns):
    assert JobSpec(**{"prompt": "x"} | columns)


@pytest.mark.parametrize("column", ["lora", "textual_inversion", "controlnet"])
@pytest.mark.parametrize("value", ["a+", "+a", "+", ("a", "")])
def test_an_empty_part_is_refused(column, value):
    with pytest.raises(ValidationError, match=r"has an empty part: remove the \+"):
        JobSpec(prompt="x", mode="control", source="a", condition="edge+depth", **{column: value})
