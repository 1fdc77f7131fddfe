"""What flows let the user say of sources: the fields of `t2vz.media.limits.Limits`."""

from dataclasses import fields
from typing import Any

from pydantic import Field, create_model

from t2vz.media.limits import Limits

_TYPES = {"int": int, "float": float, "tuple[str, ...]": list[str]}
_FIELDS: dict[str, Any] = {
    limit.name: (
        _TYPES[str(limit.type)],
        Field(
            default=list(limit.default) if isinstance(limit.default, tuple) else limit.default,
            title=limit.metadata["title"],
            description=limit.metadata["meaning"],
            gt=0 if limit.name.startswith("max_") else None,
        ),
    )
    for limit in fields(Limits)
}
SourceLimits: Any = create_model("SourceLimits", __doc__="What sources may be.", **_FIELDS)
