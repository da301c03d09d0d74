"""The base of every model that is read from a file or a command line: frozen, no unknown key, no silent cast."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
