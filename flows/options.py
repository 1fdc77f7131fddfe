"""What flows that start `render-manifest` let the user say about it."""

from typing import Any

from pydantic import create_model

from t2vz_flows.render_manifest import RenderParameters

_DECIDED = ("manifest", "out", "defaults")  # by the flow that starts it
_FIELDS: dict[str, Any] = {
    name: (field.annotation, field) for name, field in RenderParameters.model_fields.items() if name not in _DECIDED
}
RenderOptions: Any = create_model("RenderOptions", **_FIELDS)
