"""The playground's page, made with Gradio, and its server on this machine."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from t2vz.app.controls import TABS, Control, Group, Preset, Tab, cells, groups
from t2vz.app.runs import Playground, Ran, told
from t2vz.errors import OutputError, T2VZError
from t2vz.events import Event
from t2vz.sheet import strip_key
from t2vz.spec import SOURCE_COLUMNS

_PLAYABLE = (".mp4", ".webm")
_CACHE_S = (600, 3600)  # Gradio copies all that it shows or gets: how often it looks for copies, how old they grow
_LEAVE_S = 2  # what open pages get when the server ends
_MAX_SEED = 2**31 - 1  # of a drawn seed: one that a page's numbers can hold
_FONTS = ("system-ui", "sans-serif")  # Gradio's own come from elsewhere
_CSS = """
footer { display: none !important; }
@media (max-width: 768px) { .t2vz-result { order: -1; } }
@media (min-width: 769px) {
  .t2vz-result { position: sticky; top: 16px; align-self: flex-start; }
  .t2vz-result { max-height: calc(100vh - 32px); overflow-y: auto; }
}
.t2vz-line textarea { font-family: ui-monospace, monospace; white-space: pre; overflow-x: auto; }
"""
# Gradio puts its container before every selector of `css`. The container's `hidden` makes it what `sticky` sticks to.
_HEAD = "<style>.gradio-container { overflow: clip !important; }</style>"
# What the page may load: nothing that is not of this server. Gradio's own page makes its scripts in place.
_POLICY = (
    "default-src 'self'; script-src 'self' blob: 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self' blob: data:; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
_WORDS = {"decode": "reading the source", "conditions": "extracting conditions", "generate": "denoising",
          "encode": "encoding"}  # fmt: skip


def page(playground: Playground) -> gr.Blocks:
    """The page, with its tabs and what they do. To be made while the playground is open."""
    samples = _samples(playground.out / "samples")
    with gr.Blocks(title="t2vz playground", analytics_enabled=False, delete_cache=_CACHE_S) as blocks:
        gr.Markdown(
            "# t2vz playground\n"
            "Each run is a manifest's row. Videos and results are kept in "
            f"`{playground.out}`; what you like goes to `{playground.manifest}`."
        )
        for tab in TABS:
            with gr.Tab(tab.title):
                _fill(tab, playground, samples)
    return blocks


def _fill(tab: Tab, playground: Playground, samples: Mapping[str, str]) -> None:
    """A tab's controls and what they do."""
    controls: list[Control] = []
    components: list[Any] = []
    first = _starting(tab.presets[0], samples)
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            preset = gr.Dropdown([one.name for one in tab.presets], value=tab.presets[0].name, label="Preset")
            for group in groups(tab.mode):
                components += _group(group, first)
                controls += group.controls
        with gr.Column(scale=2, min_width=320, elem_classes="t2vz-result"):
            with gr.Row():
                render = gr.Button("Render", variant="primary", min_width=100)
                another = gr.Button("New seed", min_width=100)
                stop = gr.Button("Stop", min_width=100)
            status = gr.Markdown("Nothing rendered yet.", elem_classes="t2vz-status", min_height=120)
            video = gr.Video(
                label="Video",
                visible=False,
                autoplay=True,
                loop=True,
                interactive=False,
                height=300,
                buttons=["download"],
            )
            strip = gr.Image(
                label="Source, conditions and result, in step",
                visible=False,
                show_label=False,
                interactive=False,
                type="filepath",
                buttons=["download", "fullscreen"],
            )
            line = gr.Textbox(
                label="As rows of a manifest", lines=2, max_lines=6, interactive=False, elem_classes="t2vz-line"
            )
            append = gr.Button("Append to the manifest", interactive=False)
            appended = gr.Markdown("")
    asked = gr.State({})
    seed = components[[one.column for one in controls].index("seed")]

    def on_preset(name: str) -> list[Any]:
        chosen = next(one for one in tab.presets if one.name == name)
        values = _starting(chosen, samples)
        return [values.get(_key(one), _empty(one)) for one in controls]

    def on_render(progress: Any = gr.Progress(), *values: Any) -> list[Any]:  # noqa: B008 (how Gradio wants it)
        said: dict[str, str] = {}
        try:
            said = _asked(tab, controls, values, playground)
            ran = playground.run(said, partial(_progress, progress))
        except T2VZError as error:
            ran = Ran(problems=(told(error),))
        row, video_path, strip_path = ran.row, None, None
        if row is not None and row.output_uri:
            video_path = playground.video(row) if row.output_uri.endswith(_PLAYABLE) else None
            strip_path = _strip(playground, row.output_uri)
        return [
            _status(ran, playground),
            gr.update(value=video_path, visible=video_path is not None),
            gr.update(value=strip_path, visible=strip_path is not None),
            playground.line(said) if said else "",
            gr.update(interactive=row is not None and row.status == "ok"),
            "",
            said,
        ]

    def on_append(said: dict[str, str]) -> str:
        try:
            playground.append(said)
        except T2VZError as error:
            return f"**Not appended.** {_escaped(told(error))}"
        return f"Appended to `{playground.manifest}`."

    preset.input(on_preset, preset, components, api_visibility="private", queue=False)
    outputs = [status, video, strip, line, append, appended, asked]
    running: dict[str, Any] = {
        "fn": on_render,
        "inputs": components,
        "outputs": outputs,
        "concurrency_id": "render",
        "concurrency_limit": 1,
        "api_visibility": "private",
        "show_progress_on": [status],
    }
    render.click(**running)
    another.click(lambda: str(random.randrange(_MAX_SEED)), None, seed, api_visibility="private", queue=False).then(
        **running
    )
    stop.click(playground.stop, None, None, api_visibility="private", queue=False)
    append.click(on_append, asked, appended, api_visibility="private", queue=False)


def _group(group: Group, first: Mapping[str, Any]) -> list[Any]:
    """The components of a group, numbers and choices three a line."""
    made: list[Any] = []
    if not group.title:
        return [_component(one, first) for one in group.controls]
    with gr.Accordion(group.title, open=group.open):
        small: list[Control] = []

        def place() -> None:
            for at in range(0, len(small), 3):
                with gr.Row():
                    made.extend(_component(one, first) for one in small[at : at + 3])
            small.clear()

        for one in group.controls:
            if one.kind in ("video", "picture"):
                place()
                made.append(_component(one, first))
            else:
                small.append(one)
        place()
    return made


def _component(one: Control, first: Mapping[str, Any]) -> Any:
    """The Gradio component of a control."""
    common: dict[str, Any] = {"label": one.label, "value": first.get(_key(one), _empty(one)), "elem_id": None}
    if one.kind == "video":
        return gr.Video(**common, sources=["upload"], height=200)
    if one.kind == "picture":
        return gr.Image(**common, sources=["upload"], type="filepath", height=200)
    common |= {"info": one.meaning, "min_width": 200}
    if one.kind == "switch":
        return gr.Checkbox(**common)
    if one.kind == "choice":
        offered: list[Any] = [*one.choices] if one.default is not None else [("", ""), *one.choices]
        return gr.Dropdown(offered, **common)
    if one.kind == "choices":
        return gr.Dropdown([*one.choices], multiselect=True, **common)
    if one.kind == "slider":
        return gr.Slider(one.low, one.high, step=one.step, **common)
    if one.kind == "number":  # gr.Number can't be empty: it shows a 0, and means it
        return gr.Textbox(max_lines=1, placeholder=_range(one), **common)
    return gr.Textbox(lines=one.lines, **common)


def _range(one: Control) -> str:
    """As in `from 64 to 4096`; of what has no end that a person would type, nothing."""
    low, high = (None if end is None or end > 1e6 else f"{end:g}" for end in (one.low, one.high))
    return " ".join([*(["from", low] if low else []), *(["to", high] if high else [])])


def _key(one: Control) -> str:
    """What a preset calls it: a column that a video or a word may fill has two controls."""
    return f"{one.column} word" if one.column in SOURCE_COLUMNS and one.kind == "choice" else one.column


def _empty(one: Control) -> Any:
    """Its value where nobody says anything."""
    if one.default is None:
        return None if one.kind in ("video", "picture") else ""
    return [*one.default] if one.kind == "choices" else one.default


def _starting(preset: Preset, samples: Mapping[str, str]) -> dict[str, Any]:
    """A preset's values, with the paths of its sources."""
    return {name: samples[value] if name in SOURCE_COLUMNS else value for name, value in preset.cells.items()}


def _samples(folder: Path) -> dict[str, str]:
    """The example sources by name, drawn if they are not there. Raises OutputError."""
    from t2vz.media.encode import Encoding, encode
    from t2vz.mini.clips import CLIPS, RATE_FPS

    found = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in CLIPS.items():
        path = folder / f"{name}.mp4"
        if not path.exists():
            frames, draft = draw(), folder / f".{name}.mp4"
            height, width = frames.shape[1:3]
            encode([frames], draft, width=width, height=height, rate_fps=Fraction(RATE_FPS), encoding=Encoding())
            draft.replace(path)
        found[name] = str(path)
    return found


def _asked(tab: Tab, controls: Sequence[Control], values: Sequence[Any], playground: Playground) -> dict[str, str]:
    """The row's cells; uploads are kept first."""
    said = cells(tab.mode, controls, values)
    for one, value in zip(controls, values, strict=True):
        if one.kind in ("video", "picture") and value:
            said[one.column] = playground.keep(value)
    return said


def _progress(progress: Callable[..., Any], event: Event) -> None:
    if event.kind == "stage":
        progress(0.0, desc=_WORDS.get(event.stage, event.stage))
    elif event.kind == "step":
        progress((event.done, event.total), desc=_WORDS["generate"], unit="UNet evaluations")


def _status(ran: Ran, playground: Playground) -> str:
    """What became of a run, as Markdown."""
    if ran.row is None:
        if ran.problems == ("stopped",):
            return "**Stopped.**"
        return "**Not rendered.**\n\n" + "\n".join(f"- {_escaped(problem)}" for problem in ran.problems)
    row = ran.row
    if row.status != "ok":
        return f"**Failed** in {row.error_stage}: {_escaped(row.error_message or '')}"
    took = "before" if ran.before else f"in {row.wall_s or 0:.1f} s"
    lines = [
        f"**Rendered** {took}: {row.frames} frames of {row.width}×{row.height}, {Fraction(row.fps or 1)} frames/s, "
        f"seed {row.seed}.",
        f"`{playground.video(row)}`",
        *(f"Warning: {_escaped(warning)}" for warning in row.warnings),
    ]
    return "\n\n".join(lines)


def _strip(playground: Playground, output_uri: str) -> str | None:
    """The strip of a finished row, if there is one."""
    path = Path(playground.out, strip_key(output_uri))
    return str(path) if path.exists() else None


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join(f"\\{letter}" if letter in r"\`*_{}[]()#+-.!|<>~$" else letter for letter in " ".join(text.split()))


def _theme() -> gr.themes.Base:
    """Gradio's, in colours that can be read, with fonts that are there."""
    theme = gr.themes.Default(primary_hue="blue", font=_FONTS, font_mono=("ui-monospace", "monospace"))
    return theme.set(
        block_info_text_color="*neutral_600",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color_dark="*neutral_300",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        slider_color="*primary_600",
    )


def serve(
    playground: Playground, *, host: str, port: int, max_upload_bytes: int, on_ready: Callable[[str], None]
) -> None:
    """Serve the page until interrupted. on_ready: is told its address; port 0 is any free one. Raises OutputError."""
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import PlainTextResponse
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise OutputError(f"{host}:{port}: can't be listened at ({error.strerror}); choose another --port") from error
    shown = f"[{host}]" if ":" in host else host
    with listener, playground.opened():
        app = FastAPI(openapi_url=None)

        @app.middleware("http")
        async def only_from_here(request: Request, call_next: Callable[..., Any]) -> Any:
            # A page elsewhere may send a form here without reading the answer: uploads, for one, would fill the disk.
            if request.method != "GET" and request.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
                return PlainTextResponse("asked by a page of another site", 403)
            response = await call_next(request)
            response.headers["Content-Security-Policy"] = _POLICY
            response.headers["Referrer-Policy"] = "no-referrer"
            return response

        if host in ("127.0.0.1", "localhost", "::1"):  # another site's name that leads here is not let in
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
        app = gr.mount_gradio_app(
            app,
            page(playground).queue(default_concurrency_limit=4),
            path="/",
            ssr_mode=False,
            run_history=False,
            mcp_server=False,
            allowed_paths=[str(playground.out.absolute() / name) for name in ("videos", "strips", "samples")],
            max_file_size=max_upload_bytes,
            show_error=True,
            footer_links=[],
            css=_CSS,
            head=_HEAD,
            theme=_theme(),
        )
        on_ready(f"http://{shown}:{listener.getsockname()[1]}")
        config = uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=_LEAVE_S)
        try:
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            playground.stop()
