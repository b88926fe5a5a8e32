"""What all sections of the config are made of."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from topd_ray.config.text import expanded

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
DecayRate = Annotated[float, Field(ge=0.0, lt=1.0)]
Dtype = Literal["float32", "bfloat16"]
PathText = Annotated[str, AfterValidator(expanded)]
"""A path whose leading ~ is the home folder from here on, or a name that is none."""


class Section(BaseModel):
    """A part of the config: frozen, strict about types, and closed to unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
