"""`ExecutorOptions`: the section ``executor`` of a study file: where trials are carried out.

::

    executor: ray                  # the processors of this machine, or
    executor: {name: ray, workers: 8, address: auto, cpus_per_trial: 2, gpus_per_trial: 0.5}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rankopt.yaml_file import Strict

_RAYS_OWN = ("CPU", "GPU", "memory", "object_store_memory")


class ExecutorOptions(Strict):
    """Where trials are carried out.

    Attributes:
        name: local (this process, one after the other) or ray (worker processes, on this machine or a cluster).
        workers: how many trials at once, at most (None: as many as there is room for).
        address: of a Ray cluster, "auto" or "HOST:PORT" (None: one is begun on this machine, and ended).
        cpus_per_trial: processors that Ray sets aside for a trial (None: as many as its threads).
        gpus_per_trial: GPUs, or a part of one.
        resources_per_trial: resources of your own that a node needs to have to run trials.
    """

    name: Literal["local", "ray"] = "local"
    workers: int | None = Field(None, ge=1, le=10_000)
    address: str | None = Field(None, min_length=1)
    cpus_per_trial: float | None = Field(None, gt=0, allow_inf_nan=False)
    gpus_per_trial: float = Field(0.0, ge=0, allow_inf_nan=False)
    resources_per_trial: dict[str, float] = Field(default_factory=dict)

    @field_validator("resources_per_trial")
    @classmethod
    def _own(cls, given: Mapping[str, float]) -> Mapping[str, float]:
        for key, value in given.items():
            if key in _RAYS_OWN or not key.strip():
                raise ValueError(f"{key!r} is not a resource of your own; use cpus_per_trial or gpus_per_trial")
            if not 0 < value < float("inf"):
                raise ValueError(f"{key}: must be above 0, got {value:g}")
        return given

    @model_validator(mode="after")
    def _fits(self) -> ExecutorOptions:
        if self.name == "local":
            for key in sorted(self.model_fields_set - {"name"}):
                if getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True):
                    raise ValueError(f"{key}: belongs to the executor ray")
        if self.gpus_per_trial > 1 and self.gpus_per_trial != int(self.gpus_per_trial):
            raise ValueError(f"gpus_per_trial: above 1 a whole number, got {self.gpus_per_trial:g}")
        if self.address is not None and self.address.startswith("ray://"):
            raise ValueError(
                "address: the search itself has to run in the cluster, on one of its nodes or as a Ray job; "
                "give auto or HOST:PORT there, ray:// is for clients outside"
            )
        return self


def executor_section(value: Any) -> Any:
    """A name stands for the whole section."""
    return {"name": value} if isinstance(value, str) else value
